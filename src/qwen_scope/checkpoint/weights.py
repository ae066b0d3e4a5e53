"""`Weights`: the four tensors of one SAE between a file and a `TopKSAE`, and the checks every file goes through."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import replacing
from qwen_scope.sae import Activation, TopKSAE, check_shapes


class Weights(NamedTuple):
    """One SAE in the published convention: `x @ W_enc.T + b_enc` in, `acts @ W_dec.T + b_dec` out."""

    W_enc: Tensor
    """(d_sae, d_model), float32 or bfloat16."""
    W_dec: Tensor
    """(d_model, d_sae)."""
    b_enc: Tensor
    """(d_sae,)."""
    b_dec: Tensor
    """(d_model,)."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[1]

    @staticmethod
    def of(sae: TopKSAE, dtype: torch.dtype | None = None) -> "Weights":
        """An SAE's tensors on the CPU, in another dtype if asked."""
        kept = (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
        return Weights(*(tensor.detach().to("cpu", dtype) for tensor in kept))


def checked(tensors: Mapping[Any, Any], path: Path, check_numbers: bool = True) -> Weights:
    """The four tensors read from `path`, after the checks that every format shares.

    Args:
        check_numbers: look for NaN and infinity, which reads every number once.

    Raises:
        QwenScopeError: missing or unknown keys, something that is not a tensor, a dtype other than float32 and
            bfloat16, shapes that are not those of one SAE, NaN or infinity.
    """
    check_keys(tensors, Weights._fields, path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise QwenScopeError(
                f"expected plain dense tensors in {path}, found {name} of layout {tensor.layout} on {tensor.device}; "
                "save it with .to_dense()"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise QwenScopeError(
                f"expected float32 or bfloat16 weights in {path}, found {name} of {tensor.dtype}; convert it with "
                ".float()"
            )
    weights = Weights(**tensors)
    try:
        check_shapes(*(tuple(tensor.shape) for tensor in weights))
    except QwenScopeError as error:
        raise QwenScopeError(f"in {path}: {error}") from error
    if check_numbers:
        check_finite(weights, path)
    return weights


def check_finite(weights: Weights, path: Path) -> None:
    """Refuses weights with a NaN or an infinity, or none at all; reads every number once."""
    for name, tensor in zip(Weights._fields, weights, strict=True):
        # aminmax reads once, copies nothing (the files are memory-mapped) and hands NaN through.
        if tensor.numel() == 0 or not torch.stack(torch.aminmax(tensor)).isfinite().all():
            found = "an empty tensor" if tensor.numel() == 0 else "NaN or infinity"
            raise QwenScopeError(f"expected finite weights in {path}, found {found} in {name}; get the file again")


def check_keys(tensors: Mapping[Any, Any], keys: tuple[str, ...], path: Path) -> None:
    """Refuses a file whose keys are not exactly `keys`, each with a tensor."""
    if set(tensors) != set(keys):
        missing = [key for key in keys if key not in tensors]
        unknown = sorted(str(key) for key in tensors if key not in keys)
        raise QwenScopeError(
            f"expected the tensors {', '.join(keys)} in {path}, found {', '.join(missing) or 'none'} missing and "
            f"{', '.join(unknown[:5]) or 'none'} too many; check that this is the SAE's file"
        )
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise QwenScopeError(
                f"expected a tensor at {key} in {path}, found a {type(tensor).__name__}; check the file"
            )


class ForeignConfig(NamedTuple):
    """What another library's `cfg.json` says of one SAE, as far as reading its weights needs it."""

    path: Path
    k: int
    activation: Activation
    d_model: int
    d_sae: int
    backbone: str | None
    subtracts_b_dec: bool
    """Whether `b_dec` is taken off the input before encoding."""
    scaled_by_decoder_norm: bool = False
    """Whether pre-activations are multiplied, and activations divided, by the norm of their decoder direction."""


def subtracting_bias(weights: Weights, sign: int) -> Tensor:
    """`b_enc + sign * W_enc @ b_dec`, summed in float64, as float32.

    With sign -1 the encoder bias of an SAE that subtracts `b_dec` from its input becomes ours, with +1 ours becomes
    that SAE's: `W_enc @ (x - b_dec) + b` is `W_enc @ x + (b - W_enc @ b_dec)`.
    """
    chunk = max(1, 2**22 // weights.d_model)  # 32 MiB of float64 at a time instead of a doubled encoder
    products = [rows.double() @ weights.b_dec.double() for rows in weights.W_enc.split(chunk)]
    return (weights.b_enc.double() + sign * torch.cat(products)).float()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        QwenScopeError: no such file, or it holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QwenScopeError(
            f"expected a config at {path}, found none that can be read ({error.strerror or error}); check the path"
        ) from error
    except ValueError as error:
        raise QwenScopeError(f"expected JSON in {path}, found text that does not parse ({error}); repair it") from error
    if not isinstance(value, dict):
        raise QwenScopeError(f"expected a JSON object in {path}, found a {type(value).__name__}; repair it")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
