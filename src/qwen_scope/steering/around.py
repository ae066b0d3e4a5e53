"""Steering around whatever runs the model: plain forward passes, `model.generate`, pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.steering.changes import Change, Changes, Layout
from qwen_scope.suite import Suite


@contextmanager
def steered(backbone: Backbone, rows: Sequence[Sequence[Change]], suite: Suite) -> Iterator[Following]:
    """While the block runs, every forward pass of the model is steered.

    What the first pass with an empty cache reads is the prompt; what follows it, with the cache or without, is generated.
    Rows may be padded on either side if they come with an attention mask. Other threads wait meanwhile.

    Args:
        rows: the changes of each row of the batch, or of one row for all; a batch of n times as many rows, as beams and
            several samples of a prompt make it, repeats each n times.

    Raises:
        QwenScopeError: when the model runs: another number of rows, or positions that a prompt does not have.
    """
    following = Following(backbone.decoder, rows, suite)
    layers = sorted({change.edit.layer for row in rows for change in row})
    with backbone.editing({layer: following.writer(layer) for layer in layers}):
        hook = backbone.decoder.register_forward_pre_hook(following.follow, with_kwargs=True)
        try:
            yield following
        finally:
            hook.remove()


class Following:
    """Knows, at each forward pass, where its tokens are in their texts."""

    def __init__(self, decoder: nn.Module, rows: Sequence[Sequence[Change]], suite: Suite):
        self.passes = 0
        """Forward passes seen."""
        self._rows, self._suite = rows, suite
        self._signature = inspect.signature(decoder.forward)
        self._changes = Changes(rows, suite)
        self._earlier: list[list[int]] = [[0] * len(row) for row in rows]
        self._writers: dict[int, Callable[[Tensor], Tensor]] = {}
        self._lengths: list[int] = []
        self._prompt: Tensor | None = None

    @property
    def touched(self) -> list[list[int]]:
        """By row of those given, and by change of the row, how many tokens have been written to."""
        many = max(1, len(self._changes.rows) // max(1, len(self._rows)))
        now = self._changes.touched
        return [
            [before + sum(now[at * many + n][c] for n in range(many)) for c, before in enumerate(earlier)]
            for at, earlier in enumerate(self._earlier)
        ]

    def writer(self, layer: int) -> Callable[[Tensor], Tensor]:
        """What `Backbone.editing` calls after a layer."""
        return lambda x: self._writers[layer](x)

    def follow(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Called before the decoder runs, with all that it is given."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        tokens = given.get("input_ids")
        ids = tokens if tokens is not None else given["inputs_embeds"]
        batch, length = ids.shape[:2]
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        positions = _positions(given, batch, length, past)
        if past == 0 and not self._continues(ids):
            self._prompt = ids
            self._lengths = [int(row.max()) + 1 for row in positions]
        elif not self._lengths:
            # The prompt was read before the block began.
            self._lengths = [int(row.max()) + (length > 1) for row in positions]
        self._match(batch)
        if past == 0 and len(self._lengths) == batch:
            for row, prompt_length in zip(self._changes.rows, self._lengths, strict=True):
                for change in row:
                    change.edit.where.check(prompt_length)
        lengths = self._lengths
        if len(lengths) != batch:  # beams of a prompt that was read once
            lengths = [n for n in lengths for _ in range(batch // len(lengths))]
        self._writers = self._changes.writers(Layout(positions, lengths))
        self.passes += 1

    def _continues(self, ids: Tensor) -> bool:
        """Whether a pass without a cache reads the prompt again, as ids or their embeddings, with what was generated since."""
        before = self._prompt
        if (
            before is None
            or ids.ndim != before.ndim
            or ids.shape[0] != before.shape[0]
            or ids.shape[1] <= before.shape[1]
        ):
            return False
        return bool((ids[:, : before.shape[1]] == before).all())

    def _match(self, batch: int) -> None:
        """Makes as many rows as the batch has."""
        if batch % len(self._rows):
            raise QwenScopeError(
                f"expected a batch of {len(self._rows)} rows, one for each steering, found one of {batch}; give as many"
            )
        if batch != len(self._changes.rows):
            self._earlier = self.touched
            many = batch // len(self._rows)
            self._changes = Changes([row for row in self._rows for _ in range(many)], self._suite)


def _positions(given: dict[str, Any], batch: int, length: int, past: int) -> Tensor:
    """The position of each token in its text, negative at padding."""
    mask, known = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, : past + length].cpu() > 0
        positions = real.long().cumsum(1) - 1
        return positions.masked_fill(~real, -1)[:, past:]
    if isinstance(known, Tensor) and known.ndim == 2:
        return known.cpu().long().expand(batch, length)
    return torch.arange(past, past + length).expand(batch, length)
