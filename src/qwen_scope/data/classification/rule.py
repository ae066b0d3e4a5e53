"""`Rule`: a learnt rule as a small file that names its features, explains its decisions, and runs over a corpus."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from qwen_scope.corpus import Document
from qwen_scope.data.fired import read
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.files import expanded, replacing
from qwen_scope.fingerprint import fingerprint
from qwen_scope.outliers import norm_outliers

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

FORMAT = "qwen-scope rule 1"
MOST_BYTES = 2**24


@dataclass(frozen=True)
class Term:
    """A feature of a rule."""

    feature: str
    """`layer/number`."""
    weight: float
    """What it adds where it fires: for `or` always 1, for `sparse` times the root of its share of `scale`, at most 1."""
    scale: float
    """Its highest value where the rule was learnt."""
    positive_rate: float
    """Share of the positive texts it was learnt from that fire it."""
    negative_rate: float
    """The same of the negative ones."""
    label: str | None = None
    """What it is about, if an index says so."""
    examples: list[str] = field(default_factory=list)
    """Where it fires most in the index's corpus, its peak between » and «."""


@dataclass(frozen=True)
class Decision:
    """What a rule says of a text."""

    positive: bool
    """Whether the text is of the positive class."""
    score: float
    """Above 0 for positive ones: the sum of what the terms add, with the intercept, less the threshold."""
    fired: list[str]
    """The features of the rule that fire, the largest share first."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reason:
    """What one token contributes to a decision."""

    position: int
    """Which token, from 0."""
    token: str
    """Its text."""
    feature: str
    """A feature of the rule whose highest value in the text is at this token."""
    value: float
    """That value."""
    adds: float
    """What it adds to the score."""


@dataclass(frozen=True)
class Rule:
    """A rule that tells texts of one class from others by a few features."""

    kind: Literal["or", "sparse"]
    """`or`: positive if any feature fires (the report, section 5). `sparse`: a weighted vote."""
    positive: str
    """The label of the positive class."""
    terms: list[Term]
    """Its features, the heaviest first."""
    intercept: float
    """Added to the sum."""
    threshold: float
    """Subtracted from it: a text is positive above."""
    model: str
    """The language model."""
    suite: str
    """The SAEs."""
    fingerprints: dict[str, str]
    """By layer, a hash of the SAE's weights."""
    learnt_from: dict[str, int]
    """Texts of each label it was learnt from."""
    scores: dict[str, float] = field(default_factory=dict)
    """Its scores on test texts, if there were any."""

    @property
    def layers(self) -> list[int]:
        """The layers it reads."""
        return sorted({parse_feature(term.feature)[0] for term in self.terms})

    def decide(self, scope: Scope, texts: Sequence[Document]) -> list[Decision]:
        """What it says of some texts, each read whole.

        Raises:
            QwenScopeError: other SAEs than it was learnt with, or texts that cannot be read.
        """
        self.check(scope)
        found = read(scope, texts, self.layers, "any", progress=False)
        values = np.zeros((len(texts), len(self.terms)))
        for at, term in enumerate(self.terms):
            layer, number = parse_feature(term.feature)
            of = found.fired[layer]
            here = np.flatnonzero(of.features == number)
            values[of.items[here], at] = of.values[here]
        added = self._added(values)
        totals = added.sum(1) + self.intercept - self.threshold
        decisions = []
        for row, total in zip(added, totals, strict=True):
            order = [at for at in np.argsort(-np.abs(row), kind="stable") if row[at]]
            decisions.append(Decision(bool(total > 0), float(total), [self.terms[at].feature for at in order]))
        return decisions

    def explain(self, scope: Scope, text: Document) -> tuple[Decision, list[Reason]]:
        """What it says of a text, and the token at which each feature that fires does so most, the largest share first.

        Raises:
            QwenScopeError: other SAEs than it was learnt with, or a text that cannot be read.
        """
        (decision,) = self.decide(scope, [text])
        features = scope.features(text, layers=self.layers)
        kept = _kept_tokens(scope, features.ids, self.layers)
        reasons = []
        for term in self.terms:
            layer, number = parse_feature(term.feature)
            values = features[layer].activation(number).cpu().clamp_min(0) * kept[layer]
            at = int(values.argmax())
            if values[at] > 0:
                adds = float(
                    self._added(
                        np.where(np.arange(len(self.terms)) == self.terms.index(term), float(values[at]), 0.0)[None]
                    ).sum()
                )
                reasons.append(Reason(at, features.tokens[at], term.feature, float(values[at]), adds))
        return decision, sorted(reasons, key=lambda reason: -abs(reason.adds))

    def stream(
        self, scope: Scope, documents: Iterable[Document], *, at_once: int = 256
    ) -> Iterator[tuple[Document, Decision]]:
        """The same as `decide` for as many documents as there are, some at a time."""
        waiting: list[Document] = []
        for document in documents:
            waiting.append(document)
            if len(waiting) == at_once:
                yield from zip(waiting, self.decide(scope, waiting), strict=True)
                waiting = []
        if waiting:
            yield from zip(waiting, self.decide(scope, waiting), strict=True)

    def check(self, scope: Scope) -> None:
        """Raises a QwenScopeError unless the scope has the SAEs that the rule was learnt with."""
        for layer, known in self.fingerprints.items():
            if int(layer) not in scope.suite.layers or fingerprint(scope.suite, [int(layer)]) != known:
                raise QwenScopeError(
                    f"expected layer {layer} of {self.suite}, which the rule was learnt with, found {scope.suite.name} with "
                    "others or without it; use that suite"
                )

    def _added(self, values: np.ndarray) -> np.ndarray:
        weights = np.array([term.weight for term in self.terms])
        if self.kind == "or":
            return (values > 0) * weights
        scales = np.array([term.scale for term in self.terms])
        return np.sqrt(np.clip(values / scales, 0, 1)) * weights

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, atomically."""
        with replacing(expanded(path)) as temporary:
            text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Rule:
        """Reads what `save` wrote.

        Raises:
            QwenScopeError: no such file, or another kind.
        """
        place = expanded(path)
        try:
            with place.open("rb") as file:
                content = json.loads(file.read(MOST_BYTES))
        except OSError as error:
            raise QwenScopeError(
                f"expected a rule at {place}, found none ({error.strerror}); check the path"
            ) from error
        except ValueError as error:
            raise QwenScopeError(f"expected a rule at {place}, found no JSON ({error}); check the path") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise QwenScopeError(
                f"expected a rule at {place}, found another file; learn one with `qwen-scope classify-fit`"
            )
        try:
            names = {each.name for each in fields(Rule)}
            if set(content) - names:
                raise TypeError(f"an unknown {sorted(set(content) - names)[0]}")
            rule = Rule(**{**content, "terms": [Term(**term) for term in content["terms"]]})
            for term in rule.terms:
                parse_feature(term.feature)
                float(term.weight), float(term.scale)
        except (KeyError, TypeError, ValueError) as error:
            raise QwenScopeError(f"expected a whole rule in {place}, found {error}; learn it again") from error
        return rule


def _kept_tokens(scope: Scope, ids: list[int], layers: list[int]) -> dict[int, torch.Tensor]:
    """1 at tokens that rules look at, 0 at position 0 and norm outliers, by layer."""
    residuals = scope.backbone.residuals(torch.tensor([ids]), layers=layers)
    kept = {}
    for layer, x in residuals.items():
        kept[layer] = (~norm_outliers(x[0])).float().cpu()
        kept[layer][0] = 0
    return kept
