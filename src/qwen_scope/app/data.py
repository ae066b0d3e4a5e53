"""The tab Data: what uploaded sets share and repeat, seen through features; and what was saved of a classification."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from qwen_scope.app import classified, export, tokens, uploads
from qwen_scope.app.shared import Shared, in_words
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature

if TYPE_CHECKING:
    from qwen_scope.data import Footprint
    from qwen_scope.data.fired import Position
    from qwen_scope.data.study import Study
    from qwen_scope.data.study_page import Table

MOST_SETS = 8
"""Sets that are compared at once."""
MOST_TIMES_ONE_TEXT = 32
"""All items of a set together may have so many times the tokens of the longest one allowed."""
NEEDED = ("sklearn", "scipy", "matplotlib")
"""Packages that this tab needs beyond those of the app."""
PLOTS = {
    "coverage": "Coverage curves: which share of a set's features a share of its items fires, set by set",
    "overlaps": "Size-matched overlaps: which share of the row's features the column fires, for all pairs of sets",
}
PLACES: list[tuple[str, Position]] = [("at the last token of an item", "last"), ("at any token of an item", "any")]


def build(shared: Shared) -> None:
    """The tab."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        gr.HTML(
            tokens.note(
                f"This tab needs the package {missing[0]}, which is not installed; run pip install 'qwen-scope[data]' and start "
                "the app again."
            ),
            elem_id="data-none",
        )
        return
    with gr.Accordion("Sets: footprints, redundancy, overlaps", open=True, elem_id="data-sets"):
        _build_sets(shared)
    with gr.Accordion("Classification: a saved rule or evaluation", open=False, elem_id="data-classification"):
        classified.build(shared)


def _build_sets(shared: Shared) -> None:
    layers, config = shared.scope.layers, shared.config
    found = gr.State(None)
    gr.HTML(
        tokens.note(
            f"Upload up to {MOST_SETS} sets of texts, to see how much each repeats itself, how much they share, what each next "
            f"one adds, and of two, which features differ. Of each, the first {config.max_texts} items are read."
        )
    )
    files = gr.File(
        label="Sets: one text a line (TXT), or rows (JSONL, CSV, Parquet)",
        file_count="multiple",
        file_types=list(uploads.KINDS),
        elem_id="data-files",
        height=140,
    )
    with gr.Row():
        layer = gr.Dropdown(layers, value=layers[len(layers) // 2], label="Layer", elem_id="data-layer")
        count = gr.Slider(
            1, config.max_texts, config.max_texts, step=1, label="Items of each set at most", elem_id="data-count"
        )
    position = gr.Radio(PLACES, value="last", label="A feature counts where it fires", elem_id="data-position")
    with gr.Row():
        column = gr.Textbox(
            "",
            label="Column of the text",
            info="Of files with several; left empty, it is text, messages, or the only one.",
            max_length=200,
            elem_id="data-column",
        )
        template = gr.Textbox(
            "",
            label="Or a text made of columns",
            info="Such as: Question: {question}",
            max_length=2000,
            elem_id="data-template",
        )
    with gr.Row():
        run = gr.Button("Compare sets", variant="primary", elem_id="run-data", scale=4)
        stop = gr.Button("Stop", elem_id="data-stop", scale=1, min_width=80)
    said = gr.HTML(elem_id="data-said")
    plots = gr.HTML(elem_id="data-plots")
    tables = gr.HTML(elem_id="data-tables")
    with gr.Accordion("The Python lines that give this", open=False):
        code = gr.Code(language="python", label="Python", interactive=False, elem_id="data-python")

    def studied(
        files: list[str] | None,
        column: str,
        template: str,
        layer: int,
        position: Position,
        count: int,
        progress: gr.Progress = gr.Progress(),
    ) -> Iterator[tuple[Any, ...]]:
        from qwen_scope.data.study import study

        names = names_of(files or [])
        options = {
            "column": column.strip() or None,
            "template": template.replace("\\n", "\n") or None,
            "count": int(count),
        }
        footprints, left_out = [], []
        for at, (name, file) in enumerate(names.items()):
            progress((at, len(names)), desc=f"Reading {name}", unit="sets")
            # What is given between sets is where Stop can end it.
            yield gr.skip(), tokens.note(f"Reading {name}, {at + 1} of {len(names)}."), gr.skip(), gr.skip(), gr.skip()
            footprint, without = _footprint(shared, name, file, layer, position, options)
            footprints.append(footprint)
            left_out += without
        progress((len(names), len(names)), desc="Comparing", unit="sets")
        result = study(footprints)
        yield (
            result,
            said_html(result, left_out),
            plots_html(result),
            "".join(table_html(shared, table) for table in _tables(result)),
            python_lines(shared, names, layer, position, options),
        )

    reading = run.click(
        in_words(studied),
        [files, column, template, layer, position, count],
        [found, said, plots, tables, code],
        **shared.running,
    )
    stop.click(lambda: tokens.note("Stopped."), None, [said], cancels=[reading], **shared.looking)
    shared.link.keep(
        "data",
        run,
        {"column": column, "template": template, "layer": layer, "position": position, "count": count},
    )
    export.buttons(
        shared,
        "data",
        [found, code],
        {
            "csv": lambda result, code: csv_of(_there(result)),
            "json": lambda result, code: export.to_json(_there(result).to_dict()),
            "html": lambda result, code: _page(_there(result)),
            "py": lambda result, code: code if _there(result) else "",
        },
        picture="data-plots",
    )


def names_of(files: list[str]) -> dict[str, str]:
    """What sets are called, after their files, no two alike; in the order of the files.

    Raises:
        QwenScopeError: none, or too many.
    """
    if not 1 <= len(files) <= MOST_SETS:
        raise QwenScopeError(f"expected 1 to {MOST_SETS} files, found {len(files)}; choose a file for each set")
    names: dict[str, str] = {}
    for file in files:
        stem = Path(file).name.partition(".")[0] or "set"
        name, n = stem, 1
        while name in names:
            n += 1
            name = f"{stem} {n}"
        names[name] = file
    return names


def said_html(study: Study, left_out: list[str]) -> str:
    """What was compared, how to read it, and what was left out."""
    from qwen_scope.data.study_page import about

    sentences = [tokens.note(f"Layer {study.sets[0].about.layer} of {about(study)}")]
    if left_out:
        sentences.append(tokens.note(f"Left out {len(left_out)} rows, the first: {left_out[0]}"))
    return f'<div role="status">{"".join(sentences)}</div>'


def plots_html(study: Study) -> str:
    """The plots, with words for those who do not see them; the tables have the figures."""
    return "".join(
        f'<img class="qs-picture" alt="{escape(PLOTS[name])}" src="data:image/png;base64,{b64encode(data).decode()}">'
        for name, data in study.pictures().items()
    )


def table_html(shared: Shared, table: Table) -> str:
    """A table of a study; features in it are links to their pages, with what they are about."""
    if not table.rows:
        return tokens.note(f"{table.title}: none, or none so surely that chance does not explain it.")
    of_features = table.head[0] == "feature"
    columns = [*table.head, "about"] if of_features else table.head
    rows = []
    for row in table.rows:
        cells = [escape(cell) for cell in row]
        if of_features:
            layer, number = parse_feature(row[0])
            cells = [tokens.feature_link(layer, number), *cells[1:], escape(shared.names.of(layer, number))]
        rows.append(cells)
    words = 2 if table.title == "Overlaps" else 1
    return tokens.table(table.title or "Sets", columns, rows, numbers=range(words, len(table.head)))


def csv_of(study: Study) -> str:
    """Figures of each set, then those of each pair."""
    sets, *others = _tables(study)
    return "\n".join(export.to_csv(table.head, table.rows) for table in (sets, others[-1]))


def python_lines(shared: Shared, names: dict[str, str], layer: int, position: Position, options: dict[str, Any]) -> str:
    """The lines that give a study of the same files."""
    given = "".join(f", {key}={value!r}" for key, value in options.items() if value is not None)
    lines = [
        "from pathlib import Path",
        "",
        "from qwen_scope import Scope",
        "from qwen_scope.data import Footprint",
        "from qwen_scope.data.study import study",
        "",
        "",
        "def lines(file):",
        '    return [line for line in Path(file).read_text(encoding="utf-8-sig").split("\\n") if line.strip()]',
        "",
        "",
        f"scope = {shared.opening}",
        "found = study([",
    ]
    for name, file in names.items():
        source, more = repr(Path(file).name), given
        if Path(file).suffix.lower() in uploads.LINES:
            source, more = f"lines({source})[:{options['count']}]", ""
        lines.append(
            f"    Footprint.of(scope, {source}, name={name!r}, layer={layer}, position={position!r}, broken=print{more}),"
        )
    return "\n".join([*lines, "])", "print(found)", 'found.save("study")']) + "\n"


def _footprint(
    shared: Shared, name: str, file: str, layer: int, position: Position, options: dict[str, Any]
) -> tuple[Footprint, list[str]]:
    """What an uploaded set fires, and what of it was left out."""
    from qwen_scope.data import Footprint

    read = uploads.read_file(file, shared.config, **options)
    left_out = list(read.left_out)
    most = MOST_TIMES_ONE_TEXT * shared.config.max_tokens
    items = uploads.within_limits(shared.scope, read.items, shared.config, most_tokens=most, too_long=left_out.append)
    return Footprint.of(shared.scope, items, layer=layer, position=position, name=name), left_out


def _tables(study: Study) -> list[Table]:
    from qwen_scope.data.study_page import tables

    return tables(study)


def _page(study: Study) -> str:
    from qwen_scope.data.study_page import page

    return page(study, study.pictures())


def _there(study: Study | None) -> Study:
    if study is None:
        raise QwenScopeError("expected a comparison to take away, found none yet; press Compare sets first")
    return study
