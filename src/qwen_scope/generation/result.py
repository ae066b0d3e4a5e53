"""`Generation`: a text that was generated, token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from qwen_scope.steering.trace import Trace

Finish = Literal["stop", "length", "cancelled"]
"""Why a generation ended: the model or a stop text ended it, the most tokens or the model's context were reached, or nobody
wanted the rest."""


class Candidate(NamedTuple):
    """A token that the model could have said."""

    id: int
    """Its number."""
    text: str
    """Its text."""
    logprob: float
    """Logarithm of its probability, before temperature and the like."""


@dataclass(frozen=True)
class GeneratedToken:
    """A token that was generated."""

    id: int
    """Its number."""
    text: str
    """Its own text; a token that is only part of a character shows as U+FFFD."""
    piece: str
    """What it adds to the text: nothing where a character or a stop text may not be complete yet."""
    logprob: float
    """Logarithm of its probability, before temperature and the like."""
    candidates: list[Candidate]
    """The most likely tokens in its place, the first most likely."""


@dataclass(frozen=True)
class Generation:
    """A text that was generated."""

    prompt: str
    """What came before it, after the chat template for messages."""
    prompt_ids: list[int]
    """Token ids of the prompt."""
    text: str
    """What was generated, without what ended it."""
    tokens: list[GeneratedToken]
    """The same token by token, without the one that ended it."""
    finish: Finish
    """Why it ended."""
    steering: str
    """The edits it was generated under, as text; empty if none."""
    seed: int
    """The seed of its sampling."""
    steered_tokens: list[int]
    """For each edit, how many tokens it was made at while generating; a KV cache reads each token once."""
    trace: Trace | None = None
    """What the steering did, if asked for."""

    @property
    def ids(self) -> list[int]:
        """Token ids generated."""
        return [token.id for token in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        tokens = [
            {**asdict(token), "candidates": [candidate._asdict() for candidate in token.candidates]}
            for token in self.tokens
        ]
        return {**asdict(self), "tokens": tokens, "trace": self.trace.to_dict() if self.trace else None}

    def __str__(self) -> str:
        return self.text
