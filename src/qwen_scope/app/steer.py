"""The tab Steer: text under a steering beside the same without it, and what it did."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from qwen_scope.app import export, steer_sweep, tokens, uploads
from qwen_scope.app.shared import Shared, in_words
from qwen_scope.app.steer_html import both_html, edits_html, pinned_html, positions_html, trace_html
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.generation import Sampling
from qwen_scope.scope import Scope, SideBySide
from qwen_scope.steering import Edit, Steering
from qwen_scope.tokens import tokenize

CUSTOM = "custom"
PRESETS = [
    ("Light (0.4x)", "0.4x"),
    ("Medium (0.8x)", "0.8x"),
    ("Strong (1.5x)", "1.5x"),
    ("Suppress (-0.8x)", "-0.8x"),
    ("Suppress strongly (-1.5x)", "-1.5x"),
    ("Take away (ablate)", "ablate"),
    ("Custom", CUSTOM),
]
"""Amounts in units of the feature's highest activation, as `Edit.parse` reads them."""
WHERE = ["all", "generated", "prompt", "-1", "1-3", "0,1,5,generated"]
CANDIDATES = 10
"""Most likely tokens shown in place of one."""
EVERY = 0.15
"""Seconds between two looks at a text that is being generated."""
EXAMPLE = ("My neighbour told me that", "7/905:0.8x")
RECIPES = "qwen-scope recipes"
"""Where a visitor's own browser keeps recipes."""


def build(shared: Shared) -> None:
    """Fills the tab."""
    scope, most = shared.scope, shared.config.max_new_tokens
    result = gr.State()
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(EXAMPLE[0], label="Prompt", lines=3, max_lines=10, elem_id="steer-prompt")
            read_as = gr.Radio(formats(scope), value="text", label="Read as", elem_id="steer-as")
            with gr.Accordion("How tokens are drawn", open=False):
                length = gr.Slider(1, most, value=min(32, most), step=1, label="Tokens generated at most")
                temperature = gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature (0 takes the most likely token)")
                top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p")
                top_k = gr.Slider(0, 200, value=0, step=1, label="Top k (0 for all)")
                seed = gr.Number(0, label="Seed", precision=0, minimum=-(2**53), maximum=2**53)
        with gr.Column():
            steering = gr.Textbox(
                EXAMPLE[1],
                label="Steering: edits, one a line",
                info="FEATURE:AMOUNT@WHERE, such as 15/1037:0.8x@generated. x counts in the feature's highest activation; 2 adds "
                "raw units, =1x clamps, *0.5 scales, ablate takes away.",
                lines=3,
                max_lines=10,
                elem_id="steer-steering",
            )
            _recipes(shared, steering)
    with gr.Accordion("Add an edit", open=True), gr.Row():
        feature = gr.Textbox(label="Feature", placeholder="15/1037", max_lines=1, elem_id="steer-feature", min_width=90)
        preset = gr.Dropdown(PRESETS, value="0.8x", label="Amount", elem_id="steer-preset", min_width=120)
        custom = gr.Textbox(
            label="Custom amount",
            placeholder="-2x, =5, *0.5",
            max_lines=1,
            elem_id="steer-custom",
            min_width=110,
        )
        where = gr.Dropdown(
            WHERE, value="all", label="Tokens", allow_custom_value=True, elem_id="steer-where", min_width=110
        )
        add = gr.Button("Add", elem_id="steer-add", min_width=70)
    preview = gr.HTML(elem_id="steer-preview")
    with gr.Row():
        button = gr.Button("Generate", variant="primary", elem_id="run-steer", scale=4)
        stop = gr.Button("Stop", elem_id="steer-stop", scale=1, min_width=80)
    both = gr.HTML(
        tokens.note("Press Generate to see the text with and without the steering."),
        elem_id="steer-both",
        **tokens.listening,
    )
    pinned = gr.HTML(elem_id="steer-pinned")
    traced = gr.HTML(elem_id="steer-trace")
    with gr.Accordion("The Python lines that give this", open=False):
        lines = gr.Code(language="python", label="Python", interactive=False, elem_id="steer-python")
    export.buttons(
        shared,
        "steer",
        [result, lines],
        {
            "csv": lambda found, _: as_csv(there(found)),
            "json": lambda found, _: export.to_json(there(found).to_dict()),
            "py": lambda found, lines: str(there(found) and lines),
        },
        picture="steer-both",
    )

    @in_words
    def generate(
        prompt: str,
        read_as: str,
        steering: str,
        length: int | float,
        temperature: int | float,
        top_p: int | float,
        top_k: int | float,
        seed: int | float | None,
    ) -> Iterator[Any]:
        inputs, thinking = as_inputs(prompt, read_as)
        tokenize(inputs, scope.backbone.tokenizer, thinking=thinking, reply=True, most=shared.config.max_tokens)
        if length > most:
            raise QwenScopeError(f"expected at most {most} tokens to generate, found {length:g}; ask for fewer")
        sampling = Sampling(int(length), temperature, top_p, int(top_k), int(seed or 0), candidates=CANDIDATES)
        wanted = uploads.steering_of(steering)
        written = python(shared, inputs, thinking, wanted, sampling)
        told, found = 0.0, None
        for found in scope.stream_side_by_side(inputs, wanted, sampling, thinking=thinking):
            if time.monotonic() - told > EVERY and found.steered.trace is None:
                told = time.monotonic()
                yield None, both_html(found, None), "", "", written
        assert found is not None
        yield found, both_html(found, None), "", trace_html(found), written

    @in_words
    def pressed(found: SideBySide | None, event: gr.EventData) -> Any:
        at, side = getattr(event, "at", None), getattr(event, "map", "")
        if found is None or not isinstance(at, int) or side not in ("original", "steered"):
            return gr.skip(), gr.skip()
        return both_html(found, (side, at)), pinned_html(found, at)

    def seen(prompt: str, read_as: str, steering: str) -> str:
        # While somebody types, what is wrong yet is a note and no alarm.
        try:
            inputs, thinking = as_inputs(prompt, read_as)
            wanted = uploads.steering_of(steering)
            if not prompt:
                return tokens.note("Type a prompt to see which of its tokens are steered.")
            read = tokenize(
                inputs, scope.backbone.tokenizer, thinking=thinking, reply=True, most=shared.config.max_tokens
            )[0][0]
            return positions_html(read, wanted) + edits_html(shared, wanted)
        except QwenScopeError as error:
            return tokens.note(str(error))

    @in_words
    def added(steering: str, feature: str, preset: str, custom: str, where: str) -> Any:
        layer, number = parse_feature(feature)
        amount = custom.strip() if preset == CUSTOM else preset
        edit = Edit.parse(f"{layer}/{number}:{amount}@{where}")
        text = "\n".join([*steering.split(), str(edit)])
        scope.changes(replace_all(uploads.steering_of(text)))
        return text, ""

    inputs = [prompt, read_as, steering, length, temperature, top_p, top_k, seed]
    run = button.click(
        generate, inputs, [result, both, pinned, traced, lines], show_progress_on=[both], **shared.running
    )
    stop.click(None, None, None, cancels=[run], queue=False, api_visibility="private")
    both.click(pressed, [result], [both, pinned], **shared.looking)
    # When the page opens, and whenever one of them changes.
    gr.on(None, seen, [prompt, read_as, steering], [preview], trigger_mode="always_last", **shared.looking)
    add.click(added, [steering, feature, preset, custom, where], [steering, feature], **shared.looking)
    names = ["prompt", "as", "steering", "tokens", "temperature", "top_p", "top_k", "seed"]
    shared.link.keep("steer", button, dict(zip(names, inputs, strict=True)))
    steer_sweep.build(shared, steering, read_as)


def formats(scope: Scope) -> list[tuple[str, str]]:
    """How the model can read a prompt: as its tokenizer's template allows."""
    template = scope.backbone.tokenizer.chat_template if scope.backbone.tokenizer else None
    chosen = [("Plain text", "text")]
    if template:
        chosen.append(("Chat", "chat"))
    if template and "enable_thinking" in str(template):
        chosen += [("Chat, thinking", "thinking"), ("Chat, no thinking", "no-thinking")]
    return chosen


def as_inputs(prompt: str, read_as: str) -> tuple[Any, bool | None]:
    """A prompt as `Scope.generate` takes it, and its `thinking`."""
    if read_as == "text" or not prompt:
        return prompt, None
    return [{"role": "user", "content": prompt}], {"thinking": True, "no-thinking": False}.get(read_as)


def replace_all(steering: Steering) -> Steering:
    """The same at raw strengths, so that it can be checked without looking up how high features reach."""
    return Steering(tuple(replace(edit, unit="raw") for edit in steering.edits))


def there(found: SideBySide | None) -> SideBySide:
    """What was generated.

    Raises:
        QwenScopeError: nothing yet.
    """
    if found is None:
        raise QwenScopeError("expected a text that was generated, found none; press Generate first")
    return found


def as_csv(found: SideBySide) -> str:
    """A row for each candidate of each token of both texts; rank 0 is the token that was drawn."""
    from math import exp

    rows: list[list[Any]] = []
    for side, text in (("original", found.original), ("steered", found.steered)):
        for at, token in enumerate(text.tokens):
            rows.append([side, at, 0, token.text, exp(token.logprob)])
            rows += [[side, at, rank, each.text, exp(each.logprob)] for rank, each in enumerate(token.candidates, 1)]
    return export.to_csv(["text", "position", "rank", "token", "probability"], rows)


def python(shared: Shared, inputs: Any, thinking: bool | None, steering: Steering, sampling: Sampling) -> str:
    """The lines that give the same texts."""
    more = "" if thinking is None else f", thinking={thinking}"
    return (
        "from qwen_scope import Sampling, Scope\n\n"
        f"scope = {shared.opening}\n{shared.units}"
        f"sampling = Sampling(max_new_tokens={sampling.max_new_tokens}, temperature={sampling.temperature}, "
        f"top_p={sampling.top_p}, top_k={sampling.top_k}, seed={sampling.seed}, candidates={sampling.candidates})\n"
        f"both = scope.side_by_side({inputs!r}, {str(steering)!r}, sampling{more})\n"
        "print(both)  # both texts, and a trace of what the steering did\n"
    )


def _recipes(shared: Shared, steering: gr.Textbox) -> None:
    """Steerings kept: in the visitor's own browser by name, and as files, which every other part of the library takes."""
    kept = gr.BrowserState({}, storage_key=RECIPES, secret=RECIPES)
    with gr.Accordion("Recipes", open=False):
        with gr.Row():
            name = gr.Textbox(label="Name", max_lines=1, elem_id="steer-recipe-name", min_width=110)
            keep = gr.Button("Keep in this browser", elem_id="steer-recipe-keep", min_width=110)
        with gr.Row():
            chosen = gr.Dropdown([], label="Kept recipes", elem_id="steer-recipe-chosen", min_width=110)
            forget = gr.Button("Forget", elem_id="steer-recipe-forget", min_width=70)
        with gr.Row():
            export.button(
                shared,
                "Save as a file",
                "steering.json",
                "steer-recipe-save",
                [steering, name],
                lambda steering, name: recipe(shared.scope, steering, name),
            )
            opened = gr.UploadButton(
                "Open a file", file_types=[".json"], size="sm", elem_id="steer-recipe-open", min_width=80
            )

    def listed(recipes: Any) -> Any:
        return gr.Dropdown(choices=sorted(_strings(recipes)), value=None)

    @in_words
    def remember(recipes: Any, name: str, steering: str) -> Any:
        if not name.strip():
            raise QwenScopeError("expected a name for the recipe, found none; type one")
        return {**_strings(recipes), name.strip()[:80]: str(uploads.steering_of(steering))}

    def forgotten(recipes: Any, name: str | None) -> Any:
        return {key: text for key, text in _strings(recipes).items() if key != name}

    def taken(recipes: Any, name: str | None) -> Any:
        return _strings(recipes).get(name or "", None) or gr.skip()

    @in_words
    def read(path: str) -> str:
        return "\n".join(recipe_in(Path(path), shared).split())

    gr.on(None, listed, [kept], [chosen], **shared.looking)
    keep.click(remember, [kept, name, steering], [kept], **shared.looking)
    forget.click(forgotten, [kept, chosen], [kept], **shared.looking)
    chosen.input(taken, [kept, chosen], [steering], **shared.looking)
    opened.upload(read, [opened], [steering], **shared.looking)


def recipe_in(file: Path, shared: Shared) -> str:
    """The steering of a recipe that was uploaded.

    Raises:
        QwenScopeError: another file, or a recipe for another suite.
    """
    uploads.check_file(file, [".json"], shared.config)
    try:
        return str(Steering.of(file, shared.scope.suite.name))
    except QwenScopeError as error:
        raise QwenScopeError(uploads.without_folder(str(error), file)) from error


def recipe(scope: Scope, steering: str, note: str) -> bytes:
    """The content of the file that `Scope.save_steering` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steering.json"
        scope.save_steering(path, uploads.steering_of(steering), note)
        return path.read_bytes()


def _strings(recipes: Any) -> dict[str, str]:
    """What a browser kept, which may be anything."""
    pairs = recipes.items() if isinstance(recipes, dict) else ()
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
