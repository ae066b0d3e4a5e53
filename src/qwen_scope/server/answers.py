"""What clients are sent: the objects of OpenAI's chats and completions, whole or in chunks, with what was steered beside them."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from qwen_scope.generation.continuation import PARTIAL, Continuation
from qwen_scope.generation.result import GeneratedToken
from qwen_scope.server.requests import Asked
from qwen_scope.steering.trace import Trace

LEAST = -9999.0
"""Stands for the logarithm of a probability of 0, for which JSON has no word."""
END = b"data: [DONE]\n\n"
"""Ends a stream."""


class Answer:
    """What a request is answered, in the form of completions.

    Args:
        asked: the request.
        model: what clients call the model.
    """

    kind, prefix, chunk_kind = "text_completion", "cmpl", "text_completion"

    def __init__(self, asked: Asked, model: str):
        self.asked, self.model = asked, model
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._offsets: dict[int, int] = {}

    def whole(self, texts: Sequence[Continuation], traces: Sequence[Trace | None]) -> dict[str, Any]:
        """The answer at once."""
        choices = [self._whole(n, text) for n, text in enumerate(texts)]
        for choice, text, trace in zip(choices, texts, traces, strict=True):
            choice.update(steering_of(text, trace))
        return {**self._frame(self.kind), "choices": choices, "usage": usage(texts, self.asked.n or 1)}

    def opening(self, choice: int) -> list[dict[str, Any]]:
        """Chunks before the first token of a text."""
        return []

    def piece(self, choice: int, tokens: Sequence[GeneratedToken], text: str) -> dict[str, Any]:
        """A chunk with some tokens and what they add to the text."""
        return self._chunk([{**self._part(choice, text, tokens), "finish_reason": None}])

    def closing(self, choice: int, text: Continuation) -> dict[str, Any]:
        """The last chunk of a text."""
        return self._chunk([{**self._part(choice, "", ()), "finish_reason": text.finish, **steering_of(text, None)}])

    def counted(self, texts: Sequence[Continuation]) -> dict[str, Any]:
        """The chunk with the number of tokens."""
        return {**self._chunk([]), "usage": usage(texts, self.asked.n or 1)}

    def logprobs(self, choice: int, tokens: Sequence[GeneratedToken]) -> Any:
        """Probabilities of tokens; None if nobody asked for them."""
        if self.asked.candidates is None:
            return None
        offsets, at = [], self._offsets.get(choice, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token.piece)
        self._offsets[choice] = at
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{other.text: _finite(other.logprob) for other in token.candidates} for token in tokens],
            "text_offset": offsets,
        }

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # As OpenAI's: where the number of tokens will follow, all chunks before say that it has not yet.
        later = {"usage": None} if self.asked.include_usage else {}
        return {**self._frame(self.chunk_kind), "choices": choices, **later}

    def _whole(self, choice: int, text: Continuation) -> dict[str, Any]:
        return {**self._part(choice, text.result().text, text.tokens), "finish_reason": text.finish}

    def _part(self, choice: int, text: str, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        return {"index": choice, "text": text, "logprobs": self.logprobs(choice, tokens) if tokens else None}


class ChatAnswer(Answer):
    """The same in the form of chats."""

    kind, prefix, chunk_kind = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def opening(self, choice: int) -> list[dict[str, Any]]:
        """Says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def logprobs(self, choice: int, tokens: Sequence[GeneratedToken]) -> Any:
        """Probabilities of tokens; None if nobody asked for them."""
        if self.asked.candidates is None:
            return None
        content = [
            {
                **_scored(token.text, token.logprob),
                "top_logprobs": [_scored(other.text, other.logprob) for other in token.candidates],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _whole(self, choice: int, text: Continuation) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.result().text, "refusal": None}
        logprobs = self.logprobs(choice, text.tokens)
        return {"index": choice, "message": message, "logprobs": logprobs, "finish_reason": text.finish}

    def _part(self, choice: int, text: str, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        delta = {"content": text} if text or tokens else {}
        return {"index": choice, "delta": delta, "logprobs": self.logprobs(choice, tokens) if tokens else None}


def steering_of(text: Continuation, trace: Trace | None) -> dict[str, Any]:
    """What a choice says about how it was steered; nothing if it was not."""
    if not text.row:
        return {}
    steering: dict[str, Any] = {
        "edits": [str(change.edit) for change in text.row],
        "strengths": [change.strength for change in text.row],
        "tokens_steered": list(text.steered_tokens),
    }
    if trace is not None:
        steering["trace"] = trace.to_dict()
    return {"steering": steering}


def usage(texts: Sequence[Continuation], each: int) -> dict[str, int]:
    """Tokens of the prompts, each counted once though `each` texts continue it, and of what was generated."""
    prompt, generated = sum(len(text.prompt) for text in texts[::each]), sum(len(text.tokens) for text in texts)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def event(value: Any) -> bytes:
    """A value as one event of a stream."""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """Strict JSON: what is not a number becomes null. Only ASCII, since a text may hold halves of characters."""
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False).encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scored(text: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character has no text of its own, and its bytes are not known here.
    return {
        "token": text,
        "logprob": _finite(logprob),
        "bytes": None if PARTIAL in text else list(text.encode("utf-8", "replace")),
    }


def _finite(logprob: float) -> float:
    return max(LEAST, logprob)
