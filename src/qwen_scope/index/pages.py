"""Features as HTML: a fragment for notebooks, and a folder of static pages that need nothing but a browser.

Text of models and corpora is always escaped, and the pages forbid all scripts and requests but the overview's own filter.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded, replacing
from qwen_scope.index.show import author, bins, fires, flags, share, visible
from qwen_scope.render import shaded

if TYPE_CHECKING:
    from qwen_scope.index.feature import Example, Feature, Neighbour, Token
    from qwen_scope.index.feature_index import FeatureIndex

Link = Callable[[str], str | None]
"""Name of a feature -> where its page is, or None if it has none."""

# Colours that are seen through suit light and dark grounds alike, which a notebook's cell does not tell.
_FRAGMENT_CSS = """
.qs{line-height:1.5;font-variant-numeric:tabular-nums}
.qs h1,.qs h2{line-height:1.25;font-weight:600;margin:0}
.qs h1{font-size:1.5rem;overflow-wrap:anywhere}
.qs h1 small{font-size:1rem;font-weight:400;opacity:.75;margin-right:.6em}
.qs h2{font-size:1rem}
.qs .soft{opacity:.75}
.qs p{margin:.3rem 0}
.qs dl{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:1rem 0}
.qs dt{font-size:.85rem;opacity:.75}
.qs dd{margin:0;font-size:1.15rem}
.qs figure{margin:1rem 0 1.5rem;max-width:32rem}
.qs figure svg{display:block;width:100%;height:6rem;fill:rgba(99,102,241,.7)}
.qs figcaption,.qs .ends{font-size:.85rem;opacity:.75}
.qs .ends{display:flex;justify-content:space-between;margin:0 0 .35rem}
.qs .columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(15rem,100%),1fr));gap:0 2.5rem;align-items:start}
.qs table{border-collapse:collapse;width:100%;margin:0 0 1.75rem;text-align:start}
.qs caption{text-align:start;caption-side:top;padding:0 0 .35rem}
.qs th,.qs td{padding:.3rem .75rem .3rem 0;text-align:start;vertical-align:baseline;border-top:1px solid rgba(127,127,140,.25)}
.qs tr>:last-child{padding-inline-end:0}
.qs tbody th{font-weight:400;white-space:nowrap}
.qs thead th{font-size:.85rem;font-weight:400;opacity:.75;border:0}
.qs td.number,.qs th.number{text-align:end;white-space:nowrap;width:1%}
.qs td.text{overflow-wrap:anywhere;white-space:pre-wrap}
.qs code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;background:rgba(127,127,140,.16);
border-radius:3px;padding:1px 3px;white-space:pre-wrap;overflow-wrap:anywhere;display:inline-block;max-width:100%}
"""
_PAGE_CSS = """
:root{color-scheme:light dark;--page:#fcfcfd;--ink:#1d1f28;--link:#4346c4}
@media (prefers-color-scheme:dark){:root{--page:#15161b;--ink:#e4e5ec;--link:#a9acff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main,nav,footer{max-width:64rem;margin:0 auto;padding:0 1.25rem}
nav{padding-top:1.25rem}
main{padding-top:1rem;padding-bottom:1rem}
footer{padding-bottom:2.5rem;font-size:.85rem;opacity:.75}
a{color:var(--link);text-underline-offset:2px}
a:focus-visible,input:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.filter{margin:1.25rem 0}
.filter input{font:inherit;color:inherit;background:transparent;border:1px solid rgba(127,127,140,.6);border-radius:6px;
padding:.45rem .7rem;width:min(24rem,100%);display:block;margin:.35rem 0}
@media (max-width:40rem){.wide{display:none}}
"""
_FILTER = """
const field=document.getElementById("filter"),found=document.getElementById("found");
const rows=[...document.querySelectorAll("tbody tr")],texts=rows.map(row=>row.textContent.toLowerCase());
function show(){
const words=field.value.toLowerCase().split(/\\s+/);let count=0;
rows.forEach((row,n)=>{row.hidden=!words.every(word=>texts[n].includes(word));count+=!row.hidden});
found.textContent=count+" of "+rows.length+" features"}
field.addEventListener("input",show);document.querySelector(".filter").hidden=false;show();
"""


def feature_html(feature: Feature, link: Link = lambda name: None) -> str:
    """A feature as a fragment of HTML for a notebook or another page: what `show` prints, with examples as heat maps.

    Args:
        link: where neighbours' pages are.
    """
    return f'<div class="qs"><style>{_FRAGMENT_CSS}</style>{_body(feature, link)}</div>'


def export(index: FeatureIndex, folder: str | Path, names: Iterable[str | tuple[int, int]] | None = None) -> Path:
    """Writes a page per feature and an overview into a folder; nothing in them needs a server or the network.

    Args:
        folder: made if it is not there; pages of earlier exports stay.
        names: features to write; those with a label unless told.

    Returns:
        The overview, `index.html`.

    Raises:
        QwenScopeError: no such feature, no names where none is labelled, or a folder that cannot be written.
    """
    folder = expanded(folder)
    chosen = [key for key, _ in index.labels.items()] if names is None else [index.check(name) for name in names]
    if not chosen:
        raise QwenScopeError("expected features to write pages of, found no labelled ones and no names; name some")
    pages = {f"{layer}/{number}": f"{layer}-{number}.html" for layer, number in sorted(set(chosen))}
    rows = []
    for name, page in tqdm(pages.items(), desc="writing pages", unit="page", delay=2, leave=False, disable=None):
        feature = index[name]
        _write(folder / "features" / page, _page(index, feature, pages.get))
        rows.append(_overview_row(feature, f"features/{page}"))
    _write(folder / "index.html", _overview(index, rows))
    return folder / "index.html"


def _body(feature: Feature, link: Link = lambda name: None) -> str:
    label = escape(visible(feature.label.text)) if feature.label else "no label"
    about = f'<p class="soft">{escape(author(feature.label))}</p>' if feature.label else ""
    most = feature.max or max((example.value for example in feature.examples), default=0.0)
    return "".join(
        [
            f"<h1><small>{feature.name}</small>{label}</h1>{about}",
            _facts(feature),
            *(f"<p>{escape(flag)}</p>" for flag in flags(feature)),
            _histogram(feature),
            '<div class="columns">',
            _tokens("Peaks at", "Share of examples", feature.top_tokens, share),
            _tokens("Promotes", "Logit effect", feature.promoted, "{:+.2f}".format),
            _tokens("Suppresses", "Logit effect", feature.suppressed, "{:+.2f}".format),
            "</div>",
            _examples("Strongest examples", feature.top, most),
            _examples("Examples across its range", feature.range, most),
            '<div class="columns">',
            _neighbours("Similar directions", "Cosine", feature.layer, feature.similar, link),
            _neighbours("Fires together with", "Jaccard", feature.layer, feature.together, link),
            "</div>",
        ]
    )


def _facts(feature: Feature) -> str:
    if feature.mean is None or feature.max is None:
        return f"<p>{escape(fires(feature)[0]).capitalize()}.</p>"
    facts = {
        "Fires at": f"{share(feature.density)} of tokens",
        "Tokens": f"{feature.fired:,}",
        "Mean": f"{feature.mean:.3g}",
        "Max": f"{feature.max:.3g}",
        "First seen after": f"{feature.first_seen:,} tokens",
    }
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts.items())}</dl>"


def _histogram(feature: Feature) -> str:
    """Bars of how often the feature fires how strongly; a sentence says the same."""
    counted = bins(feature)
    if not counted:
        return ""
    most = max(each.tokens for each in counted)
    bars = "".join(
        f'<rect x="{n + 0.03}" y="{1 - each.tokens / most:.4f}" width="0.94" height="{each.tokens / most:.4f}">'
        f"<title>{each.low:.4g} to {each.high:.4g}: {each.tokens:,}</title></rect>"
        for n, each in enumerate(counted)
    )
    peak = max(counted, key=lambda each: each.tokens)
    said = (
        f"Activations from {counted[0].low:.4g} to {counted[-1].high:.4g}, most often from {peak.low:.4g} to {peak.high:.4g} "
        f"({peak.tokens:,} tokens); each bar is half an octave."
    )
    return (
        f'<figure><svg viewBox="0 0 {len(counted)} 1" preserveAspectRatio="none" role="img" aria-label="{said}">{bars}</svg>'
        f'<p class="ends" aria-hidden="true"><span>{counted[0].low:.4g}</span><span>{counted[-1].high:.4g}</span></p>'
        f"<figcaption>{said}</figcaption></figure>"
    )


def _tokens(title: str, unit: str, tokens: Sequence[Token], value: Callable[[float], str]) -> str:
    return _table(
        title,
        ("Token", unit),
        [
            f'<td><code>{escape(visible(token.token))}</code></td><td class="number">{value(token.value)}</td>'
            for token in tokens
        ],
    )


def _examples(title: str, examples: Sequence[Example], most: float) -> str:
    return _table(
        title,
        ("Peak", "Text"),
        [
            f'<td class="number" title="document {example.document}, characters {example.start} to {example.end}">'
            f'{example.value:.3g}</td><td class="text" dir="auto">{_heat_map(example, most)}</td>'
            for example in examples
        ],
    )


def _heat_map(example: Example, most: float) -> str:
    """The tokens of an example, shaded by their activation over the feature's highest; the peak in bold."""
    return "".join(
        shaded(visible(token), f"{value:.6g}", min(value / most, 1), "font-weight:600" * (n == example.peak))
        if value > 0
        else escape(visible(token))
        for n, (token, value) in enumerate(zip(example.tokens, example.values, strict=True))
    )


def _neighbours(title: str, unit: str, layer: int, neighbours: Sequence[Neighbour], link: Link) -> str:
    rows = []
    for neighbour in neighbours:
        name = f"{layer}/{neighbour.feature}"
        place = link(name)
        shown = f'<a href="{escape(place)}">{name}</a>' if place else name
        label = f" {escape(visible(neighbour.label))}" if neighbour.label else ""
        rows.append(f'<td class="text">{shown}{label}</td><td class="number">{neighbour.value:.2f}</td>')
    return _table(title, ("Feature", unit), rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table with a heading, or nothing if it has no rows; a column of numbers where the first row has one."""
    if not rows:
        return ""
    first_is_number = rows[0].startswith('<td class="number"')
    head = "".join(
        f'<th scope="col"{" class=number" * ((n == 0) == first_is_number)}>{name}</th>'
        for n, name in enumerate(columns)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><caption><h2>{title}</h2></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _page(index: FeatureIndex, feature: Feature, link: Link) -> str:
    from qwen_scope.index.feature_index import bundled_folder

    where = "" if index.folder == bundled_folder() else f" --index {index.folder.name}"
    title = f"{feature.name} {feature.label.text}" if feature.label else feature.name
    return _shell(
        index,
        title,
        f'<nav><a href="../index.html">All features</a></nav><main class="qs">{_body(feature, link)}'
        f'<p class="soft">In a terminal: <code>{escape(f"qwen-scope show {feature.name}{where}")}</code></p></main>',
    )


def _overview(index: FeatureIndex, rows: Sequence[str]) -> str:
    title = f"Features of {index.about.suite}"
    return _shell(
        index,
        title,
        f'<main class="qs"><h1>{escape(visible(title))}</h1>'
        '<p class="filter" hidden><label for="filter">Filter by number, label or token</label>'
        '<input id="filter" type="search" autocomplete="off"><span id="found" class="soft" aria-live="polite"></span></p>'
        '<table><thead><tr><th scope="col">Feature</th><th scope="col">Label, and tokens it peaks at</th>'
        '<th scope="col" class="number">Density</th><th scope="col" class="number wide">Max</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></main>",
        script=_FILTER,
    )


def _overview_row(feature: Feature, page: str) -> str:
    label = f"{escape(visible(feature.label.text))}<br>" if feature.label else ""
    tokens = " ".join(f"<code>{escape(visible(token.token))}</code>" for token in feature.top_tokens[:4])
    most = "" if feature.max is None else f"{feature.max:.3g}"
    return (
        f'<tr><th scope="row"><a href="{page}">{feature.name}</a></th><td>{label}{tokens}</td>'
        f'<td class="number">{share(feature.density)}</td><td class="number wide">{most}</td></tr>\n'
    )


def _shell(index: FeatureIndex, title: str, body: str, script: str = "") -> str:
    """A whole page, which may run this script and do nothing else."""
    allowed = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        allowed += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    about = index.about
    source = f"{about.suite}, {about.model}; {about.tokens:,} tokens of {about.corpus}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(visible(title))}</title><style>{_PAGE_CSS}{_FRAGMENT_CSS}</style></head><body>{body}"
        f"<footer>{escape(visible(source))}</footer>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _write(path: Path, page: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
