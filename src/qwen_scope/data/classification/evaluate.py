"""How well rules of features classify texts, beside all baselines, on texts that nothing was learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import StratifiedKFold

from qwen_scope.data.classification.baselines import BASELINES, Method, Seen
from qwen_scope.data.classification.rules import OrRule, SparseRule, best_threshold
from qwen_scope.data.classification.scores import Scores, f1, scores
from qwen_scope.data.classification.sets import Sets
from qwen_scope.data.classification.splitting import classes, sizes
from qwen_scope.data.items import Items
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded, replacing

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

OR_SIZES = (1, 2, 5, 10)
"""K of the report's rule."""
SWEPT_SIZES = (1, 2, 3, 5, 8, 12, 20, 32, 64)
"""K over which the collapse of the rule is shown."""
FRACTIONS = (0.03, 0.1, 0.3, 1.0)
"""Shares of the discovery texts that methods learn from,"""
DRAWS = 3
"""each drawn so often."""
MOST_BYTES = 2**24
"""A larger file is no evaluation of ours."""
FEWEST = 4
"""Texts of each class that a comparison needs, and that a share of the discovery texts has at least."""


@dataclass(frozen=True)
class Outcome:
    """How one method did."""

    method: str
    """Its name."""
    layers: list[int]
    """The layers it reads; none for those that read words or lengths alone."""
    scores: Scores
    """On the test texts."""
    curve: list[tuple[float, float]]
    """Recall and precision as the threshold falls, some points."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    positive: str
    """The positive label."""
    train: dict[str, int]
    """Discovery texts of each label."""
    test: dict[str, int]
    """Test texts of each label."""
    layer: int
    """The layer chosen on the discovery texts: that of the largest rate difference."""
    largest_difference: dict[int, float]
    """By layer, the largest Delta_f on the discovery texts."""
    outcomes: list[Outcome]
    """Method by method."""
    f1_by_k: dict[int, float]
    """F1 of the OR rule by its number of features."""
    f1_by_fraction: dict[str, dict[float, float]]
    """By method, F1 by the share of the discovery texts it learnt from, the mean of three draws; the layer is the one that all
    of the texts chose."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Writes evaluation.json and evaluation.png; gives the path of the plot."""
        from qwen_scope.data.classification.plot import draw

        place = expanded(folder)
        with replacing(place / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(self, place / "evaluation.png")
        return place / "evaluation.png"

    @staticmethod
    def load(path: str | Path) -> Evaluation:
        """Reads the evaluation.json that `save` wrote.

        Raises:
            QwenScopeError: no such file, another kind, or a damaged one.
        """
        place = expanded(path)
        try:
            with place.open("rb") as file:
                content = json.loads(file.read(MOST_BYTES))
        except OSError as error:
            raise QwenScopeError(
                f"expected an evaluation at {place}, found none ({error.strerror}); check the path"
            ) from error
        except (ValueError, RecursionError) as error:
            raise QwenScopeError(
                f"expected an evaluation at {place}, found no JSON ({error}); check the path"
            ) from error
        try:
            return _evaluation(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise QwenScopeError(
                f"expected an evaluation of `qwen-scope classify evaluate` in {place}, found another file or a damaged one "
                f"({error!r}); make it again"
            ) from error

    def __str__(self) -> str:
        largest = ", ".join(f"{layer}: {value:.3f}" for layer, value in self.largest_difference.items())
        lines = [
            f"positive: {self.positive!r}; discovery {self.train}, test {self.test}",
            f"layer {self.layer} chosen by the largest rate difference ({largest})",
            f"{'method':<40} {'F1':>6} {'95 %':>13} {'matched':>8} {'prec.':>6} {'recall':>6} {'AUC':>6} {'matched':>8}",
        ]
        for outcome in self.outcomes:
            s = outcome.scores
            matched = ["–" if v is None else f"{v:.3f}" for v in (s.f1_length_matched, s.auc_length_matched)]
            lines.append(
                f"{outcome.method:<40} {s.f1:>6.3f} {f'{s.f1_low:.3f}-{s.f1_high:.3f}':>13} {matched[0]:>8} "
                f"{s.precision:>6.3f} {s.recall:>6.3f} {s.auc:>6.3f} {matched[1]:>8}"
            )
        lines.append(
            "matched: with the lengths of both classes made the same; compare it with the line of length alone"
        )
        lines.append("F1 of the OR rule by K: " + "  ".join(f"{k}: {value:.3f}" for k, value in self.f1_by_k.items()))
        for name, of in self.f1_by_fraction.items():
            shares = "  ".join(f"{share:.0%}: {value:.3f}" for share, value in of.items())
            lines.append(f"F1 of {name} by share of the discovery texts: {shares}")
        return "\n".join(lines)


def evaluate(
    scope: Scope,
    train: Items,
    test: Items,
    positive: str,
    *,
    layers: Sequence[int] | None = None,
    most: int = 20,
    seed: int = 0,
    allow_duplicates: bool = False,
) -> Evaluation:
    """Discovers on some labelled texts, tests on others.

    Args:
        train: discovery texts, with labels.
        test: others, with labels.
        positive: the label that is positive; all others are negative together.
        layers: layers to choose from; all of the scope unless told.
        most: features of the sparse rule at most.
        seed: of folds, shares and resampling.
        allow_duplicates: whether texts of the discovery set may be in the test set too.

    Raises:
        QwenScopeError: fewer than four texts of a class, texts in both sets, or texts that cannot be read.
    """
    for name, items in (("discovery", train), ("test", test)):
        classes(name, items, positive, FEWEST)
    sets = Sets.read(scope, train, test, layers=layers, allow_duplicates=allow_duplicates)
    return evaluate_sets(sets, positive, most=most, seed=seed)


def evaluate_sets(sets: Sets, positive: str, *, most: int = 20, seed: int = 0) -> Evaluation:
    """The same for texts that have been read, so that several classes of them cost one reading."""
    y, truth = classes("discovery", sets.train, positive, FEWEST), classes("test", sets.test, positive, FEWEST)
    largest = sets.largest_differences(y)
    layer = max(sets.layers, key=lambda each: largest[each])
    seen, wide = sets.seen([layer], layer), sets.seen(sets.layers, layer)
    sparse = f"sparse rule of up to {most}"
    baselines = {name: _with_threshold(method, seed) for name, method in BASELINES.items()}
    one: dict[str, Method] = {f"OR of {k}": _rule(lambda k=k: OrRule(k)) for k in OR_SIZES}
    one[sparse] = _rule(lambda: SparseRule(most, seed=seed))
    several: dict[str, Method] = {}
    if len(sets.layers) > 1:
        widths = [sets.train_read.fired[each].d_sae for each in sets.layers]
        several[f"OR of the best of {len(widths)} layers"] = _rule(lambda: OrRule(len(widths), widths=widths))
        several[f"{sparse}, {len(widths)} layers"] = one[sparse]
    outcomes = []
    for methods, read in ((baselines | one, seen), (several, wide)):
        for name, method in methods.items():
            scored = method(read[0], y, read[1])
            reads = [] if name in ("length alone", "bag of words") else [layer] if read is seen else sets.layers
            outcomes.append(
                Outcome(name, reads, scores(truth, scored, read[1].lengths, seed=seed), _curve(truth, scored))
            )
    sizes_there = [k for k in SWEPT_SIZES if k <= sets.train_read.fired[layer].d_sae]
    return Evaluation(
        positive=positive,
        train=sizes(sets.train),
        test=sizes(sets.test),
        layer=layer,
        largest_difference=largest,
        outcomes=outcomes,
        f1_by_k={k: f1(truth, _rule(lambda k=k: OrRule(k))(seen[0], y, seen[1])) for k in sizes_there},
        f1_by_fraction={
            name: _by_fraction(method, seen, y, truth, seed)
            for name, method in {
                "bag of words": baselines["bag of words"],
                "logistic probe, residual": baselines["logistic probe, residual"],
                "OR of 5": one["OR of 5"],
                sparse: one[sparse],
            }.items()
        },
    )


def _rule(make: Callable[[], OrRule | SparseRule]) -> Method:
    return lambda train, positive, test: make().fit(train.features, positive).decision_function(test.features)


def _with_threshold(method: Method, seed: int) -> Method:
    """The same with the threshold that the best cross-validated F1 asks for, as the sparse rule has it: where few texts are
    positive, a method that takes the likelier class would look worse than it is."""

    def chosen(train: Seen, positive: ndarray, test: Seen) -> ndarray:
        held = np.zeros(len(positive))
        folds = StratifiedKFold(FEWEST, shuffle=True, random_state=seed)
        for learnt, rest in folds.split(np.zeros((len(positive), 1)), positive):
            held[rest] = method(train.take(learnt), positive[learnt], train.take(rest))
        return method(train, positive, test) - best_threshold(positive, held)[1]

    return chosen


def _by_fraction(method: Method, seen: tuple[Seen, Seen], y: ndarray, truth: ndarray, seed: int) -> dict[float, float]:
    found: dict[float, list[float]] = {}
    for draw in range(DRAWS):
        order = np.random.default_rng([seed, draw]).permutation(len(y))
        for fraction in FRACTIONS:
            if fraction == 1 and draw:
                continue  # all texts are the same texts in any draw
            # In their own order, on which the folds of cross-validation depend.
            rows = np.sort(np.concatenate([_first(order[y[order] == which], fraction) for which in (0, 1)]))
            scored = method(seen[0].take(rows), y[rows], seen[1])
            found.setdefault(fraction, []).append(f1(truth, scored))
    return {fraction: float(np.mean(values)) for fraction, values in found.items()}


def _first(rows: ndarray, fraction: float) -> ndarray:
    return rows[: max(FEWEST, round(len(rows) * fraction))]


def _curve(truth: ndarray, scored: ndarray) -> list[tuple[float, float]]:
    precision, recall, _ = precision_recall_curve(truth, scored)
    some = np.unique(np.linspace(0, len(recall) - 1, min(60, len(recall))).round().astype(int))
    return [(round(float(recall[at]), 4), round(float(precision[at]), 4)) for at in some[::-1]]


def _evaluation(content: dict[str, Any]) -> Evaluation:
    """The evaluation that the content of a file is; raises whatever comes up if it is none."""
    outcomes = [
        Outcome(
            method=str(each["method"]),
            layers=[int(layer) for layer in each["layers"]],
            scores=_scores(each["scores"]),
            curve=[(float(x), float(y)) for x, y in each["curve"]],
        )
        for each in content["outcomes"]
    ]
    if not outcomes:
        raise ValueError("no outcomes")
    return Evaluation(
        positive=str(content["positive"]),
        train={str(label): int(count) for label, count in content["train"].items()},
        test={str(label): int(count) for label, count in content["test"].items()},
        layer=int(content["layer"]),
        largest_difference={int(layer): float(value) for layer, value in content["largest_difference"].items()},
        outcomes=outcomes,
        f1_by_k={int(k): float(value) for k, value in content["f1_by_k"].items()},
        f1_by_fraction={
            str(name): {float(share): float(value) for share, value in of.items()}
            for name, of in content["f1_by_fraction"].items()
        },
    )


def _scores(found: dict[str, float | None]) -> Scores:
    numbers = {name: None if value is None else float(value) for name, value in found.items()}
    # Only these may be missing: where no length is of both classes.
    if {name for name, value in numbers.items() if value is None} - {"f1_length_matched", "auc_length_matched"}:
        raise ValueError("a score missing")
    return Scores(**numbers)  # pyright: ignore[reportArgumentType]
