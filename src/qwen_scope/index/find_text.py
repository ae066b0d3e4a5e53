"""How findings look in a terminal. Text of models and corpora never moves the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_scope.index.show import clip, line_width, share, visible

if TYPE_CHECKING:
    from qwen_scope.index.find import Findings, Found, Read

SPAN_SHOWN = 80
"""Characters of a span's tokens shown."""
SURE = 0.2
"""A finding with a larger q is as likely as not to be chance, or nearly."""


def findings_text(findings: Findings, width: int | None = None) -> str:
    """Findings for a terminal: a line per feature, then what they rest on and how far to trust them.

    Args:
        width: characters in a line; the terminal's unless told.
    """
    width = line_width() if width is None else width
    against, span = findings.negative is not None, findings.span
    heads = ["feature", "z", "q", "here", *(["there"] if against else []), "corpus"]
    rows = [
        [
            found.name,
            f"{found.z:.2f}",
            f"{found.q:.1g}",
            share(found.positive_rate),
            *([share(found.negative_rate)] if against else []),
            share(found.density),
        ]
        for found in findings
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row, about in zip([heads, *rows], ["label or tokens it peaks at", *map(_about, findings)], strict=True):
        cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{size}}" for cell, size in zip(row[1:], widths[1:], strict=True))]
        start = "  ".join(cells)
        lines.append(f"{start}  {clip(about, max(8, width - len(start) - 2))}".rstrip())
    if rows and min(found.q for found in findings) > SURE:
        more = "a span of more tokens, or a longer text" if span else "more texts, about five a side or more"
        lines += ["", f"none of these is surer than chance (q below {SURE:g}): give {more}"]
    if rows and span:
        lines += ["", f'steer against it: qwen-scope steer … --steering "{findings[0].name}:-1x"']
    if not rows:
        lines = [f"no feature of {findings.compared:,} fires more often in {'this span' if span else 'these texts'}"]
    return "\n".join([*lines, "", *_rest(findings)])


def _about(found: Found) -> str:
    return visible(found.label.text) if found.label else " ".join(repr(token.token) for token in found.top_tokens)


def _rest(findings: Findings) -> list[str]:
    """What findings rest on, and how far to trust them."""
    there, span = findings.negative, findings.span
    if span and there:
        lines = [
            f"here: {_read(findings.positive, 'in the span')}: {clip(' '.join(map(repr, span)), SPAN_SHOWN)}",
            f"there: {_read(there, 'beside it')}",
        ]
    else:
        lines = [f"here: {_read(findings.positive)}"]
        lines.append(f"there: {_read(there)}" if there else "compared with the corpus of the index")
    lines.append(f"{findings.compared:,} features compared; q: share of false ones to expect from the top to its line")
    if span:
        lines.append("tokens of one text are no independent witnesses: z and q promise too much, go by the order")
    elif max(read.texts for read in (findings.positive, there) if read) == 1:
        lines.append("a single text does not tell how much texts vary: z and q promise too much")
    return lines


def _read(read: Read, of: str | None = None) -> str:
    outliers = " ".join(f"{layer}: {count}" for layer, count in read.norm_outliers.items() if count)
    left_out = f"{read.first_tokens:,} at position 0" + (f", norm outliers by layer {outliers}" if outliers else "")
    of = f"of {read.texts:,} text{'s'[: read.texts != 1]}" if of is None else of
    return f"{read.tokens:,} token{'s'[: read.tokens != 1]} {of} (left out: {left_out})"
