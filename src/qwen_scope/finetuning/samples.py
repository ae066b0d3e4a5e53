"""`Sample`: what fine-tuning reads, with the tag (such as the language) that says how features should be on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope.corpus import rows
from qwen_scope.corpus.columns import as_document, is_blank
from qwen_scope.errors import QwenScopeError
from qwen_scope.tokens import TokenizedText, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = (("prompt", "completion"), ("messages",), ("text",))
"""Columns that a sample can be in, as TRL names them; the first kind that a source has is read."""


@dataclass(frozen=True)
class Sample:
    """One sample, in the form that TRL takes."""

    row: dict[str, Any]
    """`text`, `messages`, or `prompt` and `completion`; each of the latter a text or messages."""
    tag: str
    """What kind of sample it is, such as the language it is in."""
    place: str = ""
    """Where it was, such as `line 5 of set.jsonl`."""

    @staticmethod
    def of(document: Any, tag: str) -> Sample:
        """A sample of a text or of messages."""
        return Sample({"text" if isinstance(document, str) else "messages": document}, tag)

    def tokenized(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[TokenizedText, int]:
        """The whole sample as the model reads it, and how many of its first tokens are its prompt, which is not trained on.

        Raises:
            QwenScopeError: nothing to read, or messages without a chat template.
        """
        if "prompt" not in self.row:
            (text,), _ = tokenize([self.row.get("text", self.row.get("messages"))], tokenizer)
            return text, 0
        prompt, completion = self.row["prompt"], self.row["completion"]
        (text,), _ = tokenize([prompt + completion], tokenizer)
        (asked,), _ = tokenize([prompt], tokenizer, reply=True)
        # As TRL does: the completion begins where the two diverge.
        same = next((at for at, (a, b) in enumerate(zip(asked.ids, text.ids, strict=False)) if a != b), len(asked.ids))
        return text, min(same, len(text.ids))

    def prompt(self, tokenizer: PreTrainedTokenizerBase | None, tokens: int) -> TokenizedText:
        """What a model is asked, to see how it goes on: the prompt, the messages before the last answer, or the text's first
        tokens."""
        if "text" in self.row:
            (text,), _ = tokenize([self.row["text"]], tokenizer)
            end = text.spans[min(tokens, len(text)) - 1][1]
            return TokenizedText(text.text[:end], text.ids[:tokens], text.tokens[:tokens], text.spans[:tokens])
        asked = self.row["prompt"] if "prompt" in self.row else _before_the_answer(self.row["messages"])
        (text,), _ = tokenize([asked], tokenizer, reply=True)
        return text


def _before_the_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at]
    return messages[: answers[-1]] if answers else messages


def read_samples(
    source: str | Path, tag_column: str | None = "language", *, split: str = "train", subset: str | None = None
) -> list[Sample]:
    """The samples of a JSONL, CSV or Parquet file, a folder of them, or a Hugging Face dataset.

    Args:
        source: see `qwen_scope.corpus.located`. Its rows have `text`, `messages`, or `prompt` and `completion`.
        tag_column: the column that holds each sample's tag; without one, no tag is read.
        split: for datasets, the split to read.
        subset: for datasets on the hub, the configuration to read.

    Raises:
        QwenScopeError: no such source or column, a row without text or without a tag.
    """
    columns = _columns(source, tag_column, split, subset)
    found = []
    tagged = [] if tag_column is None else [tag_column]
    for where, row in rows(source, (*columns, *tagged), split=split, config=subset):
        tag = "none" if tag_column is None else row.pop(tag_column)
        if tag is None or not str(tag).strip():
            raise QwenScopeError(
                f"expected a tag, such as a language, in the column {tag_column!r} of every sample, found none in {where}; fill "
                "it in or leave the row out"
            )
        for name, value in row.items():
            if value is None or is_blank(as_document(value, where)):
                raise QwenScopeError(
                    f"expected a value of {name} in {where}, found none; fill it in or leave the row out"
                )
        row = {name: as_document(value, where) for name, value in row.items()}
        if len({type(value) for value in row.values()}) > 1:
            raise QwenScopeError(
                f"expected prompt and completion of one kind in {where}, found text and messages; use one"
            )
        found.append(Sample(row, str(tag), where))
    if not found:
        raise QwenScopeError(f"expected samples in {source}, found none; give some")
    return found


def _columns(source: str | Path, tag_column: str | None, split: str, subset: str | None) -> tuple[str, ...]:
    """The kind of columns that the source has."""
    if tag_column is not None:
        _first(rows(source, (tag_column,), split=split, config=subset), source, tag_column)
    errors = []
    for columns in KINDS:
        try:
            next(iter(rows(source, columns, split=split, config=subset)), None)
        except QwenScopeError as error:
            errors.append(error)
            continue
        return columns
    raise QwenScopeError(
        f"expected the columns text, messages, or prompt and completion in {source}, found none of them; rename yours"
    ) from errors[-1]


def _first(found: Iterator[Any], source: str | Path, tag_column: str) -> None:
    try:
        next(found, None)
    except QwenScopeError as error:
        if "the column" not in str(error):
            raise
        raise QwenScopeError(
            f"expected a column {tag_column!r} with each sample's tag in {source}, found none ({error}); name it with "
            "--tag-column"
        ) from error


def check_tags(samples: Sequence[Sample], known: Sequence[str]) -> None:
    """Raises a QwenScopeError where a sample has a tag that is not known."""
    unknown = [sample for sample in samples if sample.tag not in known]
    if unknown:
        raise QwenScopeError(
            f"expected tags among {', '.join(known)}, found {unknown[0].tag!r} in {unknown[0].place or 'a sample'} and "
            f"{len(unknown) - 1} other samples of such tags; measure the restraints with these, or leave them out"
        )
