"""A rule over a corpus of any size, a row for each text; a killed run goes on after the last whole row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qwen_scope.corpus import Document, located
from qwen_scope.data.classification.rule import Decision, Rule
from qwen_scope.data.items import text_of
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import alone, expanded, is_folder
from qwen_scope.stopping import Stopped, stopping

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

AT_ONCE, CHARACTERS = 256, 2**16
"""Texts decided together at most: so many, or as many as have that many characters."""
NAMED = 5
"""So many of the rows that cannot be read are named."""

Place = tuple[str, Document]


@dataclass
class Applied:
    """What applying a rule came to, earlier runs of the same command included."""

    texts: int = 0
    """Texts in all: as many as rows were written."""
    positive: int = 0
    """Texts of the positive class."""
    undecided: int = 0
    """Texts that the model cannot read; their rows say why."""
    left_out: int = 0
    """Lines or rows of the corpus that cannot be read, and have no row."""
    left_out_first: list[str] | None = None
    """What was wrong with the first of them."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)

    def count(self, row: dict[str, Any]) -> None:
        """Takes in a row."""
        self.texts += 1
        self.positive += row["positive"] is True
        self.undecided += row["positive"] is None

    def tell(self, sentence: str) -> None:
        """Takes in what is wrong with a row of the corpus."""
        self.left_out += 1
        self.left_out_first = self.left_out_first or []
        if len(self.left_out_first) < NAMED:
            self.left_out_first.append(sentence)


def apply(
    rule: Rule,
    scope: Scope,
    source: str | Path,
    out: str | Path,
    *,
    column: str | None = None,
    split: str = "train",
    subset: str | None = None,
) -> Applied:
    """Decides every text of a corpus and writes a row of JSON for each, in the corpus's order.

    A row has `place` (where the text was), `rule` (a hash of what decided), `positive`, `score`, `fired` (features of the rule)
    and the `text` or `messages` themselves, so that what comes out is a corpus again. Where `out` holds rows of the same rule
    and corpus, it goes on after them, and the end is the same as without a stop.

    Args:
        source: see `qwen_scope.corpus.located`, for `column`, `split` and `subset` too.
        out: a `.jsonl` file.

    Raises:
        QwenScopeError: a rule of other SAEs, no such corpus, or a file that holds other rows or is being written.
        Stopped: somebody asked for it; the rows written stay.
    """
    rule.check(scope)
    if is_folder(source) and expanded(out).resolve().is_relative_to(Path(source).expanduser().resolve()):
        raise QwenScopeError(f"expected a file outside the corpus {source}, found {out} in it; choose another place")
    done = Applied()
    documents = located(source, column=column, split=split, config=subset, broken=done.tell)
    with (
        stopping() as stop,
        _held(expanded(out)) as path,
        _Rows(path, rule.digest) as rows,
        tqdm(desc="deciding", unit="text") as bar,
    ):

        def told(tokens: int) -> None:
            if stop.asked:
                raise Stopped(f"stopped after {done.texts} texts, which are in {out}; the same command goes on")

        for chunk in _chunks(documents):
            earlier = rows.take([place for place, _ in chunk])
            for row in earlier:
                done.count(row)
            told(0)
            if len(earlier) < len(chunk):
                # All of the chunk again: what else a batch holds can change a value's last digits.
                answers = _answers(rule, scope, [document for _, document in chunk], told)
                fresh = [
                    _row(place, document, rule.digest, answer)
                    for (place, document), answer in zip(chunk, answers, strict=True)
                ][len(earlier) :]
                rows.write(fresh)
                for row in fresh:
                    done.count(row)
            bar.update(len(chunk))
        rows.check_end()
    return done


@contextmanager
def _held(path: Path) -> Iterator[Path]:
    """Keeps a second run from the file."""
    lock = path.with_name(f".{path.name}.lock")
    with alone(lock, path):
        try:
            yield path
        finally:
            with suppress(OSError):  # not every system removes open files
                lock.unlink()


def _chunks(documents: Iterable[Place]) -> Iterator[list[Place]]:
    """Texts to decide together; which ones does not depend on where an earlier run ended."""
    chunk: list[Place] = []
    size = 0
    for place, document in documents:
        chunk.append((place, document))
        size += len(text_of(document))
        if len(chunk) == AT_ONCE or size >= CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _answers(
    rule: Rule, scope: Scope, texts: Sequence[Document], told: Callable[[int], object]
) -> Sequence[Decision | str]:
    """What the rule says of each text, or why it says nothing."""
    try:
        return rule.decide(scope, texts, told=told)
    except QwenScopeError as error:
        if len(texts) == 1:
            return [str(error)]
    # One that cannot be read should not cost the others.
    return [answer for text in texts for answer in _answers(rule, scope, [text], told)]


def _row(place: str, document: Document, digest: str, answer: Decision | str) -> dict[str, Any]:
    row: dict[str, Any] = {"place": place, "rule": digest}
    if isinstance(answer, str):
        row |= {"positive": None, "error": answer}
    else:
        row |= {"positive": answer.positive, "score": round(answer.score, 6), "fired": answer.fired}
    return row | {"text" if isinstance(document, str) else "messages": document}


def _encoded(row: dict[str, Any]) -> bytes:
    # Messages may hold what JSON has no word for, such as the time of each.
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace")


class _Rows:
    """The file of rows: first those of an earlier run are taken, then new ones written after them."""

    def __init__(self, path: Path, digest: str):
        self.path, self.digest = path, digest
        self.end = 0
        self.writing = False

    def __enter__(self) -> _Rows:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self.file = self.path.open("r+b")
        except OSError as error:
            raise QwenScopeError(
                f"expected to write {self.path}, found that it cannot be done ({error.strerror or error}); choose another place"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def take(self, places: list[str]) -> list[dict[str, Any]]:
        """The earlier rows of these texts: all of them, or as many as there are."""
        found = []
        for place in [] if self.writing else places:
            line = self.file.readline()
            if not line.endswith(b"\n"):
                # The end, or a row that was cut short; anything else is not ours to cut off.
                begins = _encoded({"place": place, "rule": self.digest})[:-1]
                if line[: len(begins)] != begins[: len(line)]:
                    raise self._other(f"something else where {place} should be")
                break
            self.end += len(line)
            try:
                row = json.loads(line)
                ours = (row["place"], row["rule"]) == (place, self.digest) and row["positive"] in (True, False, None)
            except (ValueError, KeyError, TypeError):
                row, ours = {}, False
            if not ours:
                raise self._other(f"another row where {place} should be")
            found.append(row)
        return found

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows after those taken."""
        data = b"".join(_encoded(row) + b"\n" for row in rows)
        try:
            if not self.writing:
                self.file.seek(self.end)
                self.file.truncate()
                self.writing = True
            self.file.write(data)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise QwenScopeError(
                f"expected to write {self.path}, found that it cannot be done ({error.strerror or error}); free some space and "
                "run the same command again"
            ) from error

    def check_end(self) -> None:
        """Raises a QwenScopeError if the earlier rows are more than the corpus has texts."""
        if not self.writing and self.file.readline():
            raise self._other("more rows than the corpus has texts")

    def _other(self, found: str) -> QwenScopeError:
        return QwenScopeError(
            f"expected rows of this rule and corpus in {self.path}, found {found}; choose another file, or delete it"
        )
