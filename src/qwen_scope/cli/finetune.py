"""`qwen-scope finetune`: features that change a model for good."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qwen_scope.cli.common import Source, print_json, quiet_loading
from qwen_scope.cli.finetune_grpo import Grpo
from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.sasft_run_config import SASFTRun


@dataclass(frozen=True)
class Sasft:
    """Fine-tunes a model while features are kept below their normal level on samples they do not belong to (SASFT), such as
    those of Chinese in other languages; goes on where it was stopped."""

    samples: tyro.conf.Positional[str]
    """Samples with text, messages, or prompt and completion, and a tag each: a JSONL, CSV or Parquet file, a folder, or a
    Hugging Face dataset."""
    folder: tyro.conf.Positional[Path]
    """Where the model and its report go; its progress too."""
    config: tyro.conf.OmitArgPrefixes[SASFTRun]
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Trains and tells what it did."""
        quiet_loading()
        _check_installed()
        from qwen_scope.finetuning.sasft_run import finetune_sasft

        found = finetune_sasft(self.samples, self.folder, self.config)
        if not found:
            return  # another process of the same run tells
        if self.json:
            print_json(found)
            return
        for tag, before in found["before"]["perplexity"].items():
            line = f"{tag}: perplexity {before:.2f} before, {found['after']['perplexity'][tag]:.2f} after"
            if tag in found["after"]["switch_ratio"]:
                switches = [found[which]["switch_ratio"][tag] for which in ("before", "after")]
                line += f"; {switches[0]:.1%} of texts switched, now {switches[1]:.1%}"
            print(line)
        for warning in found["drift"]["warnings"]:
            print(f"warning: {warning}")
        print(f"report: {self.folder / 'README.md'}\nmodel:  {self.folder / 'model'}")


@dataclass(frozen=True)
class SpecificFeatures:
    """The features most specific to a tag, such as a language, and how high they normally are on others: what SASFT restrains."""

    samples: tyro.conf.Positional[str]
    """Samples with a tag each, as for `finetune sasft`; some dozens of each tag are enough."""
    home: tuple[str, ...]
    """Tags, such as languages, whose features to find."""
    out: Path | None = None
    """Also write them to this file, for `finetune sasft --restraints`."""
    per_layer: int = 2
    """Features of each layer for each home."""
    tag_column: str = "language"
    """Column that holds each sample's tag."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as a language."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Finds and prints."""
        from dataclasses import asdict

        from qwen_scope.finetuning.samples import read_samples
        from qwen_scope.finetuning.specific import specific_features

        if self.per_layer < 1:
            raise QwenScopeError(
                f"expected --per-layer of at least 1, found {self.per_layer}; ask for one or more features"
            )
        samples = read_samples(self.samples, self.tag_column, split=self.split, subset=self.subset)
        scope = self.source.open()
        found = specific_features(
            scope.backbone,
            scope.suite,
            samples,
            self.home,
            layers=self.source.layers or None,
            count=self.per_layer,
        )
        if self.out is not None:
            found.save(self.out)
        if self.json:
            print_json(asdict(found))
        else:
            print(found)


@dataclass(frozen=True)
class ModelDrift:
    """How well the SAEs still fit a model that was fine-tuned: FVU and overlap of features. Exits with status 1 at a warning."""

    tuned: tyro.conf.Positional[str]
    """The fine-tuned model: hub id or folder."""
    samples: str | None = None
    """Texts to read, as for `finetune sasft`, without tags. Default: a small built-in sample."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Measures and prints."""
        import sys

        from qwen_scope.evaluation import SAMPLE_TEXTS
        from qwen_scope.finetuning.samples import Sample, read_samples

        read = (
            [Sample.of(text, "") for text in SAMPLE_TEXTS] if self.samples is None else read_samples(self.samples, None)
        )
        scope = self.source.open()
        from qwen_scope.backbone import Backbone
        from qwen_scope.finetuning.drift import drift, fit

        before = fit(scope.backbone, scope.suite, read, scope.layers)
        tuned = Backbone.from_pretrained(self.tuned, dtype=self.source.dtype, device=scope.backbone.device)
        found = drift(before, fit(tuned, scope.suite, read, scope.layers))
        if self.json:
            print_json(found.to_dict())
        else:
            print(found)
        if found.warnings:
            sys.exit(1)


@dataclass(frozen=True)
class Finetune:
    """Changes a model for good by its features: SASFT, reinforcement learning with rare negatives; do the SAEs still fit?"""

    do: (
        Annotated[Sasft, tyro.conf.subcommand("sasft")]
        | Annotated[SpecificFeatures, tyro.conf.subcommand("features")]
        | Annotated[ModelDrift, tyro.conf.subcommand("drift")]
        | Annotated[Grpo, tyro.conf.subcommand("grpo")]
    )

    def run(self) -> None:
        """Does what is asked for."""
        self.do.run()


def _check_installed() -> None:
    """Raises a QwenScopeError unless the packages that training needs are there."""
    try:
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        raise QwenScopeError(
            f"expected the package {error.name} to fine-tune models, found it is not installed; run pip install "
            "'qwen-scope[finetune]'"
        ) from error
