"""`Changes`: edits made ready for one suite, and written into the residual stream of a batch whose rows differ.

All readings are taken of the residual as it arrives at the layer, and what they and the additions come to is summed; then
directions are ablated, several of them together. So the order of edits does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.steering.edit import Edit
from qwen_scope.steering.maxima import Maxima
from qwen_scope.steering.steering import Steering
from qwen_scope.suite import Suite, ranges


@dataclass(frozen=True, eq=False)
class Change:
    """An edit with its direction and its strength in raw units."""

    edit: Edit
    """What was asked for."""
    strength: float
    """In raw units of activation; the factor of `scale`; 0 for `ablate`."""
    direction: Float[Tensor, " d_model"]
    """`W_dec[:, f]`, float32, on the SAE's device."""


def changes(steering: Steering, suite: Suite, maxima: Callable[[], Maxima]) -> list[Change]:
    """The edits of a steering made ready.

    Args:
        steering: the edits.
        suite: whose features they are.
        maxima: gives what strengths in `x` are counted in; asked only where there are any.

    Raises:
        QwenScopeError: a layer or feature that the suite does not have, or one that never fires with a strength in `x`.
    """
    ready = []
    for edit in steering.edits:
        if edit.layer not in suite.layers:
            raise QwenScopeError(
                f"expected features of layers {ranges(suite.layers)} of {suite.name}, found {edit.name}; layers count from 0"
            )
        sae = suite[edit.layer]
        if edit.number >= sae.d_sae:
            raise QwenScopeError(
                f"expected a feature from {edit.layer}/0 to {edit.layer}/{sae.d_sae - 1}, found {edit.name}; choose one of those"
            )
        unit = maxima()(edit.layer, edit.number) if edit.unit == "x" else 1.0
        strength = 0.0 if edit.how == "ablate" else edit.strength * unit
        # decoder_rows() would re-lay the whole matrix for the sake of one column.
        ready.append(Change(edit, strength, sae.W_dec[:, edit.number].detach().float().contiguous()))
    return ready


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward pass are in their texts."""

    positions: Int[Tensor, "batch tokens"]
    """The position of each token in its text, from 0; negative at padding. On the CPU."""
    prompt_lengths: Sequence[int]
    """How many tokens the prompt of each row has."""


class Changes:
    """What is written into a batch, each row with its own edits.

    Args:
        rows: the changes of each row.
        suite: whose SAEs read what `clamp` and `scale` depend on.
    """

    def __init__(self, rows: Sequence[Sequence[Change]], suite: Suite):
        self.rows = [list(row) for row in rows]
        self.layers = sorted({change.edit.layer for row in rows for change in row})
        self.suite = suite
        self.touched = [[0] * len(row) for row in rows]
        """By row and change, how many tokens have been written to so far."""
        # What is added to rows that all are at a generated token, which is nearly all of generation.
        self._added: dict[int, Tensor] = {}

    def writers(self, layout: Layout) -> dict[int, Callable[[Tensor], Tensor]]:
        """By layer, the function that `Backbone.editing` takes, for a forward pass of this layout."""
        positions, lengths = layout.positions, layout.prompt_lengths
        generated = positions.shape[1] == 1 and all(
            int(position) >= length for position, length in zip(positions[:, 0].tolist(), lengths, strict=True)
        )

        def writer(layer: int) -> Callable[[Tensor], Tensor]:
            if generated:
                return lambda x: self._write_generated(layer, x)
            masks = [
                [
                    change.edit.where.mask(positions[row], lengths[row]) if change.edit.layer == layer else None
                    for change in changes
                ]
                for row, changes in enumerate(self.rows)
            ]
            return lambda x: self._write(layer, x, masks)

        return {layer: writer(layer) for layer in self.layers}

    def _write_generated(self, layer: int, x: Float[Tensor, "batch 1 d_model"]) -> Float[Tensor, "batch 1 d_model"]:
        masks: list[list[Bool[Tensor, " one"] | None]] = [[None] * len(row) for row in self.rows]
        here = torch.ones(1, dtype=torch.bool)
        for row, changes in enumerate(self.rows):
            made = [at for at, change in enumerate(changes) if _at_generated(change, layer)]
            # What is added beside other edits is added with them, since directions are ablated after that.
            only_adds = _only_adds(changes, layer)
            for at in made:
                if only_adds:
                    self.touched[row][at] += 1
                else:
                    masks[row][at] = here
        if any(mask is not None for row in masks for mask in row):
            x = self._write(layer, x, masks)
        return x + self._additions(layer, x)[:, None]

    def _additions(self, layer: int, x: Tensor) -> Float[Tensor, "batch d_model"]:
        if layer not in self._added:
            total = torch.zeros(len(self.rows), x.shape[-1], dtype=torch.float32)
            for row, changes in enumerate(self.rows):
                for change in changes if _only_adds(changes, layer) else ():
                    if _at_generated(change, layer):
                        total[row] += change.strength * change.direction.cpu()
            self._added[layer] = total.to(x)
        return self._added[layer]

    def _write(
        self,
        layer: int,
        x: Float[Tensor, "batch tokens d_model"],
        masks: list[list[Bool[Tensor, " tokens"] | None]],
    ) -> Float[Tensor, "batch tokens d_model"]:
        out = x.clone()
        values = self._read(layer, x, masks)
        for row, changes in enumerate(self.rows):
            ablated: list[tuple[Tensor, Tensor]] = []
            for at, (change, mask) in enumerate(zip(changes, masks[row], strict=True)):
                if mask is None:
                    continue
                where = mask.nonzero()[:, 0]
                if not len(where):
                    continue
                self.touched[row][at] += len(where)
                direction = change.direction.to(x.device)
                where = where.to(x.device)
                if change.edit.how == "ablate":
                    ablated.append((mask, direction))
                    continue
                if change.edit.how == "add":
                    size = torch.ones(len(where), device=x.device) * change.strength
                else:
                    value = values(row, change.edit.number, where)
                    size = change.strength - value if change.edit.how == "clamp" else (change.strength - 1) * value
                out[row, where] += (size[:, None] * direction).to(x.dtype)
            for mask, directions in _together(ablated):
                where = mask.nonzero()[:, 0].to(x.device)
                here = out[row, where].float()
                # An orthonormal basis: directions that are not orthogonal would leave some of each other.
                basis = torch.linalg.qr(directions.T.double())[0].to(torch.float32)
                out[row, where] = (here - (here @ basis) @ basis.T).to(x.dtype)
        return out

    def _read(
        self, layer: int, x: Tensor, masks: list[list[Bool[Tensor, " tokens"] | None]]
    ) -> Callable[[int, int, Tensor], Float[Tensor, " tokens"]]:
        """The values of features where `clamp` and `scale` need them, all from one encoding."""
        needed = torch.zeros(x.shape[:2], dtype=torch.bool)
        for row, changes in enumerate(self.rows):
            for change, mask in zip(changes, masks[row], strict=True):
                if mask is not None and change.edit.how in ("clamp", "scale"):
                    needed[row] |= mask
        if not needed.any():
            return lambda row, number, where: torch.zeros(len(where), device=x.device)
        sae = self.suite[layer]
        found = sae.encode(x[needed.to(x.device)].to(sae.device))
        place = (needed.flatten().cumsum(0) - 1).view(needed.shape)

        def value(row: int, number: int, where: Tensor) -> Tensor:
            return found[place[row][where.cpu()].to(sae.device)].activation(number).to(x.device)

        return value


def _at_generated(change: Change, layer: int) -> bool:
    return change.edit.layer == layer and change.edit.where.generated


def _only_adds(changes: Sequence[Change], layer: int) -> bool:
    """Whether all that is done to generated tokens at a layer is to add."""
    return all(change.edit.how == "add" for change in changes if _at_generated(change, layer))


def _together(
    ablated: list[tuple[Tensor, Tensor]],
) -> list[tuple[Bool[Tensor, " tokens"], Float[Tensor, "directions d_model"]]]:
    """Directions grouped by the tokens at which exactly these are ablated."""
    if not ablated:
        return []
    patterns = torch.stack([mask for mask, _ in ablated])
    kinds, kind = patterns.unique(dim=1, return_inverse=True)
    groups = []
    for n in range(kinds.shape[1]):
        chosen = [direction for (_, direction), here in zip(ablated, kinds[:, n].tolist(), strict=True) if here]
        if chosen:
            groups.append((kind == n, torch.stack(chosen)))
    return groups
