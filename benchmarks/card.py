"""The model card's own arithmetic: its `get_feature_acts`, with the weights and k as arguments instead of globals."""

import torch
from torch import Tensor


def get_feature_acts(residual: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """residual: (..., d_model) -> sparse feature activations in dense form (..., d_sae)."""
    pre_acts = residual @ W_enc.T + b_enc
    topk_vals, topk_idx = pre_acts.topk(k, dim=-1)
    acts = torch.zeros_like(pre_acts)
    acts.scatter_(-1, topk_idx, topk_vals)
    return acts


def decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """The card shows no decoder; this is the one its shapes define. W_dec: (d_model, d_sae)."""
    return acts @ W_dec.T + b_dec
