"""A corpus as token ids on disk, cut into pieces that never cross a document's end; some of them are held out."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Integer
from tqdm import tqdm

from qwen_scope.corpus.cutting import cut
from qwen_scope.errors import QwenScopeError
from qwen_scope.tokens import Message, TokenizedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_REST = 16
"""What is left of a document after its full pieces is dropped below this many tokens: it has next to no context."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of token ids, memory-mapped; piece n is `pieces[n]`."""

    ids: Integer[np.ndarray, " tokens"]
    """All token ids, piece after piece (uint32)."""
    starts: Int[np.ndarray, " pieces_and_1"]
    """Where each piece begins in `ids`, and the end of the last (int64)."""
    documents: Int[np.ndarray, " pieces"]
    """Which document each piece is of, in order (int64)."""
    context: int
    """The most tokens a piece has."""
    largest: int
    """The largest token id."""
    exhausted: bool
    """Whether the corpus ended before as many tokens were found as were asked for."""

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> list[int]:
        return self.ids[self.starts[number] : self.starts[number + 1]].tolist()

    @property
    def rows(self) -> Int[np.ndarray, " pieces"]:
        """Residuals that each piece gives: one for every token but the first, which is an attention sink."""
        return np.diff(self.starts) - 1

    def fingerprint(self) -> str:
        """A hash that other pieces do not share: of where all of them begin, and of token ids from all over."""
        some = self.ids[:: max(1, len(self.ids) // 2**20)]
        return hashlib.sha256(self.starts.tobytes() + np.ascontiguousarray(some).tobytes()).hexdigest()[:16]

    def texts(self, numbers: Sequence[int]) -> list[TokenizedText]:
        """Some pieces as what is read by a model; their tokens' texts are left out."""
        return [TokenizedText("", self[number], [], []) for number in numbers]

    def split(self, held_out: int, seed: int) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " kept_back"]]:
        """Numbers of the pieces to train on and of those kept back, about `held_out` tokens of whole documents.

        Documents are drawn at random; where the last one drawn is longer than needed, its end is kept back alone.
        No more than a tenth of all tokens is kept back, but for what makes the last piece whole.
        """
        wanted = min(held_out, int(self.starts[-1]) // 10)
        lengths = np.diff(self.starts)
        first = np.searchsorted(self.documents, np.arange(self.documents[-1] + 2))
        back: list[int] = []
        for document in np.random.default_rng(seed).permutation(self.documents[-1] + 1):
            # From a document's end, so that what is left of it to train on is one stretch.
            for number in range(first[document + 1] - 1, first[document] - 1, -1):
                if wanted <= 0:
                    break
                back.append(number)
                wanted -= lengths[number]
        held = np.zeros(len(self), bool)
        held[back] = True
        return np.flatnonzero(~held), np.flatnonzero(held)

    @staticmethod
    def open(folder: Path) -> "Pieces":
        """What `write` wrote.

        Raises:
            QwenScopeError: files that are missing or cut short.
        """
        try:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            starts, documents = (np.load(folder / f"{name}.npy") for name in ("starts", "documents"))
            ids = np.memmap(folder / "ids.u32", np.dtype("<u4"), "r")
            if len(ids) != starts[-1]:
                raise ValueError(f"{len(ids)} of {starts[-1]} token ids")
            return Pieces(ids, starts, documents, about["context"], about["largest"], about["exhausted"])
        except (OSError, ValueError, KeyError) as error:
            raise QwenScopeError(
                f"expected a tokenized corpus in {folder}, found none that is whole ({error}); delete that folder and start "
                "again"
            ) from error

    @staticmethod
    def write(
        folder: Path,
        documents: "Iterable[str | Sequence[Message]]",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context: int,
        tokens: int | None,
    ) -> "Pieces":
        """Tokenizes documents until their pieces hold at least `tokens` tokens (None: all) and writes them to `folder`.

        The folder appears whole or not at all. If the tokenizer begins texts with a special token, every piece begins
        with it. Chat messages go through the tokenizer's template.

        Raises:
            QwenScopeError: documents of which none has two tokens, or a disk that is full.
        """
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tokens-") as made:
                _write(Path(made) / "tokens", documents, tokenizer, context, tokens)
                shutil.rmtree(folder, ignore_errors=True)
                (Path(made) / "tokens").rename(folder)
        except OSError as error:
            raise QwenScopeError(
                f"expected to write a tokenized corpus to {folder}, found that it cannot be done "
                f"({error.strerror or error}); free some space or choose another folder"
            ) from error
        return Pieces.open(folder)


def _write(folder: Path, documents: Any, tokenizer: Any, context: int, tokens: int | None) -> None:
    folder.mkdir()
    starts, numbers, end, largest = [0], [], 0, 0
    enough = False
    with (
        (folder / "ids.u32").open("wb") as file,
        tqdm(total=tokens, desc="tokenizing", unit="token", unit_scale=True, mininterval=1, leave=False) as bar,
    ):
        for number, piece in _pieces(documents, tokenizer, context):
            file.write(np.array(piece, "<u4").tobytes())
            end, largest = end + len(piece), max(largest, *piece)
            starts.append(end)
            numbers.append(number)
            bar.update(len(piece))
            enough = tokens is not None and end >= tokens
            if enough:
                break
    if not numbers:
        raise QwenScopeError("expected documents of two or more tokens, found none in the corpus; give more text")
    np.save(folder / "starts.npy", np.array(starts))
    np.save(folder / "documents.npy", np.unique(numbers, return_inverse=True)[1])
    about = {"context": context, "largest": largest, "exhausted": not enough}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _pieces(documents: Any, tokenizer: Any, context: int) -> Iterator[tuple[int, list[int]]]:
    """Number of the document and token ids of each piece that is long enough to train on."""
    for piece in cut(documents, tokenizer, context):
        # A short document is kept whole: it has all the context there is.
        if len(piece.ids) >= (2 if piece.begins else min(SHORTEST_REST, context)):
            yield piece.document, piece.ids
