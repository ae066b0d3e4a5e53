"""How much texts repeat: whether one ends in a loop, and the repeat ratio of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_scope.errors import QwenScopeError

LONGEST = 64
"""Tokens of the longest block whose repetition counts as a loop."""
TIMES = 3
"""So often a block must come, one after the other."""
LEAST = 16
"""Tokens that a loop must have in all, so that three dots or a short refrain are none."""


@dataclass(frozen=True)
class Loop:
    """The end of a text that is one block of tokens again and again."""

    start: int
    """Position of its first token."""
    period: int
    """Tokens of the block."""
    length: int
    """Tokens from `start` to the text's end; the last block may be cut short."""

    @property
    def times(self) -> float:
        """How often the block comes."""
        return self.length / self.period


def loop_of(ids: Sequence[int], longest: int = LONGEST) -> Loop | None:
    """The loop that a text ends in, None if it ends in none.

    A text of tokens t[0 … T-1] has an end of period p and length L if t[i] = t[i-p] for its last L - p tokens, and L is the
    largest such number. It ends in a loop if for some p from 1 to `longest` this L is at least 3 p and at least 16; the loop is
    that of the smallest such p.

    Args:
        ids: token ids of what was generated, without padding. With the token by which the model ended it, a text that was ended
            is in no loop, unless that token itself repeats.
        longest: tokens of the longest block looked for.

    Raises:
        QwenScopeError: `longest` below 1.
    """
    if longest < 1:
        raise QwenScopeError(f"expected blocks of at least 1 token, found longest = {longest}; choose a larger number")
    tokens = np.asarray(ids, dtype=np.int64)
    for period in range(1, min(longest, len(tokens) // TIMES) + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        start = int(differs[-1]) + 1 if len(differs) else 0
        length = len(tokens) - start
        if length >= max(TIMES * period, LEAST):
            return Loop(start, period, length)
    return None


def repeat_ratio(texts: Sequence[Sequence[int]]) -> float:
    """The share of texts that end in a loop, as `loop_of` has it.

    Args:
        texts: token ids of each.

    Raises:
        QwenScopeError: no texts.
    """
    if not texts:
        raise QwenScopeError("expected texts to count those that loop, found none; give at least one")
    return sum(loop_of(ids) is not None for ids in texts) / len(texts)
