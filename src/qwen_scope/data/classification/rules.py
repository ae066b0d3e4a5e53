"""Rules that tell two classes of texts apart by the features they fire, as scikit-learn estimators.

X has a row for each text and a column for each feature: the highest value the feature reaches in the text, 0 where it never
fires (`qwen_scope.data.classification.matrix` makes it). y has two classes; the second in their order is the positive one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy import ndarray
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from qwen_scope.errors import QwenScopeError

CANDIDATES = 1000
"""Features that a sparse rule is chosen from: those whose rates differ most."""


class _Binary(ClassifierMixin, BaseEstimator):
    """What both rules share: checks of X and y, and what scikit-learn has to know."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.sparse = True
        return tags

    def _fitting(self, X: Any, y: Any) -> tuple[sparse.csr_matrix, ndarray]:
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            # The words that scikit-learn's own checks look for begin the sentence.
            raise QwenScopeError(
                f"Only binary classification is supported: expected labels of 2 classes, found {len(self.classes_)} class(es); "
                "fit one rule for each class against the rest"
            )
        return sparse.csr_matrix(X), encoded

    def _reading(self, X: Any) -> sparse.csr_matrix:
        check_is_fitted(self)
        return sparse.csr_matrix(validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False))

    def predict(self, X: Any) -> ndarray:
        """The class of each text."""
        above = self.decision_function(X) > 0
        return self.classes_[above.astype(int)]

    def decision_function(self, X: Any) -> ndarray:
        """Above 0 where the text is of the positive class."""
        raise NotImplementedError


def _check_number(name: str, features: int) -> None:
    if features < 1:
        raise QwenScopeError(f"expected {name} of at least 1 feature, found {features}; ask for one or more")


def rate_differences(X: sparse.csr_matrix, positive: ndarray, eps: float = 0.0) -> ndarray:
    """Delta_f = P(feature fires | positive) - P(feature fires | negative), of every feature (the report, section 5)."""
    fires = _fires(X, eps)
    first, second = fires[positive.astype(bool)], fires[~positive.astype(bool)]
    return np.asarray(first.mean(0) - second.mean(0)).ravel()


def _fires(X: sparse.csr_matrix, eps: float) -> sparse.csr_matrix:
    return X.__gt__(eps)


class OrRule(_Binary):
    """The report's rule (section 5): positive if any of the k features fires whose rates differ most.

    Args:
        k: how many features.
        eps: a feature fires where its value is above this.
        widths: how many columns each layer has, where X holds several side by side: then the rule takes the best feature of
            each of the k layers whose best ones differ most, as the report does with several layers.

    Attributes:
        features_: columns of the features, the largest difference first.
        differences_: Delta_f of each of them.
    """

    def __init__(self, k: int = 5, eps: float = 0.0, widths: Sequence[int] | None = None):
        self.k = k
        self.eps = eps
        self.widths = widths

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # whether anything fires at all says little of data that are no features
        return tags

    def fit(self, X: Any, y: Any) -> OrRule:
        """Chooses the features."""
        _check_number("k", self.k)
        X, positive = self._fitting(X, y)
        delta = rate_differences(X, positive, self.eps)
        candidates = np.arange(len(delta))
        if self.widths is not None:
            if sum(self.widths) != len(delta):
                raise QwenScopeError(
                    f"expected widths that sum to the {len(delta)} columns of X, found {list(self.widths)}; name each layer's"
                )
            starts = np.cumsum([0, *self.widths])
            candidates = np.array([a + int(delta[a:b].argmax()) for a, b in pairwise(starts)])
        self.features_ = candidates[np.argsort(-delta[candidates], kind="stable")][: self.k]
        self.differences_ = delta[self.features_]
        return self

    def decision_function(self, X: Any) -> ndarray:
        """How many of the features fire, less a half."""
        fires = _fires(self._reading(X)[:, self.features_], self.eps)
        return np.asarray(fires.sum(1), dtype=np.float64).ravel() - 0.5


class SparseRule(_Binary):
    """A weighted vote of a few features: logistic regression on features that an L1 penalty picks.

    A feature's value counts as its share of the largest one seen in fitting, at most 1, and its root, so that firing weighs
    more than firing strongly. How many features there are, and the threshold, are chosen by cross-validated F1; of equals the
    fewer.

    Args:
        most: features at most.
        folds: of the cross-validation.
        seed: of the folds.

    Attributes:
        features_: columns of the features, the largest weight first.
        weights_, scales_: weight and largest value of each of them.
        intercept_: what is added.
        threshold_: log-odds above which a text is positive.
    """

    def __init__(self, most: int = 20, folds: int = 4, seed: int = 0):
        self.most = most
        self.folds = folds
        self.seed = seed

    def fit(self, X: Any, y: Any) -> SparseRule:
        """Chooses features, weights and threshold."""
        _check_number("most", self.most)
        X, positive = self._fitting(X, y)
        folds = min(self.folds, int(np.bincount(positive, minlength=2).min()))
        sizes = [size for size in (1, 2, 5, 10, 20, 50, 100) if size < self.most] + [self.most]
        size, threshold = sizes[-1], 0.0
        if folds >= 2:
            splitter = StratifiedKFold(folds, shuffle=True, random_state=self.seed)
            held = {size: np.zeros(len(positive)) for size in sizes}
            for train, test in splitter.split(np.zeros((len(positive), 1)), positive):
                for size, chosen in zip(sizes, _paths(X[train], positive[train], sizes), strict=True):
                    model = _Weights(X[train], positive[train], chosen)
                    held[size][test] = model.scores(X[test])
            best = {size: best_threshold(positive, scores) for size, scores in held.items()}
            size = max(sizes, key=lambda size: (round(best[size][0], 3), -size))
            threshold = best[size][1]
        final = _Weights(X, positive, _paths(X, positive, [size])[0])
        order = np.argsort(-np.abs(final.weights), kind="stable")
        self.features_ = final.features[order]
        self.weights_, self.scales_ = final.weights[order], final.scales[order]
        self.intercept_, self.threshold_ = final.intercept, threshold
        return self

    def decision_function(self, X: Any) -> ndarray:
        """Log-odds less the threshold."""
        inputs = shares(self._reading(X)[:, self.features_], self.scales_)
        return inputs @ self.weights_ + self.intercept_ - self.threshold_

    def predict_proba(self, X: Any) -> ndarray:
        """Probability of each class, moved so that a half is where the threshold lies."""
        positive = 1 / (1 + np.exp(-np.clip(self.decision_function(X), -500, 500)))
        return np.stack([1 - positive, positive], axis=1)


def shares(columns: sparse.csr_matrix, scales: ndarray) -> ndarray:
    """Values of some features as the rule counts them, dense: the root of their share of the largest one, at most 1."""
    dense = np.asarray(columns.todense()) if sparse.issparse(columns) else np.asarray(columns)
    return np.sqrt(np.clip(dense / scales, 0, 1))


class _Weights:
    """A logistic model of some features."""

    def __init__(self, X: sparse.csr_matrix, positive: ndarray, features: ndarray):
        self.features = features
        columns = X[:, features]
        self.scales = np.maximum(np.asarray(columns.max(0).todense()).ravel(), 1e-12)
        model = LogisticRegression(C=10.0, max_iter=1000).fit(shares(columns, self.scales), positive)
        self.weights, self.intercept = model.coef_[0], float(model.intercept_[0])

    def scores(self, X: sparse.csr_matrix) -> ndarray:
        return shares(X[:, self.features], self.scales) @ self.weights + self.intercept


def _paths(X: sparse.csr_matrix, positive: ndarray, sizes: list[int]) -> list[ndarray]:
    """For each size, at most so many features: those that come first as an L1 penalty is loosened."""
    delta = rate_differences(X, positive)
    candidates = np.argsort(-np.abs(delta), kind="stable")[:CANDIDATES]
    scales = np.maximum(np.asarray(X[:, candidates].max(0).todense()).ravel(), 1e-12)
    inputs = shares(X[:, candidates], scales)
    order: list[int] = []
    for strength in np.geomspace(0.003, 30, 13):
        model = LogisticRegression(l1_ratio=1, C=strength, solver="liblinear", random_state=0)
        with warnings.catch_warnings():
            # Which features come first needs no last digits.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(inputs, positive)
        weights = np.abs(model.coef_[0])
        fresh = [at for at in np.argsort(-weights, kind="stable") if weights[at] > 0 and at not in order]
        order += fresh
        if len(order) >= sizes[-1]:
            break
    # Where nothing tells the classes apart, the penalty picks nothing: then the rates decide.
    order += [at for at in range(len(candidates)) if at not in order]
    return [candidates[order[:size]] for size in sizes]


def best_threshold(positive: ndarray, scores: ndarray) -> tuple[float, float]:
    """The largest F1 of the positive class and the score above which it is reached, half-way to the next lower one."""
    precision, recall, thresholds = precision_recall_curve(positive, scores)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12)
    best = int(f1.argmax())
    below = scores[scores < thresholds[best]]
    return float(f1[best]), float((thresholds[best] + below.max()) / 2 if len(below) else thresholds[best] - 1)
