"""The tab Data."""

from __future__ import annotations

from qwen_scope.app.shared import Shared


def build(shared: Shared) -> None:
    """Fills the tab."""
