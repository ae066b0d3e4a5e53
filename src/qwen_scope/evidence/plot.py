"""The plot of a sweep, by matplotlib without any window: the effect over the strength, perplexity below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_scope.drawing import drawing
from qwen_scope.evidence.report import Point, SweepReport
from qwen_scope.files import replacing

# Of Okabe and Ito's colours, which people who see fewer colours can tell apart.
STEERED, RANDOM, PROMPTED, LIMIT = "#0072B2", "#888888", "#D55E00", "#CC79A7"


def draw(report: SweepReport, path: Path) -> None:
    """Writes it as PNG, atomically.

    Raises:
        ImportError: no matplotlib.
        QwenScopeError: a path that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which keeps every figure of the process; and nothing that a user's settings or texts would have LaTeX read.
    with drawing(), replacing(path) as temporary:
        figure = Figure(figsize=(6.4, 5.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _effect(above, report)
        _perplexity(below, report)
        figure.suptitle(report.steering if len(report.steering) <= 80 else f"{report.steering[:79]}…", fontsize=9)
        # No date and version, so that the same figures make the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _effect(panel: Any, report: SweepReport) -> None:
    for number, arm in enumerate(_arms(report, "random")):
        x, y = zip(*((point.strength, point.effect.mean) for point in arm), strict=True)
        panel.plot(x, y, color=RANDOM, linewidth=0.9, alpha=0.8, label="random features" if number == 0 else None)
    for number, (point, line) in enumerate(zip(_prompted(report), ("--", ":", "-."), strict=False)):
        panel.axhline(point.effect.mean, color=PROMPTED, linestyle=line, linewidth=1.2, label=point.arm)
        panel.axhspan(
            point.effect.low, point.effect.high, color=PROMPTED, alpha=0.10 if number == 0 else 0.06, linewidth=0
        )
    (points,) = _arms(report, "steered")
    x = [point.strength for point in points]
    panel.fill_between(x, [p.effect.low for p in points], [p.effect.high for p in points], color=STEERED, alpha=0.2)
    panel.plot(x, [point.effect.mean for point in points], color=STEERED, linewidth=1.6, label="steered")
    for coherent, fill in ((True, STEERED), (False, "white")):
        there = [point for point in points if point.coherent == coherent]
        panel.scatter(
            [p.strength for p in there],
            [p.effect.mean for p in there],
            s=24,
            facecolor=fill,
            edgecolor=STEERED,
            zorder=3,
            label=None if coherent or not there else "not coherent",
        )
    if report.judgement.best is not None:
        panel.axvline(report.judgement.best, color=STEERED, linewidth=0.8, linestyle=":")
    name = report.effect
    panel.set_ylabel(name if len(name) <= 45 else f"{name[:44]}…", fontsize=8)
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)


def _perplexity(panel: Any, report: SweepReport) -> None:
    from matplotlib.ticker import StrMethodFormatter

    for arm in _arms(report, "random"):
        there = [point for point in arm if point.perplexity]
        panel.plot([p.strength for p in there], [p.perplexity for p in there], color=RANDOM, linewidth=0.9, alpha=0.8)
    for point, line in zip(_prompted(report), ("--", ":", "-."), strict=False):
        if point.perplexity:
            panel.axhline(point.perplexity, color=PROMPTED, linestyle=line, linewidth=1.2)
    (points,) = _arms(report, "steered")
    there = [point for point in points if point.perplexity]
    panel.plot(
        [p.strength for p in there],
        [p.perplexity for p in there],
        color=STEERED,
        linewidth=1.6,
        marker="o",
        markersize=4,
    )
    unsteered = next((point.perplexity for point in points if point.strength == 0), None)
    if unsteered:
        factor = report.config.perplexity_factor
        panel.axhline(factor * unsteered, color=LIMIT, linewidth=1, label=f"{factor:g} times unsteered")
        panel.legend(frameon=False, fontsize=8)
    panel.set_yscale("log")
    # The formatters of a logarithmic axis write powers as mathematics, which is turned off.
    for which in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        which(StrMethodFormatter("{x:g}"))
    panel.tick_params(axis="y", which="both", labelsize=8)
    panel.set_ylabel("median perplexity", fontsize=8)
    panel.set_xlabel("strength: multiples of the steering")
    panel.grid(alpha=0.25)


def _arms(report: SweepReport, kind: str) -> list[list[Point]]:
    """The points of the arms of a kind, by strength; random ones get what is unsteered as their strength 0."""
    names = dict.fromkeys(point.arm for point in report.points if point.kind == kind)
    nothing = [point for point in report.points if point.kind == "steered" and point.strength == 0]
    arms = [[point for point in report.points if point.arm == name] for name in names]
    if kind == "random":
        arms = [[*arm, *nothing] for arm in arms]
    return [sorted(arm, key=lambda point: point.strength) for arm in arms]


def _prompted(report: SweepReport) -> list[Point]:
    return [point for point in report.points if point.kind == "prompted"]
