"""`Best`: of each feature, the few places that rank first by some order, kept while a corpus passes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Int, Integer

Windows = Callable[[Integer[np.ndarray, " rows"]], Float[np.ndarray, "rows window"]]
"""For some of the rows given to `Best.with_more`, the feature's activations around the place."""


@dataclass(frozen=True, eq=False)
class Best:
    """Places by feature and group; within each, at most so many as are kept, in their order.

    What is kept does not depend on the order in which places are added, nor on how they are split among workers: they rank
    by `order`, then by place.
    """

    feature: Integer[np.ndarray, " rows"]
    """Which feature (int32)."""
    group: Integer[np.ndarray, " rows"]
    """Each group of a feature keeps places of its own (int8)."""
    order: Float[np.ndarray, " rows"]
    """Lower comes first (float64)."""
    place: Int[np.ndarray, " rows"]
    """Token of the corpus, from 0 (int64)."""
    value: Float[np.ndarray, " rows"]
    """Activation there (float32)."""
    window: Float[np.ndarray, "rows window"]
    """Activations of the feature at the tokens around, 0 beyond the ends of the piece (float32)."""

    @staticmethod
    def none(window: int) -> Best:
        """No places yet; `window` tokens will be kept of each."""
        return Best(
            np.empty(0, np.int32),
            np.empty(0, np.int8),
            np.empty(0),
            np.empty(0, np.int64),
            np.empty(0, np.float32),
            np.empty((0, window), np.float32),
        )

    def __len__(self) -> int:
        return len(self.feature)

    def with_more(
        self,
        keep: int,
        feature: Integer[np.ndarray, " new"],
        group: Integer[np.ndarray, " new"],
        order: Float[np.ndarray, " new"],
        place: Int[np.ndarray, " new"],
        value: Float[np.ndarray, " new"],
        windows: Windows,
    ) -> Best:
        """Those kept of these and new ones.

        Args:
            keep: how many of each feature and group.
            windows: is asked only for those of the new ones that are kept.
        """
        new = (feature.astype(np.int32), group.astype(np.int8), order, place, value.astype(np.float32))
        old = (self.feature, self.group, self.order, self.place, self.value)
        joined = [np.concatenate(pair) for pair in zip(old, new, strict=True)]
        rows = _first(keep, *joined[:4])
        window = np.empty((len(rows), self.window.shape[1]), np.float32)
        known = rows < len(self)
        window[known] = self.window[rows[known]]
        window[~known] = windows(rows[~known] - len(self))
        feature, group, order, place, value = (column[rows] for column in joined)
        return Best(feature, group, order, place, value, window)

    def merged(self, other: Best, keep: int) -> Best:
        """Those kept of two."""
        joined = Best(**{f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)})
        rows = _first(keep, joined.feature, joined.group, joined.order, joined.place)
        return Best(**{f.name: getattr(joined, f.name)[rows] for f in fields(self)})

    def worst(self, keep: int, d_sae: int, groups: int) -> Float[np.ndarray, "d_sae groups"]:
        """The order that a new place must come before (or equal) to be kept; infinite where there is room."""
        found = np.full(d_sae * groups, np.inf)
        key = self.feature.astype(np.int64) * groups + self.group
        # Rows of a key lie together, so a full one is where the key is the same `keep - 1` rows before.
        full = np.flatnonzero(key[keep - 1 :] == key[: len(key) - keep + 1]) + keep - 1 if len(key) >= keep else []
        found[key[full]] = self.order[full]
        return found.reshape(d_sae, groups)


def _first(keep: int, feature: np.ndarray, group: np.ndarray, order: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Row numbers of the first `keep` of each feature and group, sorted by feature, group, order and place."""
    key = feature.astype(np.int64) * 256 + group
    rows = np.lexsort((place, order, key))
    key = key[rows]
    begins = np.flatnonzero(np.diff(key, prepend=-1))
    within = np.arange(len(rows)) - np.repeat(begins, np.diff(begins, append=len(rows)))
    return rows[within < keep]
