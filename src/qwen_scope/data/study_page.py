"""How a study looks: its tables, and one page with them and its plots that needs nothing but a browser."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from qwen_scope.data.study import Study


class Table(NamedTuple):
    """A table of words and figures."""

    title: str
    """What it tells; empty for the first one."""
    head: list[str]
    """Names of its columns."""
    rows: list[list[str]]
    """Its rows."""


def tables(study: Study) -> list[Table]:
    """All that a study tells: figures of each set first, overlaps of all pairs last."""
    found = [_figures(study), _additions(study)]
    if study.differences is not None:
        found.append(
            Table(
                f"More or less frequent in {compared(study)}",
                ["feature", "share of the first", "share of the second", "q"],
                [[d.feature, f"{d.first:.1%}", f"{d.second:.1%}", f"{d.q:.2g}"] for d in study.differences],
            )
        )
    if study.agreements is not None:
        found.append(
            Table(
                "Agreement with models' scores",
                ["measure", "Pearson", "Spearman", "sets or pairs"],
                [[a.measure, f"{a.pearson:.2f}", f"{a.spearman:.2f}", str(a.count)] for a in study.agreements],
            )
        )
    return [*found, _overlaps(study)]


def about(study: Study) -> str:
    """What a study is of and how to read it, in a sentence or two."""
    of = study.sets[0].about
    return (
        f"{of.suite} on {of.model}; a feature counts where it fires at "
        f"{'the last token' if of.position == 'last' else 'any token'} of an item. Footprints, coverage and redundancy "
        "grow with the number of items: compare sets by the figures for one number of items."
    )


def left_out(study: Study) -> list[tuple[str, int, str | None]]:
    """Sets of which rows were left out, how many, and what was wrong with the first."""
    return [(of.name, of.left_out, of.left_out_first) for of in (each.about for each in study.sets) if of.left_out]


def compared(study: Study) -> str:
    """Which two sets the differences are of."""
    return f"{study.sets[0].about.name} than in {study.sets[1].about.name}"


def page(study: Study, pictures: dict[str, bytes]) -> str:
    """The page, with the plots of `Study.pictures`."""

    def table(of: Table) -> str:
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in of.head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in of.rows)
        heading = f"<h2>{escape(of.title)}</h2>" if of.title else ""
        return f"{heading}<table><tr>{cells}</tr>{body}</table>"

    def picture(name: str, says: str) -> str:
        return f'<img alt="{escape(says)}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'

    figures, *others = tables(study)
    parts = [
        f"<h1>{len(study.sets)} sets through the features of layer {study.sets[0].about.layer}</h1>",
        f"<p>{escape(about(study))}</p>",
        table(figures),
        *(f"<p>{escape(f'{name}: left out {n} rows, the first: {first}')}</p>" for name, n, first in left_out(study)),
        picture("coverage", "coverage curves"),
        picture("overlaps", "size-matched overlaps"),
        *map(table, others),
    ]
    return _PAGE.format(body="\n".join(parts))


def _figures(study: Study) -> Table:
    n = f"{study.size} items"
    head = [
        *("set", "items", "features", "redundancy", "mean coverage", "items for 90 %"),
        *(f"features in {n}", f"redundancy in {n}", f"mean coverage in {n}"),
    ]
    rows = [
        [
            each.about.name,
            str(each.about.items),
            f"{each.whole.features:.0f}",
            f"{each.whole.redundancy:.4f}",
            f"{each.whole.mean_coverage:.3f}",
            str(len(each.representative)),
            f"{each.matched.features:.0f}",
            f"{each.matched.redundancy:.4f}",
            f"{each.matched.mean_coverage:.3f}",
        ]
        for each in study.sets
    ]
    return Table("", head, rows)


def _additions(study: Study) -> Table:
    return Table(
        "What each next set adds",
        ["set", "new features", "in no other set", "covered so far"],
        [[a.name, str(a.adds), str(a.alone), f"{a.covered:.1%}"] for a in study.additions],
    )


def _overlaps(study: Study) -> Table:
    of = study.overlaps
    rows = [
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
    return Table(
        "Overlaps", ["row", "column", "|row n column| / |row|", "/ the smaller", f"of {of.size} items each"], rows
    )


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmarks through features</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .7rem;border-bottom:1px solid #8884;text-align:right}}
td:first-child,th:first-child{{text-align:left}}img{{max-width:100%;background:#fff}}</style>
<body>{body}</body></html>
"""
