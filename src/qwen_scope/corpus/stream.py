"""`documents`: files, folders, tables and Hugging Face datasets as one stream of documents."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_scope.corpus.columns import Broken, Document, Wanted, as_document, is_blank, parsed_or_told, unreadable
from qwen_scope.corpus.files import NotText, ending, json_lines, json_rows, separated_rows, text_pieces
from qwen_scope.corpus.tables import hub_rows, parquet_rows, saved_rows
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import is_file, is_folder

_TEXTS = (".txt", ".md")
_ROWS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_rows,
    ".csv": separated_rows,
    ".tsv": separated_rows,
    ".parquet": parquet_rows,
}


def documents(
    source: str | Path,
    *,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    streaming: bool = True,
) -> Iterator[Document]:
    """The documents of a corpus, one at a time, always in the same order: those of `located`, without their places."""
    found = located(source, column=column, split=split, config=config, streaming=streaming)
    return (document for _, document in found)


def located(
    source: str | Path,
    *,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    streaming: bool = True,
    broken: Broken = None,
) -> Iterator[tuple[str, Document]]:
    """The documents of a corpus, each with the words that say where it was, always in the same order.

    - `.txt`, `.md` and any file of another kind: the file is one document. One longer than 1 MiB comes in pieces of about
      that size, cut at line ends.
    - `.jsonl`, `.ndjson`, `.json` (one list of rows, or a row a line), `.csv`, `.tsv`, `.parquet`: a row is a document.
    - `.gz` after any of these but `.parquet`: the same, compressed.
    - A folder: its files in the order of their names, folders within it included; hidden files, linked folders and files
      that are not UTF-8 text are left out. Files whose ending promises text or rows must keep the promise.
    - A folder written by `datasets.save_to_disk`, or the id `org/name` of a dataset on the Hugging Face hub.

    Blank documents and rows without a value are left out.

    Args:
        source: a file, a folder, or a dataset's id.
        column: where a row's text or messages are; None takes `text`, `messages`, `conversations` or `conversation`, else
            the only column of strings. It must be in the first row. Messages are dicts with `role` and `content`, or
            with `from` and `value` as in ShareGPT, which are renamed.
        split: for datasets, the split to read.
        config: for datasets on the hub, the configuration to read.
        streaming: for datasets on the hub, whether to read while downloading; False keeps a copy in the hub's cache.
        broken: is called with a sentence for each line, row or file of a folder that cannot be read, which is left out
            then. Without it, the first one ends the reading.

    Raises:
        QwenScopeError: nothing there, no document in it, no such column, or a file, row or value that cannot be read.
    """
    found, first_broken = False, ""

    def told(sentence: str) -> None:
        nonlocal first_broken
        first_broken = first_broken or f" ({sentence})"
        if broken is not None:
            broken(sentence)

    tell = None if broken is None else told
    values = _values(source, column, split, config, streaming, tell)
    for where, document in parsed_or_told(values, lambda v, w: None if v is None else as_document(v, w), tell):
        if document is not None and not is_blank(document):
            found = True
            yield where, document
    if not found:
        raise QwenScopeError(
            f"expected a corpus of at least one document in {source}, found only blank ones or none{first_broken}; choose "
            "another source"
        )


def rows(
    source: str | Path,
    columns: Wanted,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = True,
    broken: Broken = None,
) -> Iterator[tuple[str, Any]]:
    """The values of each row as they were stored, blank ones included and None where a row lacks one, each with the words that
    say where it was, always in the same order: of several columns a dict, of one the value, of None that of the column which
    holds the text.

    For the other arguments and the errors see `located`.
    """
    yield from _values(source, columns, split, config, streaming, broken)


def _locate(source: str | Path) -> Path | str:
    """The file or folder that a source names, or the dataset's id that it is."""
    name = str(source)
    if name and (is_file(name) or is_folder(name)):
        return Path(name).expanduser()
    looks_like_a_file = ending(Path(name)) in {*_TEXTS, *_ROWS}
    if isinstance(source, Path) or looks_like_a_file or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise QwenScopeError(
            f"expected a file, a folder or the id org/name of a Hugging Face dataset, found nothing at {name!r}; check the "
            "path"
        )
    return name


def _values(
    source: str | Path, column: Wanted, split: str, config: str | None, streaming: bool, broken: Broken
) -> Iterator[tuple[str, Any]]:
    """Each text or row's value as it was stored, with the words that say where it was."""
    place = _locate(source)
    if isinstance(place, str):
        return hub_rows(place, column, split, config, streaming)
    if place.is_file():
        return _ROWS.get(ending(place), text_pieces)(place, column, broken)
    if any(is_file(place / name) for name in ("state.json", "dataset_dict.json")):
        return saved_rows(place, column, split)
    return _folder(place, column, broken)


def _folder(folder: Path, column: Wanted, broken: Broken) -> Iterator[tuple[str, Any]]:
    files = skipped = 0
    for path in _files(folder):
        files += 1
        try:
            yield from _ROWS.get(ending(path), text_pieces)(path, column, broken)
        except NotText as error:
            promised = ending(path) in {*_TEXTS, *_ROWS}
            if promised and broken is None:
                raise
            if promised and broken is not None:
                broken(str(error))
            skipped += 1
        except QwenScopeError as error:
            if broken is None:
                raise
            broken(str(error))
    if files == skipped:
        raise QwenScopeError(
            f"expected text files in {folder}, found {files} files and no UTF-8 text in them; choose another folder"
        )


def _files(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as listing:
            # A linked folder could lead back to this one, so links do not count as folders.
            entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing)
    except OSError as error:
        raise unreadable(folder, error) from error
    for name, is_real_folder in entries:
        if is_real_folder and not name.startswith("."):
            yield from _files(folder / name)
        elif not name.startswith(".") and is_file(folder / name):
            yield folder / name
