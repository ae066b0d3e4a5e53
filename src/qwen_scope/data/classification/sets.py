"""`Sets`: discovery and test texts read through the model once, for any number of classes and methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from numpy import ndarray

from qwen_scope.data.classification.baselines import Seen
from qwen_scope.data.classification.matrix import matrix
from qwen_scope.data.classification.rules import rate_differences
from qwen_scope.data.classification.splitting import check_apart
from qwen_scope.data.fired import Read, read
from qwen_scope.data.items import Items, text_of

if TYPE_CHECKING:
    from qwen_scope.scope import Scope


@dataclass(frozen=True, eq=False)
class Sets:
    """Labelled texts to learn from and others to test on, with what they fire."""

    train: Items
    """Discovery texts."""
    test: Items
    """Test texts."""
    train_read: Read
    """What the discovery texts fire, at all layers read."""
    test_read: Read
    """The same of the test texts."""

    @staticmethod
    def read(
        scope: Scope,
        train: Items,
        test: Items,
        *,
        layers: Sequence[int] | None = None,
        allow_duplicates: bool = False,
    ) -> Sets:
        """Reads both.

        Args:
            layers: layers to choose from later; all of the scope unless told.
            allow_duplicates: whether texts of the discovery set may be in the test set too.

        Raises:
            QwenScopeError: texts in both sets, or that cannot be read.
        """
        if not allow_duplicates:
            check_apart(train, test)
        wanted = list(scope.layers if layers is None else layers)
        first, second = (read(scope, of.texts, wanted, "any", means=True, places=of.places) for of in (train, test))
        return Sets(train, test, first, second)

    @property
    def layers(self) -> list[int]:
        """The layers read."""
        return list(self.train_read.fired)

    def seen(self, layers: Sequence[int], residual: int) -> tuple[Seen, Seen]:
        """What methods may look at, of discovery and test texts.

        Args:
            layers: whose features, side by side.
            residual: the layer whose mean residual linear probes get.
        """
        first, second = (
            Seen(
                [text_of(text) for text in items.texts],
                found.lengths,
                matrix([found.fired[layer] for layer in layers]),
                found.means[residual],
            )
            for items, found in ((self.train, self.train_read), (self.test, self.test_read))
        )
        return first, second

    def largest_differences(self, positive: Int[ndarray, " texts"]) -> dict[int, float]:
        """By layer, the largest Delta_f on the discovery texts: what the report chooses layers by."""
        return {
            layer: float(rate_differences(matrix([fired]), positive).max())
            for layer, fired in self.train_read.fired.items()
        }
