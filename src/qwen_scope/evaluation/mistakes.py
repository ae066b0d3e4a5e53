"""Which classic mistake explains a bad fit: each is undone in turn, and the one that helps is named."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.sae import TopKSAE

HELPS = 0.85
"""A mistake is named if undoing it leaves at most this share of the unexplained variance…"""
GOOD_ENOUGH = 0.6
"""…and no more than this fraction of the variance unexplained: anything helps an SAE that fits nothing."""
POOR = 0.5
"""More than this fraction of variance unexplained, and nothing to explain it, means: not this model's SAE."""
OTHER_K = (0.25, 0.5, 2, 4)
"""k is also tried at these multiples."""


def find_mistakes(sae: TopKSAE, layer: int, residuals: Mapping[int, Float[Tensor, "tokens d_model"]]) -> list[str]:
    """What seems wrong with reading `residuals[layer]` through `sae`, one sentence each; empty if nothing.

    Undone in turn, each by the definition of the mistake, measured by the fraction of variance unexplained (FVU):
    the residual of another layer; b_dec subtracted before encoding though it should not be, or the reverse; a decoder
    or encoder whose rows and columns were confused by a reshape; another k. If nothing helps and the FVU is above
    `POOR`, the SAE is said not to belong to this model.

    Args:
        residuals: of the layer itself and, where the model has them, its neighbours; the same tokens everywhere,
            position 0 and norm outliers left out.
    """
    x = residuals[layer]
    measured = fvu(x, sae(x))
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
    for multiple in OTHER_K:
        k = round(sae.k * multiple)
        if 1 <= k <= sae.d_sae:
            tried[f"k wrong: the SAE fits better with k = {k} than with k = {sae.k}"] = fvu(
                x, sae.decode(sae.encode(x, k=k))
            )
    name, best = min(tried.items(), key=lambda item: item[1])
    if best <= HELPS * measured and best <= GOOD_ENOUGH:
        return [f"{name} (variance unexplained {best:.3f} instead of {measured:.3f})"]
    if not measured <= POOR:
        return [
            f"poor fit: {measured:.2f} of the variance at layer {layer} is unexplained and no known mistake explains it; the "
            "SAE seems to belong to another model"
        ]
    return []


def _reread(sae: TopKSAE, *, encoder: bool = False, decoder: bool = False) -> TopKSAE:
    W_enc, W_dec = sae.W_enc, sae.W_dec
    if encoder:
        W_enc = W_enc.reshape(sae.d_model, sae.d_sae).T.contiguous()
    if decoder:
        W_dec = W_dec.reshape(sae.d_sae, sae.d_model).T
    with torch.no_grad():
        return TopKSAE(W_enc, W_dec, sae.b_enc, sae.b_dec, sae.k, sae.activation)
