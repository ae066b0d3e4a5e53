"""`Rule`: a learnt rule as a small file that names its features, decides, and explains its decisions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from qwen_scope.corpus import Document
from qwen_scope.data.classification.peaks import peaks
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.files import expanded, replacing
from qwen_scope.fingerprint import fingerprint

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

FORMAT = "qwen-scope rule 1"
MOST_BYTES = 2**24
"""A larger file is no rule of ours."""
AROUND = 8
"""Tokens shown before a token that decides, and half as many after it."""


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
    """The features of the rule that fire, those that add or take away most first."""


@dataclass(frozen=True)
class Reason:
    """What one token contributes to a decision."""

    feature: str
    """A feature of the rule that fires."""
    position: int
    """The token at which it is highest, from 0."""
    token: str
    """That token."""
    around: str
    """The text around it, the token between » and «."""
    value: float
    """The feature's value there."""
    adds: float
    """What that adds to the score."""
    label: str | None
    """What the feature is about, if an index said so."""


@dataclass(frozen=True)
class Explanation:
    """Why a rule decides as it does: `decision.score` is `rest` and what all reasons add."""

    label: str
    """The label of the positive class."""
    decision: Decision
    """What the rule says."""
    rest: float
    """The score of a text that fires no feature of the rule."""
    reasons: list[Reason]
    """Feature by feature, those that add or take away most first."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        from qwen_scope.data.classification.rule_text import explanation_text

        return explanation_text(self)


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
    tested_on: dict[str, int] = field(default_factory=dict)
    """Texts of each label it was tested on."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Its scores on those, see `qwen_scope.data.classification.scores.Scores`."""

    @property
    def features(self) -> list[tuple[int, int]]:
        """Layer and number of each term's feature."""
        return [parse_feature(term.feature) for term in self.terms]

    @property
    def layers(self) -> list[int]:
        """The layers it reads."""
        return sorted({layer for layer, _ in self.features})

    @property
    def digest(self) -> str:
        """A hash of all that decides: rules with the same decide the same."""
        terms = [(term.feature, term.weight, term.scale) for term in self.terms]
        what = [self.kind, self.positive, terms, self.intercept, self.threshold, sorted(self.fingerprints.items())]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

    def decide(
        self, scope: Scope, texts: Sequence[Document], *, told: Callable[[int], object] = lambda tokens: None
    ) -> list[Decision]:
        """What it says of some texts.

        Args:
            told: is called after each pass of the model with the number of its tokens.

        Raises:
            QwenScopeError: other SAEs than it was learnt with, or texts that cannot be read.
        """
        self.check(scope)
        return self.decisions(peaks(scope, texts, self.features, told=told).values)

    def explain(self, scope: Scope, text: Document) -> Explanation:
        """What it says of a text, and the token that decides it for each feature that fires.

        Raises:
            QwenScopeError: other SAEs than it was learnt with, or a text that cannot be read.
        """
        self.check(scope)
        found = peaks(scope, [text], self.features)
        (decision,) = self.decisions(found.values)
        added, ids = self.added(found.values)[0], found.ids[0]

        def decoded(tokens: list[int]) -> str:
            assert scope.backbone.tokenizer is not None  # or nothing could have been read
            return str(scope.backbone.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

        reasons = []
        for term, value, at, adds in zip(self.terms, found.values[0], found.tokens[0].tolist(), added, strict=True):
            if at < 0:
                continue
            token = decoded([ids[at]])
            around = f"{decoded(ids[max(0, at - AROUND) : at])}»{token}«{decoded(ids[at + 1 : at + 1 + AROUND // 2])}"
            reasons.append(Reason(term.feature, at, token, around, float(value), float(adds), term.label))
        reasons.sort(key=lambda reason: -abs(reason.adds))
        return Explanation(self.positive, decision, self.intercept - self.threshold, reasons)

    def decisions(self, values: Float[ndarray, "texts terms"]) -> list[Decision]:
        """What it says of texts whose features reach these values."""
        added = self.added(values)
        totals = self.totals(values)
        decisions = []
        for row, fires, total in zip(added, values > 0, totals.tolist(), strict=True):
            order = [at for at in np.argsort(-np.abs(row), kind="stable") if fires[at]]
            decisions.append(Decision(total > 0, total, [self.terms[at].feature for at in order]))
        return decisions

    def totals(self, values: Float[ndarray, "texts terms"]) -> Float[ndarray, " texts"]:
        """The score of texts whose features reach these values."""
        return self.added(values).sum(1) + self.intercept - self.threshold

    def added(self, values: Float[ndarray, "texts terms"]) -> Float[ndarray, "texts terms"]:
        """What each term adds."""
        weights = np.array([term.weight for term in self.terms])
        if self.kind == "or":
            return (values > 0) * weights
        scales = np.array([term.scale for term in self.terms])
        return np.sqrt(np.clip(values / scales, 0, 1)) * weights

    def check(self, scope: Scope) -> None:
        """Raises a QwenScopeError unless the scope has the SAEs that the rule was learnt with."""
        for layer, known in self.fingerprints.items():
            if int(layer) not in scope.suite.layers or fingerprint(scope.suite, [int(layer)]) != known:
                raise QwenScopeError(
                    f"expected layer {layer} of {self.suite}, which the rule was learnt with, found {scope.suite.name} with "
                    "others or without it; use that suite"
                )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, atomically."""
        with replacing(expanded(path)) as temporary:
            text = json.dumps({"format": FORMAT, **self.to_dict()}, indent=2, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Rule:
        """Reads what `save` wrote.

        Raises:
            QwenScopeError: no such file, another kind, or a damaged one.
        """
        place = expanded(path)
        try:
            with place.open("rb") as file:
                content = json.loads(file.read(MOST_BYTES))
        except OSError as error:
            raise QwenScopeError(
                f"expected a rule at {place}, found none ({error.strerror}); check the path"
            ) from error
        except (ValueError, RecursionError) as error:
            raise QwenScopeError(f"expected a rule at {place}, found no JSON ({error}); check the path") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise QwenScopeError(
                f"expected a rule at {place}, found another file; learn one with `qwen-scope classify fit`"
            )
        try:
            return _rule(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise QwenScopeError(f"expected a whole rule in {place}, found {error}; learn it again") from error

    def __str__(self) -> str:
        from qwen_scope.data.classification.rule_text import rule_text

        return rule_text(self)


def _rule(content: dict[str, Any]) -> Rule:
    """The rule that the content of a file is; raises whatever comes up if it is none."""
    for kind, found in ((Rule, content), *((Term, term) for term in content["terms"])):
        if unknown := set(found) - {each.name for each in fields(kind)}:
            raise ValueError(f"an unknown {min(unknown)}")
    rule = Rule(**{**content, "terms": [Term(**term) for term in content["terms"]]})
    if rule.kind not in ("or", "sparse"):
        raise ValueError(f"the kind {rule.kind!r}")
    numbers = [rule.intercept, rule.threshold]
    for term in rule.terms:
        parse_feature(term.feature)
        numbers += [term.weight, term.scale, term.positive_rate, term.negative_rate]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError("a number missing")
    if not rule.terms or len(set(rule.features)) < len(rule.terms) or min(term.scale for term in rule.terms) <= 0:
        raise ValueError("no features, one twice, or one without a scale")
    counts = [*rule.learnt_from.values(), *rule.tested_on.values()]
    if not all(type(count) is int for count in counts):
        raise ValueError("a count of texts that is none")
    if not all(value is None or type(value) in (int, float) for value in rule.scores.values()):
        raise ValueError("a score that is no number")
    words = [rule.positive, rule.model, rule.suite, *rule.fingerprints.values()]
    words += [word for term in rule.terms for word in (term.label or "", *term.examples)]
    if not all(isinstance(word, str) for word in words):
        raise ValueError("a text missing")
    if sorted(map(str, rule.layers)) != sorted(rule.fingerprints):
        raise ValueError("other fingerprints than of its layers")
    return rule
