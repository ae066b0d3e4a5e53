"""What a panel of models' scores say of sets, beside what features say: the report's ground truth (section 4).

A panel's scores are a (models, items) matrix of right (1) and wrong (0), or of any score.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import kendalltau

from qwen_scope.errors import QwenScopeError


def performance_redundancy(
    scores: Float[ndarray, "models items"],
    *,
    sizes: Int[ndarray, " sizes"] | None = None,
    draws: int = 20,
    seed: int = 0,
) -> float:
    """R(D): the mean over n of tau_n, the expected Kendall tau-b between the models' scores on all items and on n random ones.

    Args:
        scores: of each model at each item.
        sizes: the n to average over; all from 1 to N are many, so by default 50 of them spread evenly.
        draws: subsets drawn for each n.

    Raises:
        QwenScopeError: fewer than two models, or scores that are no numbers.
    """
    scores = _checked(scores)
    items = scores.shape[1]
    if sizes is None:
        sizes = np.unique(np.linspace(1, items, min(50, items)).round().astype(np.int64))
    chance, whole = np.random.default_rng(seed), scores.mean(1)
    found = []
    for n in sizes:
        taus = [kendalltau(whole, scores[:, chance.permutation(items)[:n]].mean(1)).statistic for _ in range(draws)]
        # Where all models score the same there is no order to agree with.
        found.append(np.mean(np.nan_to_num(taus)))
    return float(np.mean(found))


def performance_similarity(scores: Mapping[str, Float[ndarray, "models _"]]) -> Float[ndarray, "sets sets"]:
    """Pearson correlation, over models, of their mean scores on each two sets.

    Raises:
        QwenScopeError: fewer than two models, or other numbers of them.
    """
    return np.corrcoef(_means(scores))


def partial_similarity(scores: Mapping[str, Float[ndarray, "models _"]], general: str) -> Float[ndarray, "sets sets"]:
    """The same, less what the models' scores on one general set explain: the correlation of what is left of each after a linear
    fit on it. Rows and columns of the general set itself are NaN.

    Raises:
        QwenScopeError: no such set, fewer than three models, or other numbers of them.
    """
    means, names = _means(scores), list(scores)
    if general not in names:
        raise QwenScopeError(f"expected the general set among {', '.join(names)}, found {general}; choose one of those")
    if means.shape[1] < 3:
        raise QwenScopeError(f"expected at least 3 models for a partial correlation, found {means.shape[1]}; add some")
    at = names.index(general)
    base = means[at] - means[at].mean()
    centred = means - means.mean(1, keepdims=True)
    rest = centred - np.outer(centred @ base / (base @ base), base)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.corrcoef(rest)
    found[at] = found[:, at] = np.nan
    return found


def _means(scores: Mapping[str, Float[ndarray, "models _"]]) -> Float[ndarray, "sets models"]:
    checked = {name: _checked(of) for name, of in scores.items()}
    models = {of.shape[0] for of in checked.values()}
    if len(models) != 1:
        raise QwenScopeError(
            f"expected scores of the same models on every set, found {sorted(models)} of them; give all"
        )
    return np.stack([of.mean(1) for of in checked.values()])


def _checked(scores: Float[ndarray, "models items"]) -> Float[ndarray, "models items"]:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 2 or not array.shape[1] or not np.isfinite(array).all():
        raise QwenScopeError(
            f"expected scores of at least 2 models at each item as finite numbers, found an array of shape {array.shape}; give a "
            "row for each model"
        )
    return array
