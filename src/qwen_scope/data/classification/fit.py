"""A `Rule` learnt from labelled texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qwen_scope.data.classification.evaluate import check_apart, check_two_classes
from qwen_scope.data.classification.matrix import matrix
from qwen_scope.data.classification.rule import Rule, Term
from qwen_scope.data.classification.rules import OrRule, SparseRule, rate_differences
from qwen_scope.data.classification.scores import scores
from qwen_scope.data.fired import read
from qwen_scope.data.items import Items
from qwen_scope.fingerprint import fingerprint

if TYPE_CHECKING:
    from qwen_scope.scope import Scope


def fit_rule(
    scope: Scope,
    train: Items,
    positive: str,
    *,
    kind: Literal["or", "sparse"] = "sparse",
    layers: Sequence[int] | None = None,
    most: int = 10,
    test: Items | None = None,
    seed: int = 0,
    allow_duplicates: bool = False,
) -> Rule:
    """Learns a rule from labelled texts.

    Args:
        train: texts with labels.
        positive: the label that is positive; all others are negative together.
        kind: `sparse`, a weighted vote of features chosen by cross-validation, or `or`, the report's rule.
        layers: layers to use features of. `or` takes the one whose largest rate difference is largest.
        most: features at most; `or` takes exactly so many.
        test: texts to score the rule on, of which none may be among the others.
        seed: of folds and intervals.
        allow_duplicates: whether test texts may be among those learnt from.

    Raises:
        QwenScopeError: one class only, texts in both sets, or texts that cannot be read.
    """
    y = np.array([label == positive for label in train.labels or []], dtype=int)
    check_two_classes("discovery", train, y, positive)
    if test is not None:
        check_two_classes(
            "test", test, np.array([label == positive for label in test.labels or []], dtype=int), positive
        )
        if not allow_duplicates:
            check_apart(train, test)
    wanted = list(scope.layers if layers is None else layers)
    found = read(scope, train.texts, wanted, "any")
    if kind == "or":
        largest = {layer: float(rate_differences(matrix([found.fired[layer]]), y).max()) for layer in wanted}
        wanted = [max(wanted, key=lambda each: largest[each])]
    X = matrix([found.fired[layer] for layer in wanted])
    names = _names(scope, wanted)
    if kind == "or":
        chosen: Any = OrRule(most).fit(X, y)
        weights, intercept, threshold = np.ones(len(chosen.features_)), 0.0, 0.5
    else:
        chosen = SparseRule(most, seed=seed).fit(X, y)
        weights, intercept, threshold = chosen.weights_, chosen.intercept_, chosen.threshold_
    columns = X[:, chosen.features_]
    fires = columns != 0
    rates = [np.asarray(fires[y == which].mean(0)).ravel() for which in (1, 0)]
    highest = np.maximum(np.asarray(columns.max(0).todense()).ravel(), 1e-12)
    terms = [
        Term(names(column), float(weight), float(scale), float(first), float(second))
        for column, weight, scale, first, second in zip(chosen.features_, weights, highest, *rates, strict=True)
    ]
    used = sorted({int(term.feature.partition("/")[0]) for term in terms})
    rule = Rule(
        kind=kind,
        positive=positive,
        terms=terms,
        intercept=float(intercept),
        threshold=float(threshold),
        model=scope.backbone.name,
        suite=scope.suite.name,
        fingerprints={str(layer): fingerprint(scope.suite, [layer]) for layer in used},
        learnt_from={label: (train.labels or []).count(label) for label in sorted(set(train.labels or []))},
    )
    return rule if test is None else replace(rule, scores=score_rule(scope, rule, test, seed=seed))


def score_rule(scope: Scope, rule: Rule, test: Items, *, seed: int = 0) -> dict[str, float]:
    """A rule's scores on labelled texts, see `qwen_scope.data.classification.scores.Scores`.

    Raises:
        QwenScopeError: other SAEs than it was learnt with, or one class only.
    """
    truth = np.array([label == rule.positive for label in test.labels or []], dtype=int)
    check_two_classes("test", test, truth, rule.positive)
    scored = np.array([decision.score for decision in rule.decide(scope, test.texts)])
    lengths = np.array([len(str(text)) for text in test.texts])
    return asdict(scores(truth, scored, lengths, seed=seed))


def _names(scope: Scope, layers: Sequence[int]) -> Any:
    """The name of a column of the layers side by side."""
    starts = np.concatenate([[0], np.cumsum([scope.suite[layer].d_sae for layer in layers])])

    def name(column: int) -> str:
        at = int(np.searchsorted(starts, column, side="right")) - 1
        return f"{layers[at]}/{int(column - starts[at])}"

    return name
