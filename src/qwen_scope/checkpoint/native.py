"""Our own format: `layer{n}.safetensors` with the published keys and shapes, one `config.json` for the folder."""

from pathlib import Path

from qwen_scope.checkpoint.weights import Weights, checked
from qwen_scope.files import read_safetensors, write_safetensors


def read(path: Path, check_numbers: bool = True) -> Weights:
    """The weights of one file, memory-mapped.

    Raises:
        QwenScopeError: no such file, one that is not whole, or weights `checked` refuses.
    """
    return checked(read_safetensors(path)[0], path, check_numbers)


def write(path: Path, weights: Weights) -> None:
    """Writes one file, atomically."""
    write_safetensors(path, weights._asdict(), {"format": "qwen-scope sae 1"})
