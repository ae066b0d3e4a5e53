"""Which features fire otherwise in one text than in another, layer by layer: the comparison of the card's demo, for sets too.

Every feature has a rate, the share of the tokens at which it fires. The card ranks by |rate 1 - rate 2|; a mean value tells
also how strongly, and z how surely (see `qwen_scope.contrast`). Which of an index's features separate texts from its whole
corpus is another question, which `FeatureIndex.find` answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qwen_scope.contrast import Firing, contrast
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.features import SparseFeatures
from qwen_scope.text_features import TextFeatures

By = Literal["rate", "mean", "z"]
"""What features are ranked by: how much their rates differ (the card), their mean values, or how surely the rates do."""


@dataclass(frozen=True)
class Compared:
    """A feature and how it fires in two groups of texts."""

    layer: int
    """Which decoder layer, from 0."""
    number: int
    """Which feature of the layer."""
    first_rate: float
    """Share of the first group's tokens at which it fires."""
    second_rate: float
    """The same of the second."""
    first_mean: float
    """Its mean value over the first group's tokens, those included at which it does not fire and is 0."""
    second_mean: float
    """The same of the second."""
    z: float
    """How surely its rates differ, above 0 where it fires more often in the first group. A single text on each side does not
    tell how much texts vary: z promises too much then."""

    @property
    def name(self) -> str:
        """`layer/number`."""
        return f"{self.layer}/{self.number}"

    def difference(self, by: By) -> float:
        """First less second, of what features are ranked by."""
        if by == "z":
            return self.z
        return self.first_rate - self.second_rate if by == "rate" else self.first_mean - self.second_mean

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Two groups of texts compared."""

    by: By
    """What the features are ranked by."""
    features: list[Compared]
    """Layer by layer, those that differ most first."""
    first: list[TextFeatures]
    """The first group's texts."""
    second: list[TextFeatures]
    """The second's."""
    first_counted: list[Bool[Tensor, " _"]]
    """Of each text, which tokens were counted."""
    second_counted: list[Bool[Tensor, " _"]]
    """The same of the second group."""

    def activations(self, name: str | tuple[int, int]) -> tuple[list[Float[Tensor, " _"]], list[Float[Tensor, " _"]]]:
        """A feature's value at every token of each text, whether counted or not: the first group's, the second's.

        Raises:
            QwenScopeError: a layer that was not read, or a feature that it does not have.
        """
        layer, number = parse_feature(name)
        first, second = ([text[layer].activation(number) for text in group] for group in (self.first, self.second))
        return first, second

    def to_dict(self) -> dict[str, Any]:
        """Everything but the texts' own features as plain values for JSON."""

        def texts(group: list[TextFeatures], counted: list[Tensor]) -> list[dict[str, Any]]:
            return [
                {"text": text.text, "tokens": text.tokens, "counted": kept.tolist()}
                for text, kept in zip(group, counted, strict=True)
            ]

        return {
            "by": self.by,
            "features": [feature.to_dict() for feature in self.features],
            "first": texts(self.first, self.first_counted),
            "second": texts(self.second, self.second_counted),
        }

    def __repr__(self) -> str:
        counted = [sum(int(kept.sum()) for kept in group) for group in (self.first_counted, self.second_counted)]
        lines = [
            f"{len(self.first)} and {len(self.second)} texts of {counted[0]} and {counted[1]} tokens that count, by {self.by}",
            f"{'feature':<10} {'rate 1':>7} {'rate 2':>7} {'mean 1':>8} {'mean 2':>8} {'z':>6}",
        ]
        lines += [
            f"{of.name:<10} {of.first_rate:>7.1%} {of.second_rate:>7.1%} {of.first_mean:>8.4g} {of.second_mean:>8.4g} "
            f"{of.z:>6.2f}"
            for of in self.features
        ]
        return "\n".join(lines)


def compare(
    first: Sequence[TextFeatures],
    second: Sequence[TextFeatures],
    *,
    by: By = "rate",
    top: int = 10,
    skip_first: bool = True,
    skip_common_tokens: bool = False,
    skip_common_prefix: bool = False,
) -> Comparison:
    """Compares texts whose features have been read, at the layers that all of them have.

    Args:
        first: the first group's texts.
        second: the second's.
        by: what features are ranked by.
        top: features of each layer at most; those that do not differ are left out.
        skip_first: leave out position 0 of each text, an attention sink.
        skip_common_tokens: leave out every token that occurs in both groups.
        skip_common_prefix: leave out the tokens that all texts of both groups begin with.

    Raises:
        QwenScopeError: no texts, texts without a layer in common, or nothing left to count.
    """
    if by not in get_args(By):
        raise QwenScopeError(f"expected to compare by {', '.join(get_args(By))}, found {by!r}; choose one of them")
    if top < 1:
        raise QwenScopeError(f"expected at least 1 feature of each layer, found top = {top}; ask for one or more")
    groups = (list(first), list(second))
    for name, group in zip(("first", "second"), groups, strict=True):
        if not group:
            raise QwenScopeError(f"expected texts to compare, found none in the {name} group; give at least one")
    layers = sorted(set.intersection(*(set(text.layers) for group in groups for text in group)))
    if not layers:
        raise QwenScopeError("expected texts read at the same layers, found none in common; read them alike")
    counted = _counted(groups, skip_first, skip_common_tokens, skip_common_prefix)
    features = []
    for layer in layers:
        firing = [_firing(layer, *pair) for pair in zip(groups, counted, strict=True)]
        features += _ranked(layer, firing[0], firing[1], by, top)
    return Comparison(by, features, groups[0], groups[1], counted[0], counted[1])


def _counted(
    groups: Sequence[list[TextFeatures]], skip_first: bool, skip_common_tokens: bool, skip_common_prefix: bool
) -> list[list[Tensor]]:
    """Of each text of each group, which tokens count.

    Raises:
        QwenScopeError: none of a group.
    """
    ids = [[text.ids for text in group] for group in groups]
    start = _common_prefix([of for group in ids for of in group]) if skip_common_prefix else 0
    start = max(start, int(skip_first))
    common = set.intersection(*({id for of in group for id in of} for group in ids)) if skip_common_tokens else set()
    counted = [
        [torch.tensor([at >= start and id not in common for at, id in enumerate(of)]) for of in group] for group in ids
    ]
    for name, group in zip(("first", "second"), counted, strict=True):
        if not any(kept.any() for kept in group):
            raise QwenScopeError(
                f"expected tokens to compare in both groups, found none in the {name} once those to be left out are; leave out "
                "less, or give longer texts"
            )
    return counted


def _common_prefix(ids: list[list[int]]) -> int:
    """How many tokens all texts begin with."""
    shortest, longest = min(ids), max(ids)
    # What the first and the last of sorted lists share, all of them do.
    return next(
        (at for at, pair in enumerate(zip(shortest, longest, strict=False)) if pair[0] != pair[1]),
        min(len(shortest), len(longest)),
    )


def _firing(layer: int, texts: list[TextFeatures], counted: list[Tensor]) -> Firing:
    """At how many of the tokens that count each feature fires."""
    indices = torch.cat([text[layer].indices.cpu()[kept] for text, kept in zip(texts, counted, strict=True)])
    values = torch.cat([text[layer].values.cpu()[kept] for text, kept in zip(texts, counted, strict=True)])
    lengths = torch.tensor([int(kept.sum()) for kept in counted])
    owners = torch.arange(len(texts)).repeat_interleave(lengths)
    return Firing.of(SparseFeatures(indices, values, texts[0][layer].d_sae), owners)


def _ranked(layer: int, first: Firing, second: Firing, by: By, top: int) -> list[Compared]:
    """The features of a layer that differ most."""
    z = contrast(first, second).z
    means = [group.activation / group.tokens for group in (first, second)]
    differs = {"rate": first.rate - second.rate, "mean": means[0] - means[1], "z": z}[by].abs()
    best = differs.argsort(descending=True, stable=True)[:top]
    return [
        Compared(
            layer=layer,
            number=number,
            first_rate=float(first.rate[number]),
            second_rate=float(second.rate[number]),
            first_mean=float(means[0][number]),
            second_mean=float(means[1][number]),
            z=float(z[number]),
        )
        for number in best[differs[best] > 0].tolist()
    ]
