"""`Items`: the items of a set (questions of a benchmark, labelled texts, a training mix), each as one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from qwen_scope.corpus import Document, located, rows
from qwen_scope.corpus.columns import Broken, as_document, is_blank
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
        template: instead, a text made of a row's columns, such as `Question: {question}\\nAnswer:`.
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
    read: list[tuple[str, Document, str | None]] = []
    if not isinstance(source, str | Path):
        if template is not None or label is not None:
            raise QwenScopeError(
                "expected a file with columns for a template or labels, found a list of texts; leave them out"
            )
        read = [(f"item {n}", as_document(text, f"item {n}"), None) for n, text in enumerate(source, 1)]
    elif template is None and label is None:
        found = located(source, column=column, split=split, config=subset, broken=broken)
        for where, document in found:
            read.append((where, document, None))
            if len(read) == count:
                break
    else:
        fields = _fields(template) if template is not None else [_text_column(column)]
        columns = tuple(dict.fromkeys([*fields, *([] if label is None else [label])]))
        for where, row in rows(source, columns, split=split, config=subset, broken=broken):
            try:
                item = _item(row, where, fields, template, label)
            except QwenScopeError as error:
                if broken is None:
                    raise
                broken(str(error))
                continue
            read.append(item)
            if len(read) == count:
                break
    read = read[:count]
    if not read:
        raise QwenScopeError(
            f"expected items in {source if isinstance(source, str | Path) else 'the list'}, found none; give some"
        )
    labels = None if label is None else [str(known) for _, _, known in read]
    return Items([text for _, text, _ in read], labels, [where for where, _, _ in read])


def _text_column(column: str | None) -> str:
    return "text" if column is None else column


def _fields(template: str) -> list[str]:
    """The columns that a template names."""
    try:
        named = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise QwenScopeError(
            f"expected a template such as 'Question: {{question}}', found {template!r} ({error}); fix it"
        ) from error
    fields = [name for name in named if name.isidentifier()]
    if not fields or len(fields) != len(named):
        raise QwenScopeError(
            f"expected a template with columns in braces, such as 'Question: {{question}}', found {template!r}; name columns"
        )
    return fields


def _item(
    row: dict[str, Any], where: str, fields: list[str], template: str | None, label: str | None
) -> tuple[str, Document, str | None]:
    for name in fields:
        value = row[name]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise QwenScopeError(f"expected a value of {name} in {where}, found none; fill it in or leave the row out")
    if label is not None and row[label] in (None, ""):
        raise QwenScopeError(f"expected a label {label} in {where}, found none; fill it in or leave the row out")
    text = template.format(**row) if template is not None else row[fields[0]]
    document = as_document(text, where)
    if is_blank(document):
        raise QwenScopeError(f"expected a text in {where}, found a blank one; fill it in or leave the row out")
    return where, document, None if label is None else str(row[label])
