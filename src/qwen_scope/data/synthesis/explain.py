"""What a feature is about, in words that a model can be asked with: its label, else its tokens and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_scope.errors import QwenScopeError
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.label_examples import marked, plain, shown
from qwen_scope.index.labels import Key

TOKENS = 5
"""Tokens that a feature peaks at, of which so many are named."""
OFTEN = 0.1
"""Share of a feature's examples that must peak at a token for it to be named; the first always is."""


@dataclass(frozen=True)
class Explanation:
    """What a feature is about."""

    feature: str
    """`layer/number`."""
    label: str | None
    """Its label."""
    by: str
    """Who says so: the label's author, or `examples`."""
    tokens: Sequence[str]
    """Tokens that its examples peak at, most frequent first."""
    marked: Sequence[str]
    """Examples, with the places where it fires marked."""
    plain: Sequence[str]
    """The same without marks."""

    @staticmethod
    def of(index: FeatureIndex, key: Key, examples: int) -> Explanation:
        """From an index.

        Raises:
            QwenScopeError: the index has neither a label nor an example of it.
        """
        feature = index[key]
        found = shown(feature, examples)
        if feature.label is None and not found:
            raise QwenScopeError(
                f"expected a label or examples of {feature.name} to explain it by, found that it never fires in the index and "
                "has no label; label it, or choose another"
            )
        tokens = [token.token for n, token in enumerate(feature.top_tokens[:TOKENS]) if not n or token.value >= OFTEN]
        return Explanation(
            feature.name,
            feature.label.text if feature.label else None,
            feature.label.by if feature.label else "examples",
            tokens,
            [marked(example) for example in found],
            [plain(example) for example in found],
        )

    def __str__(self) -> str:
        """On one line, for people."""
        return self.label or f"tokens {', '.join(map(repr, self.tokens))} and {len(self.marked)} examples"
