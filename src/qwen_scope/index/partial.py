"""`Partial`: what one layer's features did on some shards; two of them make one of both.

Everything is exact and independent of who read which shard, but for sums of activations, which are rounded in the order of
the shards: so partials are joined in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from qwen_scope.index.best import Best
from qwen_scope.index.config import HarvestConfig
from qwen_scope.index.layout import HALF_OCTAVES
from qwen_scope.index.windows import activations_around

OCTAVES = len(HALF_OCTAVES) // 2
"""Groups of the examples across the range: two bins of the histogram each."""
PER_OCTAVE = 2
"""Examples kept of each."""
SPARE = 6
"""Top examples kept beyond those shown, since some turn out to be the same text."""
SAMPLED_A_SHARD = 4096
"""Tokens of a shard that may be sampled for which features fire together."""
SAMPLED = 65536
"""And of the whole corpus."""
BINS = len(HALF_OCTAVES)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens with one layer's features, whole pieces, those of a piece in their order."""

    indices: Integer[np.ndarray, "tokens k"]
    """Feature numbers (int32)."""
    values: Float[np.ndarray, "tokens k"]
    """Their activations (float32)."""
    place: Int[np.ndarray, " tokens"]
    """Which token of the corpus each is (int64)."""
    piece: Int[np.ndarray, " tokens"]
    """Which piece of the corpus each is of, in any numbering (int64)."""
    kept: Bool[np.ndarray, " tokens"]
    """Whether statistics count it: neither at position 0 nor of extreme norm."""


@dataclass(frozen=True, eq=False)
class Partial:
    """One layer's statistics, examples and sample over some shards."""

    kept: int
    """Tokens that count."""
    outliers: int
    """Tokens left out for their extreme norm; those at position 0 are not among them."""
    fired: Int[np.ndarray, " d_sae"]
    """Kept tokens at which a feature fires, that is at which its value is above 0 (int64)."""
    total: Float[np.ndarray, " d_sae"]
    """Sum of its values there (float64)."""
    highest: Float[np.ndarray, " d_sae"]
    """Highest value (float32), 0 if it never fires."""
    first: Int[np.ndarray, " d_sae"]
    """First token of the corpus at which it fires (int64); `NEVER` if it does not."""
    histogram: Int[np.ndarray, "d_sae bins"]
    """Tokens by half octave of the value (int64)."""
    top: Best
    """Places of the highest values, at most one of a piece."""
    range: Best
    """Places drawn at random from each octave of the value."""
    sampled: Integer[np.ndarray, " sample"]
    """Random numbers of the sampled tokens, lowest first (int64)."""
    sample: Integer[np.ndarray, "sample k"]
    """The features that fire at them, -1 where fewer than k do (int32)."""

    @staticmethod
    def none(d_sae: int, k: int, window: int) -> Partial:
        """Of no shard."""
        return Partial(
            0,
            0,
            np.zeros(d_sae, np.int64),
            np.zeros(d_sae),
            np.zeros(d_sae, np.float32),
            np.full(d_sae, NEVER),
            np.zeros((d_sae, BINS), np.int64),
            Best.none(window),
            Best.none(window),
            np.empty(0, np.int64),
            np.empty((0, k), np.int32),
        )

    @property
    def d_sae(self) -> int:
        """Features of the layer."""
        return len(self.fired)

    def with_chunk(self, chunk: Chunk, outliers: int, keep: Keep) -> Partial:
        """This and some more tokens of the same shard."""
        token, column = np.nonzero((chunk.values > 0) & chunk.kept[:, None])
        feature, value = chunk.indices[token, column].astype(np.int64), chunk.values[token, column]
        place = chunk.place[token]
        highest, first = self.highest.copy(), self.first.copy()
        np.maximum.at(highest, feature, value)
        np.minimum.at(first, feature, place)
        bins = half_octave(value)
        counts = np.bincount(feature * BINS + bins, minlength=self.d_sae * BINS).reshape(self.d_sae, BINS)

        def windows(best: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return activations_around(
                chunk.indices, chunk.values, chunk.piece, token[best[rows]], feature[best[rows]], *keep.window
            )

        peaks = self._peaks(keep.top, feature, value, chunk.piece[token])
        drawn_by, octave = scrambled(place, feature), bins // 2
        drawn = self._drawn(feature * OCTAVES + octave, drawn_by)
        numbers, sample = self._sampled(chunk)
        return replace(
            self,
            kept=self.kept + int(chunk.kept.sum()),
            outliers=self.outliers + outliers,
            fired=self.fired + np.bincount(feature, minlength=self.d_sae),
            total=self.total + np.bincount(feature, value.astype(np.float64), minlength=self.d_sae),
            highest=highest,
            first=first,
            histogram=self.histogram + counts,
            top=self.top.with_more(
                keep.top,
                feature[peaks],
                np.zeros(len(peaks), np.int8),
                -value[peaks].astype(np.float64),
                place[peaks],
                value[peaks],
                lambda rows: windows(peaks, rows),
            ),
            range=self.range.with_more(
                PER_OCTAVE,
                feature[drawn],
                octave[drawn],
                drawn_by[drawn],
                place[drawn],
                value[drawn],
                lambda rows: windows(drawn, rows),
            ),
            sampled=numbers,
            sample=sample,
        )

    def _peaks(self, keep: int, feature: np.ndarray, value: np.ndarray, piece: np.ndarray) -> np.ndarray:
        """Which of the pairs are the highest of their feature in their piece, and high enough to be kept."""
        worst = self.top.worst(keep, self.d_sae, 1)[:, 0]
        high = np.flatnonzero(-value <= worst[feature])
        key = feature[high] * (int(piece.max(initial=0)) + 1) + piece[high]
        # Pairs of a piece come in the order of their places, and stay in it.
        order = np.argsort(key, kind="stable")
        key, rows = key[order], high[order]
        begins = np.flatnonzero(np.diff(key, prepend=-1))
        if not len(begins):
            return rows
        highest = np.maximum.reduceat(value[rows], begins)
        equal = np.flatnonzero(value[rows] == np.repeat(highest, np.diff(begins, append=len(rows))))
        return rows[equal[np.diff(key[equal], prepend=-1) != 0]]

    def _drawn(self, cell: np.ndarray, drawn_by: np.ndarray) -> np.ndarray:
        """Which of the pairs have the lowest random numbers of their feature and octave, and low enough to be kept."""
        left = np.flatnonzero(drawn_by <= self.range.worst(PER_OCTAVE, self.d_sae, OCTAVES).ravel()[cell])
        chosen = []
        # One after the other: sorting all pairs, of which few are kept, takes far longer.
        for _ in range(PER_OCTAVE):
            lowest = np.full(self.d_sae * OCTAVES, np.inf)
            np.minimum.at(lowest, cell[left], drawn_by[left])
            found = drawn_by[left] == lowest[cell[left]]
            chosen.append(left[found])
            left = left[~found]
        return np.concatenate(chosen)

    def _sampled(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero(chunk.kept)
        numbers = random_numbers(chunk.place[rows])
        firing = np.where(chunk.values[rows] > 0, chunk.indices[rows], -1).astype(np.int32)
        return _lowest(SAMPLED_A_SHARD, self.sampled, self.sample, numbers, firing)

    def merged(self, other: Partial, keep: Keep) -> Partial:
        """This and what was found on later shards."""
        sampled, sample = _lowest(SAMPLED, self.sampled, self.sample, other.sampled, other.sample)
        return Partial(
            self.kept + other.kept,
            self.outliers + other.outliers,
            self.fired + other.fired,
            self.total + other.total,
            np.maximum(self.highest, other.highest),
            np.minimum(self.first, other.first),
            self.histogram + other.histogram,
            self.top.merged(other.top, keep.top),
            self.range.merged(other.range, PER_OCTAVE),
            sampled,
            sample,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name."""
        found: dict[str, np.ndarray] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Best):
                found |= {f"{field.name}.{column.name}": getattr(value, column.name) for column in fields(value)}
            else:
                found[field.name] = np.asarray(value)
        return found

    @staticmethod
    def of_arrays(found: Mapping[str, np.ndarray]) -> Partial:
        """What `arrays` gave."""
        values: dict[str, Any] = {}
        for field in fields(Partial):
            if field.name in ("top", "range"):
                values[field.name] = Best(*(found[f"{field.name}.{column.name}"] for column in fields(Best)))
            else:
                values[field.name] = int(found[field.name]) if found[field.name].ndim == 0 else found[field.name]
        return Partial(**values)


@dataclass(frozen=True)
class Keep:
    """How much is kept."""

    examples: int
    """Top examples shown of each feature."""
    window: tuple[int, int]
    """Tokens kept before and after the peak of each."""

    @staticmethod
    def of(config: HarvestConfig) -> Keep:
        """As a harvest's options say."""
        return Keep(config.examples, (config.before, config.after))

    @property
    def top(self) -> int:
        """Top examples kept while harvesting."""
        return self.examples + SPARE


NEVER = np.iinfo(np.int64).max


def half_octave(value: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The bin of the histogram of each value above 0 (see `layout.HALF_OCTAVES`), exact at the edges."""
    fraction, exponent = np.frexp(value)
    # value = fraction * 2 ** exponent, fraction from 0.5 to 1; the upper half octave begins at the root of a half.
    found = 2 * (exponent.astype(np.int64) - 1) + (fraction.astype(np.float64) >= np.sqrt(0.5))
    return np.clip(found - HALF_OCTAVES[0], 0, BINS - 1)


def random_numbers(place: Int[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """A random number from 0 to 2 ** 63 - 1 for each token, the same in every run (splitmix64, Steele et al. 2014)."""
    x = place.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def scrambled(place: Int[np.ndarray, " n"], feature: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A random number in [0, 1) for each pair of token and feature, the same in every run."""
    mixed = random_numbers(place) ^ (feature * np.int64(0x632BE59BD9B4E019))
    return random_numbers(mixed) * 2.0**-63


def _lowest(
    most: int, numbers: np.ndarray, rows: np.ndarray, more_numbers: np.ndarray, more_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the lowest numbers, lowest first."""
    joined = np.concatenate([numbers, more_numbers])
    chosen = np.argsort(joined, kind="stable")[:most]
    return joined[chosen], np.concatenate([rows, more_rows])[chosen]
