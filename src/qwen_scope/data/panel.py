"""What a panel of models' scores say of sets, beside what features say: the report's ground truth (section 4).

A panel's scores are a (models, items) matrix of right (1) and wrong (0), or of any score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from scipy.stats import kendalltau, spearmanr

from qwen_scope.data.coverage import redundancy
from qwen_scope.data.footprint import Footprint
from qwen_scope.data.overlap import overlaps
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded


def read_scores(path: str | Path) -> dict[str, Shaped[ndarray, "models _"]]:
    """The scores in a JSON file: an object with, by a set's name, a list of one list for each model, its scores item by item.

    Raises:
        QwenScopeError: no such file, or one of another form.
    """
    try:
        found = json.loads(expanded(path).read_text(encoding="utf-8"))
        return {name: np.asarray(rows, dtype=np.float64) for name, rows in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise QwenScopeError(
            f'expected scores such as {{"set": [[1, 0, …], …]}} in {path}, a row of numbers for each model and all as long, '
            f"found none that read ({error}); correct it"
        ) from error


def performance_redundancy(
    scores: Shaped[ndarray, "models items"],
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
        taus = [kendalltau(whole, scores[:, chance.permutation(items)[:n]].mean(1))[0] for _ in range(draws)]
        # Where all models score the same there is no order to agree with.
        found.append(np.mean(np.nan_to_num(taus)))
    return float(np.mean(found))


def performance_similarity(scores: Mapping[str, Shaped[ndarray, "models _"]]) -> Float[ndarray, "sets sets"]:
    """Pearson correlation, over models, of their mean scores on each two sets; NaN where all models score the same on one.

    Raises:
        QwenScopeError: fewer than two models, or other numbers of them.
    """
    return _correlated(_means(scores))


def partial_similarity(scores: Mapping[str, Shaped[ndarray, "models _"]], general: str) -> Float[ndarray, "sets sets"]:
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
    # Rounding may leave a little of equal scores.
    if np.abs(base).max() <= 1e-12 * max(1.0, np.abs(means[at]).max()):
        raise QwenScopeError(
            f"expected models that differ on {general}, found the same score of all; choose another set"
        )
    centred = means - means.mean(1, keepdims=True)
    found = _correlated(centred - np.outer(centred @ base / (base @ base), base))
    found[at] = found[:, at] = np.nan
    return found


@dataclass(frozen=True)
class Agreement:
    """How well a measure by features agrees with what the models' scores say."""

    measure: str
    """Which measure, against what."""
    pearson: float
    """Pearson correlation."""
    spearman: float
    """Spearman rank correlation: the report has 0.85 for redundancy over 17 sets, 0.61 for overlap over 28 pairs, 0.71 less what
    a general set explains."""
    count: int
    """Sets, or pairs of sets, that it is over."""


def agreements(
    footprints: Sequence[Footprint],
    scores: Mapping[str, Shaped[ndarray, "models _"]],
    *,
    general: str | None = None,
    draws: int = 20,
    seed: int = 0,
) -> list[Agreement]:
    """Redundancy against performance redundancy, overlap against performance similarity: as the report has it and size-matched.

    Size-matched overlaps, which depend on the direction, are averaged over both.

    Args:
        footprints: of three sets or more.
        scores: by the set's name, of each model at each item; those of sets without a footprint are not used.
        general: a set, with a footprint or without, whose scores are taken out of the similarity (see `partial_similarity`).
        draws, seed: see `performance_redundancy`.

    Raises:
        QwenScopeError: fewer than three sets, a set without scores, or what the functions above refuse.
    """
    names = [footprint.name for footprint in footprints]
    if len(names) < 3:
        raise QwenScopeError(f"expected at least 3 sets to correlate measures over, found {len(names)}; add some")
    if lacking := [name for name in names if name not in scores]:
        raise QwenScopeError(f"expected scores of {', '.join(names)}, found none of {', '.join(lacking)}; add them")
    if general is not None and general not in scores:
        raise QwenScopeError(f"expected scores of the general set {general}, found none; add them or name another set")
    shared = overlaps(footprints)
    either, own = np.triu_indices(len(names), 1), {name: scores[name] for name in names}
    performed = np.array([performance_redundancy(own[name], draws=draws, seed=seed) for name in names])
    measures = {"overlap": shared.symmetric, "overlap, size-matched": (shared.matched + shared.matched.T) / 2}
    similar = {"similarity": performance_similarity(own)}
    if general is not None:
        others = [name for name in names if name != general]
        partial = np.full((len(names), len(names)), np.nan)
        where = [names.index(name) for name in others]
        of_all = partial_similarity({name: scores[name] for name in [*others, general]}, general)
        partial[np.ix_(where, where)] = of_all[:-1, :-1]
        similar[f"similarity less {general}"] = partial
    rows = [
        (
            f"redundancy{words} against performance redundancy",
            [redundancy(f.fired, n).redundancy for f in footprints],
            performed,
        )
        for words, n in (("", None), (", size-matched", min(map(len, footprints))))
    ]
    rows += [
        (f"{measure} against {what}", values[either], of[either])
        for what, of in similar.items()
        for measure, values in measures.items()
    ]
    return [_agreement(what, np.asarray(x), np.asarray(y)) for what, x, y in rows]


def _agreement(measure: str, x: Float[ndarray, " pairs"], y: Float[ndarray, " pairs"]) -> Agreement:
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return Agreement(measure, float("nan"), float("nan"), len(x))
    ranked: Any = spearmanr(x, y)
    return Agreement(measure, float(np.corrcoef(x, y)[0, 1]), float(ranked.statistic), len(x))


def _correlated(rows: Float[ndarray, "sets models"]) -> Float[ndarray, "sets sets"]:
    centred = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    # What rounding leaves of a set that all models score the same on is no direction.
    norms[norms <= 1e-12 * np.sqrt(rows.shape[1]) * np.maximum(1, np.abs(rows).max())] = np.nan
    return np.clip(centred / norms @ (centred / norms).T, -1, 1)


def _means(scores: Mapping[str, Shaped[ndarray, "models _"]]) -> Float[ndarray, "sets models"]:
    checked = {name: _checked(of) for name, of in scores.items()}
    models = {of.shape[0] for of in checked.values()}
    if len(models) != 1:
        raise QwenScopeError(
            f"expected scores of the same models on every set, found {sorted(models)} of them; give all"
        )
    return np.stack([of.mean(1) for of in checked.values()])


def _checked(scores: Shaped[ndarray, "models items"]) -> Float[ndarray, "models items"]:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 2 or not array.shape[1] or not np.isfinite(array).all():
        raise QwenScopeError(
            f"expected scores of at least 2 models at each item as finite numbers, found an array of shape {array.shape}; give a "
            "row for each model"
        )
    return array
