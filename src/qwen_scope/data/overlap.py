"""How much of what one set fires another fires too, with sets of unlike sizes made comparable.

Footprints grow with the number of items, so a large set covers a small one for its size alone. Size-matched overlaps compare
random subsets of n items of each: feature j is fired by such a subset of set i with probability
`p_ij = 1 - C(N_i - m_ij, n) / C(N_i, n)`, and two independent subsets share `sum over j of p_aj p_bj` features on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from qwen_scope.data.coverage import missed
from qwen_scope.data.footprint import Footprint, check_comparable
from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Overlaps of some sets, row by column."""

    names: list[str]
    """What the sets are called."""
    asymmetric: Float[ndarray, "sets sets"]
    """|F_row n F_column| / |F_row| (the report): how much of the row's footprint the column's covers."""
    symmetric: Float[ndarray, "sets sets"]
    """|F_row n F_column| / min(|F_row|, |F_column|) (the report)."""
    matched: Float[ndarray, "sets sets"]
    """E |F_row(n) n F_column(n)| / E |F_row(n)| of random subsets of n items. On the diagonal: of two subsets of the same set,
    which is what no other set can be expected to exceed."""
    low: Float[ndarray, "sets sets"] | None
    """Lower ends of 95 % intervals of `matched`; None if none were asked for."""
    high: Float[ndarray, "sets sets"] | None
    """Their upper ends."""
    size: int
    """n."""


def overlaps(
    footprints: Sequence[Footprint], *, size: int | None = None, resamples: int = 0, seed: int = 0
) -> Overlaps:
    """All pairwise overlaps of some sets.

    Args:
        footprints: of one SAE and position.
        size: n, items of each subset; half of the smallest set's unless told.
        resamples: how many half-samples of the items the intervals rest on; 0 for none. Halves are drawn without replacement: a
            statistic of n <= N / 2 items varies over them as it does over sets of N items (repeated half-samples), whereas the
            usual bootstrap repeats items, and so fires fewer features.
        seed: of the half-samples.

    Raises:
        QwenScopeError: footprints that cannot be compared, or a size that a set does not have.
    """
    check_comparable(footprints)
    smallest = min(len(footprint) for footprint in footprints)
    n = max(1, smallest // 2) if size is None else size
    if not 1 <= n <= smallest:
        raise QwenScopeError(
            f"expected subsets of 1 to {smallest} items, the size of the smallest set, found {n}; choose one"
        )
    counts = np.stack([footprint.fired.counts for footprint in footprints])
    items = [len(footprint) for footprint in footprints]
    here = (counts > 0).astype(np.float32)
    shared = (here @ here.T).astype(np.float64)
    own = np.maximum(np.diag(shared), 1)
    low = high = None
    if resamples:
        if 2 * n > smallest:
            raise QwenScopeError(
                f"expected subsets of at most {smallest // 2} items for intervals, half the smallest set, found {n}; use fewer"
            )
        chance = np.random.default_rng(seed)
        drawn = []
        for _ in range(resamples):
            halves = np.stack([_half_counts(footprint, chance) for footprint in footprints])
            drawn.append(_matched(halves, [max(1, count // 2) for count in items], n))
        low, high = np.quantile(np.stack(drawn), [0.025, 0.975], axis=0)
    return Overlaps(
        names=[footprint.name for footprint in footprints],
        asymmetric=shared / own[:, None],
        symmetric=shared / np.minimum(own[:, None], own[None]),
        matched=_matched(counts, items, n),
        low=low,
        high=high,
        size=n,
    )


def _matched(counts: Int[ndarray, "sets d_sae"], items: list[int], n: int) -> Float[ndarray, "sets sets"]:
    fires = np.zeros(counts.shape, dtype=np.float64)
    for at, (row, total) in enumerate(zip(counts, items, strict=True)):
        times, which = np.unique(row, return_inverse=True)
        fires[at] = (1 - missed(times, total, np.array([n]))[:, 0])[which]
    return fires @ fires.T / np.maximum(fires.sum(1), 1e-300)[:, None]


def _half_counts(footprint: Footprint, chance: np.random.Generator) -> Int[ndarray, " d_sae"]:
    fired = footprint.fired
    taken = np.zeros(len(fired), dtype=bool)
    taken[chance.permutation(len(fired))[: max(1, len(fired) // 2)]] = True
    return np.bincount(fired.features[np.repeat(taken, np.diff(fired.starts))], minlength=fired.d_sae)


@dataclass(frozen=True)
class Addition:
    """What one set adds to those before it."""

    name: str
    """Which set."""
    adds: int
    """Features that none of those before it fires."""
    alone: int
    """Features that no other set of all fires."""
    covered: float
    """Share of all sets' features fired by those up to it."""


def additions(footprints: Sequence[Footprint]) -> list[Addition]:
    """The sets in the order in which each next one adds most features: those at the end can be left out.

    Raises:
        QwenScopeError: footprints that cannot be compared.
    """
    check_comparable(footprints)
    fires = np.stack([footprint.fired.counts > 0 for footprint in footprints])
    whole, times = max(1, int(fires.any(0).sum())), fires.sum(0)
    left, seen, found = list(range(len(footprints))), np.zeros(fires.shape[1], dtype=bool), []
    while left:
        best = max(left, key=lambda at: int((fires[at] & ~seen).sum()))
        adds = int((fires[best] & ~seen).sum())
        seen |= fires[best]
        found.append(
            Addition(footprints[best].name, adds, int((fires[best] & (times == 1)).sum()), float(seen.sum() / whole))
        )
        left.remove(best)
    return found
