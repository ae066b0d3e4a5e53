"""Arms of a sweep: the steering, and what it is compared with, each over strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen_scope.errors import QwenScopeError
from qwen_scope.evidence.config import SweepConfig
from qwen_scope.steering import Steering

Kind = Literal["steered", "random", "prompted"]
Prompt = str | Sequence[Mapping[str, Any]]
"""A text to be continued, or chat messages to be answered."""


@dataclass(frozen=True)
class Arm:
    """The steering, or one of its controls."""

    name: str
    """What it is called."""
    kind: Kind
    """`steered` also holds what is unsteered, at strength 0, and what is steered the other way, below it."""
    steering: Steering
    """At strength 1."""
    strengths: tuple[float, ...]
    """Multiples of it at which texts are generated."""
    way: str = ""
    """How the instruction is put, for what is only prompted: see `ways_to_ask`."""

    def at(self, strength: float) -> Steering:
        """The steering at a strength."""
        if strength == 0:
            return Steering()
        return self.steering if strength == 1 else self.steering.scaled(strength)


def arms_of(
    steering: Steering, others: Sequence[Steering], prompts: Sequence[Prompt], config: SweepConfig
) -> list[Arm]:
    """The steering, random ones, and prompts alone.

    Raises:
        QwenScopeError: edits that have no multiples, with other strengths than 1.
    """
    strengths = tuple(config.all_strengths)
    try:
        arms = [Arm("steered", "steered", steering, strengths)]
        for strength in strengths:
            arms[0].at(strength)
    except QwenScopeError as error:
        raise QwenScopeError(f"{error}, or sweep over the strength 1 alone") from error
    others_strengths = tuple(strength for strength in strengths if strength)
    arms += [Arm(f"random {n}", "random", other, others_strengths) for n, other in enumerate(others, 1)]
    if config.instruction:
        ways = sorted({way for prompt in prompts for way in ways_to_ask(prompt)}, reverse=True)
        arms += [Arm(f"prompted ({way})", "prompted", Steering(), (0.0,), way) for way in ways]
    return arms


def ways_to_ask(prompt: Prompt) -> list[str]:
    """How an instruction can be put to a prompt: `before` a text; as `system` message of a chat, or in its first message of
    the `user`."""
    return ["before"] if isinstance(prompt, str) else ["system", "user"]


def asked(prompt: Prompt, instruction: str, way: str) -> Prompt:
    """A prompt with an instruction put to it."""
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}"
    messages = [dict(message) for message in prompt]
    first = next((n for n, message in enumerate(messages) if message.get("role") == way), None)
    if first is not None:
        messages[first]["content"] = f"{instruction}\n\n{messages[first]['content']}"
        return messages
    return [{"role": way, "content": instruction}, *messages]
