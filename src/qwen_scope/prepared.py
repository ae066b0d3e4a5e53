"""A copy of one layer in the cache folder, laid out as encoding and decoding read it; made at the first use.

It holds what is otherwise made anew in every process: the encoder's bfloat16 operand with its norms, and the decoder with
one row per feature. The float32 encoder stays in its own file, memory-mapped: only the rows of candidate features are read.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_scope.checkpoint.contents import OwnLayer
from qwen_scope.checkpoint.weights import Weights, check_finite
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import cache_folder, read_safetensors, write_safetensors
from qwen_scope.kernels import Choice, Kernel, choose
from qwen_scope.kernels.screen import Screen
from qwen_scope.sae import Activation, TopKSAE

SCREENED: Kernel = "cpu-bfloat16"
FORMAT = "qwen-scope prepared layer 1"


def prepare(layer: OwnLayer, k: int, activation: Activation, kernel: Kernel | None) -> TopKSAE:
    """The SAE of a layer's file, from its prepared copy, which is made if it is not there.

    A file that changes gets a new copy. Numbers are checked to be finite when the copy is made.

    Raises:
        QwenScopeError: a file that cannot be used, or a cache folder that cannot be written.
    """
    weights = layer(check_numbers=False)
    path = _place(layer.path(), weights)
    tensors = _opened(path, weights)
    if not tensors:
        check_finite(weights, layer.path())
    choice = Choice(kernel, "asked for") if kernel else choose(weights.W_enc, weights.b_enc, k)
    screened = choice.kernel == SCREENED and weights.W_enc.dtype == torch.float32
    if not tensors or (screened and "operand" not in tensors):
        tensors = _laid_out(weights, screened)
        write_safetensors(path, tensors, {"format": FORMAT})
        tensors = _opened(path, weights) or tensors
    sae = TopKSAE(weights.W_enc, tensors["decoder"].T, weights.b_enc, weights.b_dec, k, activation, kernel)
    if screened and "operand" in tensors:
        screen = Screen(
            product="bfloat16",
            W_enc=weights.W_enc,
            operand=tensors["operand"],
            b_enc=weights.b_enc.float().numpy(),
            lost=tensors["lost"].numpy(),
            length=tensors["length"].numpy(),
            copied=0,
        )
        sae.encoder.adopt(screen, sae.W_enc, sae.b_enc, k, choice)
    return sae


def _opened(path: Path, weights: Weights) -> dict[str, Tensor]:
    """The tensors of a copy; none where there is none, or one that does not fit, which is then made again."""
    try:
        tensors, metadata = read_safetensors(path)
    except (QwenScopeError, OSError):
        return {}
    shape, d_sae = weights.W_enc.shape, (weights.d_sae,)
    expected = {"decoder": shape, "operand": shape, "lost": d_sae, "length": d_sae}
    fits = metadata.get("format") == FORMAT and "decoder" in tensors
    return tensors if fits and all(tensor.shape == expected.get(name) for name, tensor in tensors.items()) else {}


def _place(source: Path, weights: Weights) -> Path:
    """Where the copy of a file lies: another path, size, time of change or sample of its numbers is another copy."""
    facts = source.resolve().stat()
    digest = hashlib.sha256(f"{FORMAT} {source.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
    for tensor in weights:
        steps = [slice(None, None, max(1, size // 32)) for size in tensor.shape]
        digest.update((tensor[steps[0]] if tensor.ndim == 1 else tensor[steps[0], steps[1]]).float().numpy().tobytes())
    name = f"{source.name.partition('.')[0]}-{digest.hexdigest()[:16]}"
    return cache_folder() / "prepared" / f"{name}.safetensors"


def _laid_out(weights: Weights, screened: bool) -> dict[str, Tensor]:
    tensors = {"decoder": weights.W_dec.T.contiguous()}
    screen = Screen.of(weights.W_enc, weights.b_enc, "bfloat16") if screened else None
    if screen is not None:
        norms = {
            "lost": torch.from_numpy(np.asarray(screen.lost)),
            "length": torch.from_numpy(np.asarray(screen.length)),
        }
        tensors |= {"operand": screen.operand} | norms
    return tensors
