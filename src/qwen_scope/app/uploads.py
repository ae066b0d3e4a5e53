"""Texts that visitors type or upload, within the limits: the same for every tab that takes sets of texts.

A file of text holds one text a line, unlike in `qwen_scope.corpus`, where it is one document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.app.config import AppConfig
from qwen_scope.data.items import Items, read_items
from qwen_scope.errors import QwenScopeError
from qwen_scope.steering import Steering
from qwen_scope.tokens import tokenize

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

KINDS = [".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"]
"""Endings of files with texts."""
LINES = (".txt",)
"""Those of files with one text a line."""
LONGEST_STEERING = 20_000
"""Characters of a steering that is typed: lists of positions have no other limit."""


@dataclass(frozen=True)
class Texts:
    """Texts of a set that can be read."""

    items: Items
    """The texts, and where each was."""
    left_out: list[str]
    """What was wrong with those that cannot, a sentence each."""


def lines(text: str, name: str) -> Items:
    """The lines of a text that are not blank, each a text of its own.

    Args:
        name: what the places call it.
    """
    # Not splitlines(), which also cuts at form feeds and other characters within a line.
    found = [
        (line, f"line {n} of {name}")
        for n, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1)
        if line.strip()
    ]
    return Items([line for line, _ in found], None, [place for _, place in found])


def read_file(
    file: str, config: AppConfig, *, column: str | None = None, template: str | None = None, count: int | None = None
) -> Texts:
    """The texts of an uploaded file. Rows that cannot be used are left out.

    Args:
        file: its path on this machine, which no visitor is told.
        column: where a row's text is; found out unless told.
        template: instead, a text made of a row's columns; see `qwen_scope.data.items.read_items`.
        count: read so many at most, the first ones.

    Raises:
        QwenScopeError: another kind of file, one that is too large, or no texts in it.
    """
    path = Path(file)
    check_file(path, KINDS, config)
    left_out: list[str] = []
    if path.suffix.lower() in LINES:
        try:
            items = lines(path.read_text(encoding="utf-8-sig"), path.name)
        except UnicodeDecodeError as error:
            raise QwenScopeError(
                f"expected UTF-8 text in {path.name}, found none at byte {error.start}; save the file as UTF-8"
            ) from error
        if not items.texts:
            raise QwenScopeError(f"expected lines of text in {path.name}, found none; write one text a line")
        return Texts(_first(items, count), [])
    try:
        items = read_items(path, column=column, template=template, count=count, broken=left_out.append)
    except QwenScopeError as error:
        reason = f"; the first row left out: {left_out[0]}" if left_out else ""
        raise QwenScopeError(without_folder(f"{error}{reason}", path)) from error
    places = [without_folder(place, path) for place in items.places]
    return Texts(Items(items.texts, items.labels, places), [without_folder(told, path) for told in left_out])


def check_file(path: Path, kinds: Sequence[str], config: AppConfig) -> None:
    """Raises a QwenScopeError unless an uploaded file is of one of some kinds and not too large."""
    if path.suffix.lower() not in kinds:
        raise QwenScopeError(f"expected a file of {', '.join(kinds)}, found {path.name}; choose another")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise QwenScopeError(
            f"expected the uploaded file {path.name}, found it is gone ({error.strerror}); upload it again"
        ) from error
    if size > config.max_file_bytes:
        raise QwenScopeError(
            f"expected a file of at most {config.max_file_bytes:,} bytes, found {path.name} of {size:,}; upload a part of it"
        )


def within_limits(
    scope: Scope, items: Items, config: AppConfig, *, most_tokens: int, too_long: Callable[[str], object] | None = None
) -> Items:
    """The texts, if there are not too many and they are not too long.

    Args:
        most_tokens: of all texts together.
        too_long: is told of each text longer than one may be, which is left out then. Without it, the first one is an error.

    Raises:
        QwenScopeError: too many texts, too long ones, or none left.
    """
    if len(items) > config.max_texts:
        raise QwenScopeError(
            f"expected at most {config.max_texts} texts in a set, found {len(items)}; give fewer, or compare on your own machine"
        )
    kept, total = [], 0
    for at, (text, place) in enumerate(zip(items.texts, items.places, strict=True)):
        # Nobody's token has so many characters, and tokenizing a novel to refuse it takes time.
        long = isinstance(text, str) and len(text) > 100 * config.max_tokens
        tokens = config.max_tokens + 1 if long else len(tokenize([text], scope.backbone.tokenizer)[0][0])
        if tokens > config.max_tokens:
            sentence = f"expected texts of at most {config.max_tokens} tokens, found a longer one, {place}; shorten it"
            if too_long is None:
                raise QwenScopeError(sentence)
            too_long(sentence)
            continue
        kept.append(at)
        total += tokens
        if total > most_tokens:
            raise QwenScopeError(
                f"expected at most {most_tokens:,} tokens in all texts of a set together, found more by {place}; give fewer or "
                "shorter texts, or use the library on your own machine"
            )
    if not kept:
        raise QwenScopeError("expected texts that are not too long, found none; shorten some")
    labels = None if items.labels is None else [items.labels[at] for at in kept]
    return Items([items.texts[at] for at in kept], labels, [items.places[at] for at in kept])


def check_text(scope: Scope, text: str, config: AppConfig) -> None:
    """Raises a QwenScopeError if a text is longer than one may be."""
    within_limits(scope, Items([text], None, ["the one given"]), config, most_tokens=config.max_tokens)


def steering_of(text: str) -> Steering:
    """A steering as it was typed.

    Raises:
        QwenScopeError: something else, or a longer one than may be.
    """
    if len(text) > LONGEST_STEERING:
        raise QwenScopeError(
            f"expected a steering of at most {LONGEST_STEERING:,} characters, found {len(text):,}; give fewer edits, or ranges "
            "of positions"
        )
    return Steering.of(text)


def without_folder(text: str, path: Path) -> str:
    """A sentence that names a file, without the folder, which is this machine's affair, and without the terminal's options."""
    return text.replace(str(path), path.name).replace(" with --column (column= in Python)", "")


def _first(items: Items, count: int | None) -> Items:
    return Items(items.texts[:count], None, items.places[:count])
