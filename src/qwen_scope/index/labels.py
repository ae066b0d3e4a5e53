"""Labels of features: a file of lines that only grows, so that nothing written is ever lost."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from qwen_scope.errors import QwenScopeError
from qwen_scope.index.feature import Label

if TYPE_CHECKING:
    from qwen_scope.index.layout import About

Key = tuple[int, int]
"""Layer and number of a feature."""
HAND = "hand"


class Labels:
    """Labels by feature, kept as lines of JSON to which new ones are added.

    Of each author the newest counts, and a hand's before any model's. Other processes may add lines meanwhile: what is read
    is what lies there at that moment.

    Args:
        path: the file that new labels go to; made when the first one is written.
        below: a file that is only read, whose labels count as older.
    """

    def __init__(self, path: Path, below: Path | None = None):
        self.path = path
        self.below = below
        self._read_at: tuple[object, ...] | None = None
        self._found: dict[Key, dict[str, Label]] = {}

    @staticmethod
    def beside(folder: Path, about: About) -> Labels:
        """The labels of the index in a folder; where that folder comes with the package, new ones go to the user's own files."""
        beside = folder / "labels.jsonl"
        if folder.parent == Path(__file__).parent.parent:
            return Labels(data_folder() / "labels" / f"{folder.name}-{about.fingerprint}.jsonl", below=beside)
        return Labels(beside)

    def get(self, layer: int, number: int) -> Label | None:
        """The label that counts, or None."""
        return next(iter(self.all(layer, number)), None)

    def all(self, layer: int, number: int) -> list[Label]:
        """The newest label of each author: by hand first, then the newest."""
        return self._ordered(self._by_feature().get((layer, number), {}))

    def items(self) -> Iterator[tuple[Key, Label]]:
        """Every labelled feature with the label that counts, in order of layer and number."""
        for key, by in sorted(self._by_feature().items()):
            if ordered := self._ordered(by):
                yield key, ordered[0]

    def __len__(self) -> int:
        return sum(1 for _ in self.items())

    def add(self, layer: int, number: int, label: Label) -> None:
        """Adds a label; one without text takes back what its author wrote before.

        Raises:
            QwenScopeError: the file cannot be written.
        """
        label = label if label.time else replace(label, time=now())
        line = json.dumps({"layer": layer, "feature": number, **asdict(label)}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                # A line that a crash cut short must not swallow this one.
                start = b"\n" if file.tell() and not _ends_a_line(self.path) else b""
                file.write(start + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise QwenScopeError(
                f"expected to write labels to {self.path}, found that it cannot be done ({error.strerror or error}); choose "
                "another place for the index"
            ) from error

    def to_table(self) -> pa.Table:
        """The labels that count, a row each."""
        rows = [{"layer": layer, "feature": number, **asdict(label)} for (layer, number), label in self.items()]
        return pa.Table.from_pylist(rows, _SCHEMA)

    def stamp(self) -> str:
        """A word that changes whenever a label is added."""
        return hashlib.sha256(repr(self._state()).encode()).hexdigest()[:16]

    def _ordered(self, by: dict[str, Label]) -> list[Label]:
        newest_first = [label for label in reversed(by.values()) if label.text]
        return sorted(newest_first, key=lambda label: label.by != HAND)

    def _state(self) -> tuple[object, ...]:
        found = []
        for path in (self.below, self.path):
            try:
                stat = path.stat() if path else None
                found.append(stat and (stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append(None)
        return tuple(found)

    def _by_feature(self) -> dict[Key, dict[str, Label]]:
        state = self._state()
        if state != self._read_at:
            found: dict[Key, dict[str, Label]] = defaultdict(dict)
            for path in (self.below, self.path):
                for key, label in _lines(path) if path else ():
                    found[key].pop(label.by, None)
                    found[key][label.by] = label
            self._found, self._read_at = dict(found), state
        return self._found


_SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("feature", pa.int32()),
        ("text", pa.string()),
        ("by", pa.string()),
        ("score", pa.float64()),
        ("control", pa.float64()),
        ("prompt", pa.string()),
        ("time", pa.string()),
    ]
)


def label_of(row: object, where: str) -> tuple[Key, Label]:
    """A row of a file of labels.

    Raises:
        QwenScopeError: it is no such row.
    """
    found = row if isinstance(row, dict) else {}
    layer, number, text = found.get("layer"), found.get("feature"), found.get("text")
    numbers = [found.get(name) for name in ("score", "control")]
    if not (
        (type(layer) is int and layer >= 0)
        and (type(number) is int and number >= 0)
        and isinstance(text, str)
        and all(value is None or isinstance(value, int | float) for value in numbers)
    ):
        raise QwenScopeError(
            f"expected an object with layer, feature and text in {where}, found {repr(row)[:80]}; correct it"
        )
    score, control = (None if value is None else float(value) for value in numbers)
    prompt = None if found.get("prompt") is None else str(found["prompt"])
    return (layer, number), Label(text, str(found.get("by", HAND)), score, control, prompt, str(found.get("time", "")))


def now() -> str:
    """The time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def data_folder() -> Path:
    """Where what a user wrote is kept, unlike the cache: `QWEN_SCOPE_DATA`, else the user's folder for data."""
    if chosen := os.environ.get("QWEN_SCOPE_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "qwen-scope"


def _lines(path: Path) -> Iterator[tuple[Key, Label]]:
    """Labels of a file of ours. What is no label is passed over: only a crash can have left it."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield label_of(json.loads(line), str(path))
                except (ValueError, QwenScopeError):
                    continue
    except OSError:
        return


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
