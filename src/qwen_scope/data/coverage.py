"""How soon a few items of a set fire all the features that it fires: coverage and redundancy, in closed form.

With N items and m_j of them firing feature j, a random subset of n items misses j with probability C(N - m_j, n) / C(N, n)
(the report, section 4, without its sampling).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from qwen_scope.data.fired import Fired
from qwen_scope.errors import QwenScopeError


def coverage(counts: Int[ndarray, " features"], items: int, sizes: Int[ndarray, " sizes"]) -> Float[ndarray, " sizes"]:
    """c_n: the expected share of the set's features that a random subset of n items fires, for each n in `sizes`.

    Args:
        counts: m_j, by how many items each feature is fired; zeros do not count.
        items: N.
        sizes: subset sizes, 0 to N.

    Raises:
        QwenScopeError: another size.
    """
    if len(sizes) and not 0 <= sizes.min() <= sizes.max() <= items:
        raise QwenScopeError(
            f"expected sizes from 0 to {items}, found {sizes.min()} to {sizes.max()}; choose among those"
        )
    times, features = np.unique(counts[counts > 0], return_counts=True)
    if not len(times):
        return np.zeros(len(sizes))
    return (features @ (1 - missed(times, items, sizes))) / features.sum()


def missed(times: Int[ndarray, " times"], items: int, sizes: Int[ndarray, " sizes"]) -> Float[ndarray, "times sizes"]:
    """C(N - m, n) / C(N, n): the probability that none of n items is among the m of N that fire a feature."""
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, items + 1)))])  # log n!
    rest = items - times[:, None]
    fits = sizes[None] <= rest
    left = np.where(fits, rest - sizes[None], 0)
    ratio = log[rest] - log[left] - (log[items] - log[items - sizes])[None]
    return np.where(fits, np.exp(np.minimum(ratio, 0)), 0.0)


@dataclass(frozen=True)
class Redundancy:
    """How much of a set repeats itself."""

    redundancy: float
    """R_hat = (sum over k = 1..n of c_k) / |F| (the report). The more items fire the same features, the larger. It grows with the
    number of items: compare sets at one n."""
    mean_coverage: float
    """(sum over k = 1..n of c_k) / n: the mean height of the curve, near 1/2 if every feature is fired by one item, 1 if every
    item fires all. It grows with n too, but stays below 1."""
    features: float
    """|F|, or of a part of the set, the expected one."""
    items: int
    """n."""


def redundancy(fired: Fired, size: int | None = None) -> Redundancy:
    """Redundancy of a whole set, or that of n random items of it, in closed form.

    Of n of N items, a feature fired by m is missed with probability q = C(N - m, n) / C(N, n), and the sum over k = 1..n of the
    probabilities that k of them fire it is `n + 1 - (N + 1 - (N - n - m) q) / (m + 1)`; for n = N that is (N + 1) m / (m + 1).

    Args:
        size: n; all items unless told. Features and coverage are expectations over subsets, one divided by the other.

    Raises:
        QwenScopeError: more items than the set has, or none.
    """
    items = len(fired)
    n = items if size is None else size
    if not 1 <= n <= items:
        raise QwenScopeError(f"expected 1 to {items} items, as many as the set has, found {n}; choose fewer")
    counts = fired.counts
    times, features = np.unique(counts[counts > 0], return_counts=True)
    if not len(times):
        return Redundancy(0.0, 0.0, 0.0, n)
    q = missed(times, items, np.array([n]))[:, 0]
    whole = float(features @ (1 - q))
    total = float(features @ (n + 1 - (items + 1 - (items - n - times) * q) / (times + 1))) / whole
    return Redundancy(total / whole, total / n, whole, n)


def sampled_coverage(fired: Fired, sizes: Int[ndarray, " sizes"], *, draws: int, seed: int) -> Float[ndarray, " sizes"]:
    """The same as `coverage` by drawing subsets, as the report does: to check the closed form."""
    chance, whole = np.random.default_rng(seed), len(np.flatnonzero(fired.counts))
    found = np.zeros(len(sizes))
    for _ in range(draws):
        order = chance.permutation(len(fired))
        first = np.full(fired.d_sae, len(fired))
        # The place in this order at which each feature is fired first.
        places = np.empty(len(fired), dtype=np.int64)
        places[order] = np.arange(len(fired))
        np.minimum.at(first, fired.features, places[fired.items])
        found += (np.sort(first)[None] < sizes[:, None]).sum(1) / max(1, whole)
    return found / draws


def representative(fired: Fired, count: int) -> tuple[Int[ndarray, " chosen"], Float[ndarray, " chosen"]]:
    """A subset of items that fires as many of the set's features as can be, chosen greedily.

    Each next item is the one that adds most features, the earlier of equals; it ends early once all are fired. Of all subsets
    of the size, the best fires at most 1 / (1 - 1/e) = 1.58 times as many (Nemhauser, Wolsey and Fisher 1978).

    Returns:
        The items in the order chosen, and the share of the set's features fired after each.
    """
    import heapq

    seen = np.zeros(fired.d_sae, dtype=bool)
    whole = max(1, len(np.flatnonzero(fired.counts)))
    # What an item adds never grows, so an old bound that is still the largest after renewal is the answer.
    waiting = [(-(int(fired.starts[i + 1] - fired.starts[i])), i) for i in range(len(fired))]
    heapq.heapify(waiting)
    chosen, shares = [], []
    while waiting and len(chosen) < count:
        bound, item = heapq.heappop(waiting)
        adds = int((~seen[fired.of(item)]).sum())
        if not adds:
            continue
        if adds < -bound:
            heapq.heappush(waiting, (-adds, item))
            continue
        seen[fired.of(item)] = True
        chosen.append(item)
        shares.append(seen.sum() / whole)
    return np.array(chosen, dtype=np.int64), np.array(shares, dtype=np.float64)
