"""`study`: all that footprints tell of some sets, as figures, plots and one page."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from qwen_scope.data.compare import Difference, differences
from qwen_scope.data.coverage import Redundancy, coverage, redundancy, representative
from qwen_scope.data.footprint import About, Footprint, check_comparable
from qwen_scope.data.overlap import Addition, Overlaps, additions, overlaps
from qwen_scope.data.panel import Agreement, agreements
from qwen_scope.data.study_page import compared, left_out, page, tables
from qwen_scope.drawing import drawing
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 0.9
"""Share of a set's features that a representative subset of it is to fire."""
SHOWN = 20
"""Features that differ between two sets, printed at most; the page has all."""


@dataclass(frozen=True)
class SetFigures:
    """What one set's footprint tells."""

    about: About
    """What it is of."""
    whole: Redundancy
    """Of all its items."""
    matched: Redundancy
    """Of as many random items as half of the smallest set has: footprints grow with their sets, so only these compare."""
    representative: list[str]
    """Where the items are, chosen greedily, that fire 90 % of its features."""
    curve: list[tuple[float, float]]
    """Coverage curve: share of the items, share of the features."""


@dataclass(frozen=True)
class Study:
    """What footprints tell of some sets."""

    sets: list[SetFigures]
    """Set by set."""
    size: int
    """n of all that is size-matched."""
    overlaps: Overlaps
    """All pairwise overlaps."""
    additions: list[Addition]
    """The sets in the order in which each next one adds most."""
    differences: list[Difference] | None = None
    """Features that the first of two sets compared fires more or less often than the second."""
    agreements: list[Agreement] | None = None
    """How well all this agrees with models' scores, if those were given."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        of = self.overlaps
        matrices = {name: _plain(getattr(of, name)) for name in _MATRICES}
        return {
            "sets": [asdict(each) for each in self.sets],
            "size": self.size,
            "overlaps": {"names": of.names, "size": of.size, **matrices},
            "additions": [asdict(each) for each in self.additions],
            "differences": None if self.differences is None else [asdict(each) for each in self.differences],
            "agreements": None if self.agreements is None else [_finite(asdict(each)) for each in self.agreements],
        }

    def save(self, folder: str | Path) -> Path:
        """Writes study.json, coverage.png, overlaps.png and report.html; gives the path of the page.

        Raises:
            QwenScopeError: no matplotlib, or a folder that cannot be written.
        """
        place = expanded(folder)
        pictures = self.pictures()
        with replacing(place / "study.json") as temporary:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        for name, picture in pictures.items():
            with replacing(place / f"{name}.png") as temporary:
                temporary.write_bytes(picture)
        with replacing(place / "report.html") as temporary:
            temporary.write_text(page(self, pictures), encoding="utf-8")
        return place / "report.html"

    def pictures(self) -> dict[str, bytes]:
        """`coverage`, the curves of all sets, and `overlaps`, a heat map of the size-matched ones, as PNG.

        Raises:
            QwenScopeError: no matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise QwenScopeError(
                "expected matplotlib to draw with, found it is not installed; run pip install 'qwen-scope[data]'"
            ) from error
        side = 2.5 + 0.6 * len(self.sets)
        # The title of two sets' overlaps is wider than they are.
        sizes = {"coverage": (8.0, 4.8), "overlaps": (max(side + 1, 6.0), side)}
        made = {}
        # Not pyplot, which keeps every figure of the process.
        with drawing():
            for name, draw in (("coverage", self._draw_coverage), ("overlaps", self._draw_overlaps)):
                figure = Figure(figsize=sizes[name], dpi=100, layout="constrained")
                FigureCanvasAgg(figure)
                draw(figure)
                held = io.BytesIO()
                # No date and version, so that the same figures make the same file.
                figure.savefig(held, format="png", metadata={"Software": None})
                made[name] = held.getvalue()
        return made

    def _draw_coverage(self, figure: Figure) -> None:
        axes = figure.subplots()
        # Of more than ten sets, the colours repeat with another stroke.
        strokes = ("-", "--", ":", "-.")
        lines = [
            axes.plot(*zip(*each.curve, strict=True), color=f"C{n % 10}", linestyle=strokes[n // 10 % 4])[0]
            for n, each in enumerate(self.sets)
        ]
        axes.set(xlabel="share of the items", ylabel="share of the set's features", xlim=(0, 1), ylim=(0, 1))
        labels = [f"{each.about.name} ({each.about.items})" for each in self.sets]
        figure.legend(lines, labels, loc="outside right upper", fontsize="small", ncols=1 + len(labels) // 25)

    def _draw_overlaps(self, figure: Figure) -> None:
        names, matched = self.overlaps.names, self.overlaps.matched
        most = max(float(np.nan_to_num(matched).max()), 1e-9)
        axes = figure.subplots()
        picture = axes.imshow(matched, vmin=0, vmax=most, cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        if len(names) <= 16:
            for row, col in zip(*np.nonzero(np.isfinite(matched)), strict=True):
                shade = "white" if matched[row, col] < 0.6 * most else "black"
                axes.text(col, row, f"{matched[row, col]:.2f}", ha="center", va="center", color=shade, fontsize="small")
        axes.set_title(
            f"share of the row's features that the column fires, {self.size} items of each", fontsize="medium"
        )
        figure.colorbar(picture, shrink=0.8)

    def __str__(self) -> str:
        figures = tables(self)[0]
        rows = [figures.head, *figures.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        parts = ["\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)]
        parts += [f"{name}: left out {count} rows, the first: {first}" for name, count, first in left_out(self)]
        lines = [
            f"  {each.name}: {each.adds} features, {each.alone} of them in no other set; {each.covered:.1%} of all so far"
            for each in self.additions
        ]
        parts.append("\n".join(["what each next set adds:", *lines]))
        if self.differences is not None:
            head = f"{len(self.differences)} features more or less frequent in {compared(self)}:"
            lines = [
                f"  {d.feature:>9}  {d.first:6.1%}  {d.second:6.1%}  q {d.q:.2g}" for d in self.differences[:SHOWN]
            ]
            parts.append("\n".join([head, *lines]))
        for each in self.agreements or []:
            parts.append(f"{each.measure}: Pearson {each.pearson:.2f}, Spearman {each.spearman:.2f} ({each.count})")
        return "\n\n".join(parts)


_MATRICES = ("asymmetric", "symmetric", "matched", "low", "high")


def study(
    footprints: Sequence[Footprint],
    *,
    resamples: int = 100,
    scores: Mapping[str, Shaped[np.ndarray, "models _"]] | None = None,
    general: str | None = None,
    seed: int = 0,
) -> Study:
    """All that footprints tell of some sets.

    Args:
        footprints: of one SAE and position; of exactly two sets, their features are compared one by one too.
        resamples: half-samples that the intervals of overlaps rest on; 0 for none.
        scores: of a panel of models, by the set's name; see `qwen_scope.data.panel.agreements`.
        general: the set of general ability among them; see the same.
        seed: of everything random.

    Raises:
        QwenScopeError: footprints that cannot be compared, or scores that do not belong to them.
    """
    check_comparable(footprints)
    smallest = min(map(len, footprints))
    # Twice the subset must fit into a set for the diagonal and for the intervals.
    size = max(1, smallest // 2)
    return Study(
        sets=[_figures(footprint, size) for footprint in footprints],
        size=size,
        overlaps=overlaps(footprints, size=size, resamples=resamples if smallest > 1 else 0, seed=seed),
        additions=additions(footprints),
        differences=differences(*footprints) if len(footprints) == 2 else None,
        agreements=None if scores is None else agreements(footprints, scores, general=general, seed=seed),
    )


def _figures(footprint: Footprint, size: int) -> SetFigures:
    fired, items = footprint.fired, len(footprint)
    sizes = np.unique(np.linspace(0, items, min(items, 100) + 1).round().astype(np.int64))
    curve = coverage(fired.counts, items, sizes)
    chosen, shares = representative(fired, items)
    enough = chosen[: int((shares < ENOUGH).sum()) + 1]
    return SetFigures(
        about=footprint.about,
        whole=redundancy(fired),
        matched=redundancy(fired, size),
        representative=[footprint.places[item] for item in enough],
        curve=[(round(n / items, 4), round(float(c), 4)) for n, c in zip(sizes, curve, strict=True)],
    )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in values.items()}


def _plain(matrix: np.ndarray | None) -> list[list[float | None]] | None:
    """Rows for JSON, which has no word for NaN."""
    if matrix is None:
        return None
    return [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in matrix]
