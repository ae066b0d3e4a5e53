"""One differentiable pass through a TopK autoencoder whose backward never makes a (tokens, d_sae) gradient."""

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Autoencoded(NamedTuple):
    """What one pass gives."""

    x_hat: Float[Tensor, "tokens d_model"]
    """The reconstruction, differentiable in all four parameters."""
    indices: Int[Tensor, "tokens k"]
    """The features kept."""
    values: Float[Tensor, "tokens k"]
    """Their activations after ReLU; for statistics, no gradient flows through them."""


def autoencode(
    x: Float[Tensor, "tokens d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    decoder: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
    k: int,
    product_dtype: torch.dtype = torch.float32,
) -> Autoencoded:
    """`decode(relu(top_k(x @ W_enc.T + b_enc)))` with sparse gradients.

    The gradient of each weight matrix is a sum over the (token, feature) pairs that were kept, taken as one sparse
    product; it equals dense autograd's (tested). `x` gets no gradient.

    Args:
        decoder: `W_dec.T`, one contiguous row per feature.
        product_dtype: of the encoder's matrix product, the costly part; bfloat16 is about twice as fast as float32
            on processors that have it; it rounds the activations and moves features near rank k.
    """
    made: Any = _TopKAutoencode.apply(x, W_enc, b_enc, decoder, b_dec, k, product_dtype)
    return Autoencoded(*made)


class _TopKAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, decoder: Tensor, b_dec: Tensor, k: int, dtype: Any):
        pre = F.linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))
        values, indices = pre.topk(k, dim=1, sorted=False)
        values = values.float().relu()
        x_hat = F.embedding_bag(indices, decoder, per_sample_weights=values, mode="sum") + b_dec
        ctx.save_for_backward(x, decoder, indices, values)
        ctx.mark_non_differentiable(indices, values)
        return x_hat, indices, values

    @staticmethod
    def backward(ctx: Any, *gradients: Any):
        x, decoder, indices, values = ctx.saved_tensors
        grad = gradients[0].contiguous()
        tokens, k = indices.shape
        # Where ReLU cut a value to 0, no gradient passes to the encoder.
        pair_grad = _row_dots(grad, decoder, indices) * (values > 0)
        pairs_by_feature = indices.flatten().argsort(stable=True)
        starts = torch.zeros(len(decoder) + 1, dtype=torch.long, device=x.device)
        starts[1:] = torch.bincount(indices.flatten(), minlength=len(decoder)).cumsum(0)
        token = pairs_by_feature // k

        def sum_over_pairs(weights: Tensor, rows: Tensor) -> Tensor:
            pairs = weights.flatten()[pairs_by_feature]
            shape = (len(decoder), tokens)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                matrix = torch.sparse_csr_tensor(starts, token, pairs, shape, check_invariants=False)
            return matrix @ rows

        grad_b_enc = torch.zeros(len(decoder), device=x.device)
        grad_b_enc.index_add_(0, indices.flatten(), pair_grad.flatten())
        return (
            None,
            sum_over_pairs(pair_grad, x),
            grad_b_enc,
            sum_over_pairs(values, grad),
            grad.sum(0),
            None,
            None,
        )


def _row_dots(
    rows: Float[Tensor, "tokens d_model"], table: Float[Tensor, "d_sae d_model"], indices: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """`rows[n] . table[indices[n, j]]` without gathering (tokens, k, d_model) at once."""
    # The gathered rows of one block fit the cache.
    return torch.cat(
        [
            torch.bmm(table[some], row.unsqueeze(2)).squeeze(2)
            for row, some in zip(rows.split(64), indices.split(64), strict=True)
        ]
    )
