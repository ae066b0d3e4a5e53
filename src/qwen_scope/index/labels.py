"""Labels of features: a file of lines that only grows, so that nothing written is ever lost."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import pyarrow as pa

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded, replacing
from qwen_scope.index.feature import Label

if TYPE_CHECKING:
    from qwen_scope.index.layout import About

Key = tuple[int, int]
"""Layer and number of a feature."""
_State = tuple[tuple[int, int] | None, tuple[int, int] | None]
"""Time and size of the two files of labels."""
HAND = "hand"
"""The author of labels that people write."""
LONGEST = 1000
"""Characters of a label; what is longer is cut there."""
SHOWN = 3
"""How many broken lines of an import are told of one by one."""


@dataclass(frozen=True)
class Imported:
    """What became of the lines of an import."""

    added: int
    """Labels that went in."""
    older: int
    """Labels left out because the same author's here is newer, or is the same."""
    broken: int
    """Lines that are no label of a feature of this index."""
    broken_first: list[str]
    """What was wrong with the first of them, a sentence each."""

    def __str__(self) -> str:
        lines = [f"{self.added} labels added, {self.older} older than those here left out, {self.broken} broken lines"]
        return "\n".join([*lines, *self.broken_first])


class Labels:
    """Labels by feature, kept as lines of JSON to which new ones are added.

    Of each author the newest counts, and a hand's before any model's. Other threads and processes may add lines meanwhile:
    what is read is what lies there at that moment.

    Args:
        path: the file that new labels go to; made when the first one is written.
        below: a file that is only read, whose labels count as older.
        about: the index that they belong to, whose features alone they can be of.
    """

    def __init__(self, path: Path, below: Path | None = None, about: About | None = None):
        self.path = path
        self.below = below
        self.about = about
        self._lock = Lock()
        self._read_at: _State | None = None
        # Never changed, only replaced: another thread may be walking through it.
        self._found: dict[Key, dict[str, Label]] = {}

    @staticmethod
    def beside(folder: Path, about: About) -> Labels:
        """The labels of the index in a folder; where that folder comes with the package, new ones go to the user's own files."""
        beside = folder / "labels.jsonl"
        if folder.resolve().parent == Path(__file__).resolve().parent.parent:
            return Labels(data_folder() / "labels" / f"{folder.name}-{about.fingerprint}.jsonl", beside, about)
        return Labels(beside, about=about)

    def get(self, layer: int, number: int) -> Label | None:
        """The label that counts, or None."""
        return next(iter(self.all(layer, number)), None)

    def all(self, layer: int, number: int) -> list[Label]:
        """The newest label of each author: by hand first, then the newest."""
        return self._ordered(self._by_feature().get((layer, number), {}))

    def of(self, layer: int, number: int, by: str) -> Label | None:
        """The newest label of one author, or None."""
        label = self._by_feature().get((layer, number), {}).get(by)
        return label if label and label.text else None

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
            QwenScopeError: no such feature, or the file cannot be written.
        """
        if not self._has((layer, number)):
            raise QwenScopeError(f"expected a feature of this index, found {layer}/{number}; label one of its layers")
        self._write([((layer, number), label)])

    def export(self, path: str | Path) -> int:
        """Writes the newest label of each author of each feature to a file, a line of JSON each; returns how many.

        A line has `layer`, `feature`, the fields of `Label`, and `suite`, the fingerprint of the suite that is labelled.

        Raises:
            QwenScopeError: the file cannot be written.
        """
        suite = {} if self.about is None else {"suite": self.about.fingerprint}
        lines = [
            _line(key, label, suite) for key, by in sorted(self._by_feature().items()) for label in self._ordered(by)
        ]
        with replacing(expanded(path)) as temporary:
            temporary.write_bytes(b"".join(lines))
        return len(lines)

    def import_(self, path: str | Path) -> Imported:
        """Adds the labels of a file like those that `export` writes; `layer`, `feature` and `text` are enough.

        Lines that are no label of a feature of this index are left out, counted and named; so are labels of another suite,
        where the line says of which. A label without an author is one by hand, one without a time is of now.

        Raises:
            QwenScopeError: the file cannot be read, or the labels cannot be written.
        """
        path = expanded(path)
        added: dict[tuple[Key, str], Label] = {}
        older, broken, broken_first = 0, 0, []
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        key, label = self._imported(line, f"line {number} of {path}")
                    except QwenScopeError as error:
                        broken += 1
                        broken_first += [str(error)] if broken <= SHOWN else []
                        continue
                    here = added.get((key, label.by)) or self._by_feature().get(key, {}).get(label.by)
                    if here is not None and (_moment(here) > _moment(label) or here == label):
                        older += 1
                        continue
                    added.pop((key, label.by), None)
                    added[key, label.by] = label
        except OSError as error:
            raise QwenScopeError(
                f"expected a file of labels at {path}, found none that reads ({error.strerror or error}); check the path"
            ) from error
        if added:
            self._write([(key, label) for (key, _), label in added.items()])
        return Imported(len(added), older, broken, broken_first)

    def to_table(self) -> pa.Table:
        """The labels that count, a row each."""
        rows = [{"layer": layer, "feature": number, **asdict(label)} for (layer, number), label in self.items()]
        return pa.Table.from_pylist(rows, _SCHEMA)

    def stamp(self) -> str:
        """A word that changes whenever a label is added."""
        return hashlib.sha256(repr(self._state()).encode()).hexdigest()[:16]

    def _imported(self, line: bytes, where: str) -> tuple[Key, Label]:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise QwenScopeError(f"expected a line of JSON in {where}, found none ({error}); correct it") from error
        (layer, number), label = label_of(row, where)
        if not label.text:
            raise QwenScopeError(f"expected a text in {where}, found an empty one; correct it")
        if not self._has((layer, number)):
            raise QwenScopeError(
                f"expected a feature of this index in {where}, found {layer}/{number}; take labels of its layers"
            )
        if self.about is not None and row.get("suite", self.about.fingerprint) != self.about.fingerprint:
            raise QwenScopeError(
                f"expected labels of the suite {self.about.fingerprint} in {where}, found {str(row['suite'])[:80]!r}; take "
                "those of this suite"
            )
        return (layer, number), label if label.time else replace(label, time=now())

    def _has(self, key: Key) -> bool:
        return self.about is None or key[1] < self.about.layers.get(key[0], 0)

    def _write(self, labels: list[tuple[Key, Label]]) -> None:
        """Adds lines in one go, so that those of several writers do not mix."""
        labels = [
            (key, replace(label, text=clean(label.text)[:LONGEST], by=clean(label.by), time=label.time or now()))
            for key, label in labels
        ]
        data = b"".join(_line(key, label) for key, label in labels)
        with self._lock:
            before = self._state()
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    # A line that a crash cut short must not swallow this one.
                    start = b"\n" if file.tell() and not _ends_a_line(self.path) else b""
                    file.write(start + data)
                    file.flush()
                    os.fsync(file.fileno())
                    stat = os.fstat(file.fileno())
            except OSError as error:
                raise QwenScopeError(
                    f"expected to write labels to {self.path}, found that it cannot be done ({error.strerror or error}); choose "
                    "another place for the index"
                ) from error
            # If nobody else wrote meanwhile, what was read is still right, and a long run need not read it all each time.
            size = before[1][1] if before[1] else 0
            if before == self._read_at and stat.st_size == size + len(start) + len(data):
                self._found = _taken(self._found, labels)
                self._read_at = before[0], (stat.st_mtime_ns, stat.st_size)

    def _ordered(self, by: dict[str, Label]) -> list[Label]:
        newest_first = [label for label in reversed(by.values()) if label.text]
        return sorted(newest_first, key=lambda label: label.by != HAND)

    def _state(self) -> _State:
        return _stat(self.below), _stat(self.path)

    def _by_feature(self) -> dict[Key, dict[str, Label]]:
        with self._lock:
            state = self._state()
            if state != self._read_at:
                lines = chain.from_iterable(_lines(path) for path in (self.below, self.path) if path)
                # A file that somebody put here may be of an index with other layers.
                self._found = _taken({}, (pair for pair in lines if self._has(pair[0])))
                self._read_at = state
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
        (type(layer) is int and 0 <= layer < 2**31)
        and (type(number) is int and 0 <= number < 2**31)
        and isinstance(text, str)
        and all(value is None or (isinstance(value, int | float) and 0 <= value <= 1) for value in numbers)
    ):
        raise QwenScopeError(
            f"expected an object with layer, feature and text, and scores from 0 to 1, in {where}, found {repr(row)[:80]}; "
            "correct it"
        )
    score, control = (None if value is None else float(value) for value in numbers)
    by, prompt, time = (clean(str(found.get(name) or "")) for name in ("by", "prompt", "time"))
    return (layer, number), Label(clean(text)[:LONGEST], by or HAND, score, control, prompt or None, time)


def clean(text: str) -> str:
    """A text on one line, without characters that would do something to a terminal."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


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
                except (ValueError, RecursionError):  # a QwenScopeError is a ValueError
                    continue
    except OSError:
        return


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _taken(found: dict[Key, dict[str, Label]], labels: Iterable[tuple[Key, Label]]) -> dict[Key, dict[str, Label]]:
    """Those found before and these, the newest of each author last."""
    together = dict(found)
    own: set[Key] = set()
    for key, label in labels:
        if key not in own:
            own.add(key)
            together[key] = dict(together.get(key, {}))
        together[key].pop(label.by, None)
        together[key][label.by] = label
    return together


def _line(key: Key, label: Label, more: dict[str, str] | None = None) -> bytes:
    row = {"layer": key[0], "feature": key[1], **asdict(label), **(more or {})}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _moment(label: Label) -> datetime:
    """When a label was written; one whose time cannot be read is older than all others."""
    try:
        return datetime.fromisoformat(label.time).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


def _stat(path: Path | None) -> tuple[int, int] | None:
    try:
        stat = path.stat() if path else None
    except OSError:
        return None
    return stat and (stat.st_mtime_ns, stat.st_size)
