"""How well rules of features classify texts, beside all baselines, on texts that nothing was learnt from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from scipy import sparse
from sklearn.metrics import precision_recall_curve

from qwen_scope.corpus import Document
from qwen_scope.data.classification.baselines import BASELINES, Method, Seen
from qwen_scope.data.classification.matrix import matrix
from qwen_scope.data.classification.rules import OrRule, SparseRule, rate_differences
from qwen_scope.data.classification.scores import Scores, scores
from qwen_scope.data.fired import Read, read
from qwen_scope.data.items import Items
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

OR_SIZES = (1, 2, 5, 10)
"""K of the report's rule."""
SWEPT_SIZES = (1, 2, 3, 5, 8, 12, 20, 32, 64)
"""K over which the collapse of the rule is shown."""
FRACTIONS = (0.03, 0.1, 0.3, 1.0)
"""Shares of the discovery texts that methods learn from."""


@dataclass(frozen=True)
class Outcome:
    """How one method did."""

    method: str
    """Its name."""
    layer: str
    """The layer or layers it reads; empty where it reads none."""
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
    """By method, F1 by the share of the discovery texts it learnt from."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"positive: {self.positive}; discovery {self.train}, test {self.test}; layer {self.layer} chosen by the largest rate "
            "difference",
            f"{'method':<32} {'layer':>8} {'F1':>6} {'95 %':>13} {'matched':>8} {'prec.':>6} {'recall':>6} {'AUC':>6}",
        ]
        for outcome in self.outcomes:
            s = outcome.scores
            lines.append(
                f"{outcome.method:<32} {outcome.layer:>8} {s.f1:>6.3f} {f'{s.f1_low:.3f}-{s.f1_high:.3f}':>13} "
                f"{s.f1_length_matched:>8.3f} {s.precision:>6.3f} {s.recall:>6.3f} {s.auc:>6.3f}"
            )
        lines.append("F1 of the OR rule by K: " + "  ".join(f"{k}: {f1:.3f}" for k, f1 in self.f1_by_k.items()))
        for name, of in self.f1_by_fraction.items():
            lines.append(
                f"F1 of {name} by share of the discovery texts: "
                + "  ".join(f"{a:.0%}: {b:.3f}" for a, b in of.items())
            )
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
        seed: of folds, fractions and resampling.
        allow_duplicates: whether texts of the discovery set may be in the test set too.

    Raises:
        QwenScopeError: one class only, texts in both sets, or texts that cannot be read.
    """
    labels = [np.array([label == positive for label in of.labels or []], dtype=int) for of in (train, test)]
    for name, of, is_positive in zip(("discovery", "test"), (train, test), labels, strict=True):
        check_two_classes(name, of, is_positive, positive)
    if not allow_duplicates:
        check_apart(train, test)
    wanted = list(scope.layers if layers is None else layers)
    found = [read(scope, of.texts, wanted, "any", means=True) for of in (train, test)]
    y, truth = labels
    largest = {layer: float(rate_differences(matrix([found[0].fired[layer]]), y).max()) for layer in wanted}
    layer = max(wanted, key=lambda each: largest[each])
    seen = [_seen(of, read_, [layer], layer) for of, read_ in zip((train, test), found, strict=True)]
    wide = [_seen(of, read_, wanted, layer) for of, read_ in zip((train, test), found, strict=True)]
    methods: dict[str, tuple[Method, str, list[Seen]]] = {
        name: (method, str(layer) if "residual" in name or "features" in name else "", seen)
        for name, method in BASELINES.items()
    }
    methods |= {f"OR of {k}": (_rule(lambda k=k: OrRule(k)), str(layer), seen) for k in OR_SIZES}
    if len(wanted) > 1:
        name = f"OR of the best of {len(wanted)} layers"
        widths = [scope.suite[each].d_sae for each in wanted]
        methods[name] = (_best_of_layers(widths), ",".join(map(str, wanted)), wide)
    methods[f"sparse rule of up to {most}"] = (_rule(lambda: SparseRule(most, seed=seed)), str(layer), seen)
    if len(wanted) > 1:
        methods[f"sparse rule of up to {most}, all layers"] = (
            _rule(lambda: SparseRule(most, seed=seed)),
            ",".join(map(str, wanted)),
            wide,
        )
    outcomes = []
    for name, (method, where, (learnt, tested)) in methods.items():
        scored = method(learnt, y, tested)
        outcomes.append(Outcome(name, where, scores(truth, scored, tested.lengths, seed=seed), _curve(truth, scored)))
    by_fraction = {
        "OR of 5": _rule(lambda: OrRule(5)),
        f"sparse rule of up to {most}": _rule(lambda: SparseRule(most, seed=seed)),
    }
    by_fraction["bag of words"] = BASELINES["bag of words"]
    return Evaluation(
        positive=positive,
        train=_sizes(train),
        test=_sizes(test),
        layer=layer,
        largest_difference=largest,
        outcomes=outcomes,
        f1_by_k={
            k: _f1(truth, _rule(lambda k=k: OrRule(k))(seen[0], y, seen[1]))
            for k in SWEPT_SIZES
            if k <= seen[0].features.shape[1]
        },
        f1_by_fraction={name: _fractions(method, seen, y, truth, seed) for name, method in by_fraction.items()},
    )


def check_two_classes(name: str, items: Items, is_positive: ndarray, positive: str) -> None:
    """Raises a QwenScopeError unless there are texts of the positive label and of others."""
    if items.labels is None:
        raise QwenScopeError(f"expected labels of the {name} texts, found none; name their column")
    if is_positive.all() or not is_positive.any():
        found = ", ".join(sorted(set(items.labels))[:10])
        raise QwenScopeError(
            f"expected {name} texts of the label {positive!r} and of others, found {found} alone; choose another label or set"
        )


def check_apart(train: Items, test: Items) -> None:
    """Raises a QwenScopeError if a text is in both sets, but for case and spaces."""
    known = {_plain(text): place for text, place in zip(train.texts, train.places, strict=True)}
    both = [
        (known[_plain(text)], place)
        for text, place in zip(test.texts, test.places, strict=True)
        if _plain(text) in known
    ]
    if both:
        raise QwenScopeError(
            f"expected test texts that are not among the discovery texts, found {len(both)} that are, such as {both[0][1]}, "
            f"which is {both[0][0]}; take them out, or allow duplicates"
        )


def words_of(document: Document) -> str:
    """A document as plain text: of messages, their contents one after another."""
    return document if isinstance(document, str) else "\n".join(str(message["content"]) for message in document)


def _plain(document: Document) -> str:
    return " ".join(words_of(document).casefold().split())


def _sizes(items: Items) -> dict[str, int]:
    return {label: (items.labels or []).count(label) for label in sorted(set(items.labels or []))}


def _seen(items: Items, found: Read, layers: list[int], layer: int) -> Seen:
    features: sparse.csr_matrix = matrix([found.fired[each] for each in layers])
    return Seen([words_of(text) for text in items.texts], found.lengths, features, found.means[layer])


def _rule(make: Callable[[], OrRule | SparseRule]) -> Method:
    return lambda train, positive, test: make().fit(train.features, positive).decision_function(test.features)


def _best_of_layers(widths: list[int]) -> Method:
    """The report's rule over layers: positive if the best feature of any of them fires."""
    starts = np.concatenate([[0], np.cumsum(widths)])

    def method(train: Seen, positive: ndarray, test: Seen) -> ndarray:
        delta = rate_differences(train.features, positive)
        best = [start + int(delta[start:end].argmax()) for start, end in pairwise(starts)]
        return np.asarray((test.features[:, best] != 0).sum(1)).ravel() - 0.5

    return method


def _f1(truth: ndarray, scored: ndarray) -> float:
    called = scored > 0
    hits = (called & (truth == 1)).sum()
    return float(2 * hits / max(called.sum() + (truth == 1).sum(), 1))


def _fractions(method: Method, seen: list[Seen], y: ndarray, truth: ndarray, seed: int) -> dict[float, float]:
    found, chance = {}, np.random.default_rng(seed)
    order = chance.permutation(len(y))
    for fraction in FRACTIONS:
        rows = np.concatenate([_first(order[y[order] == which], fraction) for which in (0, 1)])
        found[fraction] = _f1(truth, method(seen[0].take(rows), y[rows], seen[1]))
    return found


def _first(rows: ndarray, fraction: float) -> ndarray:
    return rows[: max(4, round(len(rows) * fraction))]


def _curve(truth: ndarray, scored: ndarray) -> list[tuple[float, float]]:
    precision, recall, _ = precision_recall_curve(truth, scored)
    some = np.unique(np.linspace(0, len(recall) - 1, min(60, len(recall))).round().astype(int))
    return [(round(float(recall[at]), 4), round(float(precision[at]), 4)) for at in some[::-1]]
