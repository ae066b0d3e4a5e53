"""Judging a sweep: the best strength is chosen on one half of the prompts and judged on the other, and so is each control's."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from qwen_scope.evidence.arms import Arm
from qwen_scope.evidence.config import SweepConfig
from qwen_scope.evidence.statistics import Interval, bootstrap

STEERED = "steered"


@dataclass(frozen=True)
class Cell:
    """What was measured at one strength of one arm, (prompts, seeds) each."""

    effect: Float[ndarray, "prompts seeds"]
    """The effect of each text."""
    perplexity: Float[ndarray, "prompts seeds"]
    """Of each text under the unsteered model; NaN for an empty one."""
    repetition: Float[ndarray, "prompts seeds"]
    """Share of repeated runs of four tokens."""

    def of(self, prompts: Sequence[int]) -> Cell:
        """The same of some prompts."""
        at = list(prompts)
        return Cell(self.effect[at], self.perplexity[at], self.repetition[at])

    @property
    def median_perplexity(self) -> float:
        """Of the texts that are not empty; infinite if all are."""
        there = self.perplexity[~np.isnan(self.perplexity)]
        return float(np.median(there)) if there.size else float("inf")


Cells = Mapping[tuple[str, float], Cell]
"""By name of the arm and strength."""


@dataclass(frozen=True)
class Comparison:
    """The steering at its best strength against one control at its own, over the judged prompts."""

    control: str
    """Which."""
    strength: float
    """The control's own best strength."""
    effect: float
    """Its mean effect there."""
    difference: Interval
    """Of the steering's effect and its, paired by prompt and seed."""


@dataclass(frozen=True)
class Judgement:
    """What a sweep says."""

    selection: list[int]
    """Prompts on which strengths were chosen."""
    judged: list[int]
    """Prompts on which they were judged."""
    best: float | None
    """The steering's best coherent strength above 0; None if none is coherent."""
    effect: float | None
    """Its mean effect over the judged prompts."""
    perplexity: tuple[float | None, float | None] | None
    """Median perplexity of its texts over the judged prompts, and of unsteered ones; None for texts that are all empty."""
    comparisons: list[Comparison]
    """With every control that is coherent at any strength."""
    left_out: list[str]
    """Controls that are not."""
    verdict: bool
    """Whether it beats every control, and is coherent on the judged prompts too."""
    why: str
    """The reason, a sentence."""


def halves(prompts: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of prompts as two halves drawn at random, each in order; of an odd number the second has one more."""
    order = list(range(prompts))
    random.Random(seed).shuffle(order)
    return sorted(order[: prompts // 2]), sorted(order[prompts // 2 :])


def coherent(cell: Cell, unsteered: Cell, config: SweepConfig) -> bool:
    """Whether texts are about as likely, and as little repetitive, as unsteered ones: see `SweepConfig`."""
    return bool(
        cell.median_perplexity <= config.perplexity_factor * unsteered.median_perplexity
        and cell.repetition.mean() <= unsteered.repetition.mean() + config.repetition_margin
    )


def judge(arms: Sequence[Arm], cells: Cells, config: SweepConfig) -> Judgement:
    """Judges a sweep.

    The steering's strength is that of the highest mean effect on the selection half, among those above 0 that are coherent
    there. Each random steering's is chosen in the same way among all its strengths, and that of the steering turned round
    among those below 0. What is only prompted counts as it is, coherent or not.
    """
    prompts = len(next(iter(cells.values())).effect)
    selection, judged = halves(prompts, config.seed)
    unsteered = cells[STEERED, 0.0]

    def best_of(arm: str, strengths: Sequence[float]) -> float | None:
        there = {strength: cells[arm, strength].of(selection) for strength in strengths}
        fit = [s for s, cell in there.items() if coherent(cell, unsteered.of(selection), config)]
        return max(fit, key=lambda s: (there[s].effect.mean(), -abs(s)), default=None)

    strengths = arms[0].strengths
    best = best_of(STEERED, [s for s in strengths if s > 0])
    if best is None:
        why = "at no strength are its texts coherent: all are too unlikely to the unsteered model, or repeat themselves"
        return Judgement(selection, judged, None, None, None, [], [], False, why)
    mine = cells[STEERED, best].of(judged)
    chosen: dict[str, tuple[str, float | None]] = {"unsteered": (STEERED, 0.0)}
    if negative := [s for s in strengths if s < 0]:
        chosen["turned round"] = STEERED, best_of(STEERED, negative)
    for arm in arms[1:]:
        chosen[arm.name] = arm.name, 0.0 if arm.kind == "prompted" else best_of(arm.name, arm.strengths)
    comparisons = []
    for control, (arm, strength) in chosen.items():
        if strength is not None:
            other = cells[arm, strength].of(judged).effect
            difference = bootstrap(mine.effect - other, config.resamples, config.seed)
            comparisons.append(Comparison(control, strength, float(other.mean()), difference))
    left_out = [control for control, (_, strength) in chosen.items() if strength is None]
    effect, plain = float(mine.effect.mean()), unsteered.of(judged)
    first, second = (p if p < float("inf") else None for p in (mine.median_perplexity, plain.median_perplexity))
    verdict, why = _verdict(best, effect, mine, plain, comparisons, config)
    return Judgement(selection, judged, best, effect, (first, second), comparisons, left_out, verdict, why)


def _verdict(
    best: float, effect: float, mine: Cell, unsteered: Cell, comparisons: list[Comparison], config: SweepConfig
) -> tuple[bool, str]:
    if not coherent(mine, unsteered, config):
        return False, (
            f"at {best:g}, its best strength, its texts are not coherent on the prompts it is judged on: median perplexity "
            f"{mine.median_perplexity:.3g} (unsteered {unsteered.median_perplexity:.3g}), repetition "
            f"{mine.repetition.mean():.0%} ({unsteered.repetition.mean():.0%})"
        )
    nearest = min(comparisons, key=lambda comparison: comparison.difference.low)
    difference = nearest.difference
    between = f"by {difference.mean:.3g}, 95 % interval {difference.low:.3g} to {difference.high:.3g}"
    if difference.low > 0:
        return True, (
            f"at {best:g} its effect is {effect:.3g} and surely above every control; nearest is {nearest.control} with "
            f"{nearest.effect:.3g}, which it exceeds {between}"
        )
    return False, (
        f"at {best:g}, its best strength, its effect is {effect:.3g}, not surely above {nearest.control} with "
        f"{nearest.effect:.3g}, which it exceeds {between}"
    )
