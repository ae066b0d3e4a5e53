"""What `encode` and `decode` refuse: shapes, dtypes and devices that do not agree, one sentence each."""

import torch
from torch import Tensor

from qwen_scope.errors import QwenScopeError


def check_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> None:
    """Refuses what is no encoding of at least one token."""
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[1] or b_enc.shape != W_enc.shape[:1]:
        raise QwenScopeError(
            "expected x (tokens, d_model), W_enc (d_sae, d_model) and b_enc (d_sae,), found "
            f"{_shapes(x, W_enc, b_enc)}; pass tensors of one SAE"
        )
    if x.numel() == 0:
        raise QwenScopeError(f"expected at least one token, found x of shape {tuple(x.shape)}; pass a token")
    if not isinstance(k, int) or not 1 <= k <= len(W_enc):
        raise QwenScopeError(f"expected k from 1 to d_sae = {len(W_enc)}, found k = {k!r}; choose one of those")
    _check_kinds(x=x, W_enc=W_enc, b_enc=b_enc)


def check_decode(indices: Tensor, values: Tensor, decoder: Tensor, b_dec: Tensor) -> None:
    """Refuses what is no sparse pair of features of the decoder."""
    if indices.ndim != 2 or indices.shape != values.shape or decoder.ndim != 2 or b_dec.shape != decoder.shape[1:]:
        raise QwenScopeError(
            "expected indices and values (tokens, k), decoder (d_sae, d_model) and b_dec (d_model,), found "
            f"{_shapes(indices, values, decoder, b_dec)}; pass what encode gave and the decoder's rows"
        )
    if indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise QwenScopeError(f"expected whole numbers as indices, found {indices.dtype}; pass what encode gave")
    _check_kinds(values=values, decoder=decoder, b_dec=b_dec)
    if indices.device != decoder.device:
        raise QwenScopeError(
            f"expected indices on {decoder.device} as the decoder is, found them on {indices.device}; move one with .to()"
        )
    # On a GPU looking would mean waiting.
    if (
        indices.numel()
        and indices.device.type == "cpu"
        and not 0 <= int(indices.min()) <= int(indices.max()) < len(decoder)
    ):
        raise QwenScopeError(
            f"expected features from 0 to {len(decoder) - 1}, found {int(indices.min())} to {int(indices.max())}; decode "
            "with the SAE that encoded them"
        )


def _check_kinds(**tensors: Tensor) -> None:
    wrong = {name: tensor.dtype for name, tensor in tensors.items() if not tensor.is_floating_point()}
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise QwenScopeError(f"expected floating-point tensors, found {name} of {dtype}; convert it with .float()")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise QwenScopeError(f"expected all tensors on one device, found {places}; move some with .to()")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
