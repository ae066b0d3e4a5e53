"""What any rule of features must be compared with: bag of words, length alone, and linear probes on the residual stream."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from qwen_scope.index.words import UNSPACED

MANY = 100
"""With more texts than this, words that only one has do not count."""
WORD = rf"(?u)\b\w\w+\b|{UNSPACED[1:-1]}"
"""Words of two letters or more, as scikit-learn has it, and what stands for a word alone."""
STRENGTHS = np.geomspace(1e-3, 1e2, 8)
"""Inverse strengths of regularisation that cross-validation chooses from."""


@dataclass(frozen=True, eq=False)
class Seen:
    """All that methods may look at of some texts."""

    words: list[str]
    """The texts themselves."""
    lengths: ndarray
    """(texts,) tokens."""
    features: sparse.csr_matrix
    """(texts, features) highest values, of one layer or several side by side."""
    residual: ndarray
    """(texts, d_model) mean residual of one layer."""

    def take(self, rows: ndarray) -> Seen:
        """The same of some texts."""
        return Seen([self.words[row] for row in rows], self.lengths[rows], self.features[rows], self.residual[rows])


Method = Callable[[Seen, ndarray, Seen], ndarray]
"""Learns from texts and their classes (1 positive, 0 negative; two texts of each at least), and scores others: the higher, the
likelier positive, above 0 likelier than not."""


def bag_of_words(train: Seen, positive: ndarray, test: Seen) -> ndarray:
    """Logistic regression on tf-idf of words and pairs of words; in scripts without spaces each character is a word."""
    vectors = TfidfVectorizer(
        token_pattern=WORD,
        sublinear_tf=True,
        ngram_range=(1, 2),
        min_df=2 if len(positive) > MANY else 1,
        max_features=50_000,
    )
    known, asked = ([re.sub(UNSPACED, r" \1 ", text) for text in seen.words] for seen in (train, test))
    try:
        seen = vectors.fit_transform(known)
    except ValueError:  # no words at all, or none in two texts
        return np.zeros(len(asked))
    return _logistic(positive).fit(seen, positive).decision_function(vectors.transform(asked))


def length(train: Seen, positive: ndarray, test: Seen) -> ndarray:
    """Logistic regression on the logarithm of the number of tokens: what length alone gives away."""
    logs = [np.log(seen.lengths.astype(float))[:, None] for seen in (train, test)]
    return LogisticRegression().fit(logs[0], positive).decision_function(logs[1])


def difference_of_means(train: Seen, positive: ndarray, test: Seen) -> ndarray:
    """The residual along the difference of the classes' means, from half-way between them."""
    means = [train.residual[positive == which].mean(0).astype(np.float64) for which in (1, 0)]
    return (test.residual - (means[0] + means[1]) / 2) @ (means[0] - means[1])


def residual_probe(train: Seen, positive: ndarray, test: Seen) -> ndarray:
    """Logistic regression on the mean residual."""
    model = make_pipeline(StandardScaler(), _logistic(positive))
    return model.fit(train.residual, positive).decision_function(test.residual)


def sparse_features(train: Seen, positive: ndarray, test: Seen) -> ndarray:
    """Logistic regression with an L1 penalty on all features that two texts or more fire: how far features go if their number
    does not matter."""
    fires = np.flatnonzero(train.features.count_nonzero(0) >= 2)
    if not len(fires):
        return np.zeros(len(test.words))
    scales = np.maximum(np.asarray(train.features[:, fires].max(0).todense()).ravel(), 1e-12)
    unscale = sparse.diags(1 / scales)
    model = _logistic(positive, Cs=np.geomspace(0.1, 100, 5), l1_ratios=(1.0,), solver="liblinear", random_state=0)
    model.fit(train.features[:, fires] @ unscale, positive)
    return model.decision_function(test.features[:, fires] @ unscale)


def _logistic(positive: ndarray, **options: Any) -> LogisticRegressionCV:
    """Logistic regression whose regularisation is chosen by likelihood on texts held out, which few texts do not break."""
    folds = min(4, int(np.bincount(positive, minlength=2).min()))
    given: dict[str, Any] = {"Cs": STRENGTHS, "l1_ratios": (0.0,), "max_iter": 2000, "use_legacy_attributes": False}
    return LogisticRegressionCV(cv=folds, scoring="neg_log_loss", **(given | options))


BASELINES: dict[str, Method] = {
    "length alone": length,
    "bag of words": bag_of_words,
    "difference of means, residual": difference_of_means,
    "logistic probe, residual": residual_probe,
    "L1 logistic, all features": sparse_features,
}
"""Name -> method, the weakest first."""
