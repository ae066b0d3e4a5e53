"""Qwen-Scope: look inside a language model through sparse autoencoders. Text in, features out; features in, text out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.backbone import Backbone
    from qwen_scope.errors import QwenScopeError
    from qwen_scope.features import SparseFeatures
    from qwen_scope.generation.result import Generation
    from qwen_scope.generation.sampling import Sampling
    from qwen_scope.sae import TopKSAE
    from qwen_scope.scope import Scope
    from qwen_scope.steering.steering import Steering
    from qwen_scope.suite import Suite
    from qwen_scope.text_features import TextFeatures

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "Generation",
    "QwenScopeError",
    "Sampling",
    "Scope",
    "SparseFeatures",
    "Steering",
    "Suite",
    "TextFeatures",
    "TopKSAE",
]

_HOMES = {
    "Backbone": "backbone",
    "Generation": "generation.result",
    "QwenScopeError": "errors",
    "Sampling": "generation.sampling",
    "Scope": "scope",
    "SparseFeatures": "features",
    "Steering": "steering.steering",
    "Suite": "suite",
    "TextFeatures": "text_features",
    "TopKSAE": "sae",
}


def __getattr__(name: str) -> Any:
    # torch takes over a second to import; `import qwen_scope` and `qwen-scope --help` do without until a name is used.
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_scope' has no attribute {name!r}")
    return getattr(import_module(f"qwen_scope.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
