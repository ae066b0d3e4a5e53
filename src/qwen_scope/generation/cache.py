"""`RowCache`: keys, values and states of texts that are generated together, which texts can join and leave at any time.

transformers' own cache copies all it holds for every token, and knows no rows that come and go; its continuous batching knows
them, but no linear attention (Qwen3.5) and no way to tell which token of its packed batch belongs to whom.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from qwen_scope.errors import QwenScopeError

ROOM = 64
"""Columns of room for new tokens when a buffer is made."""


def prompt_cache(config: Any) -> Cache:
    """An empty cache for one prompt, that keeps all keys also where attention slides: a mask hides those too far away.

    Raises:
        QwenScopeError: a model with another kind of memory.
    """
    layers: list[Any] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is LinearAttentionLayer:
            layers.append(layer)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(DynamicLayer())
        else:
            raise QwenScopeError(
                f"expected a model with full, sliding or linear attention, found {type(layer).__name__} in its cache; steer "
                "around its own generate() instead, with Scope.steered"
            )
    return Cache(layers=layers)


class RowCache:
    """The memory of a batch of texts. Text i is row i; all end at the same column, shorter ones are padded on the left."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens held of each row."""
        self.start = 0
        """Column of the longest row's first token."""
        self.rows = self.columns = 0
        """For how many rows and columns there is room."""
        self.cache: Cache | None = None
        """What the model is given; None before the first row."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def end(self) -> int:
        """Column after the last token of every row."""
        return self.start + self.longest

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def _layers(self) -> list[_Rows | _States]:
        return self.cache.layers if self.cache is not None else []  # pyright: ignore[reportReturnType]

    def join(self, prompt: Cache, length: int) -> None:
        """Adds a row that holds what one prompt left in its cache."""
        if self.cache is None:
            self.cache = Cache(
                layers=[_Rows(self) if isinstance(layer, DynamicLayer) else _States() for layer in prompt.layers]
            )
        longer = max(0, length - self.longest)
        if len(self.lengths) >= self.rows or longer > self.start or not self.lengths:
            self._make_room(len(self.lengths) + 1, longer)
        self.start -= longer
        end = self.start + max(self.longest, length)
        for layer, source in zip(self._layers, prompt.layers, strict=True):
            layer.join(source, len(self.lengths), end, length)
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Takes a row out; the last one takes its place."""
        last, end = len(self.lengths) - 1, self.end
        for layer in self._layers:
            layer.replace(row, last)
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.start = end - self.longest
        if not self.lengths:
            self.cache, self.start, self.rows, self.columns = None, 0, 0, 0

    def before_step(self) -> None:
        """Sees to it that there is room for one more token of each row."""
        if self.end >= self.columns:
            self._make_room(len(self.lengths), 0)

    def after_step(self) -> None:
        """Notes that the model has read one more token of each row."""
        self.lengths = [length + 1 for length in self.lengths]

    def attention_mask(self, device: torch.device) -> Tensor | None:
        """As the model takes it with one more token of each row; None where nothing is padded."""
        longest = self.longest
        if min(self.lengths) == longest:
            return None
        columns = torch.arange(longest + 1)
        return (columns >= longest - torch.tensor(self.lengths)[:, None]).long().to(device)

    def _make_room(self, rows: int, left: int) -> None:
        """Moves everything into buffers for at least so many rows, with so many columns free on the left and some on the right.

        Rows that have left, and their columns, are not taken along, so that memory follows the texts there are.
        """
        # A power of two, so that many rows that join one after another are moved a few times only.
        self.rows = 1 << (rows - 1).bit_length()
        self.columns = left + self.longest + max(ROOM, self.longest // 2)
        for layer in self._layers:
            layer.move(len(self.lengths), self.start, self.end, left)
        self.start = left


class _Rows(CacheLayerMixin):
    """Keys and values of one layer, in buffers with room for more rows and columns."""

    def __init__(self, shared: RowCache):
        super().__init__()
        self.shared = shared
        self.is_initialized = True
        self.buffers: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def join(self, source: Any, row: int, end: int, length: int) -> None:
        held = (source.keys, source.values)
        if not self.buffers:
            self.buffers = [x.new_zeros(self.shared.rows, x.shape[1], self.shared.columns, x.shape[3]) for x in held]
        for buffer, x in zip(self.buffers, held, strict=True):
            # A mask hides what a row that has left wrote here, but zero times NaN is NaN.
            buffer[row, :, : end - length] = 0
            buffer[row, :, end - length : end] = x[0]

    def replace(self, row: int, last: int) -> None:
        if row != last:
            for buffer in self.buffers:
                buffer[row] = buffer[last]

    def move(self, rows: int, start: int, end: int, to: int) -> None:
        for at, buffer in enumerate(self.buffers):
            new = buffer.new_zeros(self.shared.rows, buffer.shape[1], self.shared.columns, buffer.shape[3])
            new[:rows, :, to : to + end - start] = buffer[:rows, :, start:end]
            self.buffers[at] = new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        count, start, end = key_states.shape[0], self.shared.start, self.shared.end
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:count, :, end : end + 1] = new
        keys, values = (buffer[:count, :, start : end + 1] for buffer in self.buffers)
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first row has made the buffers."""

    def get_seq_length(self) -> int:
        return self.shared.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shared.longest + query_length, 0

    def get_max_length(self) -> int:
        return -1


class _States(LinearAttentionLayer):
    """States of a layer with linear attention, a row each."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.conv_states.values(), *self.recurrent_states.values()) if x is not None)

    def join(self, source: Any, row: int, end: int, length: int) -> None:
        for mine, theirs in ((self.conv_states, source.conv_states), (self.recurrent_states, source.recurrent_states)):
            for at, state in theirs.items():
                held = mine.get(at)
                mine[at] = state if held is None or state is None else torch.cat([held, state])
        if row == 0:
            for name in ("dtype", "device", "has_previous_state", "conv_kernel_size"):
                setattr(self, name, getattr(source, name))
            self.is_conv_states_initialized = source.is_conv_states_initialized
            self.is_recurrent_states_initialized = source.is_recurrent_states_initialized

    def replace(self, row: int, last: int) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for at, state in states.items():
                if state is not None:
                    state[row] = state[last]
                    states[at] = state[:last]

    def move(self, rows: int, start: int, end: int, to: int) -> None:
        """Nothing to do: states have no columns."""
