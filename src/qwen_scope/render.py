"""How features look: tables for a terminal, HTML for a notebook. Text of models and users is always escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_scope.text_features import LayerFeatures, TextFeatures

MANY_TOKENS, MANY_FEATURES, FEW_FEATURES = 40, 8, 20
"""What a repr shows at most; up to `FEW_FEATURES` a token are shown all the same, as after `.top(20)`."""


def layer_table(found: LayerFeatures, most_tokens: int | None = None, most_features: int | None = None) -> str:
    """One line per token: position, token, then its features as `number value`, strongest first; all of them unless told."""
    rows = len(found.tokens) if most_tokens is None else min(len(found.tokens), most_tokens)
    shown = found.k if most_features is None else min(found.k, most_features)
    # One token chosen by number has no axis of tokens.
    indices = found.indices.reshape(-1, found.k)[:rows, :shown].tolist()
    values = found.values.reshape(-1, found.k)[:rows, :shown].tolist()
    names = [repr(token) for token in found.tokens[:rows]]
    width = max(map(len, [*names, "token"]))
    lines = [f"layer {found.layer}: {len(found.tokens)} tokens, {found.k} features each (d_sae {found.d_sae})"]
    lines.append(f"{'at':>4}  {'token':<{width}}  feature value")
    for position, name, some, at_values in zip(found.positions, names, indices, values, strict=False):
        pairs = "  ".join(f"{found.layer}/{i} {v:.4g}" for i, v in zip(some, at_values, strict=True))
        lines.append(f"{position:>4}  {name:<{width}}  {pairs}")
    left_out = [f"{len(found.tokens) - rows} more tokens"] * (rows < len(found.tokens))
    left_out += [f"{found.k - shown} more features a token"] * (shown < found.k)
    if left_out:
        lines.append(f"      … {', '.join(left_out)}")
    if 0 in found.positions:
        lines.append(
            "      position 0 is an attention sink, as is any token with values far above the rest: they mean little"
        )
    return "\n".join(lines)


def text_summary(found: TextFeatures) -> str:
    """A line for the text, then each layer's strongest features."""
    text = found.text if len(found.text) <= 60 else found.text[:57] + "…"
    lines = [f"TextFeatures({text!r}, {len(found)} tokens, layers {found.layers}); strongest, position 0 left out:"]
    for layer in found:
        strongest = (f"{name} {value:.4g} at {found.tokens[at]!r}" for name, value, at in layer.strongest(4))
        lines.append(f"  layer {layer.layer}: " + ", ".join(strongest))
    return "\n".join(lines)


def shaded(token: str, title: str, shade: float, style: str = "") -> str:
    """A token on a background that grows from nothing at shade 0 to strong at 1 and suits light and dark pages alike.

    Args:
        title: what pointing at it tells.
        style: more CSS, which is not escaped.
    """
    background = f"background:rgba(99,102,241,{0.6 * shade:.2f});border-radius:3px;{style}"
    return f'<span title="{escape(title)}" style="{background}">{escape(token)}</span>'


def layer_html(found: LayerFeatures) -> str:
    """The tokens in a row, shaded by their strongest feature; pointing at one names its features."""
    indices = found.indices.reshape(-1, found.k)[:, :MANY_FEATURES].tolist()
    values = found.values.reshape(-1, found.k)[:, :MANY_FEATURES].tolist()
    # Position 0 is a sink with values far above the rest, which it would bleach.
    scale = max((v[0] for v, at in zip(values, found.positions, strict=True) if at > 0), default=0.0)
    tokens = []
    for token, some, at_values in zip(found.tokens, indices, values, strict=True):
        title = "\n".join(f"{found.layer}/{i}  {v:.4g}" for i, v in zip(some, at_values, strict=True))
        shade = min(max(at_values[0] / scale, 0.0), 1.0) if scale > 0 else 0.0
        tokens.append(
            shaded(token, title, shade, "padding:1px 2px;margin:1px;display:inline-block;white-space:pre-wrap")
        )
    return (
        f'<div style="margin:4px 0"><small>layer {found.layer} · {found.k} of {found.d_sae} features a token</small>'
        f'<div style="line-height:1.9">{"".join(tokens)}</div></div>'
    )


def text_html(found: TextFeatures) -> str:
    """Every layer's `layer_html`, with its strongest features below."""
    parts = []
    for layer in found:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{value:.4g}</td><td><code>{escape(found.tokens[at])}</code></td></tr>"
            for name, value, at in layer.strongest(5)
        )
        table = f"<table><tr><th>feature</th><th>highest value</th><th>at</th></tr>{rows}</table>"
        parts.append(layer_html(layer) + table)
    return "".join(parts)
