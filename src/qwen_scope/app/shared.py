"""`Shared`: what every tab is built with, and the contract that tabs keep.

A tab is a module with one function, `build(shared: Shared) -> None`. `build.create` calls it once, inside the `gr.Tab` that it
fills; it makes its components, wires their events, and gives nothing back. What tabs agree on:

- **No visitor meets another.** What a click finds is returned to components or to a `gr.State`, never kept in a module or an
  object. `scope` and `index` are used by all at once, which both allow; `shared.scope` is never changed.
- **Events that run the model** are given `**shared.running`, so that so many run at once as the config says and the rest wait
  in the queue; those that only look something up are given `**shared.looking`, and wait for nobody.
- **Errors are told in words.** Every event handler is wrapped in `in_words`, which shows a `QwenScopeError` to the visitor.
- **What users or models wrote is escaped** wherever it goes into HTML; `tokens` has what shows tokens.
- **The main button** has `elem_id="run-<tab>"` and `variant="primary"`, and `shared.link.keep(...)` is told which components a
  link restores; `link` says the rest. `#tab=features&feature=15/1037&run=1`, as `link.href` writes it, is a link to anything.
- **What is shown can be taken away**: `export.buttons` makes a row of CSV, JSON, PNG and the Python lines, which begin with
  `scope = <shared.opening>`.
- Elements that tests and pictures look for have an `elem_id` that begins with the tab's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from html import escape
from typing import TYPE_CHECKING, Any, no_type_check

import gradio as gr

from qwen_scope.app.config import AppConfig
from qwen_scope.app.link import Link
from qwen_scope.app.names import Names
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope


@dataclass(frozen=True)
class Shared:
    """What every tab is built with. The module's docstring says how it is used."""

    scope: Scope
    """The model and its SAEs; its `maxima` are those of the index, where there is one."""
    index: FeatureIndex | None
    """The feature index of the suite; None where there is none, and a tab says so."""
    config: AppConfig
    """Limits."""
    link: Link
    """What a link restores."""
    opening: str = "Scope.from_pretrained()"
    """The Python expression that opens such a scope, for the lines that give a result."""

    @cached_property
    def names(self) -> Names:
        """What features are called: label, else the tokens that they peak at."""
        return Names(self.index)

    @property
    def units(self) -> str:
        """The Python lines after which strengths such as `2x` count as here, where the scope that was opened counts otherwise."""
        from qwen_scope.index.feature_index import bundled_folder

        if self.index is None or self.index.folder == bundled_folder() or self.scope.maxima is not self.index.maxima:
            return ""
        # The rest of the path is this machine's affair.
        folder = self.index.folder.name
        return f"from qwen_scope.index import FeatureIndex\n\nscope.maxima = FeatureIndex.open({folder!r}).maxima\n"

    @property
    def running(self) -> dict[str, Any]:
        """What events that run the model are given: `button.click(…, **shared.running)`."""
        return {"concurrency_limit": self.config.at_once, "concurrency_id": "model", "api_visibility": "private"}

    @property
    def looking(self) -> dict[str, Any]:
        """What events that only look something up are given."""
        # Through the queue all the same: Gradio's page shows no errors of what does not pass it.
        return {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


@no_type_check  # else the tests' check of types would hide from Gradio which handlers yield
def in_words(handler: Callable[..., Any]) -> Callable[..., Any]:
    """An event handler, also one that yields, whose `QwenScopeError` is told to the visitor and stays on the page."""

    if inspect.isgeneratorfunction(inspect.unwrap(handler)):

        @wraps(handler)
        def yielding(*values: Any, **named: Any) -> Iterator[Any]:
            try:
                yield from handler(*values, **named)
            except QwenScopeError as error:
                raise told(error) from error

        return yielding

    @wraps(handler)
    def returning(*values: Any, **named: Any) -> Any:
        try:
            return handler(*values, **named)
        except QwenScopeError as error:
            raise told(error) from error

    return returning


def told(error: QwenScopeError) -> gr.Error:
    """The error as the page shows it, as text whatever it quotes."""
    return gr.Error(escape(str(error)), duration=None, title="That cannot be done", print_exception=False)
