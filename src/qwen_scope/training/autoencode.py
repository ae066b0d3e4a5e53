"""One differentiable pass through a TopK autoencoder whose backward never makes a (tokens, d_sae) gradient."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope import kernels
from qwen_scope.sae import Activation


class Autoencoded(NamedTuple):
    """What one pass gives."""

    x_hat: Float[Tensor, "tokens d_model"]
    """The reconstruction, differentiable in the four parameters and in `x`."""
    indices: Int[Tensor, "tokens k"]
    """The features kept."""
    values: Float[Tensor, "tokens k"]
    """Their activations; for statistics, no gradient flows through them."""


def autoencode(
    x: Float[Tensor, "tokens d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    decoder: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
    k: int,
    encoder: kernels.Encoder | None = None,
    activation: Activation = "topk_relu",
) -> Autoencoded:
    """`decode(relu(top_k(x @ W_enc.T + b_enc)))` with sparse gradients, to fine-tune an SAE with any loss.

    The gradient of each weight matrix is a sum over the (token, feature) pairs that were kept.

    Args:
        decoder: `W_dec.T`, one contiguous row per feature.
        encoder: kept from step to step, it encodes by the fastest kernel; without one, the reference does.
        activation: `topk` leaves the ReLU out.

    Raises:
        QwenScopeError: a token's pre-activations hold a NaN or an infinity.
    """
    indices, kept = kernels.encode(x, W_enc, b_enc, k, encoder)
    # Where ReLU cuts a value to 0, no gradient passes to the encoder.
    values = kept.relu() if activation == "topk_relu" else kept
    return Autoencoded(kernels.decode(indices, values, decoder, b_dec), indices, values.detach())
