"""`Suite`: the SAEs of one backbone, one per layer, found by name, loaded when first used, evicted by bytes."""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from qwen_scope import hub
from qwen_scope.bundled import suite_folder
from qwen_scope.checkpoint import (
    Contents,
    Format,
    SuiteConfig,
    Weights,
    find,
    save_foreign,
    save_own,
)
from qwen_scope.checkpoint.contents import OwnLayer
from qwen_scope.devices import as_device
from qwen_scope.errors import QwenScopeError
from qwen_scope.kernels import Kernel
from qwen_scope.prepared import prepare
from qwen_scope.sae import Activation, TopKSAE

__all__ = ["Suite", "SuiteConfig"]


class Suite:
    """The SAEs of one backbone: `suite[12]` is the `TopKSAE` of layer 12, and iterating gives the layers' numbers.

    Made by `Suite.from_pretrained` (a published group, a hub repository, a folder, a file) or `Suite.of` (SAEs in
    memory). Layers can be asked for from several threads.
    """

    def __init__(
        self,
        contents: Contents,
        name: str,
        k: int,
        activation: Activation,
        device: str | torch.device = "cpu",
        max_bytes: int | None = None,
        kernel: Kernel | None = None,
        prepared: bool = False,
    ):
        self.name = name
        """What the suite is called: what its config says, else the repository or folder."""
        self.backbone = contents.backbone
        """Hub id of the language model the SAEs were trained on, None if nothing says."""
        self.k = k
        """Features kept per token."""
        self.activation: Activation = activation
        """What becomes of a kept pre-activation below 0, see `qwen_scope.sae.Activation`."""
        self.provenance: dict[str, Any] = dict(contents.provenance)
        """How the SAEs came about, as their config tells it; empty if nothing does."""
        self._contents = contents
        self._device = as_device(device)
        self._kernel: Kernel | None = kernel
        self._use_prepared = prepared
        self._max_bytes = _half_of_memory(self._device) if max_bytes is None else max_bytes
        self.most_layers: int | None = None
        """Layers that stay loaded at most, where that is set; `max_bytes` limits them besides."""
        self._loaded: OrderedDict[int, TopKSAE] = OrderedDict()  # the least recently used first
        self._lock = threading.RLock()

    @staticmethod
    def from_pretrained(
        name: str | Path | None = None,
        k: int | None = None,
        activation: Activation | None = None,
        layers: Iterable[int] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        max_bytes: int | None = None,
        device: str | torch.device = "cpu",
        kernel: Kernel | None = None,
        prepared: bool = False,
    ) -> "Suite":
        """Opens a suite; no layer is read or fetched before it is used.

        Args:
            name: in this order: a folder; a file `layer{n}.sae.pt` or `layer{n}.safetensors`; a published group as its
                repository (`Qwen/` may be left out) or short name (`qwen3.5-2b-k50`); any hub repository. None is the
                suite that comes with the package.
            k: features per token. Overrides what `config.json`, else the folder's or repository's name says.
            activation: `topk` or `topk_relu`, overriding the config; where nothing says it is `topk`, as the card
                defines the published checkpoints.
            layers: only these layers.
            revision: branch, tag or commit on the hub.
            cache_dir: where the hub's files are kept instead of `HF_HOME`.
            max_bytes: the least recently used layers are dropped when those loaded exceed this (one always stays).
                Default: half the memory of the machine, or of the GPU if `device` is one.
            device: where layers are put.
            kernel: which path encodes (`qwen_scope.kernels.choice.Kernel`); by default the fastest one on this machine.
            prepared: keep a copy of each layer used in the cache folder, laid out for encoding and decoding (three
                quarters of the layer's size); from then on it opens in milliseconds and its pages are shared and
                reclaimable. For published and safetensors files on the CPU; others are read as ever.

        Raises:
            QwenScopeError: nothing of that name, nothing that says k, a layer that is not there, or files that cannot
                be used; one sentence each.
        """
        contents, title = find(suite_folder() if name is None else name, revision, cache_dir)
        k = contents.k if k is None else k
        if k is None:
            raise QwenScopeError(
                f"expected a config.json in {title} or a name that says k (as SAE-Res-Qwen3.5-2B-Base-W32K-L0_50 "
                "does), found neither; pass k="
            )
        if not isinstance(k, int) or k < 1:
            raise QwenScopeError(
                f"expected a whole number k of at least 1, found {k!r}; pass the k the SAEs were trained with"
            )
        activation = activation or contents.activation or "topk"
        if activation not in get_args(Activation):
            raise QwenScopeError(
                f"expected activation 'topk' or 'topk_relu', found {activation!r}; choose one of the two"
            )
        if layers is not None:
            read = {layer: contents.read[layer] for layer in _chosen(layers, contents, contents.name or title)}
            contents = replace(contents, read=read)
        return Suite(contents, contents.name or title, k, activation, device, max_bytes, kernel, prepared)

    @staticmethod
    def of(
        saes: Mapping[int, TopKSAE],
        name: str = "unnamed",
        backbone: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Suite":
        """A suite of SAEs in memory, by layer; they are kept as they are and never evicted.

        Raises:
            QwenScopeError: none at all, a layer below 0, or SAEs that differ in d_model, k or activation.
        """
        kinds: set[tuple[int, int, Activation]] = {(sae.d_model, sae.k, sae.activation) for sae in saes.values()}
        if len(kinds) != 1 or min(saes) < 0:
            each = "; ".join(f"layer {layer}: {sae.extra_repr()}" for layer, sae in saes.items())
            raise QwenScopeError(
                f"expected SAEs of one d_model, k and activation at layers from 0, found {each or 'none'}; make one "
                "suite of each kind"
            )
        d_model, k, activation = kinds.pop()
        contents = Contents(
            {layer: lambda sae=sae: Weights.of(sae) for layer, sae in saes.items()},
            backbone=backbone,
            d_model=d_model,
            d_sae={layer: sae.d_sae for layer, sae in saes.items()},
            provenance=provenance or {},
        )
        suite = Suite(contents, name, k, activation, max_bytes=sys.maxsize)
        suite._loaded.update(saes)
        return suite

    @property
    def layers(self) -> list[int]:
        """The layers there are, in order."""
        return sorted(self._contents.read)

    @property
    def d_model(self) -> int:
        """Width of the residual stream; loads the first layer where neither config nor catalogue tells it."""
        declared = self._contents.d_model
        return self[self.layers[0]].d_model if declared is None else declared

    def __getitem__(self, layer: int) -> TopKSAE:
        """The SAE of a layer, loaded if it is not (any more).

        Raises:
            QwenScopeError: no such layer, or its file cannot be fetched or used.
        """
        if layer not in self:
            raise QwenScopeError(
                f"expected one of the layers {ranges(self.layers)} of {self.name}, found {layer!r}; choose one of those"
            )
        with self._lock:
            if layer not in self._loaded:
                self._loaded[layer] = self._load(layer)
            self._loaded.move_to_end(layer)
            # At every use: what an SAE keeps for encoding is made after it was loaded.
            while len(self._loaded) > 1 and self._too_much():
                self._loaded.popitem(last=False)
            return self._loaded[layer]

    def _too_much(self) -> bool:
        many = self.most_layers is not None and len(self._loaded) > self.most_layers
        return many or sum(sae.nbytes for sae in self._loaded.values()) > self._max_bytes

    def _load(self, layer: int) -> TopKSAE:
        read = self._contents.read[layer]
        if self._use_prepared and self._device.type == "cpu" and isinstance(read, OwnLayer):
            sae = prepare(read, self.k, self.activation, self._kernel)
            self._check(layer, Weights(*sae.parameters()))
        else:
            weights = read()
            self._check(layer, weights)
            sae = TopKSAE(*weights, k=self.k, activation=self.activation, kernel=self._kernel)
        return sae.to(self._device)

    def _check(self, layer: int, weights: Weights) -> None:
        """Refuses weights of another size than the name, the catalogue or the config declares."""
        declared = self._contents
        for what, expected, found in (
            ("d_model", declared.d_model, weights.d_model),
            ("d_sae", declared.d_sae.get(layer), weights.d_sae),
        ):
            if expected is not None and expected != found:
                raise QwenScopeError(
                    f"expected {what} = {expected} at layer {layer} of {self.name}, as {declared.declared_by} says, "
                    f"found tensors with {what} = {found}; check that the file belongs to this suite"
                )

    def __len__(self) -> int:
        return len(self._contents.read)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self._contents.read

    def __repr__(self) -> str:
        return (
            f"Suite({self.name!r}, backbone={self.backbone!r}, layers {ranges(self.layers)}, k={self.k}, "
            f"activation={self.activation!r})"
        )

    def save_pretrained(
        self,
        folder: str | Path,
        format: Format = "safetensors",
        layers: Iterable[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes layers into a folder, one at a time, each file atomically.

        `safetensors` and `published` folders also get our `config.json`, written last; more layers of the same suite
        can be added to such a folder later. `sae-lens` and `sparsify` folders are laid out as those libraries write
        them; both apply a ReLU, so for an SAE of activation `topk` a warning says that they read it as `topk_relu`.

        Args:
            folder: made if it is not there.
            format: see `qwen_scope.checkpoint.Format`.
            layers: only these; default all.
            dtype: `torch.float32` or `torch.bfloat16`; default as it is.

        Raises:
            QwenScopeError: an unknown format, dtype or layer, a folder that cannot be written or, for our two formats,
                holds another suite.
        """
        if format not in get_args(Format):
            raise QwenScopeError(
                f"expected one of the formats {', '.join(get_args(Format))}, found {format!r}; choose one"
            )
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise QwenScopeError(
                f"expected dtype torch.float32 or torch.bfloat16, found {dtype}; choose one of the two"
            )
        chosen = self.layers if layers is None else _chosen(layers, self._contents, self.name)
        widths = {layer: self._contents.d_sae.get(layer) or self[layer].d_sae for layer in chosen}
        config = SuiteConfig(self.name, self.backbone, self.k, self.activation, self.d_model, widths, self.provenance)
        weights = ((layer, Weights.of(self[layer], dtype)) for layer in chosen)
        save = save_own if format in ("safetensors", "published") else save_foreign
        save(Path(folder), format, config, weights)

    def push_to_hub(
        self,
        repo_id: str,
        format: Format = "safetensors",
        layers: Iterable[int] | None = None,
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        commit_message: str = "Upload SAEs with qwen-scope",
    ) -> None:
        """`save_pretrained` to a temporary folder, then one commit to a hub repository, made if it is not there.

        Raises:
            QwenScopeError: see `save_pretrained`; or what the hub refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, format, layers, dtype)
            hub.upload(Path(folder), repo_id, private, commit_message)


def _chosen(layers: Iterable[int], contents: Contents, name: str) -> list[int]:
    wanted = sorted(set(layers))
    missing = [layer for layer in wanted if layer not in contents.read]
    if missing or not wanted:
        raise QwenScopeError(
            f"expected layers among {ranges(sorted(contents.read))} of {name}, found {missing or 'none at all'}; "
            "choose some of those"
        )
    return wanted


def ranges(layers: Sequence[int]) -> str:
    """Sorted numbers as a person writes them: 0-3, 7."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _half_of_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 8 * 2**30  # Windows does not tell without another dependency
