"""Which features a set fires more often than another: for two evaluation sets, or for what a training mix lacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_scope.contrast import Firing, contrast, false_discovery
from qwen_scope.data.footprint import Footprint, check_comparable


@dataclass(frozen=True)
class Difference:
    """A feature that more items of one set fire."""

    feature: str
    """`layer/number`."""
    z: float
    """How surely, see `qwen_scope.contrast`: above 0 where more of the first set's items fire it."""
    q: float
    """Share of false finds to expect among all features with a q as small (Benjamini and Hochberg)."""
    first: float
    """Share of the first set's items that fire it."""
    second: float
    """The same of the second."""


def differences(first: Footprint, second: Footprint, *, most_q: float = 0.05) -> list[Difference]:
    """The features that one of two sets fires more often than chance explains, surest first.

    Every item is a witness of its own. Features that neither fires are not tested.

    Raises:
        QwenScopeError: footprints that cannot be compared.
    """
    check_comparable([first, second])
    groups = [_firing(footprint) for footprint in (first, second)]
    scores = contrast(*groups)
    tested = ((groups[0].fired + groups[1].fired) > 0).nonzero()[:, 0]
    q = false_discovery(scores.p[tested])
    rates = [group.fired / group.tokens for group in groups]
    found = [
        Difference(
            f"{first.about.layer}/{number}",
            float(scores.z[number]),
            float(at_q),
            float(rates[0][number]),
            float(rates[1][number]),
        )
        for number, at_q in zip(tested.tolist(), q.tolist(), strict=True)
        if at_q <= most_q
    ]
    return sorted(found, key=lambda difference: -abs(difference.z))


def _firing(footprint: Footprint) -> Firing:
    """Items counted as tokens are elsewhere: one of each text."""
    fired, items = torch.from_numpy(footprint.fired.counts).double(), len(footprint)
    return Firing(
        fired=fired,
        activation=fired,
        tokens=items,
        texts=items,
        squares=fired,
        crosses=fired,
        token_squares=float(items),
    )
