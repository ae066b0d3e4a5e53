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


def coverage(counts: Int[ndarray, " features"], items: int, sizes: Int[ndarray, " sizes"]) -> Float[ndarray, " sizes"]:
    """c_n: the expected share of the set's features that a random subset of n items fires, for each n in `sizes`.

    Args:
        counts: m_j, by how many items each feature is fired; zeros do not count.
        items: N.
        sizes: subset sizes, 0 to N.
    """
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
    """R_hat = (sum over n of c_n) / |F(D)| (the report). The more items fire the same features, the larger; it grows with the
    number of items, so compare sets of one size."""
    mean_coverage: float
    """(sum over n of c_n) / N: the mean height of the curve, between 1/2, if every feature is fired by one item, and 1, if
    every item fires all."""
    features: int
    """|F(D)|."""
    items: int
    """N."""


def redundancy(fired: Fired) -> Redundancy:
    """Redundancy in closed form: sum over n of c_n = (1 / |F|) sum over j of (N + 1) m_j / (m_j + 1)."""
    counts, items = fired.counts, len(fired)
    counts = counts[counts > 0]
    total = float(((items + 1) * counts / (counts + 1)).mean()) if len(counts) else 0.0
    features = max(1, len(counts))
    return Redundancy(total / features, total / max(1, items), len(counts), items)


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
