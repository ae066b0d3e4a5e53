"""What features do: harvest a corpus, then browse, search, compare and label them by `FeatureIndex`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.index.feature import Example, Feature, Label
    from qwen_scope.index.feature_index import FeatureIndex

__all__ = ["Example", "Feature", "FeatureIndex", "Label"]

_HOMES = {"Example": "feature", "Feature": "feature", "FeatureIndex": "feature_index", "Label": "feature"}


def __getattr__(name: str) -> Any:
    # pyarrow is an extra, and what needs none of it should not ask for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_scope.index' has no attribute {name!r}")
    return getattr(import_module(f"qwen_scope.index.{_HOMES[name]}"), name)
