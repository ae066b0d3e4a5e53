"""`synthesize`: texts for features that a set of texts lacks, asked for, read back, and kept only if they fire them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_scope.corpus import Document
from qwen_scope.data.footprint import Footprint
from qwen_scope.data.footprints import footprints
from qwen_scope.data.items import read_items, text_of
from qwen_scope.data.synthesis.alike import Seen
from qwen_scope.data.synthesis.config import SynthesisConfig
from qwen_scope.data.synthesis.explain import Explanation
from qwen_scope.data.synthesis.kept import Kept, Key, Reply, Text
from qwen_scope.data.synthesis.prompts import PROMPT, question, read_text, rewrite
from qwen_scope.data.synthesis.purse import Purse, Spent
from qwen_scope.data.synthesis.report import Seeds, SynthesisReport, made
from qwen_scope.data.synthesis.targets import targets_of
from qwen_scope.data.synthesis.verify import reading
from qwen_scope.data.synthesis.writers import Ask, Local, Outcome, Remote, Written
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.files import alone, expanded, replacing
from qwen_scope.fingerprint import fingerprint
from qwen_scope.generation.generate import ROWS
from qwen_scope.index.endpoint import GIVE_UP, Endpoint, EndpointError
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.labels import Key as Name
from qwen_scope.scope import Scope
from qwen_scope.steering.edit import Edit
from qwen_scope.steering.where import Where
from qwen_scope.stopping import Stopped


def synthesize(
    scope: Scope,
    index: FeatureIndex,
    targets: Sequence[str | Name],
    folder: str | Path,
    config: SynthesisConfig | None = None,
    *,
    seeds: str | Path | Sequence[Document] | None = None,
    column: str | None = None,
    template: str | None = None,
    endpoint: Endpoint | None = None,
    spent: Spent | None = None,
) -> SynthesisReport:
    """Makes texts for those of some features that a seed set does not fire, until each has enough, or the budget is spent.

    The folder gets `attempts.jsonl`, every text as it came; `data.jsonl`, those that are kept; and `report.json`. The same
    call goes on where it was stopped.

    Args:
        scope: the model and suite that texts are read with, and written, unless an endpoint writes.
        index: says what features are about.
        targets: features of one layer, `layer/number`.
        folder: where everything is kept.
        config: how it is done, and what it may cost.
        seeds: the texts that there are: a file, folder or Hugging Face dataset, or a list. None: there are none.
        column: where a row's text is; see `qwen_scope.data.items.read_items`.
        template: instead, a text made of a row's columns.
        endpoint: who writes, if `config.method` says so.
        spent: tokens that count against the budget too, such as a judge's.

    Raises:
        QwenScopeError: features, seeds or options that cannot be, or a folder with another synthesis or one at work.
        EndpointError: an endpoint that cannot go on; what was written is kept.
        Stopped: Ctrl-C; what was written is kept.
    """
    config = config or SynthesisConfig()
    if (config.method == "endpoint") != (endpoint is not None):
        raise QwenScopeError(
            f"expected an endpoint exactly if it is to write, found {'one' if endpoint else 'none'} with the method "
            f"{config.method!r}; choose the method endpoint, or leave the endpoint out"
        )
    names = targets_of(index, targets)
    if fingerprint(scope.suite, index.layers) != index.about.fingerprint:
        raise QwenScopeError(
            f"expected an index of {scope.suite.name}, found one of {index.about.suite} with other weights; use the index of the "
            "suite that is read with"
        )
    place = expanded(folder)
    with alone(place / "lock", place):
        run = _Run(scope, index, names, place, config, endpoint, spent or Spent())
        run.read_seeds(seeds, column, template)
        try:
            run.whole()
        except (Stopped, EndpointError):
            run.save()
            raise
        return run.save()


class _Run:
    """One synthesis."""

    def __init__(
        self,
        scope: Scope,
        index: FeatureIndex,
        names: list[Name],
        folder: Path,
        config: SynthesisConfig,
        endpoint: Endpoint | None,
        spent: Spent,
    ):
        self.scope, self.index, self.folder, self.config = scope, index, folder, config
        self.layer = names[0][0]
        self.targets = [number for _, number in names]
        self.explanations = {n: self._explain(n) for n in self.targets}
        about: dict[str, Any] = {
            "prompt": PROMPT,
            "model": index.about.model,
            "suite": index.about.fingerprint,
            "targets": [f"{layer}/{number}" for layer, number in names],
            "writer": endpoint.model if endpoint else index.about.model,
            **{name: getattr(config, name) for name in ("method", "kind", "asking", "examples", "temperature", "seed")},
        }
        if endpoint is None:
            about |= {"max_new_tokens": config.max_new_tokens, "top_p": config.top_p}
        if config.method == "steer":
            about["strength"] = config.strength
        self.kept = Kept(folder / "attempts.jsonl", about)
        self.writer = Remote(endpoint, self.kept.lose) if endpoint else Local(scope, config, index.about.model)
        self.spent = spent
        whole = Purse.of(config)
        whole.spend(spent.plus(self.kept.lost))
        # So that the control can have as much.
        self.purse = whole.part(0.5 if config.control else 1.0)
        self.purse.spend(self.kept.spent("aimed").plus(self.kept.spent_on_replies))
        self.seeds = Seeds("none", 0, 0, [])
        # What no text may repeat: seeds and the examples that were shown.
        self.before = Seen(config.run, config.alike)
        for explanation in self.explanations.values():
            for number, example in enumerate(explanation.plain, 1):
                self.before.add(example, f"example {number} of {explanation.feature}", shown=True)
        self.failed: dict[str, str] = {}
        self.ended = ""

    def read_seeds(
        self, source: str | Path | Sequence[Document] | None, column: str | None, template: str | None
    ) -> None:
        """Finds which targets the seed set fires."""
        if source is None:
            return
        # Seeds that cannot be used are left out, and counted.
        options: dict[str, Any] = {"column": column, "template": template}
        if isinstance(source, str | Path):
            each = {"name": "seeds", "source": str(source), **options}
            asked: dict[str, Any] = {"layer": self.layer, "position": "any"}
            read_with = {"model": self.index.about.model, "suite": self.index.about.fingerprint}
            (found,) = footprints(lambda: self.scope, [each], self.folder, read_with=read_with, **asked)
        else:
            found = Footprint.of(self.scope, source, layer=self.layer, position="any", broken=lambda _: None, **options)
        texts = read_items(source, broken=lambda _: None, **options).texts
        fired = set(np.flatnonzero(found.fired.counts).tolist())
        fires = [number for number in self.targets if number in fired]
        self.seeds = Seeds(found.about.source, len(found), found.about.left_out, fires)
        self.before.add_all(map(text_of, texts), "seed")

    @property
    def missing(self) -> list[int]:
        """Targets that the seed set does not fire, in the order given."""
        fires = set(self.seeds.fires)
        return [number for number in self.targets if number not in fires]

    def whole(self) -> None:
        """Texts, rewrites, answers and the control."""
        self.ended = self._aim()
        if not self.ended:
            self.ended = self._rewrite() or self._answer()
        if self.config.control:
            self._control()

    def _aim(self) -> str:
        """Attempts in rounds, so that each target has one before any has two. Gives why it ended early, if it did."""
        for attempt in range(self.config.attempts):
            kept = [parse_feature(key.feature)[1] for key in self.chosen() if not key.style]
            todo = [number for number in self.missing if kept.count(number) < self.config.per_target]
            keys = [Key("aimed", self._name(number), attempt) for number in todo]
            if not self._write([self._ask(key) for key in keys if key not in self.kept.texts], self.purse, "writing"):
                return "the budget was spent"
        return ""

    def _rewrite(self) -> str:
        texts = {key: self.kept.texts[key].text for key in self.chosen() if not key.style}
        keys = [key._replace(style=style) for key in texts for style in self.config.styles]
        asks = [
            self._ask(key, rewrite(texts[key._replace(style="")], key.style))
            for key in keys
            if key not in self.kept.texts
        ]
        return "" if self._write(asks, self.purse, "rewriting") else "the budget was spent"

    def _answer(self) -> str:
        if not self.config.answers:
            return ""
        asks = [
            Ask(key, self.kept.texts[key].text, self._seed(key), most=self.config.answer_tokens)
            for key in self.chosen()
            if key not in self.kept.replies
        ]
        seeds = {ask.key: ask.seed for ask in asks}

        def take(found: Mapping[Key, Written]) -> None:
            self.kept.add({k: Reply(w.text.strip(), seeds[k], w.spent.read, w.spent.written) for k, w in found.items()})

        outcome = self.writer.write(asks, take, self.purse, "answering")
        self._note(outcome)
        return "" if outcome.whole else "the budget was spent"

    def _control(self) -> None:
        """Texts about random other features until they have taken as many tokens as those about targets, or all there is."""
        aimed, random = (self.kept.spent(arm) for arm in ("aimed", "random"))
        purse = self._left()
        purse.tokens = min(aimed.tokens, random.tokens + purse.tokens)
        purse.money = min(
            math.inf if self.config.budget is None else purse.cost(aimed), purse.cost(random) + purse.money
        )
        purse.spend(random)
        # Of those drawn before, the order is the same again.
        drawn = (key for key in self._random_keys() if key not in self.kept.texts)
        while keys := list(islice(drawn, ROWS)):
            if not self._write([self._ask(key) for key in keys], purse, "control"):
                break
        # What is held back for a text may be several times what it takes. With less than the others the control would be
        # too easily beaten, so the last ones are asked for one by one.
        purse, unusable = self._left(), 0
        for key in self._random_keys():
            if key in self.kept.texts or key.feature in self.failed:
                continue
            if self.kept.spent("random").tokens >= aimed.tokens or unusable == GIVE_UP:
                return
            if not self._write([self._ask(key)], purse, "control"):
                return
            unusable += key not in self.kept.texts

    def _left(self) -> Purse:
        """What is left of the whole budget; what brought nothing has been paid for too."""
        whole = Purse.of(self.config)
        arms = (self.kept.spent(arm) for arm in ("aimed", "random"))
        for spent in (self.spent, self.kept.lost, self.kept.spent_on_replies, *arms):
            whole.spend(spent)
        return whole.part(1.0)

    def _random_keys(self) -> Iterator[Key]:
        """Random other features that fire, each once, then each again with the next seed."""
        table = self.index.table(self.layer, ["dead", "always_on"])
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        others = {n for n, (dead, always) in enumerate(rows) if not dead and not always} - set(self.targets)
        order = np.random.default_rng((self.config.seed, self.layer)).permutation(sorted(others)).tolist()
        for attempt in range(self.config.attempts if order else 0):
            for number in order:
                yield Key("random", self._name(number), attempt)

    def _write(self, asks: Sequence[Ask[Key]], purse: Purse, doing: str) -> bool:
        """Has texts written, and reads all that have not been read; False if the purse had no more."""
        by_key = {ask.key: ask for ask in asks}

        def take(found: Mapping[Key, Written]) -> None:
            self.kept.add({key: self._text(by_key[key], written) for key, written in found.items()})

        outcome = self.writer.write(asks, take, purse, doing)
        self._read()
        self._note(outcome)
        return outcome.whole

    def _text(self, ask: Ask[Key], written: Written) -> Text:
        explanation = self._explanation(ask.key)
        return Text(
            text=read_text(written.text, written.cut),
            prompt=ask.prompt,
            explanation=str(explanation),
            by=explanation.by,
            steering="" if ask.edit is None else str(ask.edit),
            seed=ask.seed,
            read=written.spent.read,
            written=written.spent.written,
        )

    def _read(self) -> None:
        unread = [key for key in self.kept.texts if key not in self.kept.readings]
        for key in tqdm(unread, desc="reading", unit="text", disable=len(unread) < 64):
            text, own = self.kept.texts[key].text, parse_feature(key.feature)[1]
            self.kept.add({key: reading(self.scope, self.layer, text, own, self.targets)})

    def _ask(self, key: Key, prompt: str | None = None) -> Ask[Key]:
        edit = None
        if self.config.method == "steer":
            number = parse_feature(key.feature)[1]
            raw = self.config.strength * self.index.maxima(self.layer, number)
            edit = Edit(self.layer, number, "add", raw, "raw", Where(prompt=False))
        return Ask(key, prompt or question(self._explanation(key), self.config), self._seed(key), edit)

    def _note(self, outcome: Outcome[Key]) -> None:
        for key, why in outcome.failed.items():
            self.failed.setdefault(key.feature, why)

    def _seed(self, key: Key) -> int:
        return self.config.seed + key.attempt

    def _name(self, number: int) -> str:
        return f"{self.layer}/{number}"

    def _explanation(self, key: Key) -> Explanation:
        number = parse_feature(key.feature)[1]
        if number not in self.explanations:
            self.explanations[number] = self._explain(number)
        return self.explanations[number]

    def _explain(self, number: int) -> Explanation:
        return Explanation.of(self.index, (self.layer, number), self.config.examples)

    def chosen(self) -> list[Key]:
        """The texts that are kept: those that fire their target and are like no other."""
        return [key for key, why in self.judged() if not why]

    def judged(self) -> Iterator[tuple[Key, str]]:
        """Every text about a target with why it is left out, if it is: in an order that does not depend on when it came."""
        seen = Seen(self.config.run, self.config.alike)
        place = {self._name(number): at for at, number in enumerate(self.targets)}
        styles = {style: at for at, style in enumerate(["", *self.config.styles])}
        read = [key for key in self.kept.readings if key.arm == "aimed" and key.style in styles]
        for key in sorted(read, key=lambda key: (styles[key.style], key.attempt, place[key.feature])):
            text = self.kept.texts[key].text
            if not text.strip():
                yield key, "it is blank"
            elif self.kept.readings[key].value <= 0:
                yield key, "it does not fire its target"
            elif like := self.before.like(text) or seen.like(text):
                yield key, f"it is like {like}"
            else:
                seen.add(text, " ".join([f"the text for {key.feature}, attempt {key.attempt}", key.style]).strip())
                yield key, ""

    def save(self) -> SynthesisReport:
        """Writes what is kept, and the report."""
        self._read()
        why = dict(self.judged())
        with replacing(self.folder / "data.jsonl") as temporary:
            rows = [self._row(key) for key in self.chosen()]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            temporary.write_text("".join(lines), encoding="utf-8")
        report = made(
            self.config,
            self.layer,
            self.targets,
            {number: str(self.explanations[number]) for number in self.targets},
            self.seeds,
            self.kept,
            why,
            self.writer.name,
            self.failed,
            self.ended or "each target has enough texts, or has had all its attempts",
        )
        with replacing(self.folder / "report.json") as temporary:
            text = json.dumps(report.to_dict(), ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        return report

    def _row(self, key: Key) -> dict[str, Any]:
        text, found, reply = self.kept.texts[key], self.kept.readings[key], self.kept.replies.get(key)
        highest = float(self.index.maxima.layer(self.layer)[parse_feature(key.feature)[1]])
        return {
            "text": text.text,
            **({} if reply is None else {"answer": reply.answer}),
            "target": key.feature,
            "explanation": text.explanation,
            "explained_by": text.by,
            "method": self.config.method,
            "model": self.writer.name,
            "prompt": text.prompt,
            "style": key.style,
            "attempt": key.attempt,
            "seed": text.seed,
            "steering": text.steering,
            "value": found.value,
            "share_of_maximum": found.value / highest if highest > 0 else None,
            "verified": True,
            "fires": [self._name(number) for number in found.fires],
        }
