"""What a harvest has found so far, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.index.partial import Keep, Partial
from qwen_scope.suite import Suite


@dataclass(eq=False)
class Total:
    """The `Partial` of each layer over the first shards."""

    shards: int
    """How many."""
    layers: dict[int, Partial]
    """What was found, by layer."""

    @staticmethod
    def open(work: Path, suite: Suite, layers: Sequence[int], keep: Keep) -> Total:
        """What was saved, or nothing yet."""
        path = _path(work)
        if not path.exists():
            width = sum(keep.window) + 1
            return Total(0, {layer: Partial.none(suite[layer].d_sae, suite[layer].k, width) for layer in layers})
        found, metadata = read_partials(path)
        return Total(int(metadata["shards"]), found)

    def add(self, found: Mapping[int, Partial], keep: Keep) -> None:
        """Adds the next shard."""
        self.layers = {layer: partial.merged(found[layer], keep) for layer, partial in self.layers.items()}
        self.shards += 1

    def save(self, work: Path) -> None:
        """Writes everything, atomically."""
        write_partials(_path(work), self.layers, {"shards": str(self.shards)})


def _path(work: Path) -> Path:
    return work / "total.safetensors"


def write_partials(path: Path, partials: Mapping[int, Partial], metadata: dict[str, str]) -> None:
    """Writes partials by layer to one file, atomically."""
    tensors = {
        f"{layer}/{name}": torch.from_numpy(np.asarray(array, order="C"))
        for layer, partial in partials.items()
        for name, array in partial.arrays().items()
    }
    write_safetensors(path, tensors, metadata)


def read_partials(path: Path) -> tuple[dict[int, Partial], dict[str, str]]:
    """What `write_partials` wrote."""
    tensors, metadata = read_safetensors(path)
    by_layer: dict[int, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.partition("/")
        # Read into memory: the file will be replaced.
        by_layer.setdefault(int(layer), {})[name] = tensor.clone().numpy()
    return {layer: Partial.of_arrays(arrays) for layer, arrays in sorted(by_layer.items())}, metadata
