"""The loops of `triton_screen`, compiled by triton for the GPU at their first use.

Tensors are contiguous; nothing here checks its arguments. Names in capitals are sizes known when a loop is compiled.

Shapes: `x` (tokens, d_model), `weights` (d_sae, d_model), `upper` (tokens, d_sae), `highest` (tokens, blocks), `chosen` and
`keys` (tokens, most), `indices` and `values` (tokens, k); `least`, `below`, `known` and `count` (tokens), and of `bias` and of
all norms one number a row.
"""

from typing import no_type_check  # the tests' run-time checks would wrap what triton has to read

import triton
import triton.language as tl

LARGEST = tl.constexpr(1e37)
"""Numbers beyond it could overflow in a product."""
NORM_SLACK = tl.constexpr(1 + 2.0**-20)
SMALLEST = tl.constexpr(2.0**-126)
SUM_ERROR = tl.constexpr(2.0**-23)
BOUND_SLACK = tl.constexpr(2.0**-20)
FLUSHED = tl.constexpr(2.0**-124)
INFINITY = tl.constexpr(float("inf"))
INTERPRETED = tl.constexpr(not isinstance(tl.cdiv, triton.JITFunction))


@triton.jit
@no_type_check
def measure_rows(given, rounded, norm, lost, length, width, WIDTH: tl.constexpr):
    """Norms of a row of `given`, of what rounding took from it and of the row of `rounded`: float32, never too small.

    A row with a number that is not finite, or beyond `LARGEST`, has the norm infinity.
    """
    row = tl.program_id(0).to(tl.int64)
    whole = tl.zeros([WIDTH], tl.float64)
    cut = tl.zeros([WIDTH], tl.float64)
    kept = tl.zeros([WIDTH], tl.float64)
    unusable = tl.zeros([WIDTH], tl.int32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        exact = tl.load(given + row * width + column, mask=column < width, other=0).to(tl.float32)
        near = tl.load(rounded + row * width + column, mask=column < width, other=0).to(tl.float32)
        usable = tl.abs(exact) <= LARGEST  # false for NaN
        unusable += 1 - usable.to(tl.int32)
        exact = tl.where(usable, exact, 0.0).to(tl.float64)
        near = tl.where(usable, near, 0.0).to(tl.float64)
        whole += exact * exact
        cut += (exact - near) * (exact - near)
        kept += near * near
    tl.store(norm + row, tl.where(tl.sum(unusable, 0) > 0, INFINITY, _rounded_up(whole)))
    tl.store(lost + row, _rounded_up(cut))
    tl.store(length + row, _rounded_up(kept))


@triton.jit
@no_type_check
def _rounded_up(squares):
    """A norm in float32 that is not too small, whatever was rounded or flushed to 0 on the way."""
    return (tl.sqrt(tl.sum(squares, 0)) * NORM_SLACK + SMALLEST).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def bound_pre_activations(
    x,
    x_norm,
    x_lost,
    x_length,
    weights,
    lost,
    length,
    bias,
    upper,
    highest,
    tokens,
    d_model,
    d_sae,
    blocks,
    longest_weight,
    longest_x,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Upper bounds of a tile of pre-activations, and the highest of each block of `BLOCK` features.

    `x` and `weights` are bfloat16. Rows longer than `longest_x` have no bound; their blocks get infinity instead, which no
    feature of theirs reaches.
    """
    row_tiles = tl.cdiv(tokens, ROWS)
    # Neighbouring programs read the same weights, which then come from memory once.
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    first_feature = (tl.program_id(0) // row_tiles) * FEATURES
    row = tl.arange(0, ROWS)
    is_row = first_row + row < tokens
    norm = tl.load(x_norm + first_row + row, mask=is_row, other=0)
    bounded = is_row & (norm < longest_x)
    product = _multiply(
        x + first_row.to(tl.int64) * d_model,
        bounded,
        weights + first_feature.to(tl.int64) * d_model,
        d_sae - first_feature,
        d_model,
        ROWS,
        FEATURES,
        DEPTH,
    )
    of_lost = tl.where(bounded, norm, 0.0)
    kept = tl.load(x_length + first_row + row, mask=bounded, other=0)
    of_length = tl.load(x_lost + first_row + row, mask=bounded, other=0) + d_model * SUM_ERROR * kept
    constant = FLUSHED * (1 + d_model) * (1 + kept + longest_weight)

    # Both halves at once would take more registers than there are.
    HALF: tl.constexpr = FEATURES // 2
    low, high = tl.split(tl.permute(tl.reshape(product, [ROWS, 2, HALF]), [0, 2, 1]))
    for half in tl.static_range(2):
        feature = first_feature + half * HALF + tl.arange(0, HALF)
        is_feature = feature < d_sae
        part = low if half == 0 else high
        bias_of = tl.load(bias + feature, mask=is_feature, other=0)[None, :]
        error = of_lost[:, None] * tl.load(lost + feature, mask=is_feature, other=0)[None, :] + constant[:, None]
        error += of_length[:, None] * tl.load(length + feature, mask=is_feature, other=0)[None, :]
        bound = part + bias_of + error + BOUND_SLACK * (tl.abs(part) + tl.abs(bias_of) + error)

        inside = is_row[:, None] & is_feature[None, :]
        corner = first_row.to(tl.int64) * d_sae + first_feature + half * HALF
        tl.store(upper + corner + row[:, None] * d_sae + tl.arange(0, HALF)[None, :], bound, mask=inside)
        shown = tl.reshape(tl.where(inside, bound, -INFINITY), [ROWS, HALF // BLOCK, BLOCK])
        of_blocks = tl.where(bounded[:, None], tl.max(shown, 2), INFINITY)
        block = (first_feature + half * HALF) // BLOCK + tl.arange(0, HALF // BLOCK)
        place = (first_row + row).to(tl.int64)[:, None] * blocks + block[None, :]
        tl.store(highest + place, of_blocks, mask=is_row[:, None] & (block < blocks)[None, :])


@triton.jit
@no_type_check
def _multiply(x, is_row, weights, features, d_model, ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr):
    """The products of the first rows of `x`, those that are rows, and of the first `features` rows of `weights`."""
    product = tl.zeros([ROWS, FEATURES], tl.float32)
    row, feature = tl.arange(0, ROWS)[:, None], tl.arange(0, FEATURES)[:, None]
    for start in range(0, d_model, DEPTH):
        d = start + tl.arange(0, DEPTH)[None, :]
        left = tl.load(x + row * d_model + d, mask=is_row[:, None] & (d < d_model), other=0)
        right = tl.load(weights + feature * d_model + d, mask=(feature < features) & (d < d_model), other=0)
        if INTERPRETED:  # it would multiply the bits of bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, tl.trans(right), product)
    return product


@triton.jit
@no_type_check
def collect(
    upper, highest, least, below, chosen, count, d_sae, blocks, most, BLOCK: tl.constexpr, FEATURES: tl.constexpr
):
    """Adds to `chosen` the features of a row whose upper bound is at least `least` and lower than `below`.

    They come in any order. `count` grows by all of them, even where there is no more room than for `most`.
    """
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    needed = tl.load(least + row)
    is_feature = feature < d_sae
    of_block = tl.load(highest + row * blocks + feature // BLOCK, mask=is_feature, other=-INFINITY)
    promising = is_feature & (of_block >= needed)
    bound = tl.load(upper + row * d_sae + feature, mask=promising, other=-INFINITY)
    wanted = (promising & (bound >= needed) & (bound < tl.load(below + row))).to(tl.int32)
    found = tl.sum(wanted, 0)
    if found > 0:
        place = tl.atomic_add(count + row, found) + tl.cumsum(wanted, 0) - 1
        tl.store(chosen + row * most + place, feature, mask=(wanted > 0) & (place < most))


@triton.jit
@no_type_check
def compute_chosen(
    x,
    weights,
    bias,
    upper,
    chosen,
    known,
    count,
    keys,
    broken,
    d_model,
    d_sae,
    most,
    CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Exact pre-activations of the features of a row chosen after the first `known`, as keys.

    In float64, rounded to float32 once. A program takes every so many of them, `CANDIDATES` together. `broken` becomes 1
    where one is above its upper bound.
    """
    row = tl.program_id(0).to(tl.int64)
    stop = tl.load(count + row)
    stop = tl.where(stop <= most, stop, 0)
    first = tl.load(known + row) + tl.program_id(1) * CANDIDATES
    for start in range(first, stop, tl.num_programs(1) * CANDIDATES):
        place = start + tl.arange(0, CANDIDATES)
        inside = place < stop
        feature = tl.load(chosen + row * most + place, mask=inside, other=0).to(tl.int64)
        terms = tl.zeros([CANDIDATES, DEPTH], tl.float64)
        for start_d in range(0, d_model, DEPTH):
            d = start_d + tl.arange(0, DEPTH)
            is_d = d < d_model
            left = tl.load(x + row * d_model + d, mask=is_d, other=0).to(tl.float64)
            at = weights + feature[:, None] * d_model + d[None, :]
            right = tl.load(at, mask=inside[:, None] & is_d[None, :], other=0).to(tl.float32)
            terms += left[None, :] * right.to(tl.float64)
        value = (tl.sum(terms, 1) + tl.load(bias + feature).to(tl.float64)).to(tl.float32)
        above = inside & ~(value <= tl.load(upper + row * d_sae + feature))  # NaN is above too
        tl.store(broken + tl.zeros([CANDIDATES], tl.int32), 1, mask=above)
        tl.store(keys + row * most + place, _key(value, feature), mask=inside)


@triton.jit
@no_type_check
def _key(value, feature):
    """One integer that orders by value, then by lower feature."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # one zero, not two
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - feature)


@triton.jit
@no_type_check
def order(keys, count, indices, values, k, most, KEYS: tl.constexpr):
    """The features and values of the k largest keys of a row, largest first; nothing where there are too few or too many.

    No two keys are equal, so that the place of one is the number of those that are larger.
    """
    row = tl.program_id(0).to(tl.int64)
    stop = tl.load(count + row)
    stop = tl.where((stop >= k) & (stop <= most), stop, 0)
    for start in range(0, stop, KEYS):
        mine_at = start + tl.arange(0, KEYS)
        mine = tl.load(keys + row * most + mine_at, mask=mine_at < stop, other=0)
        larger = tl.zeros([KEYS], tl.int32)
        for start_other in range(0, stop, KEYS):
            other_at = start_other + tl.arange(0, KEYS)
            other = tl.load(keys + row * most + other_at, mask=other_at < stop, other=0)
            larger += tl.sum(((other[None, :] > mine[:, None]) & (other_at < stop)[None, :]).to(tl.int32), 1)
        kept = (mine_at < stop) & (larger < k)
        ordered = (mine >> 32).to(tl.int32)
        bits = tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF)
        tl.store(indices + row * k + larger, 0x7FFFFFFF - (mine & 0x7FFFFFFF), mask=kept)
        tl.store(values + row * k + larger, bits.to(tl.float32, bitcast=True), mask=kept)
