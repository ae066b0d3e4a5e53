"""`qwen-scope finetune grpo`: reinforcement learning in which one rollout of each group is a rare negative."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen_scope.cli.common import Source, print_json, quiet_loading
from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.grpo_run_config import GRPORun


@dataclass(frozen=True)
class Grpo:
    """Trains a model by TRL's GRPO against repetition, or for any reward, one rollout of each group generated under steering.

    Finds repetition features unless a steering is given, evaluates on prompts kept back before, during and after, and leaves a
    page with curves. The same command goes on where it was stopped.
    """

    prompts: tyro.conf.Positional[str]
    """Prompts: a JSONL, CSV, Parquet or text file, a folder, or a Hugging Face dataset; a row is a text or chat messages."""
    folder: tyro.conf.Positional[Path]
    """Where the trained model, checkpoints and report go."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    column: str = "prompt"
    """Column that holds the prompt."""
    reward_columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME…")] = ()
    """Further columns that rewards of your own are given, such as answers."""
    chat: bool = False
    """Read each text as a user's message through the model's chat template."""
    count: int | None = None
    """Use so many prompts at most, the first ones."""
    config: tyro.conf.OmitArgPrefixes[GRPORun] = field(default_factory=GRPORun)
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Trains and tells what came of it."""
        if self.count is not None and self.count < 1:
            raise QwenScopeError(f"expected --count of at least 1, found {self.count}; ask for one or more")
        prompts, columns = self._read()
        quiet_loading()
        try:
            from qwen_scope.finetuning.grpo_run import finetune_grpo
        except ModuleNotFoundError as error:
            raise QwenScopeError(
                f"expected the package {error.name} to fine-tune, found it is not installed; run pip install "
                "'qwen-scope[finetune]'"
            ) from error
        report = finetune_grpo(self.source.open(), prompts, self.folder, self.config, columns=columns)
        if self.json:
            print_json(report.to_dict())
        else:
            print(f"{report}\n\nreport: {self.folder / 'README.md'}\nmodel: {self.folder / 'model'}")

    def _read(self) -> tuple[list[Any], dict[str, list[Any]]]:
        """The prompts, and the further columns."""
        from itertools import islice

        from qwen_scope.corpus import rows
        from qwen_scope.corpus.columns import as_document, is_blank

        plain_text = Path(self.prompts).suffix.lower() == ".txt"
        if plain_text:
            if self.reward_columns:
                raise QwenScopeError(
                    f"expected rows with the columns {', '.join(self.reward_columns)} in {self.prompts}, found a plain text; use "
                    "JSONL, CSV or Parquet"
                )
            from qwen_scope.cli.common import given_texts

            found: list[tuple[str, dict[str, Any]]] = [
                (f"line {n} of {self.prompts}", {self.column: line})
                for n, line in enumerate(given_texts((), Path(self.prompts)), 1)
            ][: self.count]
        else:
            found = list(islice(rows(self.prompts, (self.column, *self.reward_columns)), self.count))
        prompts: list[Any] = []
        for where, row in found:
            value = row[self.column]
            if value is None or is_blank(document := as_document(value, where)):
                raise QwenScopeError(
                    f"expected a prompt in {where}, found a blank one; fill it in or leave the row out"
                )
            prompts.append(
                [{"role": "user", "content": document}] if self.chat and isinstance(document, str) else document
            )
        return prompts, {name: [row[name] for _, row in found] for name in self.reward_columns}
