"""Text, JSON and CSV files: their text in pieces or their rows one by one, never more than is asked for."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_scope.corpus.columns import Broken, Wanted, chosen_columns, in_column, parsed_or_told, picked, unreadable
from qwen_scope.errors import QwenScopeError

_PIECE = 1 << 20


class NotText(QwenScopeError):
    """A file that is not UTF-8 text: skipped in a folder unless its ending promises text."""


def ending(path: Path) -> str:
    """A file's ending in lower case, that of what is compressed for `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def text_pieces(path: Path, column: Wanted, broken: Broken = None) -> Iterator[tuple[str, Any]]:
    """A text file as one document, or in pieces if it is long."""
    if isinstance(column, tuple):
        raise QwenScopeError(
            f"expected rows with the columns {', '.join(column)} in {path}, found a plain text; use JSONL, CSV or Parquet"
        )
    start = 0
    for piece in _pieces(path, _PIECE):
        yield f"{path} from character {start}" if start else str(path), piece
        start += len(piece)


def json_rows(path: Path, column: Wanted, broken: Broken = None) -> Iterator[tuple[str, Any]]:
    """The rows of one list, or those of lines."""
    if not next((line for line in _pieces(path, 1) if not line.isspace()), "").lstrip().startswith("["):
        yield from json_lines(path, column, broken)
        return
    rows = _parsed("".join(_pieces(path, _PIECE)), str(path))
    yield from in_column(((f"row {number} of {path}", row) for number, row in enumerate(rows, 1)), column, broken)


def json_lines(path: Path, column: Wanted, broken: Broken = None) -> Iterator[tuple[str, Any]]:
    """A row a line."""
    lines = ((f"line {number} of {path}", line) for number, line in enumerate(_pieces(path, 1, broken), 1))
    whole = ((where, line) for where, line in lines if not line.isspace())
    yield from in_column(parsed_or_told(whole, _parsed, broken), column, broken)


def separated_rows(path: Path, column: Wanted, broken: Broken = None) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV or TSV file, whose first names the columns."""
    # The module's limit of 128 KiB a field holds for the whole process, and documents are longer.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(_pieces(path, 1), delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    places: list[int] | None = None
    while True:
        try:
            row = next(rows, None)
            if row is None:
                return
        except csv.Error as error:
            wrong = QwenScopeError(
                f"expected rows with quotes in pairs in {path}, found line {rows.line_num} otherwise ({error}); correct it"
            )
            if broken is None or places is None:
                raise wrong from error
            broken(str(wrong))
            continue
        if places is None:
            places = (
                [row.index(name) for name in chosen_columns(dict.fromkeys(row, True), column, str(path))]
                if row
                else [0]
            )
        else:
            values = [row[place] if place < len(row) else None for place in places]
            yield f"line {rows.line_num} of {path}", picked(values, column)


def _pieces(path: Path, size: int, broken: Broken = None) -> Iterator[str]:
    """A file's text in pieces of `size` bytes and the rest of the line; of size 1, its lines. One that is told to be broken
    comes as an empty line."""
    start = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while piece := file.read(size):
                if b"\0" not in piece and not piece.endswith(b"\n"):
                    piece += file.readline()
                try:
                    text = _decoded(piece, start, path)
                except NotText as error:
                    if broken is None:
                        raise
                    broken(str(error))
                    text = "\n"
                yield text if start else text.removeprefix("\ufeff")
                start += len(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _decoded(piece: bytes, start: int, path: Path) -> str:
    if (nul := piece.find(b"\0")) >= 0:
        raise NotText(
            f"expected UTF-8 text in {path}, found a zero byte at offset {start + nul}, as in binary files; "
            "choose another file or save it as UTF-8"
        )
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise NotText(
            f"expected UTF-8 text in {path}, found no UTF-8 at offset {start + error.start}; save the file as UTF-8"
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QwenScopeError(f"expected JSON in {where}, found what does not parse ({error}); correct it") from error
