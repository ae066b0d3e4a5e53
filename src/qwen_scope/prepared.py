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
from qwen_scope.checkpoint.weights import Weights
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
    path = _place(layer.path())
    weights = layer(check_numbers=not path.exists())
    choice = Choice(kernel, "asked for") if kernel else choose(weights.W_enc, weights.b_enc, k)
    screened = choice.kernel == SCREENED and weights.W_enc.dtype == torch.float32
    tensors = _opened(path)
    if "decoder" not in tensors or (screened and "operand" not in tensors):
        write_safetensors(path, _laid_out(weights, screened), {"format": FORMAT})
        tensors = read_safetensors(path)[0]
    sae = TopKSAE(weights.W_enc, tensors["decoder"].T, weights.b_enc, weights.b_dec, k, activation, kernel)
    if screened:
        screen = Screen(
            product="bfloat16",
            W_enc=weights.W_enc,
            operand=tensors["operand"],
            b_enc=weights.b_enc.float().numpy(),
            lost=tensors["lost"].numpy(),
            length=tensors["length"].numpy(),
            shared=True,
        )
        sae.encoder.adopt(screen, sae.W_enc, sae.b_enc, choice)
    return sae


def _opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a copy; none where there is none, or a damaged one, which is then made again."""
    try:
        return read_safetensors(path)[0]
    except QwenScopeError:
        return {}


def _place(source: Path) -> Path:
    """Where the copy of a file lies: another path, size or time of change is another copy."""
    facts = source.resolve().stat()
    identity = f"{source.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    name = f"{source.name.partition('.')[0]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
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
