"""What a synthesis has got so far: lines of JSON that are added as they come, so that nothing paid for is ever lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen_scope.data.synthesis.purse import Spent
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import append_lines, replacing

Arm = Literal["aimed", "random"]
"""Whether a text is about a target, or about a random other feature, as a control."""


class Key(NamedTuple):
    """Which text of a synthesis."""

    arm: Arm
    """See `Arm`."""
    feature: str
    """The feature that it is about, `layer/number`."""
    attempt: int
    """Which attempt, from 0."""
    style: str = ""
    """The style of a rewrite; empty for what was written first."""


@dataclass(frozen=True)
class Text:
    """A text that was written, and how it came about."""

    text: str
    """The text."""
    prompt: str
    """What was asked for it."""
    explanation: str
    """What was known of the feature, on one line."""
    by: str
    """Whose label that is, or `examples`."""
    steering: str
    """What the model was steered by while it wrote, in raw units; empty if it was not."""
    seed: int
    """The seed that it was drawn with."""
    read: int
    """Tokens of the prompt."""
    written: int
    """Tokens written."""


@dataclass(frozen=True)
class Reading:
    """What a text fires, read alone: without its prompt and without steering."""

    value: float
    """The highest value of the feature that it is about; 0 if it does not fire."""
    fires: list[int]
    """Numbers of the targets that it fires, its own or others."""


@dataclass(frozen=True)
class Reply:
    """An answer to a text."""

    answer: str
    """The answer."""
    seed: int
    """The seed that it was drawn with."""
    read: int
    """Tokens of the prompt."""
    written: int
    """Tokens written."""


class Lines:
    """A file of JSON lines that only grows, the first of which says what the others are of.

    Args:
        path: where it is; made when it is not there.
        about: what it is to be of.

    Raises:
        QwenScopeError: the file is of something else, or cannot be read or written.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self._lines: list[str] = []
        about = json.loads(json.dumps(about))
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
            return
        try:
            first, *self._lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            before = json.loads(first)
        except (OSError, ValueError) as error:
            raise QwenScopeError(
                f"expected what a synthesis has got so far at {path}, found nothing that reads ({error}); choose another folder"
            ) from error
        if before != about:
            other = [name for name in about if not isinstance(before, dict) or before.get(name) != about[name]]
            raise QwenScopeError(
                f"expected {path} to be of this synthesis, found one with other {', '.join(other) or 'settings'}; choose another "
                "folder, or delete that file"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows that were there when it was opened; what is no row only a crash can have left."""
        for line in self._lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows, and has them on disk before it returns.

        Raises:
            QwenScopeError: they cannot be written.
        """
        append_lines(self.path, rows)


class Kept:
    """The texts of a synthesis so far, what they fire, and answers to them.

    Args:
        path: a file of JSON lines.
        about: what they are of.

    Raises:
        QwenScopeError: see `Lines`.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.texts: dict[Key, Text] = {}
        """In the order in which they came."""
        self.readings: dict[Key, Reading] = {}
        """What those that have been read fire."""
        self.replies: dict[Key, Reply] = {}
        """Answers."""
        self.lost = Spent()
        """Tokens of answers that could not be used."""
        self._lines = Lines(path, about)
        for row in self._lines:
            self._take(row)

    def add(self, rows: dict[Key, Text] | dict[Key, Reading] | dict[Key, Reply]) -> None:
        """Takes some more, and has them on disk before it returns.

        Raises:
            QwenScopeError: they cannot be written.
        """
        taken = [
            {"row": type(item).__name__.lower(), **key._asdict(), **asdict(item)}  # pyright: ignore[reportArgumentType]
            for key, item in rows.items()
        ]
        if taken:
            self._lines.add(taken)
        for row in taken:
            self._take(row)

    def lose(self, spent: Spent) -> None:
        """Notes tokens that brought nothing.

        Raises:
            QwenScopeError: it cannot be written.
        """
        if spent.tokens:
            self._lines.add([{"row": "lost", **spent._asdict()}])
            self.lost = self.lost.plus(spent)

    def spent(self, arm: Arm) -> Spent:
        """Tokens of the texts of an arm."""
        of_arm = [text for key, text in self.texts.items() if key.arm == arm]
        return Spent(sum(text.read for text in of_arm), sum(text.written for text in of_arm))

    @property
    def spent_on_replies(self) -> Spent:
        """Tokens of answers."""
        replies = self.replies.values()
        return Spent(sum(reply.read for reply in replies), sum(reply.written for reply in replies))

    def _take(self, row: dict[str, Any]) -> None:
        row = dict(row)
        kind = row.pop("row", None)
        try:
            if kind == "lost":
                self.lost = self.lost.plus(Spent(**row))
                return
            key = Key(*(row.pop(name) for name in Key._fields))
            for name, made, held in (
                ("text", Text, self.texts),
                ("reading", Reading, self.readings),
                ("reply", Reply, self.replies),
            ):
                if kind == name and set(row) == {field.name for field in fields(made)}:
                    held[key] = made(**row)  # pyright: ignore[reportArgumentType]
        except (KeyError, TypeError):
            return  # a line of no such kind
