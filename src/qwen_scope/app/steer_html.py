"""How the tab Steer shows what is steered, what came of it, and what else could have come."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from math import exp

import torch

from qwen_scope.app import tokens
from qwen_scope.app.shared import Shared
from qwen_scope.generation import Generation
from qwen_scope.scope import SideBySide
from qwen_scope.steering import Edit, Steering, Where
from qwen_scope.tokens import TokenizedText

NAMED = 4
"""Edits that are named at each token of a prompt, at most."""


def positions_html(read: TokenizedText, steering: Steering) -> str:
    """A prompt's tokens, those underlined that are steered, and whether what is generated is.

    Raises:
        QwenScopeError: positions that the prompt does not have.
    """
    places = torch.arange(len(read))
    by: list[list[str]] = [[] for _ in read.tokens]
    for edit in steering.edits:
        edit.where.check(len(read))
        for at in edit.where.mask(places, len(read)).nonzero()[:, 0].tolist():
            # Without its positions, a list as long as anybody likes, at each of them.
            by[at].append(str(replace(edit, where=Where())))
    most = max(map(len, by), default=0) or 1
    drawn = tokens.heat_map(
        read.tokens,
        [len(edits) / most for edits in by],
        label="Tokens of the prompt, those steered underlined",
        titles=[
            f"position {at}, {'steered by ' + _listed(edits) if edits else 'not steered'}"
            for at, edits in enumerate(by)
        ],
        marked=[at for at, edits in enumerate(by) if edits],
    )
    after = [str(edit) for edit in steering.edits if edit.where.generated]
    steered = sum(1 for edits in by if edits)
    said = f"{steered} of {len(read)} tokens of the prompt are steered; what is generated is " + (
        f"steered by {', '.join(after)}." if after else "not."
    )
    return f"<section><h2>What is steered</h2>{drawn}{tokens.note(said)}</section>"


def _listed(edits: list[str]) -> str:
    more = f" and {len(edits) - NAMED} more" if len(edits) > NAMED else ""
    return ", ".join(edits[:NAMED]) + more


def edits_html(shared: Shared, steering: Steering) -> str:
    """A row for each edit: what the feature is, and its strength in raw units where that is known at once."""
    if not steering:
        return tokens.note("No edits: both texts will be the same. Add one above.")
    rows = [
        [
            tokens.feature_link(edit.layer, edit.number),
            escape(shared.names.of(edit.layer, edit.number)),
            escape(_amount(edit)),
            _raw(shared, edit),
            escape(str(edit.where)),
        ]
        for edit in steering.edits
    ]
    return tokens.table("Edits", ["Feature", "What", "How", "Raw strength", "Tokens"], rows, numbers=[3])


def _amount(edit: Edit) -> str:
    by = f"{edit.strength:g}{' times its highest activation' if edit.unit == 'x' else ''}"
    return {"add": f"adds {by}", "clamp": f"clamps to {by}", "scale": f"scales by {by}", "ablate": "takes away"}[
        edit.how
    ]


def _raw(shared: Shared, edit: Edit) -> str:
    """In raw units, where the index tells: measuring would take long for a look in passing."""
    if edit.how in ("scale", "ablate"):
        return "–"
    if edit.unit == "raw":
        return f"{edit.strength:.4g}"
    if shared.index is None or edit.layer not in shared.index.layers:
        return "known when it runs"
    shared.index.check((edit.layer, edit.number))
    return f"{edit.strength * shared.index.maxima(edit.layer, edit.number):.4g}"


def both_html(found: SideBySide, pinned: tuple[str, int] | None) -> str:
    """Both texts beside each other, each token the stronger the less likely it was."""
    side, at = pinned or ("", -1)
    parts = [
        f'<section id="steer-{name}"><h2>{title}</h2>{_text(text, name, at if name == side else None)}</section>'
        for name, title, text in (
            ("original", "Original", found.original),
            ("steered", "Steered", found.steered),
        )
    ]
    return f'<div class="qs-columns">{"".join(parts)}</div>'


def _text(text: Generation, name: str, pressed: int | None) -> str:
    if not text.tokens:
        return tokens.note("Nothing: the model ended its text at once.")
    chances = [exp(token.logprob) for token in text.tokens]
    return tokens.heat_map(
        [token.text for token in text.tokens],
        [1 - chance for chance in chances],
        label=f"{name} text; the stronger the ground, the less likely the token; press one for what else was likely",
        name=name,
        titles=[f"probability {chance:.1%}" for chance in chances],
        pressed=pressed,
    )


def pinned_html(found: SideBySide, at: int) -> str:
    """The most likely tokens at a place of both texts."""
    parts = []
    for name, text in (("Original", found.original), ("Steered", found.steered)):
        if at >= len(text.tokens):
            continue
        token = text.tokens[at]
        rows = [
            [
                f"<code>{escape(tokens.shown(each.text))}</code>" + (" (drawn)" if each.id == token.id else ""),
                f"{exp(each.logprob):.2%}",
            ]
            for each in token.candidates
        ]
        if all(each.id != token.id for each in token.candidates):
            rows.append([f"<code>{escape(tokens.shown(token.text))}</code> (drawn)", f"{exp(token.logprob):.2%}"])
        parts.append(tokens.table(f"{name}, token {at}", ["Most likely", "Probability"], rows, numbers=[1]))
    return f'<div class="qs-columns">{"".join(parts)}</div>'


def trace_html(found: SideBySide) -> str:
    """What the steering did, in the library's own words."""
    lines = str(found.steered.trace).splitlines()
    return "<section><h2>What the steering did</h2>" + "".join(map(tokens.note, lines)) + "</section>"
