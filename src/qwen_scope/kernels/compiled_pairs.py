"""Compiled loops over the (token, feature) pairs that were kept, grouped by feature; see `compiled` for their manners.

A feature's pairs lie together, so its row of a matrix comes from memory once, and its sum is made in cache. Each sum is
added up in the order of its pairs by one thread: results do not depend on the number of threads.
"""

import math
from typing import Any

import numpy as np

from qwen_scope.kernels.compiled import _compiled, _number

_ZERO = np.float32(0)


@_compiled
def group(indices: Any, starts: Any, order: Any) -> bool:  # pragma: no cover
    """Counting sort: the pairs of feature f are `order[starts[f] : starts[f + 1]]`; False where there is no such feature.

    Args:
        starts: in: zeros, one more than features.
    """
    d_sae = len(starts) - 1
    for feature in indices:
        if feature < 0 or feature >= d_sae:
            return False
        starts[feature + 1] += 1
    for feature in range(d_sae):
        starts[feature + 1] += starts[feature]
    free = starts[:-1].copy()
    for pair in range(len(indices)):
        feature = indices[pair]
        order[free[feature]] = pair
        free[feature] += 1
    return True


@_compiled
def _sum_pairs(pairs: Any, weights: Any, rows: Any, k: int, total: Any) -> None:  # pragma: no cover
    """The sum of weight times row over some pairs, four at a time: then `total` is written a quarter as often."""
    total[:] = _ZERO
    whole = len(pairs) // 4 * 4
    for at in range(0, whole, 4):
        p0, p1, p2, p3 = pairs[at], pairs[at + 1], pairs[at + 2], pairs[at + 3]
        w0, w1, w2, w3 = weights[p0], weights[p1], weights[p2], weights[p3]
        row0, row1, row2, row3 = rows[p0 // k], rows[p1 // k], rows[p2 // k], rows[p3 // k]
        for d in range(len(total)):
            total[d] += w0 * row0[d] + w1 * row1[d] + w2 * row2[d] + w3 * row3[d]
    for at in range(whole, len(pairs)):
        weight, row = weights[pairs[at]], rows[pairs[at] // k]
        for d in range(len(total)):
            total[d] += weight * row[d]


@_compiled
def sums(
    starts: Any, order: Any, weights: Any, rows: Any, k: int, out: Any, start: int, stop: int
) -> None:  # pragma: no cover
    """`out[f]` is the sum of weight times row over the pairs of f."""
    for f in range(start, stop):
        _sum_pairs(order[starts[f] : starts[f + 1]], weights, rows, k, out[f])


@_compiled
def dots(
    starts: Any, order: Any, rows: Any, table: Any, k: int, out: Any, start: int, stop: int
) -> None:  # pragma: no cover
    """`out[pair]` is the token's row times the feature's row of the table."""
    for f in range(start, stop):
        of_feature = table[f]
        for at in range(starts[f], starts[f + 1]):
            row, total = rows[order[at] // k], _ZERO
            for d in range(len(row)):
                total += row[d] * _number(of_feature[d])
            out[order[at]] = total


@_compiled
def _gradient(
    pairs: Any, weights: Any, rows: Any, k: int, extra: Any, unit: Any, total: Any
) -> None:  # pragma: no cover
    """One feature's gradient: its pairs' sum, plus the rows of `extra`, less what is parallel to the rows of `unit`."""
    _sum_pairs(pairs, weights, rows, k, total)
    for at in range(len(extra)):
        more = extra[at]
        for d in range(len(total)):
            total[d] += more[d]
    for at in range(len(unit)):
        row, along = unit[at], _ZERO
        for d in range(len(total)):
            along += total[d] * row[d]
        for d in range(len(total)):
            total[d] -= along * row[d]


@_compiled
def squared_norms(
    starts: Any,
    order: Any,
    weights: Any,
    rows: Any,
    k: int,
    extra_at: Any,
    extra: Any,
    tangent: bool,
    parameter: Any,
    out: Any,
    start: int,
    stop: int,
) -> None:  # pragma: no cover
    """`out[f]` is the squared norm of the gradient of row f.

    Args:
        extra_at: `extra[extra_at[f] : extra_at[f + 1]]` is more gradient of f: one row or none.
        tangent: whether the gradient along the rows of the parameter, of norm 1, is left out.
    """
    total = np.empty(rows.shape[1], np.float32)
    for f in range(start, stop):
        more, fixed = extra[extra_at[f] : extra_at[f + 1]], parameter[f : f + 1 if tangent else f]
        _gradient(order[starts[f] : starts[f + 1]], weights, rows, k, more, fixed, total)
        squared = 0.0
        for d in range(len(total)):
            squared += np.float64(total[d]) * np.float64(total[d])
        out[f] = squared


@_compiled
def adam(
    starts: Any,
    order: Any,
    weights: Any,
    rows: Any,
    k: int,
    extra_at: Any,
    extra: Any,
    tangent: bool,
    unit: bool,
    parameter: Any,
    first: Any,
    second: Any,
    factor: np.float32,
    beta1: np.float32,
    beta2: np.float32,
    fresh1: np.float32,
    fresh2: np.float32,
    rate: np.float32,
    per_root: np.float32,
    eps: np.float32,
    start: int,
    stop: int,
) -> None:  # pragma: no cover
    """Adam on the rows from start to stop, each right after its gradient (see `squared_norms`) was summed up.

    Args:
        tangent: as there.
        unit: whether the rows of the parameter are set back to norm 1.
        first: Adam's running mean of the gradient.
        second: and of its square.
        factor: the gradient is multiplied by it.
        fresh1: 1 - beta1, which float32 cannot take from beta1; fresh2 likewise.
        rate: the learning rate over 1 - beta1 ** steps.
        per_root: 1 over the square root of 1 - beta2 ** steps.
    """
    total = np.empty(rows.shape[1], np.float32)
    for f in range(start, stop):
        more, fixed = extra[extra_at[f] : extra_at[f + 1]], parameter[f : f + 1 if tangent else f]
        _gradient(order[starts[f] : starts[f + 1]], weights, rows, k, more, fixed, total)
        row, mean, square = parameter[f], first[f], second[f]
        for d in range(len(total)):
            gradient = factor * total[d]
            new_mean = beta1 * mean[d] + fresh1 * gradient
            new_square = beta2 * square[d] + fresh2 * gradient * gradient
            mean[d], square[d] = new_mean, new_square
            # Python's division would look for zeros, and the loop would not be vectorised.
            row[d] -= np.divide(rate * new_mean, math.sqrt(new_square) * per_root + eps)
        if unit:
            _to_norm_1(row)


@_compiled
def _to_norm_1(row: Any) -> None:  # pragma: no cover
    squared = 0.0
    for d in range(len(row)):
        squared += np.float64(row[d]) * np.float64(row[d])
    length = np.float32(max(np.sqrt(squared), 1e-12))
    for d in range(len(row)):
        row[d] /= length
