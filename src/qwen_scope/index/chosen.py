"""Which of the places kept while harvesting become examples, with the text around them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from qwen_scope.index.partial import Keep, Partial
from qwen_scope.index.ranking import Ranked
from qwen_scope.index.shards import Shards


@dataclass(frozen=True, eq=False)
class Chosen:
    """Examples, a row each; `qwen_scope.index.feature.Example` says what the columns mean."""

    feature: Int[np.ndarray, " rows"]
    is_range: Bool[np.ndarray, " rows"]
    rank: Int[np.ndarray, " rows"]
    value: Float[np.ndarray, " rows"]
    place: Int[np.ndarray, " rows"]
    window: Float[np.ndarray, "rows window"]
    ids: Int[np.ndarray, "rows window"]
    """Token ids around the peak."""
    inside: Bool[np.ndarray, "rows window"]
    """Where the window is within the piece."""
    peak: Int[np.ndarray, " rows"]
    document: Int[np.ndarray, " rows"]
    position: Int[np.ndarray, " rows"]
    start: Int[np.ndarray, " rows"]
    end: Int[np.ndarray, " rows"]
    window_start: Int[np.ndarray, " rows"]
    window_end: Int[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.feature)

    def rows(self, chosen: np.ndarray) -> Chosen:
        """Some of the rows, in the order given."""
        return Chosen(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def top_tokens(self, d_sae: int, count: int) -> Ranked:
        """For each feature the tokens at which its examples peak, most frequent first, with their share of the examples."""
        numbers, shares = np.full((d_sae, count), -1), np.zeros((d_sae, count))
        if not len(self):
            return Ranked(numbers.astype(np.int32), shares.astype(np.float32))
        token = self.ids[np.arange(len(self)), self.middle]
        pairs, counts = np.unique(np.stack([self.feature, token]), axis=1, return_counts=True)
        order = np.lexsort((pairs[1], -counts, pairs[0]))
        feature, token, counts = pairs[0][order], pairs[1][order], counts[order]
        begins = np.flatnonzero(np.diff(feature, prepend=-1))
        rank = np.arange(len(feature)) - np.repeat(begins, np.diff(begins, append=len(feature)))
        of_feature = np.bincount(self.feature, minlength=d_sae)
        few = rank < count
        numbers[feature[few], rank[few]] = token[few]
        shares[feature[few], rank[few]] = counts[few] / of_feature[feature[few]]
        return Ranked(numbers.astype(np.int32), shares.astype(np.float32))

    @property
    def middle(self) -> Int[np.ndarray, " rows"]:
        """Column of the peak in `ids`."""
        return self.peak + self.inside.argmax(axis=1)


def chosen_examples(partial: Partial, shards: Shards, keep: Keep) -> Chosen:
    """A layer's examples: top ones whose text around them is not the same twice, and others across the octaves, by feature."""
    top = _located(_rows(partial, "top"), shards, keep.window)
    top = top.rows(_different(top))
    top = top.rows(_within(top.feature) < keep.examples)
    ranged = _rows(partial, "range")
    taken = set(zip(top.feature.tolist(), top.place.tolist(), strict=True))
    free = [(f, p) not in taken for f, p in zip(ranged["feature"].tolist(), ranged["place"].tolist(), strict=True)]
    ranged = {name: column[np.array(free, bool)] for name, column in ranged.items()}
    ranged = {name: column[_spread(ranged, keep.examples)] for name, column in ranged.items()}
    across = _located(ranged, shards, keep.window)
    joined = Chosen(*(np.concatenate([getattr(top, f.name), getattr(across, f.name)]) for f in fields(Chosen)))
    joined = joined.rows(np.lexsort((joined.place, -joined.value, joined.is_range, joined.feature)))
    key = 2 * joined.feature + joined.is_range
    return Chosen(**{**{f.name: getattr(joined, f.name) for f in fields(Chosen)}, "rank": _within(key)})


def _rows(partial: Partial, kind: str) -> dict[str, np.ndarray]:
    best = getattr(partial, kind)
    return {
        "feature": best.feature.astype(np.int64),
        "octave": best.group.astype(np.int64),
        "is_range": np.full(len(best), kind == "range"),
        "value": best.value,
        "place": best.place,
        "window": best.window,
    }


def _within(key: np.ndarray) -> np.ndarray:
    """The place of each row among those of the same key, which lie together."""
    begins = np.flatnonzero(np.diff(key, prepend=-1))
    return np.arange(len(key)) - np.repeat(begins, np.diff(begins, append=len(key)))


def _different(rows: Chosen) -> np.ndarray:
    """Rows whose text around the peak no earlier row of the same feature has."""
    around = np.concatenate([rows.feature[:, None], np.where(rows.inside, rows.ids, -1)], axis=1)
    return np.sort(np.unique(around, axis=0, return_index=True)[1])


def _spread(rows: dict[str, np.ndarray], count: int) -> np.ndarray:
    """`count` rows of each feature: one of each octave from the highest on, then the next of each."""
    nth = _within(rows["feature"] * 64 + rows["octave"])
    order = np.lexsort((rows["place"], -rows["octave"], nth, rows["feature"]))
    return np.sort(order[_within(rows["feature"][order]) < count])


def _located(rows: dict[str, np.ndarray], shards: Shards, window: tuple[int, int]) -> Chosen:
    """Rows with the text around them, read out of the shards one after the other."""
    before, after = window
    place, n, width = rows["place"], len(rows["place"]), before + 1 + after
    ids, inside = np.zeros((n, width), np.int64), np.zeros((n, width), bool)
    whole = {
        name: np.zeros(n, np.int64) for name in ("document", "position", "start", "end", "window_start", "window_end")
    }
    firsts = np.array([shards.first(number) for number in range(len(shards))])
    of_shard = np.searchsorted(firsts, place, "right") - 1
    for number in np.unique(of_shard):
        shard, here = shards[int(number)], np.flatnonzero(of_shard == number)
        at = place[here] - shard.first
        piece = np.searchsorted(shard.pieces, at, "right") - 1
        around = at[:, None] + np.arange(-before, after + 1)
        within = (around >= shard.pieces[piece][:, None]) & (around < shard.pieces[piece + 1][:, None])
        ids[here], inside[here] = np.where(within, shard.ids[np.where(within, around, 0)], 0), within
        whole["document"][here] = shard.documents[piece]
        whole["position"][here] = at - shard.pieces[piece]
        whole["start"][here], whole["end"][here] = shard.starts[at], shard.ends[at]
        first = np.maximum(around[:, 0], shard.pieces[piece])
        last = np.minimum(around[:, -1], shard.pieces[piece + 1] - 1)
        whole["window_start"][here], whole["window_end"][here] = shard.starts[first], shard.ends[last]
    return Chosen(
        feature=rows["feature"],
        is_range=rows["is_range"],
        rank=np.zeros(n, np.int64),
        value=rows["value"],
        place=place,
        window=rows["window"],
        ids=ids,
        inside=inside,
        peak=before - inside.argmax(axis=1),
        **whole,
    )
