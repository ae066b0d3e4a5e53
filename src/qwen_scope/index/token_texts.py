"""What tokens look like as text, also where one character is split into several of them."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What a tokenizer decodes part of a character to."""


class TokenTexts:
    """The texts of tokens by their ids, each decoded once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._joined: dict[tuple[int, ...], str] = {}

    def each(self, ids: Int[np.ndarray, " tokens"]) -> pa.Array:
        """The text of each token by itself."""
        unique, inverse = np.unique(ids, return_inverse=True)
        texts = self._tokenizer.batch_decode([[int(n)] for n in unique], clean_up_tokenization_spaces=False)
        return pa.array(texts, pa.string()).take(pa.array(inverse))

    def running(
        self, ids: Int[np.ndarray, " tokens"], of: Int[np.ndarray, " tokens"], weight: Float[np.ndarray, " tokens"]
    ) -> pa.Array:
        """The texts of tokens that follow each other: a character split into several is given to one of them whole.

        Args:
            of: which window each token is of; those of a window lie together.
            weight: of the tokens of one character, the one of the highest weight gets it, and the others are empty.
        """
        texts = self.each(ids)
        broken = np.flatnonzero(pc.match_substring(texts, BROKEN).to_numpy(zero_copy_only=False))  # pyright: ignore
        if not len(broken):
            return texts
        ends = np.flatnonzero((np.diff(broken) != 1) | (np.diff(of[broken]) != 0)) + 1
        changed = texts.to_pylist()
        for run in np.split(broken, ends):
            start, last = int(run[0]), int(run[-1])
            while start <= last:
                stop = self._character(ids, start, last + 1)
                if stop > start + 1:
                    chosen = start + int(weight[start:stop].argmax())
                    changed[start:stop] = [""] * (stop - start)
                    changed[chosen] = self._decoded(ids[start:stop])
                start = stop
        return pa.array(changed, pa.string())

    def _character(self, ids: np.ndarray, start: int, stop: int) -> int:
        """Where the tokens end that make whole characters from the start on; one further if none do."""
        for end in range(start + 1, min(stop, start + 8) + 1):
            if BROKEN not in self._decoded(ids[start:end]):
                return end
        return start + 1

    def _decoded(self, ids: np.ndarray) -> str:
        key = tuple(ids.tolist())
        if key not in self._joined:
            self._joined[key] = str(self._tokenizer.decode(list(key), clean_up_tokenization_spaces=False))
        return self._joined[key]
