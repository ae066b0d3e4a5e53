"""`Contents`: which layers a folder or repository holds, in which format, and what it declares about them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_scope.checkpoint import native, published, sae_lens, sparsify
from qwen_scope.checkpoint.config import FORMAT, SuiteConfig
from qwen_scope.checkpoint.weights import ForeignConfig, Weights, read_json
from qwen_scope.errors import QwenScopeError
from qwen_scope.hub import Files
from qwen_scope.sae import Activation

_LAYER_FILE = re.compile(r"layer(\d+)\.(?:sae\.pt|safetensors)")


@dataclass(frozen=True)
class Contents:
    """The layers found, not yet read, and what the files themselves say of them (None: they do not say)."""

    read: Mapping[int, Callable[[], Weights]]
    """For each layer what reads (and on the hub first fetches) its weights."""
    declared_by: str = ""
    """The file that says the following, for error messages."""
    name: str | None = None
    backbone: str | None = None
    k: int | None = None
    activation: Activation | None = None
    d_model: int | None = None
    d_sae: Mapping[int, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnLayer:
    """One layer in a file whose tensors are used as they lie there: published or ours."""

    files: Files
    name: str

    def path(self) -> Path:
        """Where the file is, on the hub once it is fetched."""
        return self.files.path(self.name)

    def __call__(self, check_numbers: bool = True) -> Weights:
        """The weights, memory-mapped; checking that all numbers are finite reads them once."""
        module = native if self.name.endswith(".safetensors") else published
        return module.read(self.path(), check_numbers)


def layer_of_file(filename: str) -> int | None:
    """The layer in `layer{n}.sae.pt` or `layer{n}.safetensors`, None for another name."""
    match = _LAYER_FILE.fullmatch(filename)
    return int(match[1]) if match else None


def published_layers(files: Files, layers: range) -> Contents:
    """The layers of a published group, whose files need not be listed to be known."""
    return Contents({layer: OwnLayer(files, f"layer{layer}.sae.pt") for layer in layers})


def contents_of(files: Files, only: str | None = None) -> Contents:
    """What a folder or repository holds: ours or published files, else SAELens' or sparsify's folders.

    Where our `config.json` is, the layers it declares count, as far as their files are there. Where one layer lies in
    both of our file formats, the safetensors file is read. `only` leaves out all layer files but that one.

    Raises:
        QwenScopeError: no SAE at all, a config that cannot be used, or folders that contradict each other.
    """
    names = files.names()
    # "layer5.safetensors" comes after "layer5.sae.pt", so it is the one kept.
    by_layer = {layer: name for name in sorted(names) if (layer := layer_of_file(name)) is not None}
    if only is not None:
        by_layer = {layer: only for layer in [layer_of_file(only)] if layer is not None}
    config = _config(files, names, by_layer)
    if config:
        here = {layer: by_layer[layer] for layer in config.layers if layer in by_layer}
        if not here:
            raise QwenScopeError(
                f"expected the layers {', '.join(map(str, config.layers)) or '(none)'} that config.json in "
                f"{files.name} declares, found none of their files; copy them beside it"
            )
        read = {layer: OwnLayer(files, name) for layer, name in here.items()}
        shared = (config.name, config.backbone, config.k, config.activation, config.d_model, config.layers)
        return Contents(read, "config.json", *shared, config.provenance)
    if by_layer:
        return Contents({layer: OwnLayer(files, name) for layer, name in by_layer.items()})
    return _foreign(files, names)


def _config(files: Files, names: list[str], by_layer: Mapping[int, str]) -> SuiteConfig | None:
    if "config.json" not in names:
        return None
    path = files.path("config.json")
    found = read_json(path).get("format")
    if isinstance(found, str) and found.startswith(FORMAT.rpartition(" ")[0]):
        return SuiteConfig.from_json(path.read_text(encoding="utf-8"), path)
    if any(name.endswith(".safetensors") for name in by_layer.values()):
        raise QwenScopeError(
            f"expected the format {FORMAT!r} in {path} beside layer files in safetensors, found another kind of "
            "config; write the folder with Suite.save_pretrained"
        )
    return None


def _foreign(files: Files, names: list[str]) -> Contents:
    """The SAEs in SAELens' or sparsify's folders: the folder itself, or each folder in it."""
    configs: dict[int, ForeignConfig] = {}
    read: dict[int, Callable[[], Weights]] = {}
    folders: dict[int, str] = {}
    other_hooks: list[str] = []
    for name in names:
        folder, _, filename = name.rpartition("/")
        if filename != "cfg.json" or folder.count("/") > 0:
            continue
        prefix = f"{folder}/" if folder else ""
        if prefix + sae_lens.WEIGHTS in names:
            hook = sae_lens.hook_of(read_json(files.path(name)))
            layer, module = sae_lens.layer_of(hook), sae_lens
        elif prefix + sparsify.WEIGHTS in names:
            hook = PurePosixPath(folder).name or files.name
            layer, module = sparsify.layer_of(hook), sparsify
        else:
            continue
        if layer is None:
            other_hooks.append(hook)
            continue
        if layer in configs:
            raise QwenScopeError(
                f"expected one SAE per layer in {files.name}, found {folders[layer]} and {folder} for layer {layer}; "
                "pass the folder of one of them"
            )
        if module is sae_lens:
            configs[layer] = sae_lens.read_config(files.path(name))
        else:
            configs[layer] = sparsify.read_config(files.path(name), _sparsify_backbone(files, names))
        folders[layer] = folder
        read[layer] = partial(_read_foreign, module.read, files, prefix + module.WEIGHTS, configs[layer])
    if not configs:
        if other_hooks:
            raise QwenScopeError(
                f"expected SAEs of the residual stream after a layer in {files.name}, found only the hooks "
                f"{', '.join(other_hooks[:5])}; choose SAEs trained at hook_resid_post or on a layer's output"
            )
        raise QwenScopeError(
            f"expected layer0.sae.pt, layer0.safetensors or a folder of SAELens or sparsify in {files.name}, found no "
            "SAE; check the path"
        )
    return Contents(
        read,
        "cfg.json",
        None,
        _common("model", {layer: config.backbone for layer, config in configs.items()}, files),
        _common("k", {layer: config.k for layer, config in configs.items()}, files),
        _common("activation", {layer: config.activation for layer, config in configs.items()}, files),
        _common("d_in", {layer: config.d_model for layer, config in configs.items()}, files),
        {layer: config.d_sae for layer, config in configs.items()},
    )


def _read_foreign(read: Callable[..., Weights], files: Files, name: str, config: ForeignConfig) -> Weights:
    return read(files.path(name), config)


def _sparsify_backbone(files: Files, names: list[str]) -> str | None:
    """sparsify's trainer writes the model's name into a `config.json` above the hookpoints."""
    found = read_json(files.path("config.json")).get("model") if "config.json" in names else None
    return found if isinstance(found, str) else None


def _common(what: str, values: Mapping[int, Any], files: Files) -> Any:
    if len(set(values.values())) > 1:
        each = ", ".join(f"{value} at layer {layer}" for layer, value in sorted(values.items())[:5])
        raise QwenScopeError(
            f"expected one {what} for all layers of {files.name}, found {each}; pass the folder of one layer at a time"
        )
    return next(iter(values.values()))
