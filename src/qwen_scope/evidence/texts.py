"""Texts of a sweep, kept in a file as they come, so that a sweep that was stopped goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import append_lines, replacing


class Key(NamedTuple):
    """Which text of a sweep."""

    arm: str
    """Name of the arm."""
    strength: float
    """Multiple of its steering."""
    prompt: int
    """Number of the prompt, from 0."""
    seed: int
    """Number of the seed, from 0."""


@dataclass(frozen=True)
class Text:
    """A text that was generated, and what is always measured of it."""

    text: str
    """What was generated."""
    tokens: int
    """Of how many tokens."""
    perplexity: float | None
    """Under the unsteered model, see `perplexities`; None for an empty text."""
    repetition: float
    """Share of repeated runs of four tokens."""


class Texts:
    """The texts of a sweep so far.

    Args:
        path: a file of JSON lines to keep them in, the first of which says what they are of; None keeps them in memory alone.
        about: what they are of.

    Raises:
        QwenScopeError: the file has texts of something else, or cannot be read or written.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path = path
        self.found: dict[Key, Text] = {}
        about = json.loads(json.dumps(about))
        if path is None:
            return
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
            return
        try:
            first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            before = json.loads(first)
        except (OSError, ValueError) as error:
            raise QwenScopeError(
                f"expected texts of a sweep at {path}, found none that read ({error}); choose another folder"
            ) from error
        if before != about:
            other = [name for name in about if not isinstance(before, dict) or before.get(name) != about[name]]
            raise QwenScopeError(
                f"expected the texts of this sweep at {path}, found those of one with other {', '.join(other) or 'settings'}; "
                "choose another folder, or delete that file"
            )
        names = {field.name for field in fields(Text)}
        for line in lines:
            try:
                row = json.loads(line)
                key = Key(*(row.pop(name) for name in Key._fields))
                if set(row) == names:
                    self.found[key] = Text(**row)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the line that a crash cut short

    def add(self, texts: dict[Key, Text]) -> None:
        """Takes some more, and has them on disk before it returns.

        Raises:
            QwenScopeError: they cannot be written.
        """
        self.found |= texts
        if self.path is None:
            return
        append_lines(self.path, ({**key._asdict(), **asdict(text)} for key, text in texts.items()))
