"""One way to read a corpus: files, folders, tables and Hugging Face datasets, as one stream of documents.

Everything is read as it is asked for, in an order that does not change from run to run, in memory that does not grow
with the corpus. Only a `.json` file that holds one list is read whole.
"""

import csv
import gzip
import hashlib
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import is_file, is_folder
from qwen_scope.tokens import Message

Document = str | list[Message]
"""A plain text, or the messages of one chat."""

_PIECE = 1 << 20
_NAMED = ("text", "messages", "conversations", "conversation")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_TEXTS = (".txt", ".md")


class _NotText(QwenScopeError):
    """A file that is not UTF-8 text: skipped in a folder unless its ending promises text."""


def documents(
    source: str | Path,
    *,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    streaming: bool = True,
) -> Iterator[Document]:
    """The documents of a corpus, one at a time, always in the same order.

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

    Raises:
        QwenScopeError: nothing there, no document in it, no such column, or a file, row or value that cannot be read.
    """
    found = False
    for where, value in _values(source, column, split, config, streaming):
        if value is not None and not _is_blank(document := _document(value, where)):
            found = True
            yield document
    if not found:
        raise QwenScopeError(
            f"expected a corpus of at least one document in {source}, found only blank ones or none; choose another source"
        )


def fingerprint(source: str | Path, *, split: str = "train", config: str | None = None) -> str:
    """A short check that a corpus is still the same, as 64 hex digits.

    For files it covers their names within `source`, their sizes and their first and last 64 KiB, so that a copy has the
    same fingerprint; a change in the middle of a large file that keeps its size goes unnoticed. For a dataset on the hub
    it covers the id, the configuration and the split.

    Raises:
        QwenScopeError: no such source, or a file or folder that cannot be read.
    """
    place, digest = _locate(source), hashlib.sha256()
    if isinstance(place, str):
        return hashlib.sha256(repr((place, config, split)).encode()).hexdigest()
    for path in [place] if place.is_file() else _files(place):
        name = path.name if path == place else path.relative_to(place).as_posix()
        try:
            with path.open("rb") as file:
                size, head = os.fstat(file.fileno()).st_size, file.read(1 << 16)
                file.seek(max(size - (1 << 16), 0))
                parts = (os.fsencode(name), str(size).encode(), head, file.read(1 << 16))
        except OSError as error:
            raise _unreadable(path, error) from error
        # Each part's own digest, so that no two lists of parts read the same when joined.
        digest.update(b"".join(hashlib.sha256(part).digest() for part in parts))
    return digest.hexdigest()


def _locate(source: str | Path) -> Path | str:
    """The file or folder that a source names, or the dataset's id that it is."""
    name = str(source)
    if name and (is_file(name) or is_folder(name)):
        return Path(name).expanduser()
    looks_like_a_file = _ending(Path(name)) in {*_TEXTS, *_ROWS}
    if isinstance(source, Path) or looks_like_a_file or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise QwenScopeError(
            f"expected a file, a folder or the id org/name of a Hugging Face dataset, found nothing at {name!r}; check the "
            "path"
        )
    return name


def _values(
    source: str | Path, column: str | None, split: str, config: str | None, streaming: bool
) -> Iterator[tuple[str, Any]]:
    """Each text or row's value as it was stored, with the words that say where it was."""
    place = _locate(source)
    if isinstance(place, str):
        return _hub(place, column, split, config, streaming)
    if place.is_file():
        return _ROWS.get(_ending(place), _text)(place, column)
    if any(is_file(place / name) for name in ("state.json", "dataset_dict.json")):
        return _saved(place, column, split)
    return _folder(place, column)


def _folder(folder: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    files = skipped = 0
    for path in _files(folder):
        files += 1
        try:
            yield from _ROWS.get(_ending(path), _text)(path, column)
        except _NotText:
            if _ending(path) in {*_TEXTS, *_ROWS}:
                raise
            skipped += 1
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
        raise _unreadable(folder, error) from error
    for name, is_real_folder in entries:
        if is_real_folder and not name.startswith("."):
            yield from _files(folder / name)
        elif not name.startswith(".") and is_file(folder / name):
            yield folder / name


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _pieces(path: Path, size: int) -> Iterator[str]:
    """A file's text in pieces of `size` bytes and the rest of the line; of size 1, its lines."""
    start = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while piece := file.read(size):
                if b"\0" not in piece and not piece.endswith(b"\n"):
                    piece += file.readline()
                if (nul := piece.find(b"\0")) >= 0:
                    raise _NotText(
                        f"expected UTF-8 text in {path}, found a zero byte at offset {start + nul}, as in binary files; "
                        "choose another file or save it as UTF-8"
                    )
                text = piece.decode()
                yield text if start else text.removeprefix("\ufeff")
                start += len(piece)
    except UnicodeDecodeError as error:
        raise _NotText(
            f"expected UTF-8 text in {path}, found no UTF-8 at offset {start + error.start}; save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _text(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    return ((str(path), piece) for piece in _pieces(path, _PIECE))


def _json(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    if not next((line for line in _pieces(path, 1) if not line.isspace()), "").lstrip().startswith("["):
        yield from _json_lines(path, column)
        return
    rows = _parsed("".join(_pieces(path, _PIECE)), str(path))
    yield from _in_column(((f"row {number} of {path}", row) for number, row in enumerate(rows, 1)), column)


def _json_lines(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    lines = ((f"line {number} of {path}", line) for number, line in enumerate(_pieces(path, 1), 1))
    yield from _in_column(((where, _parsed(line, where)) for where, line in lines if not line.isspace()), column)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QwenScopeError(f"expected JSON in {where}, found what does not parse ({error}); correct it") from error


def _separated(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    # The module's limit of 128 KiB a field holds for the whole process, and documents are longer.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(_pieces(path, 1), delimiter="\t" if _ending(path) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        index = header.index(_choose(dict.fromkeys(header, True), column, str(path))) if header else 0
        for row in rows:
            yield f"line {rows.line_num} of {path}", row[index] if index < len(row) else None
    except csv.Error as error:
        raise QwenScopeError(
            f"expected rows with quotes in pairs in {path}, found line {rows.line_num} otherwise ({error}); correct it"
        ) from error


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    pyarrow, parquet = _import("pyarrow", path), _import("pyarrow.parquet", path)
    try:
        # Buffered, and without reading ahead: a row group's column is not held whole.
        with parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False) as file:
            chosen = _choose(_strings(file.schema_arrow), column, str(path))
            batches = file.iter_batches(batch_size=64, columns=[chosen], use_threads=False)
            values = (value for batch in batches for value in batch.column(chosen).to_pylist())
            for number, value in enumerate(values, 1):
                yield f"row {number} of {path}", value
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _saved(folder: Path, column: str | None, split: str) -> Iterator[tuple[str, Any]]:
    datasets = _import("datasets", folder)
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # whatever datasets raises at half a folder
        raise _unreadable(folder, error) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise QwenScopeError(
                f"expected the split {split!r} in {folder}, found {', '.join(loaded)}; choose with split="
            )
        loaded = loaded[split]
    yield from _dataset(loaded, column, str(folder))


def _hub(name: str, column: str | None, split: str, config: str | None, streaming: bool) -> Iterator[tuple[str, Any]]:
    datasets = _import("datasets", name)
    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise QwenScopeError(
            f"expected a file, a folder or a Hugging Face dataset named {name}, found no file or folder and no such dataset "
            f"within reach ({_short(error)}); check the name and the connection, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # whatever datasets raises, such as at an unknown split or configuration
        raise QwenScopeError(
            f"expected the dataset {name} to have the split {split!r} in the configuration {config or 'by default'}, found "
            f"that it does not load ({_short(error)}); choose with split= and config="
        ) from error
    yield from _dataset(loaded, column, name)


def _dataset(loaded: Any, column: str | None, name: str) -> Iterator[tuple[str, Any]]:
    """The values of a `datasets` object; of one that knows its columns, no other column is read."""
    try:
        if not loaded.features:
            yield from _in_column(((f"row {number} of {name}", row) for number, row in enumerate(loaded, 1)), column)
            return
        chosen, number = _choose(_strings(loaded.features.arrow_schema), column, name), 0
        for batch in loaded.select_columns([chosen]).with_format("arrow").iter(batch_size=64):
            batch.validate(full=True)  # Arrow believes a file's offsets: damaged ones would end the process
            for value in batch.column(chosen).to_pylist():
                number += 1
                yield f"row {number} of {name}", value
    except QwenScopeError:
        raise
    except Exception as error:  # whatever datasets raises at a broken file or connection
        raise _unreadable(name, error) from error


def _strings(schema: Any) -> dict[str, bool]:
    return {field.name: str(field.type) in ("string", "large_string") for field in schema}


def _in_column(rows: Iterator[tuple[str, Any]], column: str | None) -> Iterator[tuple[str, Any]]:
    chosen = None
    for where, row in rows:
        if not isinstance(row, dict):
            raise QwenScopeError(
                f"expected a row of named columns in {where}, found {type(row).__name__}; write rows such as "
                '{"text": "…"}'
            )
        if chosen is None:
            chosen = _choose({name: isinstance(value, str) for name, value in row.items()}, column, where)
        yield where, row.get(chosen)


def _choose(columns: Mapping[str, bool], asked: str | None, where: str) -> str:
    """The column to read, of columns that hold strings or do not."""
    strings = [name for name, is_string in columns.items() if is_string]
    wanted = _NAMED if asked is None else (asked,)
    for name in (*wanted, *(strings if asked is None and len(strings) == 1 else [])):
        if name in columns:
            return name
    expected = "a column text or messages, or one column of strings," if asked is None else f"the column {asked!r}"
    found = ", ".join(map(repr, columns)) or "no columns"
    raise QwenScopeError(f"expected {expected} in {where}, found {found}; choose one with --column (column= in Python)")


def _document(value: Any, where: str) -> Document:
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


def _is_blank(document: Document) -> bool:
    if isinstance(document, str):
        return not document or document.isspace()
    return all(not message["content"] or str(message["content"]).isspace() for message in document)


def _import(module: str, place: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise QwenScopeError(
            f"expected the package {module.partition('.')[0]} to read {place}, found it is not installed; run "
            "pip install 'qwen-scope[train]'"
        ) from error


def _unreadable(place: str | Path, error: Exception) -> QwenScopeError:
    return QwenScopeError(
        f"expected to read {place}, found that it cannot be read ({_short(error)}); check or fetch it again"
    )


def _short(error: Exception) -> str:
    """A library's error on one line; unlike its first sentence, this keeps the choices that `datasets` lists."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__


_ROWS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}
