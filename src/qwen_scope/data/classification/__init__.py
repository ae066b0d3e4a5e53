"""Classes of texts told apart by a few features that one can read."""

from qwen_scope.data.classification.apply import Applied, apply
from qwen_scope.data.classification.cross import Crossing, cross
from qwen_scope.data.classification.evaluate import Evaluation, evaluate, evaluate_sets
from qwen_scope.data.classification.fit import described, fit_rule, scored
from qwen_scope.data.classification.matrix import FeatureEncoder
from qwen_scope.data.classification.rule import Explanation, Rule
from qwen_scope.data.classification.rules import OrRule, SparseRule
from qwen_scope.data.classification.sets import Sets

__all__ = [
    "Applied",
    "Crossing",
    "Evaluation",
    "Explanation",
    "FeatureEncoder",
    "OrRule",
    "Rule",
    "Sets",
    "SparseRule",
    "apply",
    "cross",
    "described",
    "evaluate",
    "evaluate_sets",
    "fit_rule",
    "scored",
]
