"""Which classic mistake explains a bad fit: each is undone in turn, and the one that helps is named."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.sae import TopKSAE

HELPS = 0.92
"""A mistake is named if undoing it leaves at most this share of the unexplained variance…"""
GOOD_ENOUGH = 0.5
"""…and no more than this fraction of the variance unexplained; above it, with nothing to explain it, an SAE is not this
model's."""
LENGTH_OFF = 0.05
"""k is called wrong if reconstructions fit best at a length that differs from their own by at least this fraction."""
NEGLIGIBLE = 0.01
"""No mistake is looked for where no more than this fraction is unexplained: the rest may be rounding."""
# Measured on the bundled SAEs (k = 50) and on the same trained with a tenth of the tokens:
#                                  read rightly    read wrongly
#   layer before or after / own    1.19 to 2.2     0.45 to 0.84
#   b_dec taken off or put back    1.5 to 2.8      0.36 to 0.65
#   best length                    0.995 to 1.008  0.78 to 0.94 (k = 100), 1.07 to 1.25 (k = 25)
# The k with the smallest FVU does not tell: a TopK SAE fits best at 1.2 to 4 times the k it was trained with.


def find_mistakes(sae: TopKSAE, layer: int, residuals: Mapping[int, Float[Tensor, "tokens d_model"]]) -> list[str]:
    """What seems wrong with reading `residuals[layer]` through `sae`, one sentence each; empty if nothing.

    Undone in turn, each by the definition of the mistake, measured by the fraction of variance unexplained (FVU):
    the residual of another layer; b_dec subtracted before encoding though it should not be, or the reverse; a decoder
    or encoder whose rows and columns were confused by a reshape. If none helps, k is judged by `best_length`. If that
    is right too and the FVU above `GOOD_ENOUGH`, the SAE is said not to belong to this model. The thresholds are this
    module's constants.

    Args:
        residuals: of the layer itself and, where the model has them, its neighbours; the same tokens everywhere,
            position 0 and norm outliers left out.
    """
    x = residuals[layer]
    measured = fvu(x, sae(x))
    # NaN: a single token, or tokens all alike, have no variance to explain.
    if math.isnan(measured) or measured <= NEGLIGIBLE:
        return []
    name, left = min(_undone(sae, layer, residuals).items(), key=lambda item: item[1])
    if left <= HELPS * measured and left <= GOOD_ENOUGH:
        return [f"{name} (variance unexplained {left:.3f} instead of {measured:.3f})"]
    if abs(best_length(sae, x, sae.k) - 1) >= LENGTH_OFF:
        k = _trained_k(sae, x)
        left = fvu(x, sae.decode(sae.encode(x, k=k)))
        if k != sae.k and left <= GOOD_ENOUGH:
            return [
                f"k wrong: k = {sae.k} is too {'small' if k > sae.k else 'large'}, the SAE seems trained with k = {k} "
                f"(variance unexplained {left:.3f} instead of {measured:.3f})"
            ]
    if measured > GOOD_ENOUGH:
        return [
            f"poor fit: {measured:.2f} of the variance at layer {layer} is unexplained and no known mistake explains it; "
            "the SAE seems to belong to another model"
        ]
    return []


def best_length(sae: TopKSAE, x: Float[Tensor, "tokens d_model"], k: int) -> float:
    """The factor a at which `a * (x_hat - b_dec)` is nearest to `x - b_dec` in squared error.

    It is 1 at the k an SAE was trained with: training could scale all activations at will, so a minimum of its squared
    error is one in a too. More features make reconstructions too long (a < 1); fewer make them too short, the more so
    the less orthogonal the features are.
    """
    made = sae.decode(sae.encode(x, k=k)) - sae.b_dec
    return float(((x - sae.b_dec) * made).sum() / made.pow(2).sum())


def _trained_k(sae: TopKSAE, x: Float[Tensor, "tokens d_model"]) -> int:
    """The largest k at which reconstructions are not too long, by bisection: `best_length` falls as k grows."""
    low, high = 1, min(8 * sae.k, sae.d_sae)
    while low < high:
        k = (low + high + 1) // 2
        low, high = (k, high) if best_length(sae, x, k) >= 1 else (low, k - 1)
    return low


def _undone(sae: TopKSAE, layer: int, residuals: Mapping[int, Float[Tensor, "tokens d_model"]]) -> dict[str, float]:
    """The FVU that undoing each mistake but a wrong k leaves."""
    x = residuals[layer]
    tried: dict[str, float] = {}
    for other, y in residuals.items():
        if other != layer:
            tried[
                f"layer off by {abs(other - layer)}: the SAE fits the residual after layer {other} better than that after "
                f"layer {layer} (layers count from 0, and the residual is taken after the layer)"
            ] = fvu(y, sae(y))
    tried[
        "b_dec not subtracted: the SAE fits if b_dec is subtracted before encoding, so fold it in once: "
        "b_enc - W_enc @ b_dec"
    ] = fvu(x, sae.decode(sae.encode(x - sae.b_dec)))
    tried[
        "b_dec subtracted: the SAE fits if what seems to be a subtraction of b_dec is undone, so its b_enc should be "
        "b_enc + W_enc @ b_dec"
    ] = fvu(x, sae.decode(sae.encode(x + sae.b_dec)))
    tried[
        "transposed decoder: the SAE fits if W_dec's numbers are read as (d_sae, d_model) and transposed, so it was "
        "reshaped where it should have been transposed"
    ] = fvu(x, _reread(sae, decoder=True)(x))
    tried[
        "transposed encoder: the SAE fits if W_enc's numbers are read as (d_model, d_sae) and transposed, so it was "
        "reshaped where it should have been transposed"
    ] = fvu(x, _reread(sae, encoder=True)(x))
    return tried


def _reread(sae: TopKSAE, *, encoder: bool = False, decoder: bool = False) -> TopKSAE:
    W_enc, W_dec = sae.W_enc, sae.W_dec
    if encoder:
        W_enc = W_enc.reshape(sae.d_model, sae.d_sae).T.contiguous()
    if decoder:
        W_dec = W_dec.reshape(sae.d_sae, sae.d_model).T
    with torch.no_grad():
        return TopKSAE(W_enc, W_dec, sae.b_enc, sae.b_dec, sae.k, sae.activation)
