"""`study`: all that footprints tell of some benchmarks, as figures, plots and one page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope.data.coverage import coverage, redundancy, representative
from qwen_scope.data.footprint import About, Footprint, check_comparable
from qwen_scope.data.overlap import Addition, Overlaps, additions, overlaps
from qwen_scope.files import expanded, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 0.9
"""Share of a set's features that a representative subset of it is to fire."""


@dataclass(frozen=True)
class SetFigures:
    """What one set's footprint tells."""

    about: About
    """What it is of."""
    features: int
    """|F(D)|."""
    redundancy: float
    """R_hat, see `qwen_scope.data.coverage.Redundancy`."""
    mean_coverage: float
    """Mean height of its coverage curve, see the same."""
    matched_features: float
    """Features that n random items of it fire on average, n the same for all sets: footprints grow with their sets."""
    enough: int
    """Items, chosen greedily, that fire 90 % of its features."""
    curve: list[tuple[float, float]]
    """Coverage curve: share of the items, share of the features."""


@dataclass(frozen=True)
class Study:
    """What footprints tell of some benchmarks."""

    sets: list[SetFigures]
    """Set by set."""
    size: int
    """n of all that is size-matched."""
    overlaps: Overlaps
    """All pairwise overlaps."""
    additions: list[Addition]
    """The sets in the order in which each next one adds most."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        of = self.overlaps
        matrices = {name: None if (m := getattr(of, name)) is None else m.round(4).tolist() for name in _MATRICES}
        return {
            "sets": [asdict(each) for each in self.sets],
            "size": self.size,
            "overlaps": {"names": of.names, "size": of.size, **matrices},
            "additions": [asdict(each) for each in self.additions],
        }

    def save(self, folder: str | Path) -> Path:
        """Writes study.json, coverage.png, overlaps.png and report.html; gives the path of the page."""
        place = expanded(folder)
        with replacing(place / "study.json") as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        pictures = {}
        for name, figure in (("coverage", self.coverage_plot()), ("overlaps", self.overlap_plot())):
            held = io.BytesIO()
            figure.savefig(held, format="png", dpi=120)
            pictures[name] = held.getvalue()
            with replacing(place / f"{name}.png") as temporary:
                temporary.write_bytes(pictures[name])
        with replacing(place / "report.html") as temporary:
            temporary.write_text(self._page(pictures), encoding="utf-8")
        return place / "report.html"

    def coverage_plot(self) -> Figure:
        """Coverage curves of all sets."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for each in self.sets:
            axes.plot(*zip(*each.curve, strict=True), label=f"{each.about.name} ({each.about.items})")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="share of the items", ylabel="share of the set's features", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize="small")
        return figure

    def overlap_plot(self) -> Figure:
        """A heat map of the size-matched overlaps."""
        from matplotlib.figure import Figure

        names, matched = self.overlaps.names, self.overlaps.matched
        side = 2.5 + 0.6 * len(names)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(matched, vmin=0, vmax=float(matched.max()), cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        if len(names) <= 16:
            for row, col in np.ndindex(matched.shape):
                shade = "white" if matched[row, col] < 0.6 * matched.max() else "black"
                axes.text(col, row, f"{matched[row, col]:.2f}", ha="center", va="center", color=shade, fontsize="small")
        axes.set_title(f"share of the row's features that the column fires, {self.size} items of each")
        figure.colorbar(picture, shrink=0.8)
        return figure

    def __str__(self) -> str:
        head = ["set", "items", "features", f"in {self.size} items", "redundancy", "mean coverage", "items for 90 %"]
        rows = [[str(cell) for cell in row] for row in self._rows()]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        lines.append("\nwhat each next set adds:")
        lines += [
            f"  {each.name}: {each.adds} features, {each.alone} of them in no other set; {each.covered:.1%} of all so far"
            for each in self.additions
        ]
        return "\n".join(lines)

    def _rows(self) -> list[list[object]]:
        return [
            [
                each.about.name,
                each.about.items,
                each.features,
                f"{each.matched_features:.0f}",
                f"{each.redundancy:.3f}",
                f"{each.mean_coverage:.3f}",
                each.enough,
            ]
            for each in self.sets
        ]

    def _page(self, pictures: dict[str, bytes]) -> str:
        def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
            cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table><tr>{cells}</tr>{body}</table>"

        def picture(name: str, says: str) -> str:
            return f'<img alt="{escape(says)}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'

        about, of = self.sets[0].about, self.overlaps
        between = [
            [
                of.names[row],
                of.names[col],
                f"{of.asymmetric[row, col]:.3f}",
                f"{of.symmetric[row, col]:.3f}",
                f"{of.matched[row, col]:.3f}"
                + ("" if of.low is None or of.high is None else f" [{of.low[row, col]:.3f}, {of.high[row, col]:.3f}]"),
            ]
            for row, col in np.ndindex(of.matched.shape)
            if row != col
        ]
        parts = [
            f"<h1>{len(self.sets)} sets through the features of layer {about.layer}</h1>",
            f"<p>{escape(about.suite)} on {escape(about.model)}; a feature counts where it fires at "
            f"{'the last token' if about.position == 'last' else 'any token'} of an item.</p>",
            table(
                [
                    "set",
                    "items",
                    "features",
                    f"features in {self.size} items",
                    "redundancy",
                    "mean coverage",
                    "items for 90 %",
                ],
                self._rows(),
            ),
            picture("coverage", "coverage curves"),
            picture("overlaps", "size-matched overlaps"),
            "<h2>What each next set adds</h2>",
            table(
                ["set", "new features", "in no other set", "covered so far"],
                [[a.name, a.adds, a.alone, f"{a.covered:.1%}"] for a in self.additions],
            ),
            "<h2>Overlaps</h2>",
            table(["row", "column", "|row n column| / |row|", "/ the smaller", f"of {self.size} items each"], between),
        ]
        return _PAGE.format(body="\n".join(parts))


_MATRICES = ("asymmetric", "symmetric", "matched", "low", "high")
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmarks through features</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .7rem;border-bottom:1px solid #8884;text-align:right}}
td:first-child,th:first-child{{text-align:left}}img{{max-width:100%;background:#fff}}</style>
<body>{body}</body></html>
"""


def study(footprints: Sequence[Footprint], *, resamples: int = 100, seed: int = 0) -> Study:
    """All that footprints tell of some sets.

    Args:
        footprints: of one SAE and position.
        resamples: half-samples that the intervals of overlaps rest on; 0 for none.
        seed: of the half-samples.

    Raises:
        QwenScopeError: footprints that cannot be compared.
    """
    check_comparable(footprints)
    smallest = min(len(footprint) for footprint in footprints)
    # Intervals need halves of the sets to hold the subsets.
    size = max(1, smallest // 2)
    shared = overlaps(footprints, size=size, resamples=resamples if smallest > 1 else 0, seed=seed)
    sets = []
    for footprint in footprints:
        fired, items = footprint.fired, len(footprint)
        found = redundancy(fired)
        sizes = np.unique(np.linspace(0, items, min(items, 100) + 1).round().astype(np.int64))
        curve = coverage(fired.counts, items, sizes)
        matched = float(coverage(fired.counts, items, np.array([size]))[0]) * found.features
        _, shares = representative(fired, items)
        sets.append(
            SetFigures(
                about=footprint.about,
                features=found.features,
                redundancy=found.redundancy,
                mean_coverage=found.mean_coverage,
                matched_features=matched,
                enough=int((shares < ENOUGH).sum()) + 1,
                curve=[(round(n / items, 4), round(float(c), 4)) for n, c in zip(sizes, curve, strict=True)],
            )
        )
    return Study(sets, size, shared, additions(footprints))
