"""Residuals of pieces, a block at a time: what the trainers of all layers draw their shuffled batches from.

The pieces are put in one random order and cut into blocks of about `buffer_tokens` residuals, which fit into memory. A
block is read by one pass of the model for all layers, then each layer draws its residuals in a random order of their own.
Everything follows from the seed and a number: the n-th visit is the same whenever it is made, so a run that was killed
finds its place again without any saved state of random numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.checkpoint.weights import read_json, write_json
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import BATCH_TOKENS, batches
from qwen_scope.training.pieces import Pieces

if TYPE_CHECKING:
    from qwen_scope.training.group import Group

Residuals = dict[int, Float[Tensor, "tokens d_model"]]
"""Residuals of one block by layer."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of some pieces and the order in which they are visited.

    Args:
        pieces: all pieces.
        chosen: numbers of those to read.
        seed: of the order of pieces and of blocks.
        buffer_tokens: the n-th block ends with the piece that brings all so far to at least n times this many residuals.
    """

    pieces: Pieces
    chosen: Int[np.ndarray, " train"]
    seed: int
    buffer_tokens: int

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        order = self.chosen[random.permutation(len(self.chosen))]
        ends = np.cumsum(self.pieces.rows[order])
        last = np.searchsorted(ends, np.arange(self.buffer_tokens, ends[-1], self.buffer_tokens)) + 1
        object.__setattr__(self, "_blocks", [part for part in np.split(order, np.unique(last)) if len(part)])

    def __len__(self) -> int:
        """Blocks in one pass over the pieces."""
        return len(self._blocks)  # pyright: ignore[reportAttributeAccessIssue]

    def number(self, visit: int) -> int:
        """Which block the n-th visit goes to: each pass over all of them has an order of its own.

        Visiting a block several times in a row would spare the model, but the SAE fits worse than after passes over all.
        """
        sweep, at = divmod(visit, len(self))
        return int(np.random.default_rng((self.seed, sweep)).permutation(len(self))[at]) if sweep else at

    def of(self, number: int) -> Int[np.ndarray, " some"]:
        """Numbers of the pieces in a block."""
        return self._blocks[number]  # pyright: ignore[reportAttributeAccessIssue]

    def shuffled(self, kept: Int[Tensor, " tokens"], visit: int) -> Int[Tensor, " tokens"]:
        """Rows of a block in the order of the n-th visit; a layer's order does not depend on the other layers."""
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.seed, 1, visit)).generate_state(1)[0])
        )
        return kept[torch.randperm(len(kept), generator=generator)]


@torch.no_grad()
def read_block(
    backbone: Backbone,
    pieces: Pieces,
    numbers: Sequence[int] | Int[np.ndarray, " some"],
    layers: Sequence[int],
    *,
    forward_tokens: int = BATCH_TOKENS,
    group: "Group | None" = None,
    owners: Mapping[int, int] | None = None,
    told: Callable[[int], None] = lambda tokens: None,
) -> Residuals:
    """The residuals of some pieces but those at position 0, on the CPU, in the model's dtype.

    The order of rows is that of the model's batches (pieces of like length together), the same on any number of processes.

    Args:
        forward_tokens: tokens in one pass of the model, padding included.
        group: processes that share the reading; all must call this together.
        owners: with a group, the rank that alone gets each layer; None gives every layer to all.
        told: is called after each pass of the model with the number of its residuals.
    """
    todo = batches(pieces.texts([int(n) for n in numbers]), backbone, forward_tokens)
    rows = [int(batch.real[:, 1:].sum()) for batch in todo]
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    held: Residuals = {}
    start = 0
    for number, (batch, count) in enumerate(zip(todo, rows, strict=True)):
        if number % size == rank:
            residuals = backbone.residuals(batch.ids, batch.attention_mask, layers=layers)
            keep = batch.real.clone()
            keep[:, 0] = False
            for layer, x in residuals.items():
                if layer not in held:
                    # What other ranks read stays 0 until the sum.
                    held[layer] = (torch.empty if size == 1 else torch.zeros)(sum(rows), x.shape[-1], dtype=x.dtype)
                held[layer][start : start + count] = x[keep.to(x.device)].cpu()
            told(count)
        start += count
    if group is None or size == 1:
        return held
    return _exchanged(held, layers, sum(rows), backbone, group, owners)


def _exchanged(
    held: Residuals,
    layers: Sequence[int],
    rows: int,
    backbone: Backbone,
    group: "Group",
    owners: Mapping[int, int] | None,
) -> Residuals:
    """Sums of what all ranks hold: every row is read by one of them and 0 elsewhere."""
    found: Residuals = {}
    for layer in sorted(layers):
        # A block of fewer batches than ranks leaves some without any.
        x = held.pop(layer, None)
        x = torch.zeros(rows, backbone.d_model, dtype=backbone.model.dtype) if x is None else x
        # As bytes, which every backend can add up: nothing is rounded, since all but one are 0.
        group.sum(x.view(torch.uint8))
        if owners is None or owners[layer] == group.rank:
            found[layer] = x
    return found


class BlockCache:
    """Residual blocks kept on disk, a file for each block and layer, so that other runs on the same text need no model.

    Args:
        folder: where they lie.
        about: what the residuals depend on beside block and layer, in plain values.

    Raises:
        QwenScopeError: the folder holds residuals of something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder = folder
        path = folder / "about.json"
        if not path.exists():
            write_json(path, about)
        found = read_json(path)
        different = [
            f"{name} {found.get(name)!r} and not {value!r}" for name, value in about.items() if found.get(name) != value
        ]
        if different:
            raise QwenScopeError(
                f"expected residuals of this model and text in the cache {folder}, found {'; '.join(different)}; use another "
                "folder"
            )

    def load(self, number: int, layers: Sequence[int]) -> Residuals:
        """A block's residuals (memory-mapped) at those of the layers that are there."""
        paths = {layer: self._path(number, layer) for layer in layers}
        return {layer: read_safetensors(path)[0]["x"] for layer, path in paths.items() if path.exists()}

    def save(self, number: int, residuals: Residuals) -> None:
        """Writes a block, each layer's file atomically."""
        for layer, x in residuals.items():
            write_safetensors(self._path(number, layer), {"x": x}, {})

    def _path(self, number: int, layer: int) -> Path:
        return self.folder / f"block-{number:05d}-layer{layer}.safetensors"


def kept_rows(x: Float[Tensor, "tokens d_model"]) -> Int[Tensor, " kept"]:
    """Rows of a block that are trained on: those that are no norm outliers of the block (see `qwen_scope.outliers`)."""
    return (~norm_outliers(x)).nonzero().squeeze(1)


def drawn(
    x: Float[Tensor, "tokens d_model"],
    order: Int[Tensor, " kept"],
    carried: Float[Tensor, "few d_model"],
    batch: int,
) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Batches of rows in an order, the rows that the last block left over first; what is left now stays out."""
    first = batch - len(carried)
    if first <= len(order):
        yield torch.cat([carried, x[order[:first]]])
        for start in range(first, len(order) - batch + 1, batch):
            yield x[order[start : start + batch]]


def left_over(
    x: Float[Tensor, "tokens d_model"],
    order: Int[Tensor, " kept"],
    carried: Float[Tensor, "few d_model"],
    batch: int,
) -> Float[Tensor, "left d_model"]:
    """The rows that make no whole batch: they begin the next block's first one."""
    total = len(carried) + len(order)
    if total < batch:
        return torch.cat([carried, x[order]])
    return x[order[len(order) - total % batch :]]
