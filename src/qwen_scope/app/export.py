"""What is shown, taken away: files that are made when asked for and go straight to the visitor's browser.

Nothing is written to this machine's disk, so nobody else can fetch it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from qwen_scope.app.shared import Shared, in_words
from qwen_scope.plain import finite

TYPES = {
    "csv": "text/csv",
    "json": "application/json",
    "py": "text/x-python",
    "png": "image/png",
    "jsonl": "text/plain",
}


def buttons(
    shared: Shared,
    name: str,
    inputs: Sequence[Component],
    files: dict[str, Callable[..., str | bytes]],
    *,
    picture: str | None = None,
) -> None:
    """A row of buttons that download files; each has the `elem_id` `<name>-<kind>`.

    Args:
        name: what files are called, and what the `elem_id`s begin with.
        inputs: components or states whose values the makers are given.
        files: by kind (`csv`, `json`, `py`, …) what makes the content; it may raise `QwenScopeError`.
        picture: `elem_id` of what is shown, of which the browser then makes a PNG.
    """
    with gr.Row(elem_classes="qs-row"):
        for kind, make in files.items():
            button(shared, f"{kind.upper()} file", f"{name}.{kind}", f"{name}-{kind}", inputs, make)
        if picture is not None:
            taken = f"() => {{ qsPicture({json.dumps(picture)}, {json.dumps(name + '.png')}); return []; }}"
            gr.Button("PNG picture", size="sm", elem_id=f"{name}-png", min_width=80).click(
                None, None, None, js=taken, queue=False, api_visibility="private"
            )


def button(
    shared: Shared,
    label: str,
    file: str,
    elem_id: str,
    inputs: Sequence[Component],
    make: Callable[..., str | bytes],
) -> None:
    """A button that downloads a file of that name, made when it is pressed; the maker may raise `QwenScopeError`."""
    box = gr.Textbox(visible=False)
    asked = gr.Button(label, size="sm", elem_id=elem_id, min_width=80).click(
        in_words(_packed(file, make)), list(inputs), [box], **shared.looking
    )
    asked.success(
        None, [box], None, js="packed => { qsSave(packed); return []; }", queue=False, api_visibility="private"
    )


def _packed(name: str, make: Callable[..., str | bytes]) -> Callable[..., str]:
    def packed(*values: Any) -> str:
        content = make(*values)
        data = content.encode() if isinstance(content, str) else content
        kind = TYPES.get(name.rpartition(".")[2], "application/octet-stream")
        return json.dumps({"name": name, "type": kind, "data": base64.b64encode(data).decode()})

    return packed


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV. Text that a spreadsheet would take for a formula is quoted as JSON, which shows white space too."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[_cell(value) for value in row] for row in rows])
    return out.getvalue()


def to_json(value: Any) -> str:
    """A value as JSON for people; what is no number becomes null."""
    return json.dumps(finite(value), ensure_ascii=False, indent=1) + "\n"


def _cell(value: Any) -> Any:
    risky = isinstance(value, str) and (value[:1] in "=+-@\t\r\n" or value != value.strip()) and value
    return json.dumps(value, ensure_ascii=False) if risky else value
