"""The classic mistakes, made on purpose: each takes a good SAE and gives the one that a careless reader ends up with."""

import torch

from qwen_scope.sae import TopKSAE


def _changed(sae: TopKSAE, **changes) -> TopKSAE:
    kept = {name: getattr(sae, name).detach().clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return TopKSAE(**{**kept, "k": sae.k, "activation": sae.activation, **changes})


def b_dec_subtracted(sae: TopKSAE) -> TopKSAE:
    """Encodes x - b_dec, as code for another library's SAEs does, though this SAE was trained on x itself."""
    return _changed(sae, b_enc=sae.b_enc - sae.W_enc @ sae.b_dec)


def b_dec_not_subtracted(sae: TopKSAE) -> TopKSAE:
    """The SAE as a library keeps it whose code subtracts b_dec first, read by ours, which does not."""
    return _changed(sae, b_enc=sae.b_enc + sae.W_enc @ sae.b_dec)


def decoder_transposed(sae: TopKSAE) -> TopKSAE:
    """A decoder stored as (d_sae, d_model) and forced into shape: reshaped where it should have been transposed."""
    return _changed(sae, W_dec=sae.W_dec.T.contiguous().reshape(sae.d_model, sae.d_sae))


def encoder_transposed(sae: TopKSAE) -> TopKSAE:
    """An encoder stored as (d_model, d_sae) and forced into shape."""
    return _changed(sae, W_enc=sae.W_enc.T.contiguous().reshape(sae.d_sae, sae.d_model))


def k_of(k: int):
    """Another k than the SAE was trained with."""
    return lambda sae: _changed(sae, k=k)


def exact(d_model: int, b_dec: torch.Tensor | None = None) -> TopKSAE:
    """Not a mistake: an SAE that reconstructs everything exactly, as x = relu(x) - relu(-x) does."""
    both = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    b_dec = torch.zeros(d_model) if b_dec is None else b_dec
    # A bias of the decoder is taken off by the encoder's.
    return TopKSAE(both, both.T.contiguous(), -both @ b_dec, b_dec, k=d_model, activation="topk_relu")
