"""How well texts are classified: the scores, with intervals, and with length taken out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from sklearn.metrics import average_precision_score, roc_auc_score

LENGTH_BINS = 10
"""Bins of length, each of about as many texts."""


@dataclass(frozen=True)
class Scores:
    """How well a method tells the classes apart on test texts. The positive class is the one that precision is about."""

    f1: float
    """2 TP / (2 TP + FP + FN)."""
    f1_low: float
    """Lower end of its 95 % interval, from resampling the test texts."""
    f1_high: float
    """Upper end."""
    accuracy: float
    """Share of texts classified rightly."""
    precision: float
    """Share of those called positive that are; 0 where none is."""
    recall: float
    """Share of the positive ones that are called so."""
    auc: float
    """Probability that a positive text scores higher than a negative one, ties a half."""
    average_precision: float
    """Mean precision over the recall curve."""
    f1_length_matched: float | None
    """F1 with texts weighted so that both classes have the same lengths, see `length_weights`; None where no length is of both.
    The classes weigh the same then, so compare it between methods, not with `f1`."""
    auc_length_matched: float | None
    """The same of `auc`, which does not depend on how many texts each class has: what it falls by is owed to length."""


def scores(positive: ndarray, scored: ndarray, lengths: ndarray, *, resamples: int = 1000, seed: int = 0) -> Scores:
    """The scores of one method.

    Args:
        positive: (texts,) 1 for positive texts, 0 for others.
        scored: (texts,) scores; above 0 a text is called positive.
        lengths: (texts,) tokens.
        resamples: bootstrap samples of the texts, for the interval.
        seed: of the samples.
    """
    called = scored > 0
    hits, false, missed = _counts(positive, called, np.ones(len(positive)))
    chance = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        weights = np.bincount(chance.integers(len(positive), size=len(positive)), minlength=len(positive)).astype(float)
        drawn.append(_f1(*_counts(positive, called, weights)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    weights = length_weights(positive, lengths)
    return Scores(
        f1=_f1(hits, false, missed),
        f1_low=float(low),
        f1_high=float(high),
        accuracy=float((called == (positive == 1)).mean()),
        precision=float(hits / max(hits + false, 1)),
        recall=float(hits / max(hits + missed, 1)),
        auc=float(roc_auc_score(positive, scored)),
        average_precision=float(average_precision_score(positive, scored)),
        f1_length_matched=_f1(*_counts(positive, called, weights)) if weights.any() else None,
        auc_length_matched=float(roc_auc_score(positive, scored, sample_weight=weights)) if weights.any() else None,
    )


def f1(positive: ndarray, scored: ndarray) -> float:
    """F1 alone: of texts that are positive where `positive` is 1 and called so where `scored` is above 0."""
    return _f1(*_counts(positive, scored > 0, np.ones(len(positive))))


def length_weights(positive: ndarray, lengths: ndarray) -> ndarray:
    """Weights that give both classes the same distribution of lengths: texts are put into bins of length with equally many texts,
    and in each bin the class with more texts is weighted down to the other's number."""
    edges = np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1])
    bins = np.searchsorted(edges, lengths, side="right")
    weights = np.zeros(len(lengths))
    for each in np.unique(bins):
        here = [(bins == each) & (positive == which) for which in (0, 1)]
        fewer = min(int(of.sum()) for of in here)
        for of in here:
            if of.any():
                weights[of] = fewer / of.sum()
    return weights


def _counts(positive: ndarray, called: ndarray, weights: ndarray) -> tuple[float, float, float]:
    is_positive = positive == 1
    return (
        float(weights[called & is_positive].sum()),
        float(weights[called & ~is_positive].sum()),
        float(weights[~called & is_positive].sum()),
    )


def _f1(hits: float, false: float, missed: float) -> float:
    return float(2 * hits / max(2 * hits + false + missed, 1e-12))
