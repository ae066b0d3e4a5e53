"""Rules discovered in one language, or one source of texts, and tested in others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen_scope.data.classification.matrix import matrix
from qwen_scope.data.classification.rules import OrRule
from qwen_scope.data.classification.scores import f1
from qwen_scope.data.classification.sets import Sets
from qwen_scope.data.classification.splitting import classes
from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True)
class Crossing:
    """How rules of several languages do in each other's."""

    positive: str
    """The positive label."""
    names: list[str]
    """What the languages or sources are called."""
    layer: int
    """Whose features."""
    k: int
    """Features of each rule."""
    f1: list[list[float]]
    """F1 of the report's rule: a row for the set it was discovered in, a column for the one it was tested on."""
    jaccard: list[list[float]]
    """What two sets' K features have in common: as many as are in both, over those in either."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(10, *map(len, self.names))

        def table(values: list[list[float]]) -> list[str]:
            head = " ".join(f"{name:>{width}}" for name in ("", *self.names))
            rows = zip(self.names, values, strict=True)
            return [head, *(" ".join([f"{name:>{width}}", *(f"{v:>{width}.3f}" for v in row)]) for name, row in rows)]

        lines = [
            f"F1 of the OR of {self.k} features of layer {self.layer}; discovered in the row, tested on the column"
        ]
        lines += [*table(self.f1), f"\nJaccard overlap of the {self.k} features", *table(self.jaccard)]
        return "\n".join(lines)


def cross(sets: Mapping[str, Sets], positive: str, *, k: int = 5, layer: int | None = None) -> Crossing:
    """Discovers the report's rule in each set and tests it on all (the report, section 5).

    Args:
        sets: by name of a language or source, its texts read at the same layers.
        positive: the label that is positive in all of them.
        k: features of each rule.
        layer: whose features; unless told, the one whose largest rate difference is largest on average.

    Raises:
        QwenScopeError: one class only in a set, or no layer that all were read at.
    """
    y = {name: classes("discovery", of.train, positive) for name, of in sets.items()}
    truth = {name: classes("test", of.test, positive) for name, of in sets.items()}
    shared = set.intersection(*(set(of.layers) for of in sets.values())) if sets else set()
    if not shared or (layer is not None and layer not in shared):
        raise QwenScopeError(
            f"expected sets read at {'one layer' if layer is None else f'layer {layer}'}, found {len(sets)} sets with the layers "
            f"{sorted(shared)} in common; read them at the same layers"
        )
    largest = [of.largest_differences(y[name]) for name, of in sets.items()]
    chosen = max(sorted(shared), key=lambda each: sum(of[each] for of in largest)) if layer is None else layer
    rules = {name: OrRule(k).fit(matrix([of.train_read.fired[chosen]]), y[name]) for name, of in sets.items()}
    features = {name: set(rule.features_.tolist()) for name, rule in rules.items()}
    tests = {name: matrix([of.test_read.fired[chosen]]) for name, of in sets.items()}
    return Crossing(
        positive=positive,
        names=list(sets),
        layer=chosen,
        k=k,
        f1=[[f1(truth[there], rules[here].decision_function(tests[there])) for there in sets] for here in sets],
        jaccard=[[len(features[a] & features[b]) / len(features[a] | features[b]) for b in sets] for a in sets],
    )
