"""`create`: the whole page, a tab a module."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

# Before Gradio is imported, which tells its makers that it was.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from qwen_scope.app import compare, data, features, look, prompt, steer
from qwen_scope.app.config import AppConfig
from qwen_scope.app.link import Link
from qwen_scope.app.shared import Shared
from qwen_scope.steering.recipe import model_name

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope

T = TypeVar("T")
TABS: tuple[tuple[str, str, Callable[[Shared], None]], ...] = (
    ("prompt", "Prompt", prompt.build),
    ("compare", "Compare", compare.build),
    ("steer", "Steer", steer.build),
    ("features", "Features", features.build),
    ("data", "Data", data.build),
)
"""Name in links, title, and what fills it."""
KEPT_SECONDS = 3600
"""How long uploaded files are kept, and how often they are looked through."""


def create(
    scope: Scope,
    index: FeatureIndex | None = None,
    config: AppConfig = AppConfig(),
    *,
    model: str | None = None,
    suite: str | None = None,
    opening: str = "Scope.from_pretrained()",
) -> gr.Blocks:
    """The page; `running` shows it.

    Args:
        scope: the model and its SAEs.
        index: a feature index of the same suite, for labels, search and features' pages; its highest activations are what
            strengths are counted in.
        config: limits.
        model: what the page calls the model. Default: its own name.
        suite: what it calls the SAEs. Default: theirs.
        opening: the Python expression that opens such a scope.
    """
    if index is not None and set(scope.layers) <= set(index.layers):
        scope.maxima = index.maxima
        # Or a search by example would load the model once more.
        index.scope = scope
    shared = Shared(scope, index, config, Link(), opening)
    above = look.above(model or model_name(scope.backbone, scope.suite), suite or scope.suite.name)
    return in_event_loop(lambda: _page(shared, above))


def _page(shared: Shared, above: str) -> gr.Blocks:
    with gr.Blocks(
        title="Qwen-Scope", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS), fill_width=True
    ) as page:
        gr.HTML(above)
        with gr.Tabs(selected=TABS[0][0], elem_id="tabs") as tabs:
            for name, title, fill in TABS:
                with gr.Tab(title, id=name, elem_id=f"tab-{name}"):
                    fill(shared)
        gr.HTML(look.below())
        shared.link.wire(page, tabs)
    return page.queue(max_size=shared.config.max_queued)


def in_event_loop(call: Callable[[], T]) -> T:
    """What the call returns, made in a thread with a running event loop: without one, Gradio makes loops and leaves them open."""

    async def called() -> T:
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, called()).result()
