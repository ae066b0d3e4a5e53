"""Which column of a row holds its text or messages, and what makes a document of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_scope.errors import QwenScopeError
from qwen_scope.tokens import Message

Document = str | list[Message]
"""A plain text, or the messages of one chat."""

Broken = Callable[[str], object] | None
"""What is told of a line, row or file that cannot be read, which is passed over then; None raises instead."""

_NAMED = ("text", "messages", "conversations", "conversation")
_SHAREGPT = {"human": "user", "gpt": "assistant"}


Wanted = str | tuple[str, ...] | None
"""The column asked for, several of them, or None for the one that holds the text."""


def choose(columns: Mapping[str, bool], asked: str | None, where: str) -> str:
    """The column to read, of columns that hold strings or do not."""
    strings = [name for name, is_string in columns.items() if is_string]
    wanted = _NAMED if asked is None else (asked,)
    for name in (*wanted, *(strings if asked is None and len(strings) == 1 else [])):
        if name in columns:
            return name
    expected = "a column text or messages, or one column of strings," if asked is None else f"the column {asked!r}"
    found = ", ".join(map(repr, columns)) or "no columns"
    raise QwenScopeError(f"expected {expected} in {where}, found {found}; choose one with --column (column= in Python)")


def chosen_columns(columns: Mapping[str, bool], wanted: Wanted, where: str) -> list[str]:
    """The columns to read: one that holds the text, or all of those asked for."""
    if isinstance(wanted, tuple):
        return [choose(columns, name, where) for name in wanted]
    return [choose(columns, wanted, where)]


def in_column(rows: Iterator[tuple[str, Any]], column: Wanted, broken: Broken = None) -> Iterator[tuple[str, Any]]:
    """The values in the column to read of rows with their places; of several columns, a dict of them."""
    chosen: list[str] = []
    for where, row in parsed_or_told(rows, _row, broken):
        if not chosen:
            chosen = chosen_columns({name: isinstance(value, str) for name, value in row.items()}, column, where)
        yield where, picked([row.get(name) for name in chosen], column)


def picked(values: Sequence[Any], wanted: Wanted) -> Any:
    """The value of the one column, or a dict of those asked for."""
    return dict(zip(wanted, values, strict=True)) if isinstance(wanted, tuple) else values[0]


def parsed_or_told(
    items: Iterator[tuple[str, Any]], parse: Callable[[Any, str], Any], broken: Broken
) -> Iterator[tuple[str, Any]]:
    """Items with their places, each parsed; what does not parse is told and passed over, or raised."""
    for where, item in items:
        try:
            parsed = parse(item, where)
        except QwenScopeError as error:
            if broken is None:
                raise
            broken(str(error))
            continue
        yield where, parsed


def _row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise QwenScopeError(
            f"expected a row of named columns in {where}, found {type(row).__name__}; write rows such as "
            '{"text": "…"}'
        )
    return row


def as_document(value: Any, where: str) -> Document:
    """A value as a document, or a QwenScopeError that says where it was."""
    if isinstance(value, str):
        return _unicode(value, where)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        messages = [_message(message) for message in value]
        if all(isinstance(message.get("role"), str) and "content" in message for message in messages):
            for message in messages:
                _unicode(str(message["content"]), where)
            return messages
    raise QwenScopeError(
        f"expected text or chat messages with role and content in {where}, found {type(value).__name__} "
        f"{repr(value)[:60]}; choose another column with --column (column= in Python)"
    )


def _message(message: dict[str, Any]) -> Message:
    if "from" not in message or "value" not in message:
        return message
    return {"role": _SHAREGPT.get(str(message["from"]), message["from"]), "content": message["value"]}


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QwenScopeError(
            f"expected valid Unicode in {where}, found {text[error.start]!a} at character {error.start}; correct the text"
        ) from error
    return text


def is_blank(document: Document) -> bool:
    """Whether a document has nothing to read."""
    if isinstance(document, str):
        return not document or document.isspace()
    return all(not message["content"] or str(message["content"]).isspace() for message in document)


def unreadable(place: str | Path, error: Exception) -> QwenScopeError:
    """The error for a source that is there but cannot be read."""
    return QwenScopeError(
        f"expected to read {place}, found that it cannot be read ({short(error)}); check or fetch it again"
    )


def short(error: Exception) -> str:
    """A library's error on one line; unlike its first sentence, this keeps the choices that `datasets` lists."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
