"""An evaluation as a picture: precision over recall, F1 by K, F1 by the share of the discovery texts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope.drawing import drawing
from qwen_scope.files import replacing
from qwen_scope.index.show import clip, visible

if TYPE_CHECKING:
    from qwen_scope.data.classification.evaluate import Evaluation


def draw(evaluation: Evaluation, path: Path) -> None:
    """Writes a PNG."""
    data = picture(evaluation)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def picture(evaluation: Evaluation) -> bytes:
    """The same as it would be written."""
    with drawing():
        return _drawn(evaluation)


def _drawn(evaluation: Evaluation) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    _draw(evaluation, *figure.subplots(1, 3))
    held = io.BytesIO()
    # No date and version, so that the same figures make the same file.
    figure.savefig(held, format="png", dpi=110, metadata={"Software": None})
    return held.getvalue()


def _draw(evaluation: Evaluation, curves: Any, by_k: Any, by_share: Any) -> None:
    for number, outcome in enumerate(evaluation.outcomes):
        # Baselines are dashed, whatever colour they get.
        rule = outcome.method.startswith(("OR", "sparse"))
        curves.plot(
            *zip(*outcome.curve, strict=True),
            label=_name(outcome.method),
            color=f"C{number % 10}",
            linestyle="-" if rule else "--",
            linewidth=1.2,
        )
    curves.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01), title=_name(evaluation.positive))
    curves.legend(fontsize=6)
    by_k.plot(list(evaluation.f1_by_k), list(evaluation.f1_by_k.values()), marker="o", markersize=3)
    by_k.set(xlabel="features K", ylabel="F1", xscale="log", ylim=(0, 1.01), title="the report's OR rule")
    by_k.set_xticks(list(evaluation.f1_by_k), [str(k) for k in evaluation.f1_by_k])
    by_k.minorticks_off()
    for name, of in evaluation.f1_by_fraction.items():
        by_share.plot(list(of), list(of.values()), marker="o", markersize=3, label=_name(name))
    by_share.set(xlabel="share of the discovery texts", ylabel="F1", xscale="log", ylim=(0, 1.01))
    by_share.legend(fontsize=6)


def _name(text: str) -> str:
    """A name from a file, short enough to leave room for the plot."""
    return clip(visible(text), 60)
