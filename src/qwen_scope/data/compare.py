"""Which features a set fires more often than another: for two evaluation sets, or for what a training mix lacks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from qwen_scope.contrast import false_discovery
from qwen_scope.data.footprint import Footprint, check_comparable


@dataclass(frozen=True)
class Difference:
    """A feature that more items of one set fire."""

    feature: str
    """`layer/number`."""
    p: float
    """Twice the smaller tail of Fisher's exact test, at most 1."""
    q: float
    """Share of false finds to expect among all features with a q as small (Benjamini and Hochberg)."""
    first: float
    """Share of the first set's items that fire it."""
    second: float
    """The same of the second."""


def differences(first: Footprint, second: Footprint, *, most_q: float = 0.05) -> list[Difference]:
    """The features that one of two sets fires more often than chance explains, surest first.

    Every item is a witness of its own, so that the two sets must not share items. Features that neither fires are not tested.

    Raises:
        QwenScopeError: footprints that cannot be compared.
    """
    check_comparable([first, second])
    items = (len(first), len(second))
    counts = np.stack([footprint.fired.counts for footprint in (first, second)], axis=1)
    tested = np.flatnonzero(counts.any(1))
    if not len(tested):
        return []
    # Most features share their counts with others.
    pairs, which = np.unique(counts[tested], axis=0, return_inverse=True)
    p = _exact(pairs, items)[which.reshape(-1)]
    q = false_discovery(torch.from_numpy(p)).numpy()
    rates = counts[tested] / items
    found = [
        Difference(
            f"{first.about.layer}/{tested[at]}", float(p[at]), float(q[at]), float(rates[at, 0]), float(rates[at, 1])
        )
        for at in np.flatnonzero(q <= most_q)
    ]
    return sorted(found, key=lambda difference: (difference.p, -abs(difference.first - difference.second)))


def _exact(pairs: Int[ndarray, "tests two"], items: tuple[int, int]) -> Float[ndarray, " tests"]:
    """Two-sided p-values of pairs of counts, given how many items fire a feature in both sets together."""
    from scipy.stats import hypergeom

    chance = hypergeom(sum(items), pairs.sum(1), items[0])
    tails = np.minimum(chance.cdf(pairs[:, 0]), chance.sf(pairs[:, 0] - 1))
    return np.clip(2 * tails, 0, 1)
