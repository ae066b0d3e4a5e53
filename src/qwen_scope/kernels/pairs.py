"""Gradients of encode and decode as sums over the (token, feature) pairs that were kept.

Nothing here makes a (tokens, d_sae) matrix, nor the (tokens * k, d_model) rows of all pairs. Float32 on the CPU runs in
compiled loops; any other device or dtype, and a machine without numba, in torch alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen_scope.errors import QwenScopeError
from qwen_scope.kernels import reference
from qwen_scope.kernels.threads import share

FEATURE_WORK = 8
"""What a feature costs beside its pairs, in pairs: threads get equal shares of the sum of both."""


@dataclass(frozen=True)
class Pairs:
    """The kept (token, feature) pairs, grouped by feature; pair `n * k + j` is token n with its feature j."""

    indices: Int[Tensor, "tokens k"]
    """The features of each token."""
    starts: Int[Tensor, " d_sae_and_1"]
    """Where each feature's pairs start in `order`, and the end of the last."""
    order: Int[Tensor, " pairs"]
    """The pairs of feature 0 in order of their tokens, then those of feature 1, and so on."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.starts) - 1


def group_by_feature(indices: Int[Tensor, "tokens k"], d_sae: int) -> Pairs:
    """Sorts pairs by feature, those of one feature by token.

    Raises:
        QwenScopeError: an index that is no feature.
    """
    flat = indices.flatten()
    loops = compiled_loops(indices.device)
    if loops is None:
        features, order = flat.sort(stable=True)
        starts = torch.searchsorted(features, torch.arange(d_sae + 1, device=indices.device))
        known = not len(features) or bool((features[0] >= 0) & (features[-1] < d_sae))
    else:
        starts, order = torch.zeros(d_sae + 1, dtype=torch.long), torch.empty(len(flat), dtype=torch.long)
        known = loops.group(flat.long().numpy(), starts.numpy(), order.numpy())
    if not known:
        found = f"{int(indices.min())} to {int(indices.max())}"
        raise QwenScopeError(f"expected features from 0 to {d_sae - 1}, found {found}; take them from encode")
    return Pairs(indices, starts, order)


def sum_over_pairs(
    pairs: Pairs, weights: Float[Tensor, "tokens k"], rows: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, "d_sae d_model"]:
    """For each feature the sum over its pairs of the pair's weight times the token's row, in the dtype of the rows.

    Raises:
        QwenScopeError: weights or rows of another number of tokens or features than the pairs.
    """
    check_pairs(pairs, weights, rows)
    loops = compiled_loops(rows.device, weights, rows)
    if loops is None:
        token, sorted_weights = pairs.order // pairs.indices.shape[1], weights.flatten()[pairs.order].to(rows.dtype)
        return F.embedding_bag(token, rows, pairs.starts[:-1], mode="sum", per_sample_weights=sorted_weights)
    # numpy asks the system for large pages, which makes a fresh matrix several times cheaper to touch.
    out = np.empty((pairs.d_sae, rows.shape[1]), np.float32)
    share_features(pairs, partial(loops.sums, *as_arrays(pairs, weights, rows), out))
    return torch.from_numpy(out)


def row_dots(
    pairs: Pairs, rows: Float[Tensor, "tokens d_model"], table: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "tokens k"]:
    """For each pair the token's row times the feature's row of the table, in the dtype of the rows.

    Raises:
        QwenScopeError: rows or a table of another number of tokens or features than the pairs.
    """
    check_pairs(pairs, pairs.indices, rows)
    if len(table) != pairs.d_sae:
        raise QwenScopeError(f"expected a table of {pairs.d_sae} rows, found {len(table)}; pass one row per feature")
    loops = compiled_loops(rows.device, rows)
    if loops is None or table.dtype not in (torch.float32, torch.bfloat16):
        return _gathered_row_dots(pairs.indices, rows, table)
    out = torch.empty(pairs.indices.shape)
    starts, order, _, row_array, k = as_arrays(pairs, out, rows)
    table = table.detach().contiguous()
    table_array = (table.view(torch.uint16) if table.dtype == torch.bfloat16 else table).numpy()
    share_features(pairs, partial(loops.dots, starts, order, row_array, table_array, k, out.flatten().numpy()))
    return out


def _gathered_row_dots(indices: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    block = max(1, reference.BLOCK_BYTES // max(1, 4 * indices.shape[1] * rows.shape[1]))
    return torch.cat(
        [
            torch.bmm(table[some].to(rows.dtype), row.unsqueeze(2)).squeeze(2)
            for row, some in zip(rows.split(block), indices.split(block), strict=True)
        ]
    )


def check_pairs(pairs: Pairs, weights: Tensor, rows: Tensor) -> None:
    """Raises a QwenScopeError unless there is one weight per pair and one row per token."""
    if weights.shape != pairs.indices.shape or len(rows) != len(pairs.indices):
        raise QwenScopeError(
            f"expected weights of shape {tuple(pairs.indices.shape)} and a row per token, found "
            f"{tuple(weights.shape)} and {len(rows)} rows; pass those that belong to the pairs"
        )


def compiled_loops(device: torch.device, *tensors: Tensor) -> Any:
    """The module of compiled loops, None where it does not serve: not on the CPU, not float32, no numba."""
    if device.type != "cpu" or any(tensor.dtype != torch.float32 for tensor in tensors):
        return None
    try:
        from qwen_scope.kernels import compiled_pairs
    except ImportError:
        return None
    return compiled_pairs


def as_arrays(pairs: Pairs, weights: Tensor, rows: Tensor) -> tuple[Any, Any, Any, Any, int]:
    """What the compiled loops take first: starts, order, flat weights, rows, k."""
    flat = weights.detach().flatten().numpy()
    return pairs.starts.numpy(), pairs.order.numpy(), flat, rows.detach().contiguous().numpy(), weights.shape[1]


def share_features(pairs: Pairs, loop: Any) -> None:
    """Runs `loop(start, stop)` over all features, each thread's share about as much work as the others'."""
    work = pairs.starts.numpy() + FEATURE_WORK * np.arange(pairs.d_sae + 1)

    def run(begin: int, end: int) -> None:
        start, stop = np.searchsorted(work, (begin, end))
        loop(int(start), int(stop))

    share(run, int(work[-1]))


class TopKValues(torch.autograd.Function):
    """Makes the values that `encode` kept differentiable: `TopKValues.apply(values, indices, x, W_enc, b_enc)`.

    Gives the (tokens, k) values; gradients reach `x`, `W_enc` and `b_enc`, as many as need one.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """The values as they are."""
        ctx.save_for_backward(indices, x, W_enc)
        ctx.bias_dtype = b_enc.dtype
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of `x` (a mix of encoder rows), `W_enc` and `b_enc` (sums over pairs)."""
        [grad] = gradients
        indices, x, W_enc = ctx.saved_tensors
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_x = reference.decode(indices, grad, W_enc, x.new_zeros(x.shape[1])).to(x.dtype)
        if ctx.needs_input_grad[3]:
            pairs = group_by_feature(indices, len(W_enc))
            grad_W = sum_over_pairs(pairs, grad.float(), x.float()).to(W_enc.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = sum_per_feature(indices, grad, len(W_enc)).to(ctx.bias_dtype)
        return None, None, grad_x, grad_W, grad_b


class SparseDecode(torch.autograd.Function):
    """`reference.decode` with sparse gradients: `SparseDecode.apply(indices, values, decoder, b_dec)`.

    Gives the (tokens, d_model) reconstruction; gradients reach `values`, `decoder` and `b_dec`, as many as need one.
    """

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, decoder: Tensor, b_dec: Tensor) -> Tensor:
        """`acts @ decoder + b_dec` in float32."""
        ctx.save_for_backward(indices, values, decoder)
        ctx.bias_dtype = b_dec.dtype
        return reference.decode(indices, values, decoder, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of `values` (a dot product per pair), `decoder` (sums over pairs) and `b_dec`."""
        [grad] = gradients
        indices, values, decoder = ctx.saved_tensors
        grad_values = grad_decoder = grad_b = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            pairs = group_by_feature(indices, len(decoder))
            if ctx.needs_input_grad[1]:
                grad_values = row_dots(pairs, grad, decoder).to(values.dtype)
            if ctx.needs_input_grad[2]:
                grad_decoder = sum_over_pairs(pairs, values.float(), grad).to(decoder.dtype)
        if ctx.needs_input_grad[3]:
            grad_b = grad.sum(0).to(ctx.bias_dtype)
        return None, grad_values, grad_decoder, grad_b


def sum_per_feature(
    indices: Int[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    """For each feature the sum of its pairs' weights, in float32."""
    return torch.zeros(d_sae, device=weights.device).index_add_(0, indices.flatten(), weights.flatten().float())
