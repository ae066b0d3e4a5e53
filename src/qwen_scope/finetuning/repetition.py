"""Repetition features: those that read higher at the last repeat of a token than where the token came first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.repeats import loop_of
from qwen_scope.generation import Sampling
from qwen_scope.reading import read_rows
from qwen_scope.scope import Scope
from qwen_scope.tokens import tokenize


@dataclass(frozen=True)
class RepetitionFeature:
    """A feature, and how it reads repeats."""

    layer: int
    """Which layer's, from 0."""
    number: int
    """Which of the layer's features."""
    difference: float
    """Mean activation at last repeats less that at first occurrences."""
    first: float
    """Mean activation at first occurrences, 0 where the feature does not fire."""
    last: float
    """The same at last repeats."""
    rises: float
    """Share of the samples in which the difference is above 0."""

    @property
    def name(self) -> str:
        """`layer/number`."""
        return f"{self.layer}/{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"feature": self.name, **asdict(self)}


@torch.no_grad()
def repetition_features(scope: Scope, samples: Any, layer: int, count: int = 10) -> list[RepetitionFeature]:
    """The features of a layer that rise most from the first occurrence of a token to its last repeat (the report, section 8).

    In a sample, each token that occurs at two or more positions counts once: the feature's activation at the last of them less
    that at the first. Position 0 is no occurrence, an attention sink where features mean little. A sample's value is the mean
    over its tokens, and a feature's difference the mean over samples, so that no long sample outweighs others. An activation is
    the value of a feature where it is among the k kept and above 0, else 0.

    Args:
        scope: the model and its SAEs.
        samples: texts that loop, whatever `Scope.features` takes; those without a repeated token count for nothing.
        layer: whose features.
        count: how many, those of the largest difference first; fewer if fewer rise.

    Raises:
        QwenScopeError: a layer that is not there, a count below 1, or samples in which no token repeats.
    """
    if count < 1:
        raise QwenScopeError(f"expected a count of at least 1 feature, found {count}; ask for one or more")
    if layer not in scope.layers:
        raise QwenScopeError(
            f"expected one of the layers {scope.layers} that the scope reads, found {layer}; choose one"
        )
    texts, _ = tokenize(samples, scope.backbone.tokenizer)
    ends = [_first_and_last(torch.tensor(text.ids)) for text in texts]
    sae = scope.suite[layer]
    first, last, rises = (torch.zeros(sae.d_sae, dtype=torch.float64) for _ in range(3))
    read = 0
    for order, residuals in read_rows(texts, scope.backbone, [layer]):
        rows, start = residuals[layer], 0
        for text in order:
            firsts, lasts = ends[text]
            if len(firsts):
                # Only these few tokens are encoded.
                here = rows[start + torch.cat([firsts, lasts]).to(rows.device)]
                found = sae.encode(here.to(sae.device)).to("cpu")
                means = []
                for part in (found[: len(firsts)], found[len(firsts) :]):
                    values = part.values.clamp_min(0).double() / len(firsts)
                    means.append(
                        torch.zeros(sae.d_sae, dtype=torch.float64).index_add_(
                            0, part.indices.flatten().long(), values.flatten()
                        )
                    )
                first += means[0]
                last += means[1]
                rises += means[1] > means[0]
                read += 1
            start += len(texts[text])
    if not read:
        raise QwenScopeError(
            f"expected samples that repeat a token after position 0, found none among {len(texts)}; give texts that loop"
        )
    difference = (last - first) / read
    best = difference.argsort(descending=True, stable=True)[:count].tolist()
    return [
        RepetitionFeature(
            layer, n, float(difference[n]), float(first[n]) / read, float(last[n]) / read, float(rises[n]) / read
        )
        for n in best
        if difference[n] > 0
    ]


def _first_and_last(ids: Int[Tensor, " tokens"]) -> tuple[Int[Tensor, " repeated"], Int[Tensor, " repeated"]]:
    """The first and the last position of each token that occurs more than once after position 0."""
    if len(ids) < 3:
        nothing = torch.zeros(0, dtype=torch.long)
        return nothing, nothing
    distinct, which = ids[1:].unique(return_inverse=True)
    positions = torch.arange(1, len(ids))
    first = torch.full((len(distinct),), len(ids)).scatter_reduce(0, which, positions, "amin")
    last = torch.zeros(len(distinct), dtype=torch.long).scatter_reduce(0, which, positions, "amax")
    repeated = first < last
    return first[repeated], last[repeated]


def looping_samples(
    scope: Scope, prompts: Sequence[Any], sampling: Sampling, *, most: int | None = None
) -> list[list[int]]:
    """Texts of the model itself that end in a loop, each as token ids with its prompt's.

    Args:
        prompts: texts or chats to be continued.
        sampling: how; each prompt's seed is this one's plus its number.
        most: so many samples are enough.
    """
    samplings = [
        Sampling(sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed + n)
        for n in range(len(prompts))
    ]
    texts = scope.generate(list(prompts), None, samplings)
    found = [[*text.prompt_ids, *text.ids] for text in texts if text.finish == "length" and loop_of(text.ids)]
    return found[:most]
