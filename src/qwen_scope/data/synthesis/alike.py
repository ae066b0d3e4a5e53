"""`Seen`: whether a text says what another one said: the same words, or largely the same runs of words."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from unicodedata import normalize

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from qwen_scope.index.words import UNSPACED

_WORD = re.compile(r"\w+")
LEAST_RUNS = 5
"""Runs of words that an example must have to tell whether a text repeats it: four words in a row are an idiom."""


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text as they are compared: without case, signs, and forms of one character; of a text without words, what
    lies between white space."""
    plain = normalize("NFKC", text).casefold()
    return tuple(_WORD.findall(re.sub(UNSPACED, r" \1 ", plain)) or plain.split())


def runs_of(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """All runs of so many words that follow each other; of fewer words, the one run of all."""
    if len(words) <= length:
        return {tuple(words)} if words else set()
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


class Seen:
    """Texts seen so far.

    Args:
        length: words in a run.
        alike: share of runs in common from which on two texts count as alike: the Jaccard index, runs in both among runs in
            either.
    """

    def __init__(self, length: int, alike: float):
        self._length, self._alike = length, alike
        self._exact: dict[int, str] = {}
        self._holders: defaultdict[int, list[int]] = defaultdict(list)
        self._texts: list[tuple[str, int, bool]] = []
        self._many: list[_Many] = []

    def add(self, text: str, name: str, *, shown: bool = False) -> None:
        """Takes a text in.

        Args:
            name: what `like` calls it.
            shown: it was shown as an example: what has enough of its runs is like it, however much comes besides.
        """
        words = words_of(text)
        runs = runs_of(words, self._length)
        self._exact.setdefault(hash(words), name)
        if shown and len(runs) < LEAST_RUNS:
            return
        for run in runs:
            self._holders[hash(run)].append(len(self._texts))
        self._texts.append((name, len(runs), shown))

    def add_all(self, texts: Iterable[str], name: str) -> None:
        """Takes a whole set in, in little memory: 16 bytes for each of its runs.

        Args:
            name: what `like` calls them, with the number of each, from 1.
        """
        runs, owners, sizes = array("q"), array("q"), []
        for number, text in enumerate(texts):
            words = words_of(text)
            found = runs_of(words, self._length)
            self._exact.setdefault(hash(words), f"{name} {number + 1}")
            runs.extend(map(hash, found))
            owners.extend([number] * len(found))
            sizes.append(len(found))
        hashes, numbers = (np.fromiter(column, np.int64, len(column)) for column in (runs, owners))
        order = np.argsort(hashes, kind="stable")
        self._many.append(_Many(name, hashes[order], numbers[order], np.array(sizes, dtype=np.int64)))

    def like(self, text: str) -> str | None:
        """The name of the first text that this one is like, or None."""
        words = words_of(text)
        if hash(words) in self._exact:
            return self._exact[hash(words)]
        runs = [hash(run) for run in runs_of(words, self._length)]
        shared = Counter(at for run in runs for at in self._holders.get(run, ()))
        for at in sorted(shared):
            name, size, shown = self._texts[at]
            if shared[at] >= self._alike * (size if shown else len(runs) + size - shared[at]):
                return name
        return next((found for many in self._many if (found := many.like(runs, self._alike))), None)


class _Many:
    """A set of texts by the hashes of their runs, in order."""

    def __init__(
        self, name: str, runs: Int[ndarray, " runs"], owners: Int[ndarray, " runs"], sizes: Int[ndarray, " texts"]
    ):
        self._name, self._runs, self._owners, self._sizes = name, runs, owners, sizes

    def like(self, runs: list[int], alike: float) -> str | None:
        own = np.array(runs, dtype=np.int64)
        first, last = (np.searchsorted(self._runs, own, side) for side in ("left", "right"))
        shared = Counter(at for a, b in zip(first, last, strict=True) for at in self._owners[a:b].tolist())
        for at in sorted(shared):
            if shared[at] >= alike * (len(runs) + int(self._sizes[at]) - shared[at]):
                return f"{self._name} {at + 1}"
        return None
