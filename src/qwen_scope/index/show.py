"""How features, hits and tables look in a terminal. Text of models and corpora never moves the cursor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import combining, east_asian_width

import pyarrow as pa

from qwen_scope.index.layout import HALF_OCTAVES

if TYPE_CHECKING:
    from qwen_scope.index.feature import Example, Feature, Label, Neighbour
    from qwen_scope.index.search import Hit

NARROWEST, WIDEST = 40, 160
"""Lines are no shorter, whatever the terminal, and no longer, or nobody reads them."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_INDENT = 12
"""Where the second column begins."""


class Bin(NamedTuple):
    """A part of a feature's range of activations."""

    low: float
    """Activations from here on,"""
    high: float
    """up to here."""
    tokens: int
    """At how many tokens."""


def feature_text(feature: Feature, examples: int = 6, width: int | None = None) -> str:
    """A feature for a terminal: what it is about, when it fires, with which tokens, and examples, one a line.

    Args:
        examples: how many of the strongest, and how many from across the range.
        width: characters in a line; the terminal's unless told.
    """
    width = line_width() if width is None else width
    lines = [
        f"{feature.name}  {title(feature.label)}",
        *_wrapped("", fires(feature), width),
        *_wrapped("", flags(feature), width),
    ]
    if counted := bins(feature):
        bars = _bars([each.tokens for each in counted])
        lines.append(f"{'activations':<{_INDENT}}{counted[0].low:.4g} {bars} {counted[-1].high:.4g}")
    lines += [
        "",
        *_wrapped("peaks at", [f"{token.token!r} {share(token.value)}" for token in feature.top_tokens], width),
        *_wrapped("promotes", [f"{token.token!r} {token.value:+.2f}" for token in feature.promoted], width),
        *_wrapped("suppresses", [f"{token.token!r} {token.value:+.2f}" for token in feature.suppressed], width),
        *_wrapped("similar", [_neighbour(feature.layer, each) for each in feature.similar], width),
        *_wrapped("fires with", [_neighbour(feature.layer, each) for each in feature.together], width),
    ]
    for heading, found in (("strongest examples", feature.top), ("across its range", feature.range)):
        if found[:examples]:
            lines += ["", heading, *(example_line(example, width) for example in found[:examples])]
    return "\n".join(lines)


def example_line(example: Example, width: int) -> str:
    """An example on one line: the activation, then the text around its peak, which stands between « and »."""
    before, peak, after = (
        visible("".join(part))
        for part in (
            example.tokens[: example.peak],
            example.tokens[example.peak : example.peak + 1],
            example.tokens[example.peak + 1 :],
        )
    )
    room = width - 11  # what the value and the marks take
    peak = clip(peak, room - 2)  # which leaves place for … on both sides
    left = min(cells(before), max(room - cells(peak) - cells(after), (room - cells(peak)) * 3 // 5))
    before = clip(before, left, from_start=True)
    return f"{example.value:>8.3g} {before}«{peak}»{clip(after, room - cells(before) - cells(peak))}"


def hits_text(hits: Sequence[Hit], width: int | None = None) -> str:
    """What a search found, for a terminal: name, label or else the tokens it peaks at, and below them what matched."""
    width = line_width() if width is None else width
    names = max((cells(hit.name) for hit in hits), default=0)
    lines = []
    for hit in hits:
        about = visible(hit.label.text) if hit.label else " ".join(map(repr, hit.top_tokens))
        lines.append(f"{hit.name:<{names}}  {clip(about, width - names - 2)}")
        if hit.where not in ("label", None if hit.label else "top tokens"):
            where = f"{hit.where}: " if hit.where else ""
            lines.append(f"{'':<{names}}  {clip(where + visible(_marked(hit)), width - names - 2)}")
    return "\n".join(lines)


def table_text(table: pa.Table, width: int | None = None, rows: int = 40) -> str:
    """An Arrow table for a terminal; its first rows where it has many."""
    width = line_width() if width is None else width
    shown = [[visible(name) for name in table.column_names]]
    shown += [[_cell(value) for value in row.values()] for row in table.slice(0, rows).to_pylist()]
    most = max(8, width // max(1, table.num_columns) - 2)
    widths = [min(max(map(cells, column)), most) for column in zip(*shown, strict=True)]
    lines = ["  ".join(_padded(cell, size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in shown]
    if not table.num_rows:
        lines.append("no rows")
    if table.num_rows > rows:
        lines.append(f"… {table.num_rows - rows} more rows")
    return "\n".join(lines)


def title(label: Label | None) -> str:
    """A label with its author and score."""
    return "(no label)" if label is None else f"{visible(label.text)}  ({author(label)})"


def author(label: Label) -> str:
    """Who wrote a label and how well it does."""
    score = "" if label.score is None else f", score {label.score:.2f}"
    control = "" if label.control is None else f", {label.control:.2f} with labels of other features"
    return f"by {visible(label.by)}{score}{control}"


def fires(feature: Feature) -> list[str]:
    """How often a feature fires and how strongly, a phrase each."""
    if feature.mean is None or feature.max is None:
        return ["never fires in this corpus"]
    return [
        f"fires at {share(feature.density)} of the tokens ({feature.fired:,})",
        f"mean {feature.mean:.3g}",
        f"max {feature.max:.3g}",
        f"first after {feature.first_seen:,} tokens",
    ]


def flags(feature: Feature) -> list[str]:
    """What to know before trusting it."""
    return ["always on: it fires nearly everywhere, and means little at any one token"] * feature.always_on


def bins(feature: Feature) -> list[Bin]:
    """The histogram without its empty ends; nothing if the feature never fires."""
    counts = feature.histogram
    filled = [n for n, count in enumerate(counts) if count]
    if not filled:
        return []
    edges = [2 ** (exponent / 2) for exponent in (*HALF_OCTAVES, HALF_OCTAVES.stop)]
    return [Bin(edges[n], edges[n + 1], counts[n]) for n in range(filled[0], filled[-1] + 1)]


def share(value: float) -> str:
    """A share of 1 as a percentage of three digits."""
    return f"{100 * value:.3g} %"


def visible(text: str) -> str:
    """A text on one line in which every character is seen: a line break as ↵, a tab as ⇥, what else has no look as \\x1b."""
    if text.isprintable():
        return text
    shown = {"\n": "↵", "\t": "⇥"}
    return "".join(shown.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def cells(text: str) -> int:
    """How many columns of a terminal a text takes; Chinese characters, for instance, take two."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 1 + (east_asian_width(c) in "WF") for c in text)


def clip(text: str, width: int, *, from_start: bool = False) -> str:
    """A text cut to some columns, with … where something is missing."""
    if cells(text) <= width:
        return text
    kept, used = [], 1
    for character in reversed(text) if from_start else text:
        used += cells(character)
        if used > width:
            break
        kept.append(character)
    return "…" + "".join(reversed(kept)) if from_start else "".join(kept) + "…"


def line_width() -> int:
    """Characters in a line of the terminal, within reason."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, NARROWEST), WIDEST)


def _bars(counts: list[int]) -> str:
    most = max(counts)
    return "".join(_BLOCKS[(len(_BLOCKS) * count - 1) // most] if count else " " for count in counts)


def _neighbour(layer: int, neighbour: Neighbour) -> str:
    label = f" {clip(visible(neighbour.label), 40)}" if neighbour.label else ""
    return f"{layer}/{neighbour.feature} {neighbour.value:.2f}{label}"


def _wrapped(title: str, items: Sequence[str], width: int) -> list[str]:
    """A title and items, as many to a line as fit; nothing if there are none."""
    lines: list[str] = []
    indent = _INDENT if title else 0
    for item in items:
        item = clip(item, width - indent)
        if lines and cells(lines[-1]) + 2 + cells(item) <= width:
            lines[-1] += f"  {item}"
        else:
            lines.append(f"{'' if lines else title:<{indent}}{item}")
    return lines


def _marked(hit: Hit) -> str:
    """The snippet with what matched between « and »."""
    parts, at = [], 0
    for start, end in hit.matched:
        parts += [hit.snippet[at:start], f"«{hit.snippet[start:end]}»"]
        at = end
    return "".join([*parts, hit.snippet[at:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return visible(str("" if value is None else value))


def _padded(text: str, width: int) -> str:
    text = clip(text, width)
    return text + " " * (width - cells(text))
