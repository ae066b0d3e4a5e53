"""The definition of encode and decode: the model card's arithmetic, in float32, in bounded memory.

Knows nothing of SAEs, files or text: tensors in, tensors out.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError

CHUNK_TOKENS = 1024
"""Tokens whose pre-activations are computed together: each reads the whole encoder once."""
BLOCK_BYTES = 32 * 2**20
"""Pre-activations, or weights converted to float32, held at a time."""


def encode(
    x: Float[Tensor, "tokens d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """The k largest of `x @ W_enc.T + b_enc` for each token, strongest first.

    Computed in float32 whatever the dtypes given, a block of tokens and features at a time, so that no (tokens, d_sae)
    matrix ever exists. Equal pre-activations are ordered by the lower feature index, so the result is defined even
    there. Values are the raw pre-activations and may be negative where fewer than k are positive. Differentiable.

    Source: the model card's `get_feature_acts`.

    Raises:
        QwenScopeError: a token's pre-activations hold a NaN or an infinity.
    """
    indices, values = encode_rows(x, W_enc, b_enc, k)
    refuse_non_finite(values)
    return indices, values


def encode_rows(
    x: Float[Tensor, "tokens d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """`encode` before it looks for NaN and infinity.

    Args:
        dtype: what the products are computed in, before they are rounded to float32 and compared.
    """
    parts = [_encode_chunk(rows.to(dtype), W_enc, b_enc, k) for rows in x.split(CHUNK_TOKENS)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def refuse_non_finite(values: Float[Tensor, "tokens k"]) -> None:
    """Raises if a row holds NaN or infinity: topk puts NaN and +inf first, so a bad row always shows among those kept."""
    bad = ~values.isfinite().all(dim=1)
    if bad.any():
        raise QwenScopeError(
            f"expected finite residuals, found NaN or infinity in the pre-activations of {int(bad.sum())} of {len(values)} "
            f"tokens (the first at row {int(bad.nonzero()[0])}); check the model's dtype (float16 overflows on "
            "residual streams, bfloat16 and float32 do not) and the SAE's weights"
        )


def _encode_chunk(
    x: Float[Tensor, "tokens d_model"], W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, " d_sae"], k: int
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    block = BLOCK_BYTES // (x.element_size() * len(x))
    if W_enc.dtype != x.dtype:
        block = min(block, BLOCK_BYTES // (x.element_size() * x.shape[1]))
    block = max(block, 1)
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(b_enc), block):
        rows = slice(start, start + block)
        pre = F.linear(x, W_enc[rows].to(x.dtype), b_enc[rows].to(x.dtype))
        indices, values = _top_k(pre.float(), k)
        best.append((indices + start, values))
    if len(best) == 1:
        return best[0]
    # Blocks are in order of their features and each in order of its values, equal ones by index: so is what a stable
    # sort makes of them.
    values, place = torch.cat([part[1] for part in best], dim=1).sort(dim=1, descending=True, stable=True)
    return torch.cat([part[0] for part in best], dim=1).gather(1, place[:, :k]), values[:, :k]


def _top_k(
    pre: Float[Tensor, "tokens features"], k: int
) -> tuple[Int[Tensor, "tokens kept"], Float[Tensor, "tokens kept"]]:
    # One more than k shows a tie across the border; torch.topk itself promises no order among equals.
    values, indices = pre.topk(min(k + 1, pre.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    values, indices = values[:, :k], indices[:, :k]
    if tied.any():
        sorted_values, sorted_indices = pre[tied].sort(dim=1, descending=True, stable=True)
        values = values.index_put((tied,), sorted_values[:, :k])
        indices = indices.index_put((tied,), sorted_indices[:, :k])
    return indices, values


def decode(
    indices: Int[Tensor, "tokens k"],
    values: Float[Tensor, "tokens k"],
    decoder: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
) -> Float[Tensor, "tokens d_model"]:
    """`acts @ W_dec.T + b_dec` from the sparse pair, in float32, reading only the k decoder rows each token needs.

    Args:
        decoder: `W_dec.T`, one row per feature; contiguous rows are what makes this fast.

    Differentiable in `values`, `decoder` and `b_dec`.
    """
    if decoder.dtype != torch.float32:
        # Only the rows that are needed are converted.
        needed, indices = indices.unique(return_inverse=True)
        decoder = decoder[needed].float()
    x_hat = F.embedding_bag(indices, decoder, per_sample_weights=values.float(), mode="sum")
    return x_hat + b_dec.float()
