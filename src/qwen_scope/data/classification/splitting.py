"""Labelled texts to learn from and others to test on: two classes in each, and no text in both."""

from __future__ import annotations

from collections import Counter

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from qwen_scope.corpus import Document
from qwen_scope.data.items import Items, text_of
from qwen_scope.errors import QwenScopeError

NAMED = 10
"""So many labels are named where the one asked for is not there."""


def classes(name: str, items: Items, positive: str, least: int = 1) -> Int[ndarray, " items"]:
    """1 for items of the positive label, 0 for others.

    Args:
        name: what the items are called in an error, such as `discovery`.
        least: how many there must be of each class.

    Raises:
        QwenScopeError: no labels, or too few items of a class.
    """
    if items.labels is None:
        raise QwenScopeError(f"expected labels of the {name} texts, found none; name the column that holds them")
    is_positive = np.array([label == positive for label in items.labels], dtype=np.int64)
    count = int(is_positive.sum())
    if min(count, len(items) - count) < least:
        found = sorted(set(items.labels))
        others = ", ".join(map(repr, found[:NAMED])) + (" and more" if len(found) > NAMED else "")
        raise QwenScopeError(
            f"expected at least {least} of the {name} texts with the label {positive!r} and as many with others, found {count} "
            f"and {len(items) - count} (labels {others}); choose another label, or give more texts"
        )
    return is_positive


def check_apart(train: Items, test: Items) -> None:
    """Raises a QwenScopeError if a text is in both sets, but for case and spaces."""
    known = {_plain(text): place for text, place in zip(train.texts, train.places, strict=True)}
    both = [
        (known[plain], place)
        for plain, place in zip(map(_plain, test.texts), test.places, strict=True)
        if plain in known
    ]
    if both:
        raise QwenScopeError(
            f"expected test texts that are not among the discovery texts, found {len(both)} that are, such as {both[0][1]}, "
            f"which is {both[0][0]}; take them out, or allow duplicates"
        )


def held_back(items: Items, share: float, seed: int) -> tuple[Items, Items]:
    """Items to learn from, and about a share of each label's kept back for a test; those with the same text stay together.

    Raises:
        QwenScopeError: no labels.
    """
    if items.labels is None:
        raise QwenScopeError("expected labels of the texts, found none; name the column that holds them")
    same: dict[str, list[int]] = {}
    for row, text in enumerate(items.texts):
        same.setdefault(_plain(text), []).append(row)
    groups = list(same.values())
    by_label: dict[str, list[list[int]]] = {}
    for at in np.random.default_rng(seed).permutation(len(groups)):
        by_label.setdefault(items.labels[groups[at][0]], []).append(groups[at])
    test = {row for of in by_label.values() for rows in of[: round(share * len(of))] for row in rows}
    return some(items, [row for row in range(len(items)) if row not in test]), some(items, sorted(test))


def some(items: Items, rows: list[int]) -> Items:
    """Some of the items, in the order given."""
    labels = None if items.labels is None else [items.labels[row] for row in rows]
    return Items([items.texts[row] for row in rows], labels, [items.places[row] for row in rows])


def sizes(items: Items) -> dict[str, int]:
    """How many items each label has."""
    return dict(sorted(Counter(items.labels or []).items()))


def _plain(document: Document) -> str:
    return " ".join(text_of(document).casefold().split())
