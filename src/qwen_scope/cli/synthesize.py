"""`qwen-scope synthesize`: texts for the features that a set of texts does not fire."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qwen_scope.cli.common import Index, open_index, print_json, quiet_loading
from qwen_scope.data.synthesis.config import SynthesisConfig
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.data.synthesis.purse import Spent
    from qwen_scope.index.endpoint import Endpoint
    from qwen_scope.index.feature_index import FeatureIndex


@dataclass(frozen=True)
class Synthesize:
    """Makes texts for features that a set of texts does not fire, and keeps those that do, read back without prompt or steering.

    Tells coverage before and after, beside that of as many tokens about random other features. Everything written is kept at
    once, and the same command goes on where it was stopped.
    """

    folder: tyro.conf.Positional[Path]
    """Where texts and report go."""
    index: Index = None
    """Folder of a feature index, whose model and suite read. Default: the one that comes with the package."""
    targets: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--target",), metavar="LAYER/NUMBER…")] = ()
    """Features that texts are wanted for, such as 15/123, all of one layer."""
    topic: str | None = None
    """Instead, a topic: those features that a judge finds relevant to it."""
    layer: int = 15
    """Whose features are judged."""
    candidates: int = 200
    """So many features are judged at most, those that a search finds first for the topic; 0 for all that fire."""
    tau: float = 7.0
    """Relevance, from 0 to 10, from which on a feature is a target."""
    judge_endpoint: str | None = None
    """Address of the endpoint that judges. Default: the one that writes."""
    judge_model: str | None = None
    """What that endpoint calls the judge."""
    seed_set: str | None = None
    """The texts that there are: a file, a folder or a Hugging Face dataset. Default: none, so that all targets are missing."""
    column: str | None = None
    """Column that holds the seeds' text."""
    template: str | None = None
    """Instead, a text made of columns, such as 'Question: {question}'; \\n is a new line."""
    endpoint: str | None = None
    """Address of the endpoint that writes, such as http://127.0.0.1:8000/v1, for `--method endpoint`."""
    model: str | None = None
    """What the endpoint calls the model."""
    key_variable: str | None = None
    """Environment variable that holds the key of both endpoints, such as OPENAI_API_KEY. Default: no key is sent."""
    timeout: float = 60.0
    """Seconds that one attempt to get an answer may take."""
    retries: int = 4
    """Further attempts after overload, server errors and time-outs, each after a longer pause."""
    concurrency: int = 4
    """Questions on their way at once."""
    config: tyro.conf.OmitArgPrefixes[SynthesisConfig] = field(default_factory=SynthesisConfig)
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Finds the targets, makes texts, and prints what came of it."""
        if bool(self.targets) == (self.topic is not None):
            raise QwenScopeError(
                f"expected --targets or --topic, found {'both' if self.targets else 'neither'}; say what texts are wanted for, "
                "such as --targets 15/123"
            )
        if (self.endpoint is not None) != (self.config.method == "endpoint"):
            raise QwenScopeError(
                f"expected --endpoint exactly with --method endpoint, found the method {self.config.method} and "
                f"{'an' if self.endpoint else 'no'} endpoint; choose both or neither"
            )
        quiet_loading()
        index = open_index(self.index)
        from qwen_scope.data.synthesis.purse import Spent
        from qwen_scope.data.synthesis.run import synthesize
        from qwen_scope.data.synthesis.targets import targets_of

        writer = None if self.endpoint is None else self._endpoint(self.endpoint, self.model, self.config.temperature)
        spent = Spent()
        if self.topic is None:
            targets = targets_of(index, self.targets)
        else:
            targets, spent = self._judged(index, self.topic)
        report = synthesize(
            index.scope,
            index,
            targets,
            self.folder,
            self.config,
            seeds=self.seed_set,
            column=self.column,
            template=None if self.template is None else self.template.replace("\\n", "\n"),
            endpoint=writer,
            spent=spent,
        )
        if self.json:
            print_json(report.to_dict())
        else:
            print(f"{report}\n\ntexts: {self.folder / 'data.jsonl'}")
        if report.failed:
            sys.exit(1)

    def _judged(self, index: "FeatureIndex", topic: str) -> tuple[list[tuple[int, int]], "Spent"]:
        """Relevant features, and what it took to find them."""
        from qwen_scope.data.synthesis.purse import Purse
        from qwen_scope.data.synthesis.targets import candidates, check_tau, judge

        check_tau(self.tau)
        if self.candidates < 0:
            raise QwenScopeError(f"expected --candidates of 0 or more, found {self.candidates}; such as 200")
        address = self.judge_endpoint or self.endpoint
        if address is None:
            raise QwenScopeError(
                "expected an endpoint that judges which features are about the topic, found none; give --judge-endpoint and "
                "--judge-model, or name features with --targets"
            )
        endpoint = self._endpoint(address, self.judge_model or self.model, 0.0)
        features = candidates(index, self.layer, topic, self.candidates or None)
        path = self.folder / "judged.jsonl"
        found = judge(index, features, topic, endpoint, path, Purse.of(self.config))
        if found.failed:
            # With other targets the texts so far would be of another synthesis.
            (layer, number), why = next(iter(found.failed.items()))
            raise QwenScopeError(
                f"expected a judge's answers about {len(features)} features, found none about {len(found.failed)}, the first "
                f"{layer}/{number}: {why}; the same command asks about those again"
            )
        relevant = found.relevant(self.tau)
        sys.stderr.write(
            f"{len(relevant)} of {len(features)} features are relevant; {found.unreadable} answers were no numbers\n"
        )
        return relevant, found.spent

    def _endpoint(self, address: str, model: str | None, temperature: float) -> "Endpoint":
        from qwen_scope.index.endpoint import Endpoint

        if model is None:
            raise QwenScopeError(
                "expected a model with an endpoint, found none; give --model, as the endpoint calls it"
            )
        return Endpoint(
            address,
            model,
            key_variable=self.key_variable,
            timeout=self.timeout,
            retries=self.retries,
            concurrency=self.concurrency,
            answer_tokens=self.config.answer_tokens,
            temperature=temperature,
        )
