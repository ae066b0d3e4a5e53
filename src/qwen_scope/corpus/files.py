"""Text, JSON and CSV files: their text in pieces or their rows one by one, never more than is asked for."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_scope.corpus.columns import choose, in_column, unreadable
from qwen_scope.errors import QwenScopeError

_PIECE = 1 << 20


class NotText(QwenScopeError):
    """A file that is not UTF-8 text: skipped in a folder unless its ending promises text."""


def ending(path: Path) -> str:
    """A file's ending in lower case, that of what is compressed for `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def text_pieces(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """A text file as one document, or in pieces if it is long."""
    return ((str(path), piece) for piece in _pieces(path, _PIECE))


def json_rows(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of one list, or those of lines."""
    if not next((line for line in _pieces(path, 1) if not line.isspace()), "").lstrip().startswith("["):
        yield from json_lines(path, column)
        return
    rows = _parsed("".join(_pieces(path, _PIECE)), str(path))
    yield from in_column(((f"row {number} of {path}", row) for number, row in enumerate(rows, 1)), column)


def json_lines(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """A row a line."""
    lines = ((f"line {number} of {path}", line) for number, line in enumerate(_pieces(path, 1), 1))
    yield from in_column(((where, _parsed(line, where)) for where, line in lines if not line.isspace()), column)


def separated_rows(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV or TSV file, whose first names the columns."""
    # The module's limit of 128 KiB a field holds for the whole process, and documents are longer.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(_pieces(path, 1), delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        index = header.index(choose(dict.fromkeys(header, True), column, str(path))) if header else 0
        for row in rows:
            yield f"line {rows.line_num} of {path}", row[index] if index < len(row) else None
    except csv.Error as error:
        raise QwenScopeError(
            f"expected rows with quotes in pairs in {path}, found line {rows.line_num} otherwise ({error}); correct it"
        ) from error


def _pieces(path: Path, size: int) -> Iterator[str]:
    """A file's text in pieces of `size` bytes and the rest of the line; of size 1, its lines."""
    start = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while piece := file.read(size):
                if b"\0" not in piece and not piece.endswith(b"\n"):
                    piece += file.readline()
                if (nul := piece.find(b"\0")) >= 0:
                    raise NotText(
                        f"expected UTF-8 text in {path}, found a zero byte at offset {start + nul}, as in binary files; "
                        "choose another file or save it as UTF-8"
                    )
                text = piece.decode()
                yield text if start else text.removeprefix("\ufeff")
                start += len(piece)
    except UnicodeDecodeError as error:
        raise NotText(
            f"expected UTF-8 text in {path}, found no UTF-8 at offset {start + error.start}; save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QwenScopeError(f"expected JSON in {where}, found what does not parse ({error}); correct it") from error
