"""`SASFTRun`: one run of supervised fine-tuning, from samples to report. Its fields and docstrings make the command's options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qwen_scope.errors import QwenScopeError

FREE_TO_CHANGE = ("save_every",)
"""What may differ between a run and its resumption."""


@dataclass(frozen=True)
class SASFTRun:
    """What is kept down on which samples, and how the model is trained."""

    home: tuple[str, ...] = ()
    """Tags, such as languages, whose features are kept down on samples of the others: `--home zh`."""
    method: Literal["sasft", "sft", "token-penalty"] = "sasft"
    """Features kept down; or, to compare with, nothing; or the probability of all tokens in the scripts of `home`."""
    restraints: Path | None = None
    """Features and limits that `finetune features` wrote. Default: they are found, on samples that are trained on."""
    features: tuple[str, ...] = ()
    """Restrain these features, such as 23/4411, instead of the most specific ones; with a single home."""
    model: str | None = None
    """Language model: hub id or folder. Default: the suite's own backbone, or the bundled model."""
    suite: str | None = None
    """SAEs of it. Default: the bundled suite."""
    layers: tuple[int, ...] = ()
    """Layers to look for features in, counted from 0. Default: the last two of the suite."""
    per_layer: int = 2
    """Features of each layer for each home."""
    reduce_weight: float = 5e-4
    """Weight of the reduction loss. SASFT used 5e-4 to 1e-3; where pre-activations are smaller than Qwen's, more is needed."""
    token_penalty: float = 1.0
    """Weight of the penalty, where that is the method."""
    tag_column: str = "language"
    """Column that holds each sample's tag."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as a language."""
    epochs: float = 1.0
    """How often each sample is trained on."""
    steps: int | None = None
    """Updates, instead of epochs."""
    rows: int = 8
    """Samples, or packed rows, in one forward and backward pass of each process."""
    accumulate: int = 1
    """Passes of an update."""
    max_length: int = 512
    """Tokens of a sample, or packed row, at most; the rest is cut off."""
    packing: bool = False
    """Put several samples into each row."""
    learning_rate: float = 5e-5
    """Of AdamW; falls linearly to 0."""
    warmup: float = 0.03
    """Share of the updates in which it rises from 0."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers of the decoder; 0 trains all weights."""
    bf16: bool = False
    """Compute in bfloat16 beside weights in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    evaluate_on: Path | None = None
    """More samples, to evaluate on. Default: some of the samples are kept back."""
    held_out: float = 0.1
    """Share of each tag's samples kept back to evaluate on, drawn at random."""
    held_out_most: int = 64
    """Of each tag, at most so many."""
    measure_on: int = 64
    """Samples of each tag, drawn from those trained on, to find features and their limits on."""
    prompt_tokens: int = 16
    """Of a plain text, so many first tokens are what the model goes on from when switches are counted."""
    new_tokens: int = 48
    """Tokens generated at most."""
    texts_each: int = 2
    """Texts generated from each sample kept back."""
    temperature: float = 0.7
    """Of these."""
    save_every: int = 50
    """Updates between checkpoints, from which the same command goes on."""
    device: str | None = None
    """Where to compute, such as `cpu`. Default: the first GPU if there is one."""
    seed: int = 0
    """What everything random follows from."""
    trl: tuple[str, ...] = ()
    """Further options of TRL's SFTConfig as name=value, such as weight_decay=0.01; those that would do nothing are refused."""

    def __post_init__(self) -> None:
        if not self.home and self.restraints is None:
            raise QwenScopeError(
                "expected a home, whose features are kept down on samples of the others, or restraints, found neither; give "
                "such as --home zh"
            )
        if self.restraints is not None and (self.features or self.layers):
            raise QwenScopeError(
                "expected restraints, or features and layers to make them of, found both; leave one of them out"
            )
        if self.features and len(self.home) != 1:
            raise QwenScopeError(
                f"expected a single home for the features given, found {len(self.home)}; make restraints with `finetune features`"
            )
        for name in (
            "per_layer",
            "rows",
            "accumulate",
            "max_length",
            "measure_on",
            "prompt_tokens",
            "new_tokens",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise QwenScopeError(
                    f"expected {name} of at least 1, found {getattr(self, name)}; choose a larger number"
                )
        for name in ("lora_rank", "reduce_weight", "token_penalty", "temperature", "texts_each", "seed", "warmup"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise QwenScopeError(f"expected {name} of 0 or more, found {getattr(self, name)}; choose such a number")
        if self.warmup >= 1:
            raise QwenScopeError(
                f"expected warmup as a share of the updates below 1, found {self.warmup}; choose such as 0.03"
            )
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise QwenScopeError(f"expected {name} above 0, found {getattr(self, name)}; choose such a number")
        if self.steps is not None and self.steps < 1:
            raise QwenScopeError(f"expected steps of at least 1, found {self.steps}; choose a larger number")
        if not 0 < self.held_out < 1 or self.held_out_most < 1:
            raise QwenScopeError(
                f"expected held_out between 0 and 1, of at least one sample, found {self.held_out} and {self.held_out_most}; "
                "keep some back, so that there is something to evaluate on"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        return json.loads(json.dumps(asdict(self), default=str))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs so that one cannot go on as the other, as `name was a and is b`."""
    names = ("samples", *(field.name for field in fields(SASFTRun) if field.name not in FREE_TO_CHANGE))
    found = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    # Known once the samples have been read.
    if "content" in before and "content" in now and before["content"] != now["content"]:
        found.append("the samples hold something else than before")
    return found
