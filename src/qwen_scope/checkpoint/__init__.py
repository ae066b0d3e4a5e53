"""Reading and writing one layer's SAE in each file format, and finding the layers behind a name.

| format | files | module |
|---|---|---|
| `published` | `layer{n}.sae.pt` | `published` |
| `safetensors` | `layer{n}.safetensors` | `native` |
| `sae-lens` | `blocks.{n}.hook_resid_post/{cfg.json,sae_weights.safetensors}` | `sae_lens` |
| `sparsify` | `layers.{n}/{cfg.json,sae.safetensors}` | `sparsify` |
"""

from typing import Literal

from qwen_scope.checkpoint.config import SuiteConfig
from qwen_scope.checkpoint.contents import Contents
from qwen_scope.checkpoint.naming import find
from qwen_scope.checkpoint.saving import save_foreign, save_own
from qwen_scope.checkpoint.weights import Weights

Format = Literal["safetensors", "published", "sae-lens", "sparsify"]
"""The file formats that can be written; all of them can be read."""

__all__ = [
    "Contents",
    "Format",
    "SuiteConfig",
    "Weights",
    "find",
    "save_foreign",
    "save_own",
]
