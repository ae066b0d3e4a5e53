"""An OpenAI-compatible server whose answers can be steered: chats and completions, features, and the feature index."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.server.app import create_app
    from qwen_scope.server.config import ServerConfig
    from qwen_scope.server.listen import running, serve

__all__ = ["ServerConfig", "create_app", "running", "serve"]

_HOMES = {"ServerConfig": "config", "create_app": "app", "running": "listen", "serve": "listen"}


def __getattr__(name: str) -> Any:
    # The command line reads the config alone, and must wait neither for torch nor for the web framework.
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_scope.server' has no attribute {name!r}")
    return getattr(import_module(f"qwen_scope.server.{_HOMES[name]}"), name)
