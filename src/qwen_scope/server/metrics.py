"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest


class Metrics:
    """Figures of one server, in a registry of their own so that a process can run several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "qwen_scope_requests", "Requests answered.", ["endpoint", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("qwen_scope_prompt_tokens", "Tokens of prompts read.", registry=self.registry)
        self.generated_tokens = Counter("qwen_scope_generated_tokens", "Tokens generated.", registry=self.registry)
        self.cancelled = Counter("qwen_scope_cancelled", "Texts given up before they ended.", registry=self.registry)
        self.first_token = Histogram(
            "qwen_scope_time_to_first_token_seconds",
            "From a request to its first token, waiting included.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=self.registry,
        )

    def watch(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Adds a figure that is read whenever somebody asks."""
        Gauge(f"qwen_scope_{name}", about, registry=self.registry).set_function(read)

    def answered(self, endpoint: str, status: int) -> None:
        """Counts a request."""
        self._requests.labels(endpoint, str(status)).inc()

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)
