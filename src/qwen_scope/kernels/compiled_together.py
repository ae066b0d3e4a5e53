"""A compiled loop over pairs that counts which features fire together; see `compiled` for its manners."""

from typing import Any

import numpy as np

from qwen_scope.kernels.compiled import _compiled


@_compiled
def most_together(
    starts: Any,
    order: Any,
    features: Any,
    fires: Any,
    fired: Any,
    least: int,
    numbers: Any,
    shares: Any,
    start: int,
    stop: int,
) -> None:  # pragma: no cover
    """The features that fire most often at the tokens of each feature from start to stop, by Jaccard's share.

    Args:
        starts: the pairs of feature f are `order[starts[f] : starts[f + 1]]`; pair p belongs to token `p // k`.
        features: (tokens, k), the feature of each pair.
        fires: (tokens, k), whether its value is above 0.
        fired: at how many tokens each feature fires.
        least: tokens at which both must fire.
        numbers: out, (d_sae, count), filled with -1: highest share first, of equal ones the lower number.
        shares: out, (d_sae, count), filled with 0: tokens where both fire, among those where either does.
    """
    d_sae, count = numbers.shape
    k = features.shape[1]
    both = np.zeros(d_sae, np.int64)
    seen = np.empty(d_sae, np.int64)
    for f in range(start, stop):
        found = 0
        for at in range(starts[f], starts[f + 1]):
            token, place = order[at] // k, order[at] % k
            if not fires[token, place]:
                continue
            for other in range(k):
                if fires[token, other]:
                    g = features[token, other]
                    if both[g] == 0:
                        seen[found] = g
                        found += 1
                    both[g] += 1
        kept = 0
        for at in range(found):
            g = seen[at]
            at_both = both[g]
            both[g] = 0
            if g == f or at_both < least:
                continue
            share = np.float64(at_both) / np.float64(fired[f] + fired[g] - at_both)
            place = kept
            # From the end, as long as what stands there is worse.
            while place > 0 and (
                shares[f, place - 1] < share or (shares[f, place - 1] == share and numbers[f, place - 1] > g)
            ):
                place -= 1
            if place == count:
                continue
            kept = min(kept + 1, count)
            for later in range(kept - 1, place, -1):
                shares[f, later], numbers[f, later] = shares[f, later - 1], numbers[f, later - 1]
            shares[f, place], numbers[f, place] = share, g
