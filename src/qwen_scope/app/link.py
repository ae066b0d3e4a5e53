"""`Link`: what the address of the page says after its `#`, so that a reload, a bookmark or a friend sees the same.

It is written as a query, `#tab=prompt&text=Hello&run=1`, but after the `#`: browsers keep that part to themselves, so that no
prompt is sent along with the address, lands in a log, or is too long for one. Values are text as it is and everything else as
JSON. `run=1` also presses the tab's main button.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

MOST_FIELDS = 64
"""Values in a link that are read."""
MOST = 2**53
"""The largest number that a link can give: larger integers are none to a browser."""


def href(tab: str, *, run: bool = True, **values: Any) -> str:
    """A link to a tab of this page with some of its components set; not escaped for HTML."""
    pairs = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return "#" + urlencode({"tab": tab, **pairs, **({"run": "1"} if run else {})})


@dataclass(frozen=True)
class Kept:
    """What a link restores of one tab."""

    tab: str
    """Name of the tab."""
    components: dict[str, Component]
    """By the name that the link gives them."""


class Link:
    """Collects, while the page is built, what a link restores."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    def keep(
        self, tab: str, button: gr.Button, components: Mapping[str, Component], *, after: Sequence[Dependency] = ()
    ) -> None:
        """From now on, pressing the button puts the components' values into the address.

        Args:
            tab: name of the tab.
            button: its main button, with the `elem_id` `run-<tab>`.
            components: by the name that the link gives them: Textbox, Number, Slider, Checkbox, Radio, Dropdown, CheckboxGroup.
            after: other events, such as the choice of a token, after which the address is written anew.
        """
        self._kept.append(Kept(tab, dict(components)))
        remember = (
            f"(...values) => {{ qsRemember({json.dumps(tab)}, {json.dumps(list(components))}, values); return []; }}"
        )
        for event in (button.click, *(each.then for each in after)):
            event(None, list(components.values()), None, js=remember, queue=False, api_visibility="private")

    def wire(self, page: gr.Blocks, tabs: gr.Tabs) -> None:
        """Reads the address when the page is opened and whenever a link on it is followed."""
        components = [component for kept in self._kept for component in kept.components.values()]
        address = gr.Textbox(visible=False)
        followed = gr.Button("Follow the link", visible="hidden", elem_id="follow-link")
        for event in (page.load, followed.click):
            event(
                self.restored,
                [address],
                [tabs, *components],
                js="() => [window.location.hash]",
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            ).then(None, None, None, js="() => { qsRun(); return []; }", queue=False, api_visibility="private")

    def restored(self, address: str | None) -> list[Any]:
        """What becomes of the tabs and of each component kept, for the part of an address after its `#`.

        What cannot be read is passed over: an old link should still open.
        """
        try:
            found = dict(parse_qsl((address or "").lstrip("#"), keep_blank_values=True, max_num_fields=MOST_FIELDS))
        except ValueError:
            found = {}
        tab = found.get("tab")
        known = any(kept.tab == tab for kept in self._kept)
        changes: list[Any] = [gr.Tabs(selected=tab) if known else gr.skip()]
        for kept in self._kept:
            for name, component in kept.components.items():
                value = _value(component, found[name]) if kept.tab == tab and name in found else None
                changes.append(gr.skip() if value is None else gr.update(value=value))
        return changes


def _value(component: Component, text: str) -> Any:
    """The value that a link gives a component; None where it cannot have it."""
    if isinstance(component, gr.Textbox):
        return text
    try:
        value = text if isinstance(component, gr.Radio | gr.Dropdown) and not text.startswith("[") else json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(component, gr.Checkbox):
        return value if isinstance(value, bool) else None
    if isinstance(component, gr.Slider | gr.Number):
        # So that no NaN and nothing endless comes in: JSON as Python reads it has both.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
            return None
        low, high = component.minimum, component.maximum
        return None if (low is not None and value < low) or (high is not None and value > high) else value
    if isinstance(component, gr.Radio | gr.Dropdown | gr.CheckboxGroup):
        choices = [choice[1] for choice in component.choices]
        several = value if isinstance(value, list) else [value]
        free = isinstance(component, gr.Dropdown) and component.allow_custom_value
        return value if free or all(each in choices for each in several) else None
    return None
