"""The tab Compare: which features fire otherwise in one text, or set of texts, than in another."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from qwen_scope.app import export, tokens, uploads
from qwen_scope.app.shared import Shared, in_words
from qwen_scope.comparison import By, Comparison
from qwen_scope.corpus import Document
from qwen_scope.data.items import Items
from qwen_scope.errors import QwenScopeError
from qwen_scope.text_features import TextFeatures

MOST_TEXTS_SHOWN = 5
"""Texts of each set of which tokens are shown: those in which the chosen feature is highest."""
MOST_TIMES_ONE_TEXT = 8
"""All texts of a set together may have so many times the tokens of the longest one allowed: they are kept for the heat maps."""
EXAMPLES = (
    "The council met on Tuesday and agreed to repair the old bridge before winter.",
    "Le conseil s'est réuni mardi et a décidé de réparer le vieux pont avant l'hiver.",
)
ORDERS: list[tuple[str, By]] = [
    ("|rate 1 − rate 2|", "rate"),
    ("|mean 1 − mean 2|", "mean"),
    ("how surely the rates differ", "z"),
]
SIDES = ("First", "Second")


def build(shared: Shared) -> None:
    """The tab."""
    scope, config = shared.scope, shared.config
    found = gr.State(None)
    feature = gr.Textbox("", visible=False)
    gr.HTML(
        tokens.note(
            "Which features fire more often, or more strongly, in one text than in another. Pressing a feature below shows where "
            "it fires in both."
        )
    )
    typed: list[gr.Textbox] = []
    files: list[gr.File] = []
    with gr.Row():
        for side, example in zip(SIDES, EXAMPLES, strict=True):
            name = side.lower()
            with gr.Column(min_width=280):
                typed.append(
                    gr.Textbox(
                        example,
                        label=f"{side} text",
                        lines=4,
                        max_lines=14,
                        max_length=200 * config.max_tokens,
                        elem_id=f"compare-{name}",
                    )
                )
                with gr.Accordion(f"{side} set from a file", open=False, elem_id=f"compare-{name}-upload"):
                    files.append(
                        gr.File(
                            label=f"{side} set: one text a line (TXT), or a column text (JSONL, CSV, Parquet)",
                            file_types=list(uploads.KINDS),
                            elem_id=f"compare-{name}-file",
                            height=120,
                        )
                    )
    each_line = gr.Checkbox(
        False,
        label="Each line is a text of its own",
        info=f"Compares two sets of up to {config.max_texts} texts. A file counts instead of what is typed.",
        elem_id="compare-lines",
    )
    with gr.Accordion("What is counted, and how features are ranked", open=False, elem_id="compare-options"):
        with gr.Row():
            low = gr.Dropdown(scope.layers, value=scope.layers[0], label="Layers from", elem_id="compare-from")
            high = gr.Dropdown(scope.layers, value=scope.layers[-1], label="to", elem_id="compare-to")
            top = gr.Slider(1, 50, 10, step=1, label="Features of each layer", elem_id="compare-top")
        by = gr.Radio(
            ORDERS,
            value="rate",
            label="Ranked by",
            info="The rate is the share of tokens at which a feature fires, the mean its mean value over all tokens.",
            elem_id="compare-by",
        )
        with gr.Row():
            skip_first = gr.Checkbox(True, label="Leave out the first token", elem_id="compare-skip-first")
            skip_common = gr.Checkbox(False, label="Leave out common tokens", elem_id="compare-skip-common")
            skip_prefix = gr.Checkbox(False, label="Leave out the common prefix", elem_id="compare-skip-prefix")
    run = gr.Button("Compare", variant="primary", elem_id="run-compare")
    said = gr.HTML(elem_id="compare-said")
    with gr.Column(elem_id="compare-result"):
        heat = gr.HTML(elem_id="compare-heat")
        table = gr.HTML(elem_id="compare-table", **tokens.listening)
    options = [each_line, low, high, top, by, skip_first, skip_common, skip_prefix]
    with gr.Accordion("The Python lines that give this", open=False):
        lines = gr.Code(language="python", label="Python", interactive=False, elem_id="compare-python")

    def compared(
        first: str,
        second: str,
        first_file: str | None,
        second_file: str | None,
        each_line: bool,
        low: int,
        high: int,
        top: int,
        by: By,
        skip_first: bool,
        skip_common: bool,
        skip_prefix: bool,
        feature: str,
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[Comparison, str, str, str, str, str]:
        progress(0, desc="Reading")
        sets = [
            _set(shared, side, text, file, each_line)
            for side, text, file in zip(SIDES, (first, second), (first_file, second_file), strict=True)
        ]
        groups = [of.items.texts for of in sets]
        options: dict[str, Any] = {
            "layers": _layers(shared, low, high),
            "by": by,
            "top": int(top),
            "skip_first": skip_first,
            "skip_common_tokens": skip_common,
            "skip_common_prefix": skip_prefix,
        }
        result = scope.compare(*groups, **options)
        left_out = [sentence for of in sets for sentence in of.left_out]
        names = [of.name for of in result.features]
        first_shown = feature if feature in names else next(iter(names), "")
        return (
            result,
            first_shown,
            _said(result, left_out),
            table_html(shared, result),
            heat_html(shared, result, first_shown) if first_shown else "",
            python_lines(shared, groups, options),
        )

    def chosen(result: Comparison | None, event: gr.EventData) -> tuple[Any, Any]:
        name = getattr(event, "choose", None)
        if result is None or not isinstance(name, str):
            return gr.skip(), gr.skip()
        return name, heat_html(shared, result, name)

    run.click(
        in_words(compared),
        [*typed, *files, *options, feature],
        [found, feature, said, table, heat, lines],
        **shared.running,
    )
    choosing = table.click(in_words(chosen), [found], [feature, heat], **shared.looking)
    shared.link.keep(
        "compare",
        run,
        {
            "first": typed[0],
            "second": typed[1],
            "lines": each_line,
            "from": low,
            "to": high,
            "top": top,
            "by": by,
            "skip_first": skip_first,
            "skip_common": skip_common,
            "skip_prefix": skip_prefix,
            "feature": feature,
        },
        after=[choosing],
    )
    export.buttons(
        shared,
        "compare",
        [found, lines],
        {
            "csv": lambda result, code: csv_of(shared, _there(result)),
            "json": lambda result, code: export.to_json(_there(result).to_dict()),
            "py": lambda result, code: _there(result) and code,
        },
        picture="compare-result",
    )


def table_html(shared: Shared, comparison: Comparison) -> str:
    """A table for each layer; the button in a row chooses its feature."""
    parts = []
    for layer in sorted({of.layer for of in comparison.features}):
        rows = []
        for of in comparison.features:
            if of.layer != layer:
                continue
            name = shared.names.of(of.layer, of.number)
            rows.append(
                [
                    tokens.choose(of.name, of.name, f"Show where {of.name} fires. {name}"),
                    escape(name),
                    f"{of.first_rate:.1%}",
                    f"{of.second_rate:.1%}",
                    f"{of.first_mean:.3g}",
                    f"{of.second_mean:.3g}",
                    f"{of.z:+.2f}",
                    tokens.feature_link(of.layer, of.number),
                ]
            )
        columns = ["Show", "About", "Rate 1", "Rate 2", "Mean 1", "Mean 2", "z", "Page"]
        parts.append(tokens.table(f"Layer {layer}", columns, rows, numbers=range(2, 7)))
    return "".join(parts)


def heat_html(shared: Shared, comparison: Comparison, name: str) -> str:
    """Where a feature fires in the texts of both groups."""
    values = comparison.activations(name)
    counted = (comparison.first_counted, comparison.second_counted)
    # What is not counted, such as the first token, may be far above the rest, which it would bleach.
    most = max(
        (
            float(of[kept].max())
            for group in zip(values, counted, strict=True)
            for of, kept in zip(*group, strict=True)
            if kept.any()
        ),
        default=0.0,
    )
    layer, _, number = name.partition("/")
    about = shared.names.of(int(layer), int(number))
    shown = tokens.note(f"{name} {about}".strip() + f": its highest value at a token that counts is {most:.4g}.")
    columns = []
    for side, texts, of_side, kept_of in zip(
        SIDES, (comparison.first, comparison.second), values, counted, strict=True
    ):
        best = sorted(range(len(texts)), key=lambda at: -float(of_side[at].max()))[:MOST_TEXTS_SHOWN]
        heading = f"{side} text" if len(texts) == 1 else f"{side} set: {len(best)} of {len(texts)} texts"
        maps = [
            _text_map(texts[at], of_side[at].tolist(), kept_of[at].tolist(), most, f"{heading}, {name}") for at in best
        ]
        columns.append(f"<section><h2>{escape(heading)}</h2>{''.join(maps)}</section>")
    return f'{shown}<div class="qs-columns">{"".join(columns)}</div>'


def _text_map(text: TextFeatures, values: list[float], counted: list[bool], most: float, label: str) -> str:
    titles = [f"{value:.4g}{'' if kept else ', not counted'}" for value, kept in zip(values, counted, strict=True)]
    shades = [max(0.0, value) / most if most > 0 else 0.0 for value in values]
    return tokens.heat_map(text.tokens, shades, label=label, titles=titles)


def csv_of(shared: Shared, comparison: Comparison) -> str:
    """The features compared, a row each."""
    columns = ["feature", "about", "first_rate", "second_rate", "first_mean", "second_mean", "z"]
    rows = [
        [
            of.name,
            shared.names.of(of.layer, of.number),
            of.first_rate,
            of.second_rate,
            of.first_mean,
            of.second_mean,
            of.z,
        ]
        for of in comparison.features
    ]
    return export.to_csv(columns, rows)


def python_lines(shared: Shared, groups: list[list[Document]], options: dict[str, Any]) -> str:
    """The lines that give a comparison."""
    # One chat alone is a list too, and would be taken for several texts.
    first, second = (repr(group[0] if len(group) == 1 and isinstance(group[0], str) else group) for group in groups)
    given = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    return (
        f"from qwen_scope import Scope\n\nscope = {shared.opening}\nfirst = {first}\nsecond = {second}\n"
        f"print(scope.compare(\n    first,\n    second,\n{given}))\n"
    )


def _set(shared: Shared, side: str, text: str, file: str | None, each_line: bool) -> uploads.Texts:
    """The texts of one side.

    Raises:
        QwenScopeError: none, too many, or too long ones.
    """
    config = shared.config
    if file:
        read = uploads.read_file(file, config, count=config.max_texts + 1)
    elif not text.strip():
        raise QwenScopeError(f"expected a {side.lower()} text to compare, found none; type one or choose a file")
    else:
        read = uploads.Texts(
            uploads.lines(text, f"the {side.lower()} text")
            if each_line
            else Items([text], None, [f"the {side.lower()} text"]),
            [],
        )
    most = MOST_TIMES_ONE_TEXT * config.max_tokens
    return uploads.Texts(uploads.within_limits(shared.scope, read.items, config, most_tokens=most), read.left_out)


def _layers(shared: Shared, low: int, high: int) -> list[int]:
    layers = [layer for layer in shared.scope.layers if low <= layer <= high]
    if not layers:
        raise QwenScopeError(f"expected layers from a lower to a higher one, found {low} to {high}; turn them round")
    return layers


def _said(comparison: Comparison, left_out: list[str]) -> str:
    """What was compared, in sentences."""
    counts = [sum(int(kept.sum()) for kept in group) for group in (comparison.first_counted, comparison.second_counted)]
    sizes = [len(comparison.first), len(comparison.second)]
    of = " and ".join(
        f"{count:,} tokens" + (f" of {size} texts" if size > 1 else "")
        for count, size in zip(counts, sizes, strict=True)
    )
    sentences = [f"Compared: {of}."]
    if not comparison.features:
        sentences.append("No feature differs.")
    if min(sizes) == 1:
        sentences.append("A single text does not tell how much texts vary, so z promises too much.")
    if left_out:
        sentences.append(f"Left out {len(left_out)} rows, the first: {left_out[0]}.")
    return f'<div role="status">{tokens.note(" ".join(sentences))}</div>'


def _there(comparison: Comparison | None) -> Comparison:
    """The comparison to take away.

    Raises:
        QwenScopeError: there is none yet.
    """
    if comparison is None:
        raise QwenScopeError("expected a comparison to take away, found none yet; press Compare first")
    return comparison
