"""How much of what one set fires another fires too, with sets of unlike sizes made comparable.

Footprints grow with the number of items, so a large set covers a small one for its size alone. Size-matched overlaps compare
random subsets of n items of each: feature j is fired by such a subset of set i with probability
`p_ij = 1 - C(N_i - m_ij, n) / C(N_i, n)`, and subsets of two sets share `sum over j of p_aj p_bj` features on average. Two
subsets of one set that have no item in common both fire j with probability `1 - 2 q(n) + q(2n)`, q the probability of missing it.
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
    """E |F_row(n) n F_column(n)| / E |F_row(n)| of random subsets of n items. On the diagonal: of two subsets of the same set
    without a common item, as if the set were sampled twice, which is what to hold the rest of the row against; NaN for a set of
    fewer than 2n items."""
    low: Float[ndarray, "sets sets"] | None
    """Lower ends of 95 % intervals of `matched`, NaN on the diagonal; None if none were asked for."""
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
    counts = [footprint.fired.counts for footprint in footprints]
    here = (np.stack(counts) > 0).astype(np.float32)
    shared = (here @ here.T).astype(np.float64)
    own = np.maximum(np.diag(shared), 1)
    items = [len(footprint) for footprint in footprints]
    matched = _matched([_firing(of, total, n) for of, total in zip(counts, items, strict=True)])
    np.fill_diagonal(matched, [_with_itself(of, total, n) for of, total in zip(counts, items, strict=True)])
    low, high = _intervals(footprints, n, resamples, seed) if resamples else (None, None)
    return Overlaps(
        names=[footprint.name for footprint in footprints],
        asymmetric=shared / own[:, None],
        symmetric=shared / np.minimum(own[:, None], own[None]),
        matched=matched,
        low=low,
        high=high,
        size=n,
    )


def _firing(counts: Int[ndarray, " d_sae"], items: int, n: int) -> Float[ndarray, " d_sae"]:
    """p: the probability that n of the items fire each feature."""
    return 1 - missed(np.arange(items + 1), items, np.array([n]))[:, 0][counts]


def _matched(firing: list[Float[ndarray, " d_sae"]]) -> Float[ndarray, "sets sets"]:
    p = np.stack(firing)
    return p @ p.T / np.maximum(p.sum(1), np.finfo(np.float64).tiny)[:, None]


def _with_itself(counts: Int[ndarray, " d_sae"], items: int, n: int) -> float:
    """E |F(S) n F(T)| / E |F(S)| of two subsets of n items without a common one."""
    if 2 * n > items:
        return float("nan")
    once, twice = missed(np.arange(items + 1), items, np.array([n, 2 * n])).T
    both = 1 - 2 * once + twice
    return float(both[counts].sum() / max((1 - once)[counts].sum(), np.finfo(np.float64).tiny))


def _intervals(
    footprints: Sequence[Footprint], n: int, resamples: int, seed: int
) -> tuple[Float[ndarray, "sets sets"], Float[ndarray, "sets sets"]]:
    """95 % intervals of the matched overlaps from half-samples."""
    from scipy import sparse

    smallest = min(len(footprint) for footprint in footprints)
    if 2 * n > smallest:
        raise QwenScopeError(
            f"expected subsets of at most {smallest // 2} items for intervals, half the smallest set, found {n}; use fewer"
        )
    chance, drawn = np.random.default_rng(seed), []
    # Features by items, so that a half's counts are one product.
    tables = [
        sparse.csr_matrix((np.ones(len(of.features), np.int32), of.features, of.starts), (len(of), of.d_sae)).T
        for of in (footprint.fired for footprint in footprints)
    ]
    for _ in range(resamples):
        firing = []
        for table in tables:
            items = table.shape[1]
            half = np.zeros(items, np.int32)
            half[chance.permutation(items)[: items // 2]] = 1
            firing.append(_firing(table @ half, items // 2, n))
        drawn.append(_matched(firing))
    low, high = np.quantile(np.stack(drawn), [0.025, 0.975], axis=0)
    for ends in (low, high):
        np.fill_diagonal(ends, np.nan)
    return low, high


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
