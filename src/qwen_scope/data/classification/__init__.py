"""Classes of texts told apart by a few features that one can read."""

from qwen_scope.data.classification.matrix import FeatureEncoder
from qwen_scope.data.classification.rules import OrRule, SparseRule

__all__ = ["FeatureEncoder", "OrRule", "SparseRule"]
