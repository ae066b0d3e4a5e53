"""`Where`: which tokens of a text are steered, and how that is written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError

_RANGE = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", re.ASCII)


@dataclass(frozen=True)
class Where:
    """Which tokens are steered: the prompt's, those generated, single positions, or a mix."""

    prompt: bool = True
    """All tokens of the prompt but that at position 0, an attention sink where steering tells the model nothing; name it with
    `positions` to steer it too."""
    generated: bool = True
    """All tokens that follow the prompt."""
    positions: tuple[tuple[int, int], ...] = ()
    """Positions of the prompt besides, as (first, last), both included, from 0; negative ones count from the prompt's end, -1
    its last token."""

    def __post_init__(self) -> None:
        if not (self.prompt or self.generated or self.positions):
            raise QwenScopeError(
                "expected tokens to steer, found none; say prompt, generated, or positions such as 0,3-7"
            )
        for first, last in self.positions:
            if (first < 0) == (last < 0) and first > last:
                raise QwenScopeError(f"expected positions in order, found {first}-{last}; write {last}-{first}")

    @staticmethod
    def parse(text: str) -> Where:
        """Reads `all`, or a list with commas of `prompt`, `generated`, positions `5` and `-1`, and ranges `3-7` and `-3--1`.

        Raises:
            QwenScopeError: anything else.
        """
        prompt = generated = False
        positions = []
        for part in text.split(","):
            word = part.strip()
            if word in ("all", "both"):
                prompt = generated = True
            elif word == "prompt":
                prompt = True
            elif word == "generated":
                generated = True
            elif match := _RANGE.fullmatch(word):
                first = int(match[1])
                positions.append((first, first if match[2] is None else int(match[2])))
            else:
                raise QwenScopeError(
                    f"expected tokens to steer such as all, prompt, generated, 0,3-7 or -1, found {word[:40]!r}; correct it"
                )
        return Where(prompt, generated, tuple(positions))

    def __str__(self) -> str:
        words = [word for word, chosen in (("prompt", self.prompt), ("generated", self.generated)) if chosen]
        if len(words) == 2 and not self.positions:
            return "all"
        return ",".join([*(str(a) if a == b else f"{a}-{b}" for a, b in self.positions), *words])

    def check(self, prompt_length: int) -> None:
        """Raises a QwenScopeError if a position lies beyond a prompt of so many tokens, or none of it would be steered."""
        for first, last in self.positions:
            for position in (first, last):
                if not -prompt_length <= position < prompt_length:
                    raise QwenScopeError(
                        f"expected positions from 0 to {prompt_length - 1} of the prompt (or from -{prompt_length} to -1, from "
                        f"its end), found {position}; steer tokens that it has"
                    )
            start, end = (position % prompt_length for position in (first, last))
            if start > end:
                raise QwenScopeError(
                    f"expected positions in order, found {first}-{last}, which is {start}-{end} of a prompt of {prompt_length} "
                    "tokens; turn them round"
                )

    def mask(self, positions: Int[Tensor, " tokens"], prompt_length: int) -> Bool[Tensor, " tokens"]:
        """Which of some positions are steered, in a text whose prompt has so many tokens; negative ones (padding) never are."""
        steered = torch.zeros_like(positions, dtype=torch.bool)
        if self.prompt:
            steered |= (positions >= 1) & (positions < prompt_length)
        if self.generated:
            steered |= positions >= prompt_length
        for first, last in self.positions:
            start, end = (position % prompt_length for position in (first, last))
            steered |= (positions >= start) & (positions <= end)
        return steered

    def overlaps(self, other: Where) -> bool:
        """Whether both can steer the same token, in some prompt."""
        if (self.prompt and other.prompt) or (self.generated and other.generated):
            return True
        ends = (*self.positions, *other.positions)
        if self.positions and other.positions and any(len({each[at] < 0 for each in ends}) > 1 for at in (0, 1)):
            # Of one counted from the prompt's start and one from its end, no matter how far apart: some prompt is so short.
            return True
        # In order of their starts, so that long lists, which a server may be sent, need no look at every pair.
        furthest: list[float | None] = [None, None]
        for first, last, whose in sorted(
            (*each, n) for n, where in enumerate((self, other)) for each in where._signed()
        ):
            theirs, mine = furthest[1 - whose], furthest[whose]
            if theirs is not None and first <= theirs:
                return True
            furthest[whose] = last if mine is None else max(mine, last)
        return False

    def _signed(self) -> list[tuple[float, float]]:
        """Positions as intervals; all of the prompt is every position but 0, and those of mixed sign are anywhere."""
        whole = [(1.0, math.inf), (-math.inf, -1.0)] if self.prompt else []
        mixed = [(-math.inf, math.inf) if (a < 0) != (b < 0) else (float(a), float(b)) for a, b in self.positions]
        return [*whole, *mixed]
