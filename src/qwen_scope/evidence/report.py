"""`SweepReport`: what a sweep found, as figures, as a page to read, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_scope.evidence.arms import Arm
from qwen_scope.evidence.config import SweepConfig
from qwen_scope.evidence.judging import Cell, Judgement, coherent
from qwen_scope.evidence.statistics import LEVEL, Interval, bootstrap
from qwen_scope.files import expanded, replacing

FORMAT = "qwen-scope sweep 1"
LONGEST_EXAMPLE = 300
"""Characters of a text shown in a report."""


@dataclass(frozen=True)
class Point:
    """One strength of one arm, over all prompts."""

    arm: str
    """Name of the arm."""
    kind: str
    """`steered`, `random` or `prompted`."""
    strength: float
    """Multiple of its steering."""
    effect: Interval
    """Mean effect."""
    perplexity: float | None
    """Median perplexity of its texts under the unsteered model; None if all are empty."""
    repetition: float
    """Mean share of repeated runs of four tokens."""
    tokens: float
    """Mean length."""
    coherent: bool
    """Whether its texts are about as likely, and as little repetitive, as unsteered ones."""

    @staticmethod
    def of(arm: Arm, strength: float, cell: Cell, unsteered: Cell, tokens: float, config: SweepConfig) -> Point:
        """From what was measured."""
        perplexity = cell.median_perplexity
        return Point(
            arm=arm.name,
            kind=arm.kind,
            strength=strength,
            effect=bootstrap(cell.effect, config.resamples, config.seed),
            perplexity=perplexity if perplexity < float("inf") else None,
            repetition=float(cell.repetition.mean()),
            tokens=tokens,
            coherent=coherent(cell, unsteered, config),
        )


@dataclass(frozen=True)
class Example:
    """A text of a sweep."""

    prompt: str
    """What came before."""
    arm: str
    """Name of the arm, or `unsteered`."""
    strength: float
    """Multiple of its steering."""
    text: str
    """What was generated."""


@dataclass(frozen=True)
class SweepReport:
    """What a sweep found."""

    steering: str
    """The edits as they were given: strength 1."""
    raw: str
    """The same with strengths in raw units of activation."""
    units: str
    """Where the highest activations were from that strengths in `x` are counted in."""
    random: list[str]
    """The random steerings it was compared with."""
    densities: str
    """Where the densities were from that these were drawn by."""
    effect: str
    """What was measured."""
    circular: bool
    """Whether that is the reading of a feature that was itself steered: little more than that what was written can be read."""
    model: str
    """The language model."""
    suite: str
    """The SAEs."""
    prompts: list[str]
    """What the texts continue."""
    config: SweepConfig
    """How it was run and judged."""
    points: list[Point]
    """Every strength of every arm."""
    judgement: Judgement
    """What follows."""
    examples: list[Example]
    """Some texts."""

    @property
    def verdict(self) -> str:
        """`yes` or `no`."""
        return "yes" if self.judgement.verdict else "no"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"format": FORMAT, **asdict(self), "verdict": self.verdict}

    def save(self, folder: str | Path) -> Path:
        """Writes `sweep.json`, `README.md` and, where matplotlib is installed, `sweep.png` into a folder.

        Raises:
            QwenScopeError: it cannot be written.
        """
        place = expanded(folder)
        with replacing(place / "sweep.json") as temporary:
            temporary.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        try:
            from qwen_scope.evidence.plot import draw

            draw(self, place / "sweep.png")
            plot = "![effect and perplexity over the strength](sweep.png)\n\n"
        except ImportError:
            plot = "(no plot: matplotlib is not installed)\n\n"
        with replacing(place / "README.md") as temporary:
            temporary.write_text(page(self, plot), encoding="utf-8")
        return place

    def __str__(self) -> str:
        rows = [
            f"{p.arm:<20} {p.strength:>8g} {p.effect.mean:>9.4g}  {f'{p.effect.low:.3g} to {p.effect.high:.3g}':<20} "
            f"{p.perplexity or float('nan'):>10.4g} {p.repetition:>10.1%}{'' if p.coherent else '  not coherent'}"
            for p in self.points
        ]
        head = f"{'arm':<20} {'strength':>8} {'effect':>9}  {f'{LEVEL:.0%} interval':<20} {'perplexity':>10} {'repetition':>10}"
        return "\n".join(
            [
                f"{self.steering}: {self.effect}",
                "",
                head,
                *rows,
                "",
                f"{self.verdict}: {self.judgement.why}",
                *notes(self),
            ]
        )


def notes(report: SweepReport) -> list[str]:
    """What a reader should know besides the verdict."""
    found = []
    if report.circular:
        found.append("note: the effect is the reading of a feature that was steered, which is nearly circular")
    if not report.config.instruction:
        found.append("note: no instruction was given, so that nothing was compared with what is only prompted")
    if report.judgement.left_out:
        found.append(f"note: not coherent at any strength, and left out: {', '.join(report.judgement.left_out)}")
    return found


def page(report: SweepReport, plot: str) -> str:
    """The report as Markdown."""
    judgement, config = report.judgement, report.config
    head = f"# Sweep: {_code(report.steering)}\n\n**{report.verdict}**: {judgement.why}.\n\n"
    said = "".join(f"{note[0].upper()}{note[1:]}.\n\n" for note in notes(report))
    about = (
        f"Effect: {_plain(report.effect)}. Model {_plain(report.model)}, SAEs {_plain(report.suite)}. "
        f"{len(report.prompts)} prompts with {config.seeds} seed{'s' if config.seeds > 1 else ''} each, "
        f"{len(judgement.selection)} of them to choose strengths on, {len(judgement.judged)} to judge; up to "
        f"{config.max_new_tokens} tokens at temperature {config.temperature:g}. Strengths are multiples of the steering, which "
        f"is {_code(report.raw)} in raw units (maxima: {_plain(report.units)}). Random features are of like density (from "
        f"{_plain(report.densities)}) and norm.\n\n"
    )
    asked = f"What is only prompted is asked: {_code(config.instruction)}\n\n" if config.instruction else ""
    comparisons = _table(
        ["against", "at strength", "its effect", "steered is more by", f"{LEVEL:.0%} interval"],
        [
            [c.control, f"{c.strength:g}", f"{c.effect:.4g}", f"{c.difference.mean:.4g}", _interval(c.difference)]
            for c in judgement.comparisons
        ],
    )
    points = _table(
        ["arm", "strength", "effect", f"{LEVEL:.0%} interval", "median perplexity", "repetition", "tokens", "coherent"],
        [
            [
                point.arm,
                f"{point.strength:g}",
                f"{point.effect.mean:.4g}",
                _interval(point.effect),
                "–" if point.perplexity is None else f"{point.perplexity:.3g}",
                f"{point.repetition:.0%}",
                f"{point.tokens:.1f}",
                "yes" if point.coherent else "no",
            ]
            for point in report.points
        ],
    )
    texts = "".join(
        f"- {example.arm}{f' at {example.strength:g}' if example.strength else ''}: {_code(shortened(example.prompt))} → "
        f"{_code(shortened(example.text))}\n"
        for example in report.examples
    )
    judged = "On the judged prompts, each control at its own best strength:\n\n" if judgement.comparisons else ""
    return (
        f"{head}{said}{plot}{about}{asked}{judged}{comparisons if judgement.comparisons else ''}\n## Every strength\n\nOver all "
        f"prompts.\n\n{points}\n## Texts\n\n{texts}"
    )


def shortened(text: str) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_EXAMPLE else f"{line[: LONGEST_EXAMPLE - 1]}…"


def _interval(interval: Interval) -> str:
    return f"{interval.low:.4g} to {interval.high:.4g}"


def _plain(text: str) -> str:
    """Text of others so that Markdown leaves it as it is."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>()#|!&~$" else character for character in text)


def _code(text: str) -> str:
    """Text of others as code, whatever backticks it has."""
    fence = "`"
    while fence in text:
        fence += "`"
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
