"""Which features texts are wanted for: named by hand, or chosen by a judge who reads what each is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_scope.data.synthesis.explain import Explanation
from qwen_scope.data.synthesis.kept import Lines
from qwen_scope.data.synthesis.prompts import MOST, PROMPT, read_relevance, relevance
from qwen_scope.data.synthesis.purse import Purse, Spent
from qwen_scope.data.synthesis.writers import Ask, Remote, Written
from qwen_scope.errors import QwenScopeError
from qwen_scope.index.endpoint import Endpoint, EndpointError
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.labels import Key

EXAMPLES = 4
"""Examples of each feature that a judge sees."""


@dataclass(frozen=True)
class Judged:
    """What a judge says."""

    scores: dict[Key, float]
    """Relevance of each feature, from 0 to 10, most relevant first."""
    unreadable: int
    """Features that it said something else about than a number."""
    failed: dict[Key, str]
    """Features that have no answer, and why; the same call asks about those again."""
    spent: Spent
    """Tokens that it took, in this run and before."""

    def relevant(self, tau: float) -> list[Key]:
        """Features of a score of at least tau.

        Raises:
            QwenScopeError: there are none.
        """
        found = [key for key, score in self.scores.items() if score >= tau]
        if not found:
            highest = max(self.scores.values(), default=0.0)
            raise QwenScopeError(
                f"expected features of a relevance of at least {tau:g}, found {highest:g} as the highest of {len(self.scores)}; "
                "lower tau, or judge more features"
            )
        return found


def targets_of(index: FeatureIndex, names: Iterable[str | Key]) -> list[Key]:
    """Features named by hand, of one layer, each once.

    Raises:
        QwenScopeError: none, no such feature, or several layers.
    """
    found = list(dict.fromkeys(map(index.check, names)))
    if not found:
        raise QwenScopeError("expected features that texts are wanted for, found none; name some, such as 15/123")
    if len(layers := sorted({layer for layer, _ in found})) > 1:
        raise QwenScopeError(
            f"expected features of one layer, found some of {', '.join(map(str, layers))}; make texts for one after the other"
        )
    return found


def candidates(index: FeatureIndex, layer: int, topic: str, count: int | None) -> list[Key]:
    """Features of a layer for a judge to read: those that `search` finds first for the topic, or, without a count, all that
    fire, but not nearly always.

    Raises:
        QwenScopeError: no such layer, or nothing that is found.
    """
    if count is None:
        table = index.table(layer, ["dead", "always_on"])
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        return [(layer, n) for n, (dead, always) in enumerate(rows) if not dead and not always]
    found = [(hit.layer, hit.number) for hit in index.search(topic, count=count, layers=layer)]
    if not found:
        raise QwenScopeError(
            f"expected features of layer {layer} that a search for {topic!r} finds, found none; say it in other words, or have "
            "all features judged (--candidates 0)"
        )
    return found


def judge(
    index: FeatureIndex, features: Iterable[Key], topic: str, endpoint: Endpoint, path: Path, purse: Purse
) -> Judged:
    """Has an endpoint say how much each of some features has to do with a topic, from 0 to 10. Each answer is kept at once.

    Args:
        index: says what they are about: each by its label, if it has one, and examples.
        features: which.
        topic: in words.
        endpoint: whom to ask.
        path: a file of JSON lines that answers are kept in, so that the same call goes on.
        purse: what it may cost.

    Raises:
        QwenScopeError: no topic, or more to judge than the purse allows.
        EndpointError: an endpoint that cannot go on.
        Stopped: Ctrl-C.
    """
    if not topic.strip():
        raise QwenScopeError(f"expected a topic in words, found {topic!r}; say what texts are wanted about")
    wanted = list(dict.fromkeys(features))
    about = {"topic": topic, "judge": endpoint.model, "suite": index.about.fingerprint, "prompt": PROMPT}
    lines = Lines(path, about)
    scores: dict[Key, float | None] = {}
    for row in lines:
        if {"feature", "score", "read", "written"} <= set(row):
            scores[index.check(row["feature"])] = row["score"]
        if {"read", "written"} <= set(row):
            purse.spend(Spent(row["read"], row["written"]))

    def take(answers: Mapping[Key, Written]) -> None:
        for (layer, number), answer in answers.items():
            error = None
            try:
                score = read_relevance(answer.text)
            except EndpointError as raised:
                # It would say the same again: this is an answer too, and only several in a row end it.
                score, error = None, raised
            lines.add([{"feature": f"{layer}/{number}", "score": score, **answer.spent._asdict()}])
            scores[layer, number] = score
            if error is not None:
                raise error

    def lost(spent: Spent) -> None:
        if spent.tokens:
            lines.add([spent._asdict()])

    todo = [key for key in wanted if key not in scores]
    asks = [Ask(key, relevance(Explanation.of(index, key, EXAMPLES), topic), 0) for key in todo]
    outcome = Remote(endpoint, lost).write(asks, take, purse, "judging")
    if not outcome.whole:
        done = sum(key in scores for key in wanted)
        raise QwenScopeError(
            f"expected a judge to read {len(wanted)} features within the budget, found that it reaches {done}; allow more, or "
            "judge fewer"
        )
    found = {key: score for key in wanted if (score := scores.get(key)) is not None}
    failed = {key: why for key, why in outcome.failed.items() if key not in scores}
    order = sorted(found, key=lambda key: -found[key])
    unreadable = sum(key in scores for key in wanted) - len(found)
    return Judged({key: found[key] for key in order}, unreadable, failed, purse.spent)


def check_tau(tau: float) -> None:
    """Raises a QwenScopeError unless tau is a relevance."""
    if not 0 <= tau <= MOST:
        raise QwenScopeError(f"expected tau from 0 to {MOST}, found {tau}; such as 7")
