"""Encode and decode on plain tensors: one entry each, whatever the machine; `choice` decides which path runs.

`reference` is the definition: torch only, any device, the card's arithmetic in float32. The others return the k largest
exact pre-activations (`screen`), which are the same features wherever float32 can tell them apart.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.kernels import pairs, reference
from qwen_scope.kernels.arguments import check_decode, check_encode
from qwen_scope.kernels.choice import Choice, Kernel, choose
from qwen_scope.kernels.encoder import Encoder

__all__ = ["Choice", "Encoder", "Kernel", "choose", "decode", "encode"]


def encode(
    x: Float[Tensor, "tokens d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    encoder: Encoder | None = None,
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """The k largest of `x @ W_enc.T + b_enc` for each token, strongest first, equal ones by the lower feature.

    No (tokens, d_sae) matrix ever exists, in the backward pass neither: the gradient of `W_enc` is a sum over the
    (token, feature) pairs that were kept. Values are raw pre-activations in float32 and may be negative.

    Args:
        encoder: keeps what the fast path needs between calls; without one, the reference runs.

    Raises:
        QwenScopeError: shapes, dtypes or devices that do not agree, no token, k outside 1..d_sae, or pre-activations
            that hold a NaN or an infinity.
    """
    check_encode(x, W_enc, b_enc, k)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        find = reference.encode if encoder is None else encoder.encode
        indices, values = find(x, W_enc, b_enc, k)
    if torch.is_grad_enabled() and (x.requires_grad or W_enc.requires_grad or b_enc.requires_grad):
        values = pairs.TopKValues.apply(values, indices, x, W_enc, b_enc)
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

    Differentiable in `values`, `decoder` and `b_dec`, with sparse sums in the backward pass as in `encode`.

    Raises:
        QwenScopeError: shapes, dtypes or devices that do not agree, or features that the decoder does not have.
    """
    check_decode(indices, values, decoder, b_dec)
    if torch.is_grad_enabled() and (values.requires_grad or decoder.requires_grad or b_dec.requires_grad):
        return pairs.SparseDecode.apply(indices, values, decoder, b_dec)
    return reference.decode(indices, values, decoder, b_dec)
