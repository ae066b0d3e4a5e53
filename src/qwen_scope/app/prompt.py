"""The tab Prompt: a text's tokens as heat maps, layers side by side, and what each token fires."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from qwen_scope.app import export, tokens
from qwen_scope.app.shared import Shared, in_words
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.text_features import LayerFeatures, TextFeatures
from qwen_scope.tokens import tokenize

EXAMPLE = "The council met on Tuesday and agreed to repair the old bridge before winter."
MOST_LAYERS = 4
"""Layers shown where nobody chooses; more are read when asked for."""
STRONGEST = 10
"""Features in the table of the strongest of each layer."""
COLOURS = [
    ("Strongest feature", "strongest"),
    ("Reconstruction error", "error"),
    ("One feature", "feature"),
]


def build(shared: Shared) -> None:
    """Fills the tab."""
    scope = shared.scope
    result = gr.State()
    with gr.Row():
        with gr.Column(scale=3):
            text = gr.Textbox(EXAMPLE, label="Text", lines=4, max_lines=12, elem_id="prompt-text")
        with gr.Column(scale=2):
            layers = gr.CheckboxGroup(
                [(str(layer), layer) for layer in scope.layers], value=spread(scope.layers), label="Layers"
            )
            read_as = gr.Radio(
                [("Plain text", "text"), ("A user's message", "chat")],
                value="text",
                label="Read as",
                visible=bool(scope.backbone.tokenizer and scope.backbone.tokenizer.chat_template),
            )
    button = gr.Button("Read", variant="primary", elem_id="run-prompt")
    with gr.Row():
        colour = gr.Radio(COLOURS, value="strongest", label="Colour by", elem_id="prompt-colour")
        feature = gr.Textbox(label="The feature", placeholder="15/1037", elem_id="prompt-feature", max_lines=1)
        count = gr.Slider(1, min(50, scope.suite.k), value=min(8, scope.suite.k), step=1, label="Features of a token")
    at = gr.Number(-1, visible=False, precision=0)
    maps = gr.HTML(
        tokens.note("Press Read to see what the model finds in the text."), elem_id="prompt-maps", **tokens.listening
    )
    details = gr.HTML(elem_id="prompt-details", **tokens.listening)
    strongest = gr.HTML(elem_id="prompt-strongest", **tokens.listening)
    with gr.Accordion("The Python lines that give this", open=False):
        lines = gr.Code(language="python", label="Python", interactive=False, elem_id="prompt-python")
    export.buttons(
        shared,
        "prompt",
        [result, count, lines],
        {
            "csv": lambda found, count, _: as_csv(shared, there(found), int(count)),
            "json": lambda found, count, _: export.to_json(there(found).to_dict(int(count))),
            "py": lambda found, _, lines: str(there(found) and lines),
        },
        picture="prompt-maps",
    )

    @in_words
    def read(
        text: str, layers: list[int], read_as: str, colour: str, feature: str, count: int | float, at: int | float
    ) -> Any:
        if not layers:
            raise QwenScopeError("expected a layer to read, found none chosen; tick one")
        inputs: Any = [{"role": "user", "content": text}] if read_as == "chat" and text else text
        # Before the model reads it: a long text should not keep others waiting.
        tokenize(inputs, scope.backbone.tokenizer, most=shared.config.max_tokens)
        found = scope.features(inputs, layers=sorted(layers), errors=True)
        place = int(at) if 0 <= at < len(found) else len(found) - 1
        return (
            found,
            place,
            *shown(found, colour, feature, count, place),
            strongest_html(shared, found),
            python(shared.opening, text, layers, read_as, int(count)),
        )

    @in_words
    def shown(found: TextFeatures | None, colour: str, feature: str, count: int | float, at: int | float) -> Any:
        if found is None:
            return gr.skip(), gr.skip()
        return (
            maps_html(found, colour, feature, int(at)),
            details_html(shared, found, int(at), int(count)),
        )

    @in_words
    def pressed(found: TextFeatures | None, colour: str, feature: str, count: int | float, event: gr.EventData) -> Any:
        at = getattr(event, "at", None)
        if found is None or not isinstance(at, int) or not 0 <= at < len(found):
            return gr.skip(), gr.skip(), gr.skip()
        return at, *shown(found, colour, feature, count, at)

    @in_words
    def chosen(found: TextFeatures | None, count: int | float, at: int | float, event: gr.EventData) -> Any:
        name = getattr(event, "choose", None)
        if found is None or not isinstance(name, str):
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return "feature", name, *shown(found, "feature", name, count, at)

    reading = [text, layers, read_as, colour, feature, count, at]
    button.click(read, reading, [result, at, maps, details, strongest, lines], **shared.running)
    again = ([result, colour, feature, count, at], [maps, details])
    events = [
        event(shown, *again, **shared.looking) for event in (colour.input, feature.submit, feature.blur, count.release)
    ]
    events.append(maps.click(pressed, [result, colour, feature, count], [at, maps, details], **shared.looking))
    for component in (details, strongest):
        events.append(component.click(chosen, [result, count, at], [colour, feature, maps, details], **shared.looking))
    kept = {"text": text, "layers": layers, "as": read_as, "colour": colour, "feature": feature, "top": count, "at": at}
    shared.link.keep("prompt", button, kept, after=events)


def spread(layers: Sequence[int]) -> list[int]:
    """All layers, or a few from the first to the last."""
    if len(layers) <= MOST_LAYERS:
        return list(layers)
    return [layers[round(n * (len(layers) - 1) / (MOST_LAYERS - 1))] for n in range(MOST_LAYERS)]


def there(found: TextFeatures | None) -> TextFeatures:
    """What was read.

    Raises:
        QwenScopeError: nothing yet.
    """
    if found is None:
        raise QwenScopeError("expected a text that was read, found none; press Read first")
    return found


def maps_html(found: TextFeatures, colour: str, feature: str, at: int) -> str:
    """A heat map for each layer.

    Raises:
        QwenScopeError: one feature to colour by that is not named, or of a layer that was not read.
    """
    if colour == "feature":
        strongest = next(iter(found)).strongest(1) or [(f"{found.layers[0]}/0", 0.0, 0)]
        layer, number = parse_feature(feature.strip() or strongest[0][0])
        one = found[layer]
        if number >= one.d_sae:
            raise QwenScopeError(
                f"expected a feature from {layer}/0 to {layer}/{one.d_sae - 1}, found {feature}; choose one of those"
            )
        heading = f"feature {tokens.feature_link(layer, number)}"
        return columns([map_html(one, one.activation(number).tolist(), heading, f"value of {layer}/{number}", at)])
    if colour == "error":
        parts = [
            map_html(
                one,
                found.errors[one.layer].tolist(),
                f"layer {one.layer}, reconstruction error",
                "reconstruction error",
                at,
            )
            for one in found
        ]
        return columns(parts)
    return columns(
        [
            map_html(one, one.values[:, 0].tolist(), f"layer {one.layer}", "strongest feature's value", at)
            for one in found
        ]
    )


def map_html(one: LayerFeatures, values: list[float], heading: str, what: str, at: int) -> str:
    """One heat map below its heading, which is HTML."""
    # Position 0 is a sink with values far above the rest, which it would bleach.
    scale = max(values[1:], default=0.0) or max(values, default=0.0) or 1.0
    drawn = tokens.heat_map(
        one.tokens,
        [max(value, 0.0) / scale for value in values],
        label=f"Tokens at layer {one.layer} by {what}",
        name=str(one.layer),
        titles=[f"{what} {value:.3g}" for value in values],
        pressed=at,
    )
    return f"<section><h2>{heading}</h2>{drawn}</section>"


def columns(parts: Sequence[str]) -> str:
    """Parts side by side where there is room."""
    return f'<div class="qs-columns">{"".join(parts)}</div>'


def details_html(shared: Shared, found: TextFeatures, at: int, count: int) -> str:
    """What a token fires at each layer, and how far its reconstruction is off."""
    parts = []
    for one in found:
        rows = []
        for number, value in zip(one.indices[at, :count].tolist(), one.values[at, :count].tolist(), strict=True):
            rows.append(
                [
                    tokens.feature_link(one.layer, number),
                    f"{value:.3g}",
                    escape(shared.names.of(one.layer, number)),
                    tokens.choose(f"{one.layer}/{number}", "show", f"colour the text by {one.layer}/{number}"),
                ]
            )
        caption = f"Layer {one.layer}, reconstruction error {found.errors[one.layer][at]:.1%}"
        parts.append(tokens.table(caption, ["Feature", "Value", "What", "Map"], rows, numbers=[1]))
    sink = " Position 0 is an attention sink, where features mean little." if at == 0 else ""
    token = f"<p>Token {at}: <code>{escape(tokens.shown(found.tokens[at]))}</code>.{sink}</p>"
    return f"{token}{columns(parts)}"


def strongest_html(shared: Shared, found: TextFeatures) -> str:
    """The features that reach the highest value anywhere in the text, position 0 left out."""
    parts = []
    for one in found:
        rows = []
        for name, value, at in one.strongest(STRONGEST):
            layer, number = parse_feature(name)
            rows.append(
                [
                    tokens.feature_link(layer, number),
                    f"{value:.3g}",
                    f"<code>{escape(tokens.shown(found.tokens[at]))}</code>",
                    escape(shared.names.of(layer, number)),
                    tokens.choose(name, "show", f"colour the text by {name}"),
                ]
            )
        caption = f"Strongest of layer {one.layer}"
        parts.append(tokens.table(caption, ["Feature", "Value", "At", "What", "Map"], rows, numbers=[1]))
    return columns(parts)


def as_csv(shared: Shared, found: TextFeatures, count: int) -> str:
    """A row for each feature of each token at each layer."""
    rows = [
        [
            at,
            found.tokens[at],
            one.layer,
            float(found.errors[one.layer][at]),
            rank,
            f"{one.layer}/{number}",
            value,
            shared.names.of(one.layer, number),
        ]
        for one in found
        for at in range(len(found))
        for rank, (number, value) in enumerate(
            zip(one.indices[at, :count].tolist(), one.values[at, :count].tolist(), strict=True)
        )
    ]
    return export.to_csv(["position", "token", "layer", "error", "rank", "feature", "value", "what"], rows)


def python(opening: str, text: str, layers: Sequence[int], read_as: str, count: int) -> str:
    """The lines that give the same features."""
    given = f'[{{"role": "user", "content": {text!r}}}]' if read_as == "chat" else repr(text)
    return (
        "from qwen_scope import Scope\n\n"
        f"scope = {opening}\n"
        f"found = scope.features({given}, layers={sorted(layers)!r}, errors=True)\n"
        f"for layer in found:\n    print(layer.top({count}))  # token, feature, value\n"
        "    print(found.errors[layer.layer])  # |x - x_hat| / |x| of each token\n"
    )
