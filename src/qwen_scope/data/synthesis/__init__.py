"""Texts made for the features that a set of texts does not fire, and kept only if they fire them (the report, section 6)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.data.synthesis.config import SynthesisConfig
    from qwen_scope.data.synthesis.report import SynthesisReport
    from qwen_scope.data.synthesis.run import synthesize

__all__ = ["SynthesisConfig", "SynthesisReport", "synthesize"]

_HOMES = {"SynthesisConfig": "config", "SynthesisReport": "report", "synthesize": "run"}


def __getattr__(name: str) -> Any:
    # torch takes over a second to import, and the command's options do without.
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_scope.data.synthesis' has no attribute {name!r}")
    return getattr(import_module(f"qwen_scope.data.synthesis.{_HOMES[name]}"), name)
