"""How much a model that is being trained repeats, on prompts that it is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from qwen_scope.evidence.fluency import perplexities, repetition
from qwen_scope.evidence.statistics import Interval, bootstrap
from qwen_scope.finetuning.repeats import loop_of
from qwen_scope.generation import Sampling
from qwen_scope.scope import Scope

RESAMPLES = 2000
"""Of the bootstrap over prompts."""


@dataclass(frozen=True)
class Evaluation:
    """What the texts of the prompts kept back are like at one moment."""

    step: int
    """Updates done before."""
    loops: list[list[float]]
    """By prompt and sample, 1 where the text ran into the limit of tokens and ends in a loop (`loop_of`), else 0."""
    repetition: list[list[float]]
    """By prompt and sample, the share of runs of four tokens that occurred in the text before."""
    tokens: list[list[int]]
    """By prompt and sample, tokens generated."""
    ended: float
    """Share of texts that the model ended."""
    perplexity: float | None
    """Median perplexity of the texts under the model before training; None where that is not at hand."""
    examples: list[str]
    """The first text of each of the first two prompts."""

    @property
    def repeat_ratio(self) -> Interval:
        """The share of texts that loop, with its interval over prompts."""
        return bootstrap(np.asarray(self.loops), RESAMPLES, 0)

    @property
    def mean_repetition(self) -> Interval:
        """The mean share of repeated runs of four tokens, with its interval over prompts."""
        return bootstrap(np.asarray(self.repetition), RESAMPLES, 0)

    @property
    def mean_tokens(self) -> float:
        """Mean length in tokens."""
        return float(np.mean(self.tokens))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; `Evaluation(**…)` reads the fields again."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    scope: Scope,
    prompts: Sequence[Any],
    step: int,
    *,
    samples: int,
    sampling: Sampling,
    before: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Evaluation:
    """Generates from each prompt, always with the same seeds, and measures.

    Draws nothing from torch's own random numbers, so that training goes on as if it had not been.

    Args:
        samples: texts of each prompt.
        sampling: how; seeds count up from its own.
        before: a context in which the model is as before training, to tell how likely that finds the texts.
    """
    model: Any = scope.backbone.model
    was = model.training
    model.eval()
    try:
        each = [prompt for prompt in prompts for _ in range(samples)]
        ways = [
            Sampling(sampling.max_new_tokens, sampling.temperature, sampling.top_p, seed=sampling.seed + n)
            for n in range(len(each))
        ]
        texts = scope.generate(each, None, ways)
        perplexity = None
        if before is not None:
            with before():
                found = perplexities(scope.backbone, [text.prompt_ids for text in texts], [text.ids for text in texts])
            known = [value for value in found if value is not None]
            perplexity = median(known) if known else None
    finally:
        model.train(was)

    def table(values: list[Any]) -> list[list[Any]]:
        return [values[start : start + samples] for start in range(0, len(values), samples)]

    return Evaluation(
        step=step,
        loops=table([float(text.finish == "length" and loop_of(text.ids) is not None) for text in texts]),
        repetition=table([repetition(text.ids) for text in texts]),
        tokens=table([len(text.ids) for text in texts]),
        ended=sum(text.finish == "stop" for text in texts) / len(texts),
        perplexity=perplexity,
        examples=[text.text for text in texts[: 2 * samples : samples]],
    )
