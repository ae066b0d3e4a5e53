"""What tests of the server share: a slow or breaking model, servers of it, and what they tell of themselves."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.scope import Scope
from qwen_scope.server import ServerConfig, running

MODEL = "LlamaForCausalLM"
"""What the tiny model calls itself."""


class Served:
    """A server and clients of it."""

    def __init__(self, url: str, client: OpenAI, web: httpx.Client):
        self.url, self.client, self.web = url, client, web

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.web.post(f"{self.url}/{path}", json=body)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("chat/completions", {"messages": [{"role": "user", "content": "the capital"}], **body})

    def figures(self) -> dict[str, float]:
        """Metrics without labels."""
        text = self.web.get(f"{self.url.removesuffix('/v1')}/metrics").text
        found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name.removeprefix("qwen_scope_"): sample.value for sample in found if not sample.labels}

    def until(self, name: str, value: float) -> dict[str, float]:
        """Waits until a metric has a value."""
        end = time.monotonic() + 30
        while (figures := self.figures())[name] != value:
            assert time.monotonic() < end, f"{name} stays at {figures[name]}"
            time.sleep(0.01)
        return figures

    def idle(self) -> None:
        """Waits until nothing runs, and checks that nothing is left."""
        figures = self.until("running", 0)
        assert (figures["queued"], figures["cache_bytes"]) == (0, 0)


@contextmanager
def served(scope: Scope, index: FeatureIndex | None = None, *, key: str = "none", **config: Any) -> Iterator[Served]:
    # Retries would hide what fails.
    with running(scope, index, ServerConfig(port=0, **config)) as url:
        headers = {"Authorization": f"Bearer {key}"}
        with (
            OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client,
            httpx.Client(timeout=60, headers=headers) as web,
        ):
            yield Served(url, client, web)


def slowed(scope: Scope, seconds: float) -> None:
    """Makes every forward pass of a model take longer."""
    scope.backbone.layers[0].register_forward_pre_hook(lambda module, args: time.sleep(seconds))
