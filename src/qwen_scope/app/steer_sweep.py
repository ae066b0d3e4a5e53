"""The part of the tab Steer that sweeps over strengths beside controls: does the steering do what it is for?"""

from __future__ import annotations

import base64
import queue
import tempfile
import threading
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from qwen_scope.app import export, tokens, uploads
from qwen_scope.app.shared import Shared, in_words
from qwen_scope.errors import QwenScopeError
from qwen_scope.evidence import SweepConfig, SweepReport, sweep
from qwen_scope.steering import Steering

EFFECTS = [
    ("Words (goal, team)", "words"),
    ("Language (fr)", "language"),
    ("Script (Greek)", "script"),
    ("Reading of a feature (15/1037)", "feature"),
]
"""What can be measured. A scorer of one's own would run code of the visitor's choice, and an expression can take for ever."""
PROMPTS = "\n".join(
    (
        "My neighbour told me that",
        "The old house at the end of the road",
        "Yesterday afternoon we",
        "The first thing to know about",
        "When I was young,",
        "In the middle of the night",
    )
)
WAYS_TO_ASK = 2
"""Controls that are only prompted, at most, where there is an instruction."""


def build(shared: Shared, steering: gr.Textbox, read_as: gr.Radio) -> None:
    """Fills the part; steering and format are those of the tab."""
    result = gr.State()
    with gr.Accordion("Sweep over strengths, with controls: does it do what it is for?", open=False, elem_id="sweep"):
        with gr.Row():
            prompts = gr.Textbox(PROMPTS, label="Prompts, one a line (four or more)", lines=6, elem_id="sweep-prompts")
            with gr.Column():
                kind = gr.Dropdown(EFFECTS, value="words", label="What should become more", elem_id="sweep-kind")
                what = gr.Textbox(label="Namely", placeholder="goal, team, match", max_lines=1, elem_id="sweep-what")
                instruction = gr.Textbox(
                    label="What one would ask for instead (may be left out)", max_lines=2, elem_id="sweep-instruction"
                )
                strengths = gr.Textbox(
                    "-1 0.5 1 2", label="Strengths: multiples of the steering", max_lines=1, elem_id="sweep-strengths"
                )
                others = gr.Slider(1, 8, value=2, step=1, label="Random features to compare with")
                length = gr.Slider(4, 60, value=16, step=1, label="Tokens of each text")
        with gr.Row():
            button = gr.Button("Sweep", variant="primary", elem_id="run-sweep", scale=4)
            stop = gr.Button("Stop the sweep", elem_id="sweep-stop", scale=1, min_width=80)
        shown = gr.HTML(elem_id="sweep-report")
        with gr.Accordion("The Python lines that give this", open=False):
            lines = gr.Code(language="python", label="Python", interactive=False, elem_id="sweep-python")
        export.buttons(
            shared,
            "sweep",
            [result, lines],
            {
                "csv": lambda found, _: as_csv(_there(found)),
                "json": lambda found, _: export.to_json(_there(found).to_dict()),
                "py": lambda found, lines: str(_there(found) and lines),
            },
            picture="sweep-report",
        )

    @in_words
    def swept(
        steering: str,
        read_as: str,
        prompts: str,
        kind: str,
        what: str,
        instruction: str,
        strengths: str,
        others: int | float,
        length: int | float,
        progress: gr.Progress = gr.Progress(),
    ) -> Iterator[Any]:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not what.strip():
            raise QwenScopeError(
                "expected what should become more, found nothing; type words, a language, or a feature"
            )
        if kind not in {value for _, value in EFFECTS}:
            raise QwenScopeError(f"expected one of the effects offered, found {kind[:40]!r}; choose one")
        config = SweepConfig(
            strengths=numbers(strengths),
            instruction=instruction.strip(),
            random_features=int(others),
            max_new_tokens=min(int(length), shared.config.max_new_tokens),
        )
        count = len(config.all_strengths) - 1
        many = len(texts) * (1 + count * (1 + config.random_features) + WAYS_TO_ASK * bool(config.instruction))
        if many > shared.config.max_sweep_texts:
            raise QwenScopeError(
                f"expected a sweep of at most {shared.config.max_sweep_texts} texts, found {many}; take fewer prompts, "
                "strengths or random features"
            )
        # What one would ask for stands before a prompt.
        for text in (what, *(f"{config.instruction} {text}" for text in texts)):
            uploads.check_text(shared.scope, text, shared.config)
        inputs = as_prompts(texts, read_as)
        wanted, effect = uploads.steering_of(steering), f"{kind}:{what.strip()}"
        written = python(shared, wanted, inputs, effect, config)
        progress(0, desc="Beginning")
        for news in watched(shared, wanted, inputs, effect, config):
            if isinstance(news, SweepReport):
                yield news, report_html(news), written
            else:
                progress(news, desc="Generating", unit="texts")
                yield None, tokens.note(f"{news[0]} of {news[1]} texts generated."), written

    chosen = [steering, read_as, prompts, kind, what, instruction, strengths, others, length]
    run = button.click(swept, chosen, [result, shown, lines], show_progress_on=[shown], **shared.running)
    stop.click(None, None, None, cancels=[run], queue=False, api_visibility="private")


def as_prompts(texts: list[str], read_as: str) -> list[Any]:
    """Prompts as `sweep` takes them.

    Raises:
        QwenScopeError: chats whose thinking is chosen, which it does not take.
    """
    if read_as not in ("text", "chat"):
        raise QwenScopeError(
            "expected prompts read as plain text or as a chat, found a chat whose thinking is chosen, which a sweep cannot do; "
            "choose another under Read as"
        )
    return list(texts) if read_as == "text" else [[{"role": "user", "content": text}] for text in texts]


def watched(
    shared: Shared, steering: Steering, prompts: list[Any], effect: str, config: SweepConfig
) -> Iterator[tuple[int, int] | SweepReport]:
    """A sweep in a thread of its own: how many texts there are of how many, at last the report. It ends with whoever asks."""
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gone = threading.Event()

    def progress(done: int, of: int) -> None:
        if gone.is_set():
            raise _NobodyAsks
        news.put((done, of))

    def work() -> None:
        try:
            news.put(sweep(shared.scope, steering, prompts, effect, config, progress=progress))
        except BaseException as error:  # told where somebody waits for it
            news.put(error)

    threading.Thread(target=work, name="qwen-scope sweep", daemon=True).start()
    try:
        while True:
            found = news.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if isinstance(found, SweepReport):
                return
    finally:
        gone.set()


class _NobodyAsks(Exception):
    """Ends a sweep whose visitor has stopped it or gone."""


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with spaces or commas between.

    Raises:
        QwenScopeError: something else.
    """
    try:
        return tuple(float(each) for each in text.replace(",", " ").split())
    except ValueError as error:
        raise QwenScopeError(f"expected numbers such as -1 0.5 1 2, found {text[:60]!r}; correct them") from error


def report_html(report: SweepReport) -> str:
    """Verdict, plot, every strength, and some texts."""
    points = [
        [
            escape(point.arm),
            f"{point.strength:g}",
            f"{point.effect.mean:.3g}",
            f"{point.effect.low:.3g} to {point.effect.high:.3g}",
            "–" if point.perplexity is None else f"{point.perplexity:.3g}",
            "yes" if point.coherent else "no",
        ]
        for point in report.points
    ]
    texts = [
        [
            escape(each.arm),
            f"{each.strength:g}",
            f'<span class="qs-text">{escape(each.prompt)} <b>{escape(each.text)}</b></span>',
        ]
        for each in report.examples
    ]
    head = ["Arm", "Strength", "Effect", "Interval", "Perplexity", "Coherent"]
    return (
        f'<h2 id="sweep-verdict">Verdict: {report.verdict}</h2>{"".join(map(tokens.note, str(report).splitlines()))}'
        f"{picture(report)}{tokens.table('Every strength', head, points, numbers=[1, 2, 3, 4])}"
        f"{tokens.table('Texts', ['Arm', 'Strength', 'Text'], texts, numbers=[1])}"
    )


def picture(report: SweepReport) -> str:
    """The library's plot, within the page; a sentence where matplotlib is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.png"
        try:
            from qwen_scope.evidence.plot import draw

            draw(report, path)
        except ImportError:
            return tokens.note("No plot: matplotlib is not installed.")
        data = base64.b64encode(path.read_bytes()).decode()
    said = f"Effect and perplexity over the strength: {report.effect}"
    return f'<img class="qs-picture" alt="{escape(said)}" src="data:image/png;base64,{data}">'


def as_csv(report: SweepReport) -> str:
    """A row for each strength of each arm."""
    columns = ["arm", "kind", "strength", "effect", "low", "high", "perplexity", "repetition", "tokens", "coherent"]
    rows = [
        [
            p.arm,
            p.kind,
            p.strength,
            p.effect.mean,
            p.effect.low,
            p.effect.high,
            p.perplexity,
            p.repetition,
            p.tokens,
            p.coherent,
        ]
        for p in report.points
    ]
    return export.to_csv(columns, rows)


def python(shared: Shared, steering: Steering, prompts: list[Any], effect: str, config: SweepConfig) -> str:
    """The lines that give the same report."""
    return (
        "from qwen_scope import Scope\nfrom qwen_scope.evidence import SweepConfig, sweep\n\n"
        f"scope = {shared.opening}\n{shared.units}"
        f"config = SweepConfig(\n    strengths={config.strengths!r},\n    instruction={config.instruction!r},\n"
        f"    random_features={config.random_features},\n    max_new_tokens={config.max_new_tokens},\n)\n"
        f"report = sweep(scope, {str(steering)!r}, {prompts!r}, {effect!r}, config)\nprint(report)\n"
    )


def _there(report: SweepReport | None) -> SweepReport:
    if report is None:
        raise QwenScopeError("expected a sweep that was run, found none; press Sweep first")
    return report
