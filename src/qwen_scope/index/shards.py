"""A corpus cut into shards of token ids on disk, each small enough for one worker; every token keeps its place in the text.

The whole corpus is cut before the model reads any of it: how much there is, and which lines are broken, is known at once.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, Integer
from tqdm import tqdm

from qwen_scope.corpus import Document
from qwen_scope.corpus.cutting import Piece, cut
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import read_safetensors, replacing, write_safetensors
from qwen_scope.index.layout import DOCUMENTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_BROKEN = 20
"""So many of the broken lines are named."""
DOCUMENTS_AT_ONCE = 4096
"""Places of documents written together."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Consecutive pieces of the corpus."""

    number: int
    """Which shard, from 0."""
    first: int
    """Tokens of the corpus before it."""
    ids: Integer[np.ndarray, " tokens"]
    """Token ids, piece after piece."""
    starts: Integer[np.ndarray, " tokens"]
    """Where each token starts in its document, in characters."""
    ends: Integer[np.ndarray, " tokens"]
    """Where it ends."""
    pieces: Int[np.ndarray, " pieces_and_1"]
    """Where each piece begins in `ids`, and the end of the last."""
    documents: Int[np.ndarray, " pieces"]
    """Which document each piece is of."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Cut:
    """What a corpus was cut into."""

    documents: int
    """Documents of which something is in a shard."""
    tokens: int
    """Tokens in all."""
    firsts: list[int]
    """Tokens before each shard."""
    pieces: int
    """Pieces: as many tokens are at position 0."""
    broken: int
    """Lines, rows or files that could not be read."""
    broken_first: list[str]
    """What was wrong with the first of them."""


class Shards:
    """A corpus in shards, in a folder; `shards[n]` is memory-mapped."""

    def __init__(self, folder: Path, about: Cut):
        self.folder, self.about = folder, about

    def __len__(self) -> int:
        return len(self.about.firsts)

    def __getitem__(self, number: int) -> Shard:
        tensors, metadata = read_safetensors(_path(self.folder, number))
        return Shard(number, int(metadata["first"]), **{name: tensor.numpy() for name, tensor in tensors.items()})

    def first(self, number: int) -> int:
        """Tokens of the corpus before a shard; all of them before the one that is beyond the last."""
        return self.about.firsts[number] if number < len(self) else self.about.tokens

    @staticmethod
    def open(folder: Path) -> "Shards":
        """What `write` wrote.

        Raises:
            QwenScopeError: nothing there.
        """
        try:
            return Shards(folder, Cut(**json.loads((folder / "cut.json").read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise QwenScopeError(
                f"expected a corpus in shards in {folder}, found none that is whole ({error}); delete that folder and start "
                "again"
            ) from error

    @staticmethod
    def write(
        folder: Path,
        read: Callable[[Callable[[str], object]], Iterable[tuple[str, Document]]],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context: int,
        shard_tokens: int,
        tokens: int | None,
    ) -> "Shards":
        """Cuts documents into shards of at least `shard_tokens` tokens (the last may be smaller); the folder appears whole or
        not at all.

        Args:
            read: gives the documents with their places, and tells the function it is given what is broken.
            tokens: stops with the piece that reaches so many; None takes all.

        Raises:
            QwenScopeError: no document with a token, a tokenizer that tells no places, a disk that is full.
        """
        if not tokenizer.is_fast:
            raise QwenScopeError(
                "expected a tokenizer that tells where its tokens are in the text, found a slow one; use the fast one"
            )
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".shards-") as made:
                place = Path(made) / "shards"
                place.mkdir()
                about = _write(place, read, tokenizer, context, shard_tokens, tokens)
                with replacing(place / "cut.json") as temporary:
                    temporary.write_text(json.dumps(asdict(about)), encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                place.rename(folder)
        except OSError as error:
            raise QwenScopeError(
                f"expected to write a tokenized corpus to {folder}, found that it cannot be done "
                f"({error.strerror or error}); free some space or choose another folder"
            ) from error
        return Shards.open(folder)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def _write(folder: Path, read: Any, tokenizer: Any, context: int, shard_tokens: int, tokens: int | None) -> Cut:
    broken: list[str] = []
    count = 0

    def told(sentence: str) -> None:
        nonlocal count
        count += 1
        if len(broken) < NAMED_BROKEN:
            broken.append(sentence)

    firsts: list[int] = []
    documents = done = pieces = size = 0
    last = -1
    held: list[_Held] = []

    def save() -> None:
        nonlocal done, held, size
        _save(folder, len(firsts), done, held)
        firsts.append(done)
        done, held, size = done + size, [], 0

    with (
        _Places(folder / "documents.parquet") as places,
        tqdm(total=tokens, desc="tokenizing", unit="token", unit_scale=True, mininterval=1, leave=False) as bar,
    ):
        for piece in cut(places.passing(read(told)), tokenizer, context, spans=True, broken=told):
            documents += piece.document != last
            last = piece.document
            held.append(_Held.of(piece))
            size += len(piece.ids)
            pieces += 1
            bar.update(len(piece.ids))
            enough = tokens is not None and done + size >= tokens
            if size >= shard_tokens or enough:
                save()
            if enough:
                break
        if held:
            save()
    if not firsts:
        raise QwenScopeError("expected documents with tokens in the corpus, found none; give more text")
    return Cut(documents, done, firsts, pieces, count, broken)


class _Held(NamedTuple):
    """A piece as arrays, which take a tenth of what lists of numbers do."""

    document: int
    ids: np.ndarray
    spans: np.ndarray

    @staticmethod
    def of(piece: Piece) -> "_Held":
        return _Held(piece.document, np.array(piece.ids, np.int32), np.array(piece.spans, np.int32).reshape(-1, 2))


def _save(folder: Path, number: int, first: int, pieces: list[_Held]) -> None:
    spans = np.concatenate([piece.spans for piece in pieces])
    arrays = {
        "ids": np.concatenate([piece.ids for piece in pieces]),
        "starts": spans[:, 0],
        "ends": spans[:, 1],
        "pieces": np.cumsum([0, *(len(piece.ids) for piece in pieces)]),
        "documents": np.array([piece.document for piece in pieces], np.int64),
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    write_safetensors(_path(folder, number), tensors, {"first": str(first)})


class _Places:
    """Writes where each document was while they pass by."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []
        self.written = 0

    def __enter__(self) -> "_Places":
        self.writer = pq.ParquetWriter(self.path, DOCUMENTS, compression="zstd")
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self.writer.close()

    def passing(self, documents: Iterable[tuple[str, Document]]) -> Iterator[Document]:
        for place, document in documents:
            self.waiting.append(place)
            if len(self.waiting) == DOCUMENTS_AT_ONCE:
                self._flush()
            yield document

    def _flush(self) -> None:
        numbers = range(self.written, self.written + len(self.waiting))
        self.writer.write_table(pa.table({"document": list(numbers), "place": self.waiting}, schema=DOCUMENTS))
        self.written += len(self.waiting)
        self.waiting = []
