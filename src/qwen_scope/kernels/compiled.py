"""Loops that torch has no operation for, compiled by numba at their first use and kept on disk; no compiler is needed.

Numpy arrays in, numpy arrays out; bfloat16 comes as the uint16 of its bits. Every function lets go of the interpreter's
lock and works on the rows from `start` to `stop`, so that `threads.share` can share them out. Nothing here checks its
arguments.
"""

import inspect
from functools import partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import types

intrinsic: Any = extending.intrinsic  # whose type would be that of the functions it is given
# Sums may be added up in any order, which lets them be vectorised. Callers keep NaN and infinity out.
_FAST = {"reassoc", "contract", "nsz", "nnan", "ninf"}
_LOWEST = np.float32(-3.4e38)
SLACK = 2.0**-20
FEW_KEYS = 256
BOUND_BROKEN = -1
TOO_MANY = -2


def _compiled(function: Any, fast: set[str] | None = _FAST) -> Any:
    function = inspect.unwrap(function)  # the tests wrap every function to check its arguments
    options: Any = {"nogil": True, "fastmath": fast or False, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written, so it is compiled in each process
        return numba.njit(**options)(function)


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(typing_context: Any, number: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _number(typing_context: Any, stored: Any) -> Any:
    """The float32 that an array of float32, or of bfloat16 bits, holds."""

    def widen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        upper_half = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(upper_half, ir.FloatType())

    def same(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return types.float32(stored), widen if stored == types.uint16 else same


@_compiled
def round_rows(
    given: Any, rounded: Any, norm: Any, rounded_norm: Any, lost_norm: Any, start: int, stop: int
) -> None:  # pragma: no cover
    """float32 rows to bfloat16, to nearest even, with the norms of the row, of what it becomes and of the difference."""
    for row in range(start, stop):
        whole, kept, lost = 0.0, 0.0, 0.0
        for d in range(given.shape[1]):
            bits = _as_bits(given[row, d])
            half = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
            rounded[row, d] = half
            exact, near = np.float64(given[row, d]), np.float64(_number(half))
            whole += exact * exact
            kept += near * near
            lost += (exact - near) * (exact - near)
        norm[row], rounded_norm[row], lost_norm[row] = np.sqrt(whole), np.sqrt(kept), np.sqrt(lost)


@_compiled
def row_norms(given: Any, norm: Any, start: int, stop: int) -> None:  # pragma: no cover
    """The norm of each row of float32 or bfloat16."""
    for row in range(start, stop):
        whole = 0.0
        for d in range(given.shape[1]):
            exact = np.float64(_number(given[row, d]))
            whole += exact * exact
        norm[row] = np.sqrt(whole)


@_compiled
def products(x: Any, weights: Any, out: Any, start: int, stop: int) -> None:  # pragma: no cover
    """`out[n, f] = x[n] . weights[f]` for the features from start to stop: each row of the weights is read once.

    Four features far apart at a time: four streams from memory are faster than one.
    """
    quarter = (stop - start) // 4
    for step in range(quarter):
        f0 = start + step
        f1, f2, f3 = f0 + quarter, f0 + 2 * quarter, f0 + 3 * quarter
        row0, row1, row2, row3 = weights[f0], weights[f1], weights[f2], weights[f3]
        for n in range(x.shape[0]):
            row_x = x[n]
            total0, total1, total2, total3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(len(row_x)):
                total0 += row_x[d] * _number(row0[d])
                total1 += row_x[d] * _number(row1[d])
                total2 += row_x[d] * _number(row2[d])
                total3 += row_x[d] * _number(row3[d])
            out[n, f0], out[n, f1], out[n, f2], out[n, f3] = total0, total1, total2, total3
    for f in range(start + 4 * quarter, stop):
        for n in range(x.shape[0]):
            total = np.float32(0)
            for d in range(x.shape[1]):
                total += x[n, d] * _number(weights[f, d])
            out[n, f] = total


@partial(_compiled, fast=None)
def _upper(product: Any, spread: Any, bias: Any) -> Any:  # pragma: no cover
    """A product as large as its rounding allows, plus the bias.

    Compiled strictly, so that all places that compare it get the same bits.
    """
    number = _number(product)
    grown, shrunk = number * (np.float32(1) + spread), number * (np.float32(1) - spread)
    return (grown if grown > shrunk else shrunk) + bias


@_compiled
def _key(value: Any, feature: int) -> Any:  # pragma: no cover
    """One integer that orders by value, then by lower feature."""
    bits = np.int64(np.int32(_as_bits(value)))
    ordered = bits if bits >= 0 else bits ^ np.int64(0x7FFFFFFF)
    return (ordered << np.int64(32)) | (np.int64(0xFFFFFFFF) - np.int64(feature))


@_compiled
def _value_of(key: Any) -> Any:  # pragma: no cover
    ordered = key >> np.int64(32)
    bits = ordered if ordered >= 0 else ordered ^ np.int64(0x7FFFFFFF)
    return _as_float(np.uint32(bits & np.int64(0xFFFFFFFF)))


@_compiled
def _compute(
    chosen: Any, known: Any, count: Any, x: Any, weights: Any, bias: Any, keys: Any, start: int
) -> None:  # pragma: no cover
    """Exact pre-activations of the features chosen for all rows, in the order of the features, so that a row of the
    weights comes from memory once for all tokens that need it.

    In float64, rounded to float32 once: the same whatever the order of the sum, but for one case in millions.
    """
    most, d_sae = chosen.shape[1], weights.shape[0]
    starts = np.zeros(d_sae + 1, np.int32)
    for row in range(chosen.shape[0]):
        for c in range(known[row], count[row]):
            starts[chosen[row, c] + 1] += 1
    for feature in range(d_sae):
        starts[feature + 1] += starts[feature]
    total = starts[d_sae]
    features, places = np.empty(total, np.int32), np.empty(total, np.int64)
    for row in range(chosen.shape[0]):
        for c in range(known[row], count[row]):
            feature = chosen[row, c]
            features[starts[feature]] = feature
            places[starts[feature]] = row * most + c
            starts[feature] += 1
    for pair in range(total):
        feature, place = features[pair], places[pair]
        row = place // most
        total_64 = 0.0
        for d in range(x.shape[1]):
            total_64 += np.float64(x[start + row, d]) * np.float64(_number(weights[feature, d]))
        value = np.float32(total_64 + np.float64(bias[feature]))
        keys[row, place - row * most] = _key(value if value != 0 else np.float32(0), feature)  # one zero, not two


@_compiled
def _needed(value: Any, error: Any) -> Any:  # pragma: no cover
    """What an upper bound must reach, before the error is added, for an exact pre-activation of `value` or more."""
    return np.float64(value) - error - SLACK * (abs(np.float64(value)) + error)


@_compiled
def _kth_largest_or_less(numbers: Any, k: int) -> Any:  # pragma: no cover
    """A number that at least k of these reach and not many more: halving a range is faster than sorting a part."""
    low, high = numbers[0], numbers[0]
    for number in numbers:
        low = number if number < low else low
        high = number if number > high else high
    for _ in range(32):
        middle = low + (high - low) * np.float32(0.5)
        if not low < middle < high:
            break
        reached = 0
        for number in numbers:
            reached += number >= middle
        if reached >= k:
            low = middle
            if reached == k:
                break
        else:
            high = middle
    return low


@_compiled
def select(
    approx: Any,
    spread: np.float32,
    x: Any,
    weights: Any,
    bias: Any,
    lost: Any,
    length: Any,
    of_lost: Any,
    of_length: Any,
    constant: float,
    blocks: int,
    k: int,
    all_chosen: Any,
    all_spare: Any,
    all_keys: Any,
    indices: Any,
    values: Any,
    computed: Any,
    start: int,
    stop: int,
) -> None:  # pragma: no cover
    """The k largest exact pre-activations of each row, found from approximate products; `screen` proves the bound.

    Feature j of row n has at most `upper + of_lost[n] * lost[j] + of_length[n] * length[j] + constant`, where `upper` is
    its approximate pre-activation, widened by the relative error `spread` of the product.

    Args:
        blocks: features this far apart share a block, whose largest value stands for them in the first look.
        computed: in: 0, or anything else for rows to leave alone; out: how many exact pre-activations were computed, or
            why there is no answer: `BOUND_BROKEN` or `TOO_MANY` (more than `most`).
    """
    d_sae, rows, most = approx.shape[1], stop - start, all_chosen.shape[1]
    chosen, spare, keys = all_chosen[start:stop], all_spare[start:stop], all_keys[start:stop]
    highest, exact = np.empty(blocks, np.float32), np.empty(most, np.float32)
    first, reach = np.empty(rows, np.float32), np.empty(rows, np.float64)
    known, count, spares = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    most_lost, most_length = lost.max(), length.max()

    for row in range(rows):
        if computed[start + row] != 0:
            continue
        highest[:] = _LOWEST
        for low in range(0, d_sae, blocks):
            # Slices of one row: with the whole matrix, the loop is not vectorised.
            products_of, bias_of = approx[start + row, low : low + blocks], bias[low : low + blocks]
            for q in range(len(products_of)):
                at_most = _upper(products_of[q], spread, bias_of[q])
                highest[q] = highest[q] if highest[q] > at_most else at_most
        # Any k features give a lower bound of the k-th value; the best of the k best blocks give a good one.
        first[row] = _kth_largest_or_less(highest, k)
        # Those that may be wanted next are noted while the row is in cache; two errors lower is nearly always enough.
        error = of_lost[start + row] * most_lost + of_length[start + row] * most_length + constant
        reach[row] = first[row] - 2 * (error + spread * abs(first[row]))
        for q in range(blocks):
            if highest[q] >= reach[row]:
                for j in range(q, d_sae, blocks):
                    at_most = _upper(approx[start + row, j], spread, bias[j])
                    if at_most >= first[row]:
                        if count[row] < most:
                            chosen[row, count[row]] = j
                        count[row] += 1
                    elif at_most >= reach[row]:
                        if spares[row] < most:
                            spare[row, spares[row]] = j
                        spares[row] += 1
        if count[row] > most or count[row] < k:  # fewer only where values are not finite
            computed[start + row], count[row] = TOO_MANY, 0
    _compute(chosen, known, count, x, weights, bias, keys, start)

    for row in range(rows):
        if computed[start + row] != 0:
            continue
        by_lost, by_length, kept = of_lost[start + row], of_length[start + row], True
        for c in range(count[row]):
            j, exact[c] = chosen[row, c], _value_of(keys[row, c])
            at_most = _upper(approx[start + row, j], spread, bias[j])
            kept = kept and at_most >= _needed(exact[c], by_lost * lost[j] + by_length * length[j] + constant)
        known[row] = count[row]
        if not kept:
            computed[start + row] = BOUND_BROKEN
            continue
        least = _kth_largest_or_less(exact[: count[row]], k)
        lowest_needed = _needed(least, by_lost * most_lost + by_length * most_length + constant)
        noted = lowest_needed >= reach[row] and spares[row] <= most
        for c in range(spares[row] if noted else d_sae):
            j = np.int64(spare[row, c]) if noted else c
            at_most = _upper(approx[start + row, j], spread, bias[j])
            if at_most < lowest_needed or at_most >= first[row]:
                continue
            if at_most >= _needed(least, by_lost * lost[j] + by_length * length[j] + constant):
                if count[row] < most:
                    chosen[row, count[row]] = j
                count[row] += 1
        if count[row] > most:
            computed[start + row], count[row] = TOO_MANY, known[row]
    _compute(chosen, known, count, x, weights, bias, keys, start)

    for row in range(rows):
        if computed[start + row] == 0:
            computed[start + row] = count[row]
            mine = keys[row, : count[row]]
            few = count[row] <= FEW_KEYS
            if not few:
                mine = np.sort(mine)[::-1]
            for at in range(count[row]):
                place = at
                if few:  # no two keys are equal, and counting the larger ones is faster than sorting
                    place = 0
                    for other in mine:
                        place += other > mine[at]
                if place < k:
                    indices[start + row, place] = np.int64(0xFFFFFFFF) - (mine[at] & np.int64(0xFFFFFFFF))
                    values[start + row, place] = _value_of(mine[at])
