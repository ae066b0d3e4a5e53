"""Writing a suite's layers into a folder, in any of the four formats."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from qwen_scope.checkpoint import native, published, sae_lens, sparsify
from qwen_scope.checkpoint.config import SuiteConfig
from qwen_scope.checkpoint.weights import Weights, read_json, write_json
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import replacing

_WRITERS = {"safetensors": (native.write, ".safetensors"), "published": (published.write, ".sae.pt")}


def save_own(folder: Path, format: str, config: SuiteConfig, layers: Iterable[tuple[int, Weights]]) -> None:
    """Writes `layer{n}.safetensors` or `layer{n}.sae.pt` and, last, `config.json`.

    Args:
        config: of the suite, with the width of every layer that comes.
        layers: number and weights, taken one at a time.

    Raises:
        QwenScopeError: the folder holds another suite, or one of the layers in the other file format.
    """
    write, ending = _WRITERS[format]
    other = next(e for _, e in _WRITERS.values() if e != ending)
    twice = [f"layer{layer}{other}" for layer in sorted(config.layers) if (folder / f"layer{layer}{other}").exists()]
    if twice:
        raise QwenScopeError(
            f"expected no other file for these layers in {folder}, found {', '.join(twice[:3])}; choose another folder"
        )
    joined(folder, config)
    for layer, weights in layers:
        write(folder / f"layer{layer}{ending}", weights)
    # Read again: another process may have added its layers meanwhile.
    config = joined(folder, config)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")


def joined(folder: Path, config: SuiteConfig) -> SuiteConfig:
    """The config with the layers that are already in the folder.

    Raises:
        QwenScopeError: the folder holds another suite.
    """
    path = folder / "config.json"
    if not path.exists():
        return config
    before = SuiteConfig.from_json(path.read_text(encoding="utf-8"), path)
    for key in ("name", "backbone", "k", "activation", "d_model"):
        if getattr(before, key) != getattr(config, key):
            raise QwenScopeError(
                f"expected {folder} to be empty or to hold the same suite, found one with {key} = "
                f"{getattr(before, key)!r} and not {getattr(config, key)!r}; choose another folder"
            )
    return SuiteConfig(
        config.name,
        config.backbone,
        config.k,
        config.activation,
        config.d_model,
        {**before.layers, **config.layers},
        {**before.provenance, **config.provenance},
    )


def save_foreign(folder: Path, format: str, config: SuiteConfig, layers: Iterable[tuple[int, Weights]]) -> None:
    """Writes the folders of SAELens (`sae-lens`) or sparsify, a layer at a time; arguments as in `save_own`."""
    if config.activation == "topk":
        warnings.warn(
            f"{format} applies a ReLU, so it reads the activation 'topk' of {config.name} as 'topk_relu'; the two "
            "differ "
            "only where fewer than k features are positive",
            stacklevel=3,
        )
    for layer, weights in layers:
        if format == "sae-lens":
            sae_lens.write(folder, weights, layer, config.k, config.activation, config.backbone)
        else:
            sparsify.write(folder, weights, layer, config.k, config.activation)
    if format == "sparsify" and config.backbone is not None:
        # Where sparsify's trainer, and SAELens' reader of its folders, keep the model's name.
        path = folder / "config.json"
        write_json(path, (read_json(path) if path.exists() else {}) | {"model": config.backbone})
