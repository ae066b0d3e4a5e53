"""A `Rule` learnt from labelled texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy import ndarray
from scipy import sparse

from qwen_scope.data.classification.matrix import matrix
from qwen_scope.data.classification.peaks import peaks
from qwen_scope.data.classification.rule import Rule, Term
from qwen_scope.data.classification.rules import OrRule, SparseRule, rate_differences
from qwen_scope.data.classification.scores import scores
from qwen_scope.data.classification.splitting import check_apart, classes, sizes
from qwen_scope.data.fired import read
from qwen_scope.data.items import Items
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.fingerprint import fingerprint
from qwen_scope.steering.recipe import model_name

if TYPE_CHECKING:
    from qwen_scope.index.feature import Example
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope

Kind = Literal["sparse", "or", "or-layers"]
"""`sparse`: a weighted vote of features of all layers, chosen by cross-validation. `or`: the report's rule, of the layer whose
largest rate difference is largest. `or-layers`: the report's rule of the best feature of each layer."""
EXAMPLES = 3
"""Examples of a feature in a rule."""


def fit_rule(
    scope: Scope,
    train: Items,
    positive: str,
    *,
    kind: Kind = "sparse",
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
        kind: see `Kind`.
        layers: layers to use features of; all of the scope unless told.
        most: features at most; the OR rules take exactly so many, where there are.
        test: texts to score the rule on, of which none may be among the others.
        seed: of folds and intervals.
        allow_duplicates: whether test texts may be among those learnt from.

    Raises:
        QwenScopeError: one class only, texts in both sets, or texts that cannot be read.
    """
    y = classes("discovery", train, positive)
    if test is not None:
        classes("test", test, positive)  # what is wrong with it should be known before the model runs
        if not allow_duplicates:
            check_apart(train, test)
    wanted = list(scope.layers if layers is None else layers)
    found = read(scope, train.texts, wanted, "any", places=train.places).fired
    if kind == "or":
        largest = {layer: float(rate_differences(matrix([found[layer]]), y).max()) for layer in wanted}
        wanted = [max(wanted, key=lambda layer: largest[layer])]
    X, widths = matrix([found[layer] for layer in wanted]), [found[layer].d_sae for layer in wanted]
    if kind == "sparse":
        model = SparseRule(most, seed=seed).fit(X, y)
        terms = _terms(X, y, model.features_, model.weights_, wanted, widths)
        intercept, threshold = model.intercept_, model.threshold_
    else:
        model = OrRule(most, widths=widths if kind == "or-layers" else None).fit(X, y)
        terms = _terms(X, y, model.features_, np.ones(len(model.features_)), wanted, widths)
        intercept, threshold = 0.0, 0.5
    used = sorted({int(term.feature.partition("/")[0]) for term in terms})
    rule = Rule(
        kind="sparse" if kind == "sparse" else "or",
        positive=positive,
        terms=terms,
        intercept=intercept,
        threshold=threshold,
        model=model_name(scope.backbone, scope.suite),
        suite=scope.suite.name,
        fingerprints={str(layer): fingerprint(scope.suite, [layer]) for layer in used},
        learnt_from=sizes(train),
    )
    return rule if test is None else scored(scope, rule, test, seed=seed)


def scored(scope: Scope, rule: Rule, test: Items, *, seed: int = 0) -> Rule:
    """The rule with its scores on labelled texts, see `qwen_scope.data.classification.scores.Scores`.

    Raises:
        QwenScopeError: other SAEs than it was learnt with, or one class only.
    """
    truth = classes("test", test, rule.positive)
    rule.check(scope)
    found = peaks(scope, test.texts, rule.features)
    lengths = np.array([len(ids) for ids in found.ids])
    return replace(
        rule, tested_on=sizes(test), scores=asdict(scores(truth, rule.totals(found.values), lengths, seed=seed))
    )


def described(rule: Rule, index: FeatureIndex) -> Rule:
    """The rule with what an index knows of its features: labels and examples. Layers that it has not stay as they are.

    Raises:
        QwenScopeError: an index of another suite.
    """
    if index.about.suite != rule.suite:
        raise QwenScopeError(
            f"expected an index of {rule.suite}, which the rule is of, found one of {index.about.suite}; name its own"
        )
    terms = []
    for term in rule.terms:
        if parse_feature(term.feature)[0] not in index.layers:
            terms.append(term)
            continue
        feature = index[term.feature]
        label = None if feature.label is None else feature.label.text
        terms.append(replace(term, label=label, examples=[_marked(example) for example in feature.top[:EXAMPLES]]))
    return replace(rule, terms=terms)


def _marked(example: Example) -> str:
    before, after = example.tokens[: example.peak], example.tokens[example.peak + 1 :]
    marked = f"{''.join(before[-8:])}»{example.tokens[example.peak]}«{''.join(after[:4])}"
    return " ".join(marked.split())


def _terms(
    X: sparse.csr_matrix, y: ndarray, chosen: ndarray, weights: ndarray, layers: list[int], widths: list[int]
) -> list[Term]:
    """The columns chosen, of layers side by side, with their names and how often they fire."""
    columns = X[:, chosen]
    fires = columns != 0
    rates = [np.asarray(fires[y == which].mean(0)).ravel().tolist() for which in (1, 0)]
    scales = np.maximum(np.asarray(columns.max(0).todense()).ravel(), 1e-12).tolist()
    starts = np.cumsum([0, *widths])
    at = np.searchsorted(starts, chosen, side="right") - 1
    names = [f"{layers[layer]}/{column - starts[layer]}" for layer, column in zip(at, chosen, strict=True)]
    return [Term(*values) for values in zip(names, weights.tolist(), scales, *rates, strict=True)]
