"""Rewards for reinforcement learning by name: against repetition, for a length, or a function of the user's."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from qwen_scope.errors import QwenScopeError, reason
from qwen_scope.evidence.fluency import repetition
from qwen_scope.finetuning.repeats import loop_of

Reward = Callable[..., Sequence[float | None]]
"""What TRL calls with `prompts`, `completions`, `completion_ids` and the data's other columns, each a list, by name; it gives a
number for each completion, or None for one that it has nothing to do with."""

_LENGTH = re.compile(r"length:(\d{1,6})", re.ASCII)


def reward_of(name: str) -> Reward:
    """A reward by name:

    - `repetition`: less the share of a completion's runs of four tokens that occurred in it before, from -1 to 0;
    - `loop`: -1 for a completion that ends in a loop (see `loop_of`), else 0;
    - `length:64`: -|n - 64| / 64 for one of n tokens, at least -1;
    - `module:function`: a function of a module that Python finds, called as TRL calls rewards.

    Raises:
        QwenScopeError: anything else, or a function that does not import.
    """
    if name == "repetition":
        return against_repetition
    if name == "loop":
        return against_loops
    if match := _LENGTH.fullmatch(name):
        if not int(match[1]):
            raise QwenScopeError("expected a length of at least 1 token, found length:0; such as length:64")
        return _length(int(match[1]))
    module, colon, function = name.partition(":")
    if not colon or not module or not function or module == "length":
        raise QwenScopeError(
            f"expected a reward as repetition, loop, length:64 or module:function, found {name[:80]!r}; use one of those"
        )
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises when it is imported
        raise QwenScopeError(
            f"expected a reward at {name!r}, as module:function, found none that imports ({reason(error)}); set PYTHONPATH to "
            "where the module is"
        ) from error
    if not callable(found):
        raise QwenScopeError(f"expected a function at {name!r}, found {type(found).__name__}; name another")
    return _checked(found, name)


def against_repetition(completion_ids: Sequence[Sequence[int]], **rest: Any) -> list[float]:
    """Less the share of runs of four tokens that occurred in the completion before."""
    return [-repetition(ids) for ids in completion_ids]


def against_loops(completion_ids: Sequence[Sequence[int]], **rest: Any) -> list[float]:
    """-1 for completions that end in a loop, else 0."""
    return [-1.0 if loop_of(ids) else 0.0 for ids in completion_ids]


def _length(wanted: int) -> Reward:
    def length(completion_ids: Sequence[Sequence[int]], **rest: Any) -> list[float]:
        return [-min(1.0, abs(len(ids) - wanted) / wanted) for ids in completion_ids]

    return length


def _checked(function: Callable[..., Any], name: str) -> Reward:
    """The user's function, whose mistakes end the run in a sentence."""

    def reward(completion_ids: Sequence[Sequence[int]], **rest: Any) -> list[float | None]:
        try:
            found = function(completion_ids=completion_ids, **rest)
            # None says that the reward has nothing to do with a completion; TRL leaves it out then.
            values = [None if value is None else float(value) for value in found]
        except Exception as error:  # whatever the user's code raises
            raise QwenScopeError(
                f"expected the reward {name} to give a number for each of {len(completion_ids)} completions, found that it fails "
                f"({reason(error)}); correct it"
            ) from error
        finite = sum(value is None or math.isfinite(value) for value in values)
        if len(values) != len(completion_ids) or finite < len(values):
            raise QwenScopeError(
                f"expected the reward {name} to give a finite number for each of {len(completion_ids)} completions, found "
                f"{len(values)} values of which {finite} are finite; correct it"
            )
        return values

    # TRL names its figures after it.
    reward.__name__ = name.replace(":", "_")
    return reward
