"""The words of an index by feature, in SQLite's full-text search: derived from the index, kept in the cache.

One row per feature: its label, the tokens it often peaks at, those it promotes, and its strongest examples. The rows are
written once; a label that changes is followed by writing its row again.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import cache_folder, is_file, replacing
from qwen_scope.index.layout import layer_folder

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex

FORM = 1
"""Counts up when the database changes its form, so that no older one is read."""
EXAMPLES_READ = 10
"""Strongest examples of a feature whose words count."""
OFTEN = 0.1
"""Share of a feature's examples that must peak at a token for it to count as one of its tokens; the first always does."""
BETWEEN = "\x1f"
"""Stands between tokens and between examples; a blank to SQLite."""
UNSPACED = "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
JOINT = "\u200b"
"""Put around each of those, so that every character is a word to SQLite and a word of several is a phrase."""
# Porter's stemmer changes Latin words only. Marks count as parts of words, or Hindi and Arabic fall into pieces.
_TOKENIZE = "porter unicode61 remove_diacritics 2 categories ''L* N* Co Mn Mc''"
_FEATURES_AT_ONCE = 2048
_BUSY_SECONDS = 5
"""How long to wait for another process that writes labels, before going on without it."""


class Words:
    """The database of one index, opened, or built where there is none that fits; safe to use from several threads.

    If the cache cannot be written it is built in memory, for this process alone.

    Raises:
        QwenScopeError: the index has no whole tables, or SQLite no full-text search.
    """

    def __init__(self, index: FeatureIndex):
        self._index = index
        self._lock = Lock()
        self._labels_at: str | None = None
        self._connection = _open(index)

    def select(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query, with today's labels.

        Raises:
            QwenScopeError: the database is damaged.
        """
        with self._lock:
            try:
                self._follow_labels()
                return self._connection.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                if "locked" in str(error):
                    raise QwenScopeError(
                        f"expected to read the search database at {path_of(self._index)}, found another process holding it for "
                        "seconds; try again"
                    ) from error
                raise QwenScopeError(
                    f"expected a whole search database at {path_of(self._index)}, found a damaged one ({error}); delete it, and "
                    "it is built again"
                ) from error

    def _follow_labels(self) -> None:
        stamp = self._index.labels.stamp()
        if stamp == self._labels_at:
            return
        try:
            self._write_labels()
        except sqlite3.OperationalError:
            # Another process holds it, or it can only be read: go on with a copy of our own.
            self._connection.rollback()
            memory = _connect(":memory:")
            self._connection.backup(memory)
            self._connection.close()
            self._connection = memory
            self._write_labels()
        self._labels_at = stamp

    def _write_labels(self) -> None:
        widths = self._index.about.layers
        now = {
            row_of(layer, number): spaced(label.text)
            for (layer, number), label in self._index.labels.items()
            if number < widths.get(layer, 0)
        }
        written = dict(self._connection.execute("SELECT id, text FROM labels"))
        if now == written:
            return
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            written = dict(connection.execute("SELECT id, text FROM labels"))
            changed = [
                (now.get(row, ""), row) for row in now.keys() | written.keys() if now.get(row) != written.get(row)
            ]
            for pair in tqdm(changed, desc="taking in labels", unit="label", delay=2, leave=False, disable=None):
                connection.execute("UPDATE words SET label = ? WHERE rowid = ?", pair)
            connection.execute("DELETE FROM labels")
            connection.executemany("INSERT INTO labels VALUES (?, ?)", now.items())


def row_of(layer: int, number: int) -> int:
    """The number of a feature's row."""
    return layer << 32 | number


def feature_of(row: int) -> tuple[int, int]:
    """Layer and number of the feature of a row."""
    return row >> 32, row & 0xFFFFFFFF


def spaced(text: str) -> str:
    """A text in which each character of a script without spaces stands by itself."""
    return text if text.isascii() else re.sub(UNSPACED, f"{JOINT}\\1{JOINT}", text)


def joined(text: str) -> str:
    """The text that `spaced` was given."""
    return text.replace(JOINT, "")


def path_of(index: FeatureIndex) -> Path:
    """Where an index's database lies in the cache."""
    place = hashlib.sha256(str(index.folder.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / "search" / f"{place}-{FORM}.sqlite"


def _open(index: FeatureIndex) -> sqlite3.Connection:
    path, identity = path_of(index), _identity(index)
    found = _stored(path, identity)
    if found is not None:
        return found
    try:
        with replacing(path) as temporary:
            connection = _connect(temporary)
            try:
                _build(connection, index, identity)
            except sqlite3.OperationalError as error:  # such as a full disk
                raise OSError(str(error)) from error
            finally:
                connection.close()
    except QwenScopeError:
        # Neither a full disk nor a cache that cannot be written should keep anybody from searching.
        connection = _connect(":memory:")
        _build(connection, index, identity)
        return connection
    return _connect(path)


def _connect(place: str | Path) -> sqlite3.Connection:
    # Transactions are begun where they are wanted; `Words` sees to it that one thread at a time is in here.
    return sqlite3.connect(place, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _stored(path: Path, identity: str) -> sqlite3.Connection | None:
    """The database at a path, if it is one of the index as it is now."""
    if not is_file(path):
        return None
    try:
        connection = _connect(path)
    except sqlite3.OperationalError:  # it may not be read, such as one that root left
        return None
    try:
        if connection.execute("SELECT identity FROM about").fetchall() == [(identity,)]:
            return connection
    except sqlite3.DatabaseError:
        pass
    connection.close()
    return None


def _identity(index: FeatureIndex) -> str:
    """A word that changes when the index does: harvested again, or another one in its place."""
    files = [index.folder / "index.json"]
    files += [
        layer_folder(index.folder, n) / f"{name}.parquet" for n in index.layers for name in ("features", "examples")
    ]
    stats = [path.stat() for path in files if path.is_file()]
    state = [index.about.fingerprint, index.about.created, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def _build(connection: sqlite3.Connection, index: FeatureIndex, identity: str) -> None:
    # Whole or not at all, by a rename: a journal would only cost time.
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    try:
        connection.execute(
            f"CREATE VIRTUAL TABLE words USING fts5(label, tokens, promoted, contexts, tokenize = '{_TOKENIZE}')"
        )
    except sqlite3.OperationalError as error:
        if "fts5" not in str(error):
            raise
        raise QwenScopeError(
            f"expected SQLite with full-text search (FTS5), found version {sqlite3.sqlite_version} without it; use a Python "
            "whose sqlite3 has it"
        ) from error
    connection.execute("CREATE TABLE labels (id INTEGER PRIMARY KEY, text TEXT)")
    connection.execute("CREATE TABLE about (identity TEXT)")
    connection.execute("BEGIN")
    with tqdm(
        total=len(index), desc="reading words", unit="feature", unit_scale=True, delay=2, leave=False, disable=None
    ) as bar:
        for layer, width in sorted(index.about.layers.items()):
            for start in range(0, width, _FEATURES_AT_ONCE):
                rows = _rows(index, layer, start, min(start + _FEATURES_AT_ONCE, width))
                connection.executemany(
                    "INSERT INTO words(rowid, label, tokens, promoted, contexts) VALUES (?, '', ?, ?, ?)", rows
                )
                bar.update(len(rows))
    connection.execute("INSERT INTO words(words) VALUES ('optimize')")
    connection.execute("INSERT INTO about VALUES (?)", [identity])
    connection.execute("COMMIT")
    # One in memory lives on, and labels are written to it whole or not at all.
    connection.execute("PRAGMA journal_mode = MEMORY")


def _rows(index: FeatureIndex, layer: int, start: int, stop: int) -> list[tuple[int, str, str, str]]:
    """Row number, top tokens, promoted tokens and examples of some features; nothing for what dead features promote."""
    features = index.rows(layer, "features", start, stop, ["feature", "dead", "top_tokens", "promoted"])
    examples = index.rows(layer, "examples", start, stop, ["feature", "kind", "rank", "tokens"])
    examples = examples.filter((pc.field("kind") == "top") & (pc.field("rank") < EXAMPLES_READ))
    contexts: dict[int, list[str]] = {}
    texts = pc.call_function("binary_join", [examples.column("tokens"), ""]).to_pylist()
    for number, text in zip(examples.column("feature").to_pylist(), texts, strict=True):
        contexts.setdefault(number, []).append(text)
    return [
        (
            row_of(layer, number),
            spaced(BETWEEN.join(tokens.split(BETWEEN)[: max(1, sum(share >= OFTEN for share in shares))])),
            "" if dead else spaced(promoted),
            spaced(BETWEEN.join(contexts.get(number, ()))),
        )
        for number, dead, tokens, shares, promoted in zip(
            features.column("feature").to_pylist(),
            features.column("dead").to_pylist(),
            _texts(features.column("top_tokens")),
            _lists(features.column("top_tokens"), "value").to_pylist(),
            _texts(features.column("promoted")),
            strict=True,
        )
    ]


def _texts(tokens: pa.ChunkedArray) -> list[str]:
    """The texts of each row's tokens in one."""
    return pc.call_function("binary_join", [_lists(tokens, "token"), BETWEEN]).to_pylist()


def _lists(tokens: pa.ChunkedArray, field: str) -> pa.ChunkedArray:
    """One field of each row's tokens."""
    return pa.chunked_array(
        [pa.ListArray.from_arrays(chunk.offsets, chunk.values.field(field)) for chunk in tokens.chunks]
    )
