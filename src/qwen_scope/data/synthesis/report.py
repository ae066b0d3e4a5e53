"""`SynthesisReport`: which targets are fired before and after, beside the control, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_scope.data.synthesis.config import SynthesisConfig
from qwen_scope.data.synthesis.kept import Arm, Kept, Key
from qwen_scope.data.synthesis.purse import Purse
from qwen_scope.evidence.statistics import Interval, bootstrap

FORMAT = "qwen-scope synthesis 1"
RESAMPLES = 2000


@dataclass(frozen=True)
class Seeds:
    """The texts that there were."""

    source: str
    """Where they were read from."""
    items: int
    """How many."""
    left_out: int
    """Rows that could not be used."""
    fires: list[int]
    """Numbers of the targets that they fire."""


@dataclass(frozen=True)
class Target:
    """What became of one target."""

    feature: str
    """`layer/number`."""
    explanation: str
    """What is known of it, on one line."""
    before: bool
    """Whether a seed fires it."""
    attempts: int
    """Texts written for it, rewrites included."""
    fired: int
    """Those of them that fire it."""
    kept: int
    """Those of them that are kept."""
    value: float
    """The highest value that one of them reached."""
    after: bool
    """Whether a seed or a text that is kept fires it."""
    by_any: bool
    """Whether a seed or any text about a target fires it, kept or not."""
    control: bool
    """Whether a seed or any text of the control fires it."""


@dataclass(frozen=True)
class Side:
    """Texts about the targets, or those about random other features."""

    texts: int
    """Texts written."""
    tokens_read: int
    """Tokens of their prompts."""
    tokens_written: int
    """Tokens written."""
    fired: int
    """Texts that fire the feature that they are about."""
    rate: float | None
    """How often a text fires a given target: of texts about targets, the one that it is about; of the control, any one of those
    that are missing, a mean over them. None without texts."""
    covered: int
    """Missing targets that any of its texts fires, kept or not."""
    share: Interval | None
    """The same as a share of the missing ones, with its 95 % interval over targets; None if none were missing."""


@dataclass(frozen=True)
class SynthesisReport:
    """What a synthesis has come to."""

    method: str
    """Who wrote, and how."""
    writer: str
    """The model that wrote."""
    config: SynthesisConfig
    """How it was done."""
    seeds: Seeds
    """The texts that there were."""
    targets: list[Target]
    """Each of them."""
    aimed: Side
    """Texts about the targets that no seed fires."""
    control: Side | None
    """Texts about random other features; None if none were asked for."""
    difference: Interval | None
    """Share of the missing targets that texts about targets fire, kept or not, less what texts of the control fire, with its
    95 % interval over targets: all texts of both count, so that like is compared with like. None without a control's texts."""
    kept: int
    """Texts kept, rewrites included."""
    answers: int
    """Those of them that are answered."""
    silent: int
    """Texts left out because they do not fire their target, or are blank."""
    duplicates: int
    """Texts left out because they are like a seed, an example, or another text."""
    failed: dict[str, str]
    """Features about which an endpoint gave no usable answer, and why."""
    cost: float | None
    """What all of it has cost, if prices are known; a judge not included."""
    ended: str
    """Why it ended."""

    @property
    def before(self) -> float:
        """Share of the targets that the seeds fire."""
        return len(self.seeds.fires) / len(self.targets)

    @property
    def after(self) -> float:
        """Share of the targets that seeds or kept texts fire."""
        return sum(target.after for target in self.targets) / len(self.targets)

    @property
    def after_any(self) -> float:
        """Share of the targets that seeds or any texts about targets fire, also those that are left out."""
        return sum(target.by_any for target in self.targets) / len(self.targets)

    @property
    def after_control(self) -> float | None:
        """Share of the targets that seeds or texts of the control fire."""
        return None if self.control is None else sum(t.control for t in self.targets) / len(self.targets)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        shares = {
            "before": self.before,
            "after": self.after,
            "after_any": self.after_any,
            "after_control": self.after_control,
        }
        return {"format": FORMAT, "coverage": shares, **asdict(self)}

    def __str__(self) -> str:
        missing = len(self.targets) - len(self.seeds.fires)
        lines = [
            f"{len(self.targets)} targets, {missing} of which no seed fires; {self.aimed.texts} texts by {self.writer} "
            f"({self.method}), {self.kept} of them kept",
            f"left out: {self.silent} that do not fire their target, {self.duplicates} that are like others",
            f"coverage before {self.before:.1%}, after {self.after:.1%} (by all texts, kept or not, {self.after_any:.1%})",
        ]
        if self.control is not None:
            lines.append(
                f"control: {self.control.texts} texts about random other features, of as many tokens: {self.after_control:.1%}"
            )
        if self.difference is not None:
            d = self.difference
            lines.append(
                f"all texts against all of the control: {d.mean:.1%} of the missing targets more, 95 % interval {d.low:.1%} to "
                f"{d.high:.1%}"
            )
        if self.control is not None and self.control.rate is not None and self.aimed.rate is not None:
            lines.append(
                f"a text fires its target in {self.aimed.rate:.1%} of the cases; one of the control fires a given target in "
                f"{self.control.rate:.1%}"
            )
        sides = [self.aimed, *([self.control] if self.control else [])]
        read, written = sum(side.tokens_read for side in sides), sum(side.tokens_written for side in sides)
        lines.append(
            f"{read} tokens of prompts and {written} of texts"
            + ("" if self.cost is None else f"; it has cost {self.cost:.4f}")
        )
        if self.failed:
            feature, why = next(iter(self.failed.items()))
            lines.append(f"no usable answer about {len(self.failed)} features, the first {feature}: {why}")
        return "\n".join([*lines, f"ended because {self.ended}"])


def made(
    config: SynthesisConfig,
    layer: int,
    targets: Sequence[int],
    explanations: Mapping[int, str],
    seeds: Seeds,
    kept: Kept,
    why: Mapping[Key, str],
    writer: str,
    failed: dict[str, str],
    ended: str,
) -> SynthesisReport:
    """The report of what has been kept so far.

    Args:
        why: for each text about a target, why it is left out; empty for those that are kept.
    """
    before = set(seeds.fires)
    missing = [number for number in targets if number not in before]
    good = {number for key, said in why.items() if not said for number in kept.readings[key].fires}
    fires: dict[Arm, set[int]] = {"aimed": set(), "random": set()}
    for key, found in kept.readings.items():
        fires[key.arm].update(found.fires)
    sides = {arm: _side(kept, arm, missing, by, config.seed) for arm, by in fires.items()}
    difference = [float(n in fires["aimed"]) - float(n in fires["random"]) for n in missing]
    rows = []
    for number in targets:
        own = [key for key in why if key.feature == f"{layer}/{number}"]
        values = [kept.readings[key].value for key in own]
        rows.append(
            Target(
                feature=f"{layer}/{number}",
                explanation=explanations[number],
                before=number in before,
                attempts=len(own),
                fired=sum(value > 0 for value in values),
                kept=sum(not why[key] for key in own),
                value=max(values, default=0.0),
                after=number in before | good,
                by_any=number in before | fires["aimed"],
                control=number in before | fires["random"],
            )
        )
    purse = Purse(price_in=config.price_in or 0.0, price_out=config.price_out or 0.0)
    spent = kept.spent("aimed").plus(kept.spent("random")).plus(kept.spent_on_replies).plus(kept.lost)
    chosen = [key for key, said in why.items() if not said]
    return SynthesisReport(
        method=config.method,
        writer=writer,
        config=config,
        seeds=seeds,
        targets=rows,
        aimed=sides["aimed"],
        control=sides["random"] if config.control else None,
        # Less nothing is no difference.
        difference=_interval(difference, config.seed) if config.control and sides["random"].texts else None,
        kept=len(chosen),
        answers=sum(key in kept.replies for key in chosen),
        silent=sum("like" not in said and bool(said) for said in why.values()),
        duplicates=sum("like" in said for said in why.values()),
        failed=failed,
        cost=None if config.price_in is None else purse.cost(spent),
        ended=ended,
    )


def _side(kept: Kept, arm: Arm, missing: Sequence[int], fires: set[int], seed: int) -> Side:
    spent = kept.spent(arm)
    read = [found for key, found in kept.readings.items() if key.arm == arm]
    fired = sum(found.value > 0 for found in read)
    by_chance = sum(len(set(found.fires) & set(missing)) for found in read) / max(1, len(missing))
    covered = [float(number in fires) for number in missing]
    return Side(
        texts=sum(key.arm == arm for key in kept.texts),
        tokens_read=spent.read,
        tokens_written=spent.written,
        fired=fired,
        rate=(fired if arm == "aimed" else by_chance) / len(read) if read else None,
        covered=round(sum(covered)),
        share=_interval(covered, seed),
    )


def _interval(values: Sequence[float], seed: int) -> Interval | None:
    """A mean over targets with its interval, which are what would differ in another try."""
    if not values:
        return None
    return bootstrap(np.array(values, dtype=np.float64)[:, None], RESAMPLES, seed)
