"""The four trained tensors in the trainer's units: taken from an SAE of raw residuals, and folded into one."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from qwen_scope.sae import Activation, TopKSAE
from qwen_scope.training.group import Group
from qwen_scope.training.normalise import Normalisation


class Weights(NamedTuple):
    """Parameters of an autoencoder of normalised residuals; of a rank's own features, where ranks share them."""

    W_enc: Float[Tensor, "d_sae d_model"]
    """One row per feature."""
    b_enc: Float[Tensor, " d_sae"]
    """Added to the pre-activations."""
    decoder: Float[Tensor, "d_sae d_model"]
    """The direction of each feature, one contiguous row each."""
    b_dec: Float[Tensor, " d_model"]
    """Added to the reconstruction."""


def has_unit_rows(sae: TopKSAE) -> bool:
    """Whether each feature's direction has norm 1, as far as bfloat16 can tell; published checkpoints do not promise it."""
    norms = sae.W_dec.detach().float().norm(dim=0)
    return bool(((norms - 1).abs() < 0.01).all())


def as_sae(
    weights: Weights, normalise: Normalisation, k: int, activation: Activation, features: Group | None = None
) -> TopKSAE:
    """The SAE of raw residuals: centre and scale are folded into the biases, so that it subtracts and scales nothing.

    Decoder rows keep their norm, so activations come out in the residual stream's units.

    Args:
        features: ranks that hold other features; all call this together and get the whole SAE.
    """
    centre, scale = normalise.centre, normalise.scale
    of_features = ((features or Group()).gather(tensor.detach()).flatten(0, 1) for tensor in weights[:3])
    W_enc, b_enc, decoder = (tensor.clone() for tensor in of_features)
    b_enc = b_enc * scale - (W_enc.double() @ centre.double()).float()
    return TopKSAE(W_enc, decoder.T, b_enc, weights.b_dec.detach() * scale + centre, k, activation)


def of_sae(sae: TopKSAE, normalise: Normalisation, features: Group | None = None) -> Weights:
    """Weights that do in normalised units what an SAE does to raw residuals: the inverse of `as_sae`, exact but for rounding.

    Pre-activations are those of the SAE divided by the scale, so the same features are kept in the same order.

    Args:
        features: ranks that hold other features; each gets its own.
    """
    centre, scale = normalise.centre, normalise.scale
    own = (features or Group()).share(sae.d_sae)
    held = (sae.W_enc[own], sae.b_enc[own], sae.W_dec.T[own], sae.b_dec)
    W_enc, b_enc, decoder, b_dec = (tensor.detach().to(centre.device).float() for tensor in held)
    b_enc = ((b_enc.double() + W_enc.double() @ centre.double()) / scale).float()
    return Weights(W_enc.clone(), b_enc, decoder.clone().contiguous(), (b_dec - centre) / scale)
