"""`Names`: what features are called on the page."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from qwen_scope.index.show import visible

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex

TOKENS = 3
"""Tokens that stand for a feature without a label."""


class Names:
    """What features are called.

    Args:
        index: where labels and tokens are looked up; without one, features have no names.
    """

    def __init__(self, index: FeatureIndex | None):
        self.index = index
        # What a feature peaks at never changes; labels do, and are looked up anew.
        self._peaks = lru_cache(maxsize=20_000)(self._read_peaks)

    def of(self, layer: int, number: int) -> str:
        """The label; else the tokens that it peaks at, as `peaks at “the”, “a”`; else nothing."""
        if self.index is None or layer not in self.index.about.layers:
            return ""
        label = self.index.labels.get(layer, number)
        return visible(label.text) if label else self._peaks(layer, number)

    def _read_peaks(self, layer: int, number: int) -> str:
        assert self.index is not None
        found = self.index.rows(layer, "features", number, columns=["top_tokens"]).to_pylist()
        tokens = [visible(item["token"]) for item in found[0]["top_tokens"][:TOKENS]] if found else []
        # A space at a token's edge is part of it, and no place to break a line.
        tokens = [token.replace(" ", "\N{NO-BREAK SPACE}") for token in tokens]
        return "peaks at " + ", ".join(f"“{token}”" for token in tokens) if tokens else ""
