"""Plots of a run: how training went, and how often features fire. Drawn by matplotlib without any window."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_scope.evaluation.check import CheckReport
from qwen_scope.evaluation.density import DENSE, LOG10_EDGES
from qwen_scope.files import replacing

# Okabe and Ito's colours, which people who see fewer colours can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_NAMED = 8
"""With more layers than this, a legend would hide the curves."""


def draw(folder: Path, check: CheckReport, history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Writes `training.png` (if there is a history) and `density.png` into a folder, each atomically.

    Returns:
        A description of each file written, by its name.

    Raises:
        ImportError: no matplotlib.
        QwenScopeError: a folder that cannot be written.
    """
    found = {}
    if history:
        _save(folder / "training.png", (9.0, 2.8), lambda figure: _training(figure, check, history))
        found["training.png"] = "FVU, dead features and learning rate over the tokens trained on, of each layer"
    _save(folder / "density.png", (6.0, 2.8), lambda figure: _density(figure, check))
    found["density.png"] = "how many features fire at which share of the tokens, of each layer"
    return found


def _save(path: Path, inches: tuple[float, float], fill: Callable[[Any], None]) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which keeps every figure of the process; and no LaTeX, which a user's settings may ask for.
    with rc_context({"text.usetex": False}), replacing(path) as temporary:
        figure = Figure(figsize=inches, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        figure.savefig(temporary, format="png")


def _training(figure: Any, check: CheckReport, history: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import ScalarFormatter

    widths = {row.layer: row.d_sae for row in check.layers}
    panels = figure.subplots(1, 3)
    for at, layer in enumerate(sorted({row["layer"] for row in history})):
        rows = sorted((row for row in history if row["layer"] == layer), key=lambda row: row["step"])
        tokens = [row["tokens"] / 1e6 for row in rows]
        look = {"color": COLOURS[at % len(COLOURS)], "label": f"layer {layer}", "linewidth": 1.2}
        panels[0].plot(tokens, [row["fvu"] for row in rows], **look)
        panels[1].plot(tokens, [100 * row["dead"] / widths.get(layer, row["dead"] or 1) for row in rows], **look)
        panels[2].plot(tokens, [row["learning_rate"] for row in rows], **look)
    # The first steps lie far above all that follows.
    panels[0].set_yscale("log")
    for which in (panels[0].yaxis.set_major_formatter, panels[0].yaxis.set_minor_formatter):
        which(ScalarFormatter())
    for panel, name in zip(panels, ("FVU while training", "dead features (%)", "learning rate"), strict=True):
        panel.set_xlabel("million tokens")
        panel.set_ylabel(name)
        panel.grid(alpha=0.25)
    _legend(panels[0])


def _density(figure: Any, check: CheckReport) -> None:
    panel = figure.subplots()
    for at, row in enumerate(check.layers):
        counts = row.fidelity.density.histogram
        look = {"color": COLOURS[at % len(COLOURS)], "label": f"layer {row.layer}", "linewidth": 1.4}
        panel.stairs(counts, [10**edge for edge in LOG10_EDGES], **look)
    panel.axvline(DENSE, color="#888888", linewidth=0.8, linestyle=":")
    panel.set_xscale("log")
    panel.set_xlabel("density: share of the held-out tokens at which a feature fires")
    panel.set_ylabel("features")
    panel.grid(alpha=0.25)
    _legend(panel)


def _legend(panel: Any) -> None:
    if len(panel.get_legend_handles_labels()[0]) <= MOST_NAMED:
        panel.legend(frameon=False, fontsize=8)
