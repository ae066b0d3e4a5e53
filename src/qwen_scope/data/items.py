"""`Items`: the items of a set (questions of a benchmark, labelled texts, a training mix), each as one text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from qwen_scope.corpus import Document, rows
from qwen_scope.corpus.columns import Broken, as_document, is_blank, parsed_or_told
from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True)
class Items:
    """The items of a set."""

    texts: list[Document]
    """What is read of each: a text, or chat messages."""
    labels: list[str] | None
    """The label of each, if one was asked for."""
    places: list[str]
    """Where each was, such as `line 5 of set.jsonl`."""

    def __len__(self) -> int:
        return len(self.texts)


def read_items(
    source: str | Path | Sequence[Document],
    *,
    column: str | None = None,
    template: str | None = None,
    label: str | None = None,
    split: str = "train",
    subset: str | None = None,
    count: int | None = None,
    broken: Broken = None,
) -> Items:
    """The items of a file, a folder, a Hugging Face dataset, or a list of texts.

    Args:
        source: see `qwen_scope.corpus.located`; or the texts themselves.
        column: where a row's text or messages are; see `located`.
        template: instead, a text made of a row's columns, such as `Question: {question}\\nAnswer:`; `{choices[0]}` is the first
            of a list, and `{{` a brace.
        label: the column that holds each item's label.
        split: for datasets, the split to read.
        subset: for datasets on the hub, the configuration to read.
        count: read so many items at most, the first ones.
        broken: is called with a sentence for each row that cannot be used, such as one with an empty field, which is left out
            then. Without it, the first one ends the reading.

    Raises:
        QwenScopeError: no such source, column or field, a row that cannot be used, or no items at all.
    """
    if template is not None and column is not None:
        raise QwenScopeError("expected a column or a template, found both; leave one out")
    if count is not None and count < 1:
        raise QwenScopeError(f"expected a count of at least 1 item, found {count}; ask for one or more")
    first_broken = ""

    def told(sentence: str) -> None:
        nonlocal first_broken
        first_broken = first_broken or f" ({sentence})"
        if broken is not None:
            broken(sentence)

    tell = None if broken is None else told
    fields = [] if template is None else _fields(template)
    named = template is not None or label is not None
    if isinstance(source, str | Path):
        columns = [*(fields or [column or "text"]), *([] if label is None else [label])]
        wanted = tuple(dict.fromkeys(columns)) if named else column
        found: Iterable[tuple[str, Any]] = rows(source, wanted, split=split, config=subset, broken=tell)
    elif named or column is not None:
        raise QwenScopeError(
            "expected a file with columns for a column, a template or labels, found a list of texts; leave them out"
        )
    else:
        found = ((f"item {n}", text) for n, text in enumerate(source, 1))

    def parsed(value: Any, where: str) -> tuple[Document, str]:
        if not named:
            return _document(value, where), ""
        known = "" if label is None else str(as_document(str(_filled(value, label, where)), where))
        values = {name: _filled(value, name, where) for name in fields}
        text = value[column or "text"] if template is None else _formatted(template, values, where)
        return _document(text, where), known

    read = list(islice(parsed_or_told(iter(found), parsed, tell), count))
    if not read:
        place = source if isinstance(source, str | Path) else "the list"
        raise QwenScopeError(f"expected items in {place}, found none that can be used{first_broken}; give some")
    labels = None if label is None else [known for _, (_, known) in read]
    return Items([text for _, (text, _) in read], labels, [where for where, _ in read])


def text_of(document: Document) -> str:
    """A document as plain text: of messages, their contents one after another."""
    return document if isinstance(document, str) else "\n".join(str(message["content"]) for message in document)


def _fields(template: str) -> list[str]:
    """The columns that a template names."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise QwenScopeError(
            f"expected a template such as 'Question: {{question}}', found {template!r} ({error}); fix it"
        ) from error
    fields = []
    for _, name, form, conversion in parts:
        found = re.fullmatch(r"([^.\[\]]+)(\[[^.\[\]]+\])*", name or "")
        if found is None or form or conversion or found[1].isdigit():
            raise QwenScopeError(
                f"expected columns in braces, such as 'Question: {{question}}' or '{{choices[0]}}', found {{{name}}} in "
                f"{template!r}; name a column, and write {{{{ for a brace"
            )
        fields.append(found[1])
    if not fields:
        raise QwenScopeError(
            f"expected a template with columns in braces, such as 'Question: {{question}}', found {template!r}; name columns"
        )
    return fields


def _filled(row: dict[str, Any], name: str, where: str) -> Any:
    value = row[name]
    # NaN, which tables have where a number is missing, is the one value that is unlike itself.
    missing = value is None or value == [] or (isinstance(value, float) and value != value)
    if missing or (isinstance(value, str) and not value.strip()):
        raise QwenScopeError(f"expected a value of {name} in {where}, found none; fill it in or leave the row out")
    return value


def _formatted(template: str, values: dict[str, Any], where: str) -> str:
    try:
        return template.format(**values)
    except (LookupError, TypeError, ValueError) as error:
        raise QwenScopeError(
            f"expected all that {template!r} names in {where}, found that it lacks some ({error}); change the template or the row"
        ) from error


def _document(value: Any, where: str) -> Document:
    if value is None or is_blank(document := as_document(value, where)):
        raise QwenScopeError(f"expected a text in {where}, found a blank one; fill it in or leave the row out")
    return document
