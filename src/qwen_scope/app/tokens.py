"""Tokens as HTML: the heat map that all tabs show, and the small tables beside it. Everything is escaped here.

A heat map is a group of buttons, one a token, of which the keyboard reaches one and moves among them by arrow keys. Pressing
one tells the `gr.HTML` around it `click` with `at`, the token's position, and `map`, the name of the heat map; `listening` is
what such a component is made with. Colours are seen through, and suit light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from qwen_scope.app.link import href

LISTENING = """
element.addEventListener("click", event => {
  const pressed = event.target.closest("[data-at], [data-choose]");
  if (!pressed || !element.contains(pressed)) return;
  const group = pressed.closest("[data-map]");
  if (pressed.dataset.choose !== undefined) trigger("click", {choose: pressed.dataset.choose});
  else trigger("click", {at: Number(pressed.dataset.at), map: group ? group.dataset.map : ""});
});
"""
listening: dict[str, Any] = {"js_on_load": LISTENING}
"""What a `gr.HTML` with heat maps is made with: `gr.HTML(…, **listening)`; its `click` event then tells the position."""


def shown(token: str) -> str:
    """A token so that its white space is seen: a new line as ⏎, a tab as ⇥, nothing as ∅; not escaped."""
    return token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def heat_map(
    tokens: Sequence[str],
    shades: Sequence[float],
    *,
    label: str,
    name: str = "",
    titles: Sequence[str] = (),
    pressed: int | None = None,
    marked: Iterable[int] = (),
    breaks: bool = True,
) -> str:
    """Tokens in a row, each on a ground as strong as its shade.

    Args:
        tokens: texts of the tokens.
        shades: from -1 (orange) through 0 (nothing) to 1 (violet); what is beyond is cut, and NaN is 0.
        label: what the whole is, for screen readers.
        name: what `click` calls it.
        titles: what pointing at a token tells, and screen readers say after it.
        pressed: the token that is chosen.
        marked: tokens that are underlined.
        breaks: begin a new line after a token that ends one.
    """
    under, parts = set(marked), []
    reachable = pressed if pressed is not None and 0 <= pressed < len(tokens) else 0
    for at, token in enumerate(tokens):
        shade = max(-1.0, min(1.0, shades[at])) if shades[at] == shades[at] else 0.0
        kind = "qs-token" + (" qs-against" if shade < 0 else "") + (" qs-marked" if at in under else "")
        title = f' title="{escape(titles[at])}"' if titles else ""
        said = f' aria-label="{escape(shown(token) + ", " + titles[at])}"' if titles else ""
        parts.append(
            f'<button type="button" class="{kind}" data-at="{at}" aria-pressed="{str(at == pressed).lower()}" '
            f'tabindex="{0 if at == reachable else -1}" style="--shade:{abs(shade):.3f}"{title}{said}>'
            f"{escape(shown(token))}</button>"
        )
        if breaks and token.endswith("\n"):
            parts.append("<br>")
    return (
        f'<div class="qs-map" role="group" dir="auto" aria-label="{escape(label)}" data-map="{escape(name)}">'
        f"{''.join(parts)}</div>"
    )


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """A table whose cells are HTML, which the caller has escaped; caption and columns are text.

    Args:
        numbers: columns that hold numbers and stand to the right.
    """
    right = set(numbers)
    kind = [' class="qs-number"' if at in right else "" for at in range(len(columns))]
    head = "".join(f'<th scope="col"{kind[at]}>{escape(column)}</th>' for at, column in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{kind[at]}>{cell}</td>" for at, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="qs-scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="qs-table">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def feature_link(layer: int, number: int) -> str:
    """The name of a feature, as a link to its page in the tab Features."""
    name = f"{layer}/{number}"
    return f'<a href="{escape(href("features", feature=name))}">{name}</a>'


def choose(what: str, text: str, label: str) -> str:
    """A small button in a `listening` component, whose `click` tells `choose`."""
    return (
        f'<button type="button" class="qs-choose" data-choose="{escape(what)}" aria-label="{escape(label)}">'
        f"{escape(text)}</button>"
    )


def note(text: str) -> str:
    """A sentence in place of a result, or beside it."""
    return f'<p class="qs-note">{escape(text)}</p>'
