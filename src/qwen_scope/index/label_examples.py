"""Which examples of a feature are shown to ask for its label, and which texts the label is then scored on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain, groupby, zip_longest

import numpy as np
import pyarrow.dataset as ds

from qwen_scope.index.feature import Example, Feature
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.layout import layer_folder

MARKED = 0.3
"""A token is marked where the feature's activation is at least this share of its peak in the example."""
POOL = 200
"""Features of a layer whose examples serve as texts where others do not fire."""


def shown(feature: Feature, count: int) -> list[Example]:
    """The examples to ask for a label with: of every second one by rank, the first too, three top ones for one of the range.

    So a label is asked for what a feature fires at most, but sees its weaker side too; and the score can be on examples that
    are as strong. Fewer than `count` where there are no more; no text twice.
    """
    top, rest = _different(feature.top[::2]), _different(feature.range[::2], feature.top[::2])
    of_top = min(len(top), max(count - count // 4, count - len(rest)))
    return [*top[:of_top], *rest[: count - of_top]]


def held_out(feature: Feature, count: int) -> list[Example]:
    """Examples to score a label on: of the other ranks, the top and the range in turn, none that overlaps one of `shown`."""
    in_turn = chain.from_iterable(zip_longest(feature.top[1::2], feature.range[1::2]))
    rest = [example for example in in_turn if example is not None]
    return _different(rest, [*feature.top[::2], *feature.range[::2]])[:count]


def plain(example: Example) -> str:
    """An example on one line."""
    return _one_line(example.text)


def marked(example: Example) -> str:
    """An example on one line, with the tokens at which the feature fires as `<<token>>`; neighbours share their marks."""
    least = MARKED * max(example.values)
    parts = []
    for fires, run in groupby(zip(example.tokens, example.values, strict=True), lambda pair: pair[1] >= least > 0):
        text = _one_line("".join(token for token, _ in run))
        # A token often begins with the blank before its word.
        blank = " " if fires and text[:1] == " " and text.strip() else ""
        parts.append(f"{blank}<<{text.removeprefix(blank)}>>" if fires else text)
    return "".join(parts)


class Others:
    """Examples of a sample of a layer's features, as texts where another feature does not fire.

    Args:
        index: where they are.
        layer: whose.
        features: those that will be asked about, so that their pairs, where the index keeps them, are read once.
        seed: decides which features are in the sample.
    """

    def __init__(self, index: FeatureIndex, layer: int, features: Collection[int], seed: int):
        self._seed = seed
        rng = np.random.default_rng((seed, layer))
        alive = [number for number, fired in enumerate(index.table(layer, ["fired"])["fired"].to_pylist()) if fired]
        chosen = rng.permutation(np.array(alive, dtype=np.int64))[:POOL].tolist()
        self._examples = [
            (number, Example(**row)) for number in chosen for row in index.rows(layer, "examples", number).to_pylist()
        ]
        self._fires = _firing(index, layer, features, {example.document for _, example in self._examples})

    def silent(self, feature: Feature, count: int, besides: Iterable[int] = ()) -> list[Example]:
        """Examples of other features, at most one of each, where `feature` does not fire.

        Where the index keeps all pairs, that is certain. Without them it is only known of places that are examples of the
        feature, and features that often fire together with it are left out; a feature that fires at one token in a hundred
        still fires in about one window of 24 tokens in five.

        Args:
            feature: the one that is to be silent.
            count: how many; fewer where there are no more.
            besides: further features that no example may be of.
        """
        own = [*feature.examples]
        barred = {feature.number, *besides, *(near.feature for near in feature.together)}
        fires = self._fires.get(feature.number, set())
        order = np.random.default_rng((self._seed, feature.layer, feature.number)).permutation(len(self._examples))
        found: list[Example] = []
        for at in order.tolist():
            number, example = self._examples[at]
            if len(found) == count:
                break
            if number in barred or not fires.isdisjoint(_places(example)) or not _different([example], [*own, *found]):
                continue
            barred.add(number)
            found.append(example)
        return found


def _firing(
    index: FeatureIndex, layer: int, features: Collection[int], documents: Collection[int]
) -> dict[int, set[tuple[int, int]]]:
    """Documents and positions at which features fire, by the pairs that the index keeps; nothing if it keeps none.

    Positions are counted in each piece of a document: in a long one, a place may stand for several.
    """
    files = sorted((layer_folder(index.folder, layer) / "pairs").glob("*.parquet"))
    if not files:
        return {}
    wanted = ds.field("feature").isin(list(features)) & ds.field("document").isin(list(documents))
    table = ds.dataset(files, format="parquet").to_table(["feature", "document", "position"], filter=wanted)
    found: dict[int, set[tuple[int, int]]] = {}
    for number, document, position in zip(*(column.to_pylist() for column in table.columns), strict=True):
        found.setdefault(number, set()).add((document, position))
    return found


def _places(example: Example) -> Iterable[tuple[int, int]]:
    first = example.position - example.peak
    return ((example.document, first + at) for at in range(len(example.tokens)))


def _different(examples: Sequence[Example], others: Sequence[Example] = ()) -> list[Example]:
    """Those that are neither the same text as, nor overlap in their document with, an earlier one or one of the others."""
    texts = {plain(example) for example in others}
    taken = list(others)
    found = []
    for example in examples:
        if plain(example) in texts or any(_overlap(example, other) for other in taken):
            continue
        texts.add(plain(example))
        taken.append(example)
        found.append(example)
    return found


def _overlap(one: Example, other: Example) -> bool:
    return (
        one.document == other.document and one.window_start < other.window_end and other.window_start < one.window_end
    )


def _one_line(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\n", "⏎").replace("\r", "⏎").replace("\t", " ")
