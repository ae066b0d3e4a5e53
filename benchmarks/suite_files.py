"""A suite in published files, made for a benchmark, and ways to open one of its layers and encode with it."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import card
import torch
from contenders import Sizes, fill
from torch import Tensor

from qwen_scope.suite import Suite

OpenLayer = Callable[[int], Callable[[Tensor], Any]]
"""The number of a layer -> what turns residuals into features."""


def card_way(folder: Path, k: int, max_bytes: int | None) -> OpenLayer:
    def open_layer(layer: int) -> Callable[[Tensor], Tensor]:
        held = torch.load(path_of(folder, layer), map_location="cpu")
        return lambda x: card.get_feature_acts(x, held["W_enc"], held["b_enc"], k)

    return open_layer


def our_way(folder: Path, k: int, max_bytes: int | None) -> OpenLayer:
    suite = Suite.from_pretrained(folder, k=k, max_bytes=max_bytes)
    return lambda layer: suite[layer].encode


def prepared_way(folder: Path, k: int, max_bytes: int | None) -> OpenLayer:
    suite = Suite.from_pretrained(folder, k=k, max_bytes=max_bytes, prepared=True)
    return lambda layer: suite[layer].encode


WAYS: dict[str, Callable[[Path, int, int | None], OpenLayer]] = {
    "card": card_way,
    "qwen_scope": our_way,
    "qwen_scope_prepared": prepared_way,
}
LABELS = {"card": "the card's way", "qwen_scope": "qwen_scope", "qwen_scope_prepared": "qwen_scope, prepared"}


def pairs(encoded: Any, k: int) -> tuple[Tensor, Tensor]:
    """(indices, values) of what a way gave."""
    if isinstance(encoded, Tensor):
        values, indices = encoded.topk(k, dim=-1)
        return indices, values
    return encoded.indices, encoded.values


def choice(folder: Path, k: int, x: Tensor) -> dict[str, str]:
    """Which kernel encodes, and why; brings in its measurement and compilation, which happen once per machine."""
    sae = Suite.from_pretrained(folder, k=k)[0]
    sae.encode(x)
    found = sae.encoder.choice
    assert found is not None
    return {"kernel": found.kernel, "why": found.why}


@torch.no_grad()
def write_layers(folder: Path, sizes: Sizes, layers: int, seed: int) -> None:
    """Published files, on the disk when this returns."""
    for layer in range(layers):
        W_enc, rows = torch.empty(sizes.d_sae, sizes.d_model), torch.empty(sizes.d_sae, sizes.d_model)
        b_enc, b_dec = torch.empty(sizes.d_sae), torch.empty(sizes.d_model)
        fill(sizes, seed + layer, W_enc, rows, b_enc, b_dec)
        tensors = {"W_enc": W_enc, "W_dec": rows.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec}
        torch.save(tensors, path_of(folder, layer))
        with path_of(folder, layer).open("rb") as file:
            os.fsync(file.fileno())


def path_of(folder: Path, layer: int) -> Path:
    return folder / f"layer{layer}.sae.pt"


def drop_from_page_cache(folder: Path) -> None:
    """Asks the system to read all files here from the disk the next time."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--folder", type=Path, help="where files are made; default: the system's temporary folder")
    options.add_argument("--keep", action="store_true", help="do not remove them at the end")


@contextmanager
def scratch(parent: Path | None, keep: bool) -> Iterator[Path]:
    """A new folder, with this package's cache in it so that prepared copies are made anew, and removed with it."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix="qwen-scope-benchmark-", dir=parent))
    os.environ["QWEN_SCOPE_CACHE"] = str(folder / "cache")
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)
