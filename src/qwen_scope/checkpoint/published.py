"""The published format: `layer{n}.sae.pt`, a pickled dict of four tensors."""

import pickle
import zipfile
from pathlib import Path

import torch

from qwen_scope.checkpoint.weights import Weights, checked
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import replacing


def read(path: Path, check_numbers: bool = True) -> Weights:
    """The weights of a published file, memory-mapped (files in torch's old, unzipped format are read into memory).

    Only tensors are unpickled; a pickle that names code is refused and nothing of it runs.

    Raises:
        QwenScopeError: no such file, one that is damaged, unsafe or no pickle, or weights `checked` refuses.
    """
    if not path.is_file():
        raise QwenScopeError(f"expected an SAE at {path}, found no file; check the path")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    # Damaged bytes can make the unpickler raise nearly anything.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise QwenScopeError(
                f"expected only tensors in {path}, found a pickle that calls other code; the file is unsafe, do not "
                "load it"
            ) from error
        raise QwenScopeError(
            f"expected a whole torch checkpoint at {path}, found {path.stat().st_size} bytes that do not load "
            f"({type(error).__name__}); get the file again"
        ) from error
    if not isinstance(loaded, dict):
        raise QwenScopeError(
            f"expected a dict of four tensors in {path}, found a {type(loaded).__name__}; check that this is an SAE's "
            "file"
        )
    return checked(loaded, path, check_numbers)


def write(path: Path, weights: Weights) -> None:
    """Writes a published file, atomically."""
    with replacing(path) as temporary:
        # A clone where the storage is larger than the tensor: torch.save would write all of it.
        tensors = {
            name: t.contiguous()
            if t.untyped_storage().nbytes() == t.nbytes
            else t.clone(memory_format=torch.contiguous_format)
            for name, t in weights._asdict().items()
        }
        torch.save(tensors, temporary)
