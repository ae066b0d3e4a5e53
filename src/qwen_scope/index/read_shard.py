"""What one worker does: a shard of the corpus through the model and the SAEs of all layers, to a `Partial` of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from qwen_scope.features import SparseFeatures
from qwen_scope.index.layout import PAIRS, layer_folder, write_table
from qwen_scope.index.partial import Chunk, Keep, Partial
from qwen_scope.index.shards import Shard
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import read_rows
from qwen_scope.scope import Scope
from qwen_scope.tokens import TokenizedText

HELD_TOKENS, HELD_BYTES = 16384, 2**30
"""Residuals of all layers held before they are encoded: so many tokens, or as many as that many bytes hold."""
PAIR_ROWS = 2**20
"""Rows in a row group of pairs/*.parquet."""


@torch.no_grad()
def read_shard(
    scope: Scope,
    shard: Shard,
    layers: Sequence[int],
    keep: Keep,
    *,
    forward_tokens: int,
    pairs: Path | None = None,
    told: Callable[[int], object] = lambda tokens: None,
) -> dict[int, Partial]:
    """Statistics and examples of a shard, by layer; the same on any worker.

    Args:
        pairs: the index's folder, to write every (token, feature) pair to it too.
        told: is called after each pass of the model with the number of its tokens.
    """
    texts = [TokenizedText("", ids.tolist(), [], []) for ids in np.split(shard.ids, shard.pieces[1:-1])]
    width = sum(keep.window) + 1
    found = {layer: Partial.none(scope.suite[layer].d_sae, scope.suite[layer].k, width) for layer in layers}
    written: dict[int, list[tuple[Chunk, np.ndarray]]] = {layer: [] for layer in layers}
    token_bytes = len(layers) * scope.backbone.d_model * scope.backbone.model.dtype.itemsize
    held_bytes = min(HELD_BYTES, HELD_TOKENS * token_bytes)
    for order, residuals in read_rows(
        texts, scope.backbone, layers, forward_tokens=forward_tokens, held_bytes=held_bytes, told=told
    ):
        starts, lengths = shard.pieces[order], np.diff(shard.pieces)[order]
        begins = np.cumsum(lengths) - lengths
        within = np.arange(lengths.sum()) - np.repeat(begins, lengths)
        place = np.repeat(starts, lengths) + within
        for layer in layers:
            x = residuals.pop(layer)
            kept, outliers = kept_tokens(x, torch.from_numpy(within == 0))
            sae = scope.suite[layer]
            features: SparseFeatures = sae.encode(x.to(sae.device).float()).to("cpu")
            chunk = Chunk(
                features.indices.to(torch.int32).numpy(),
                features.values.numpy(),
                shard.first + place,
                np.repeat(np.asarray(order), lengths),
                kept,
            )
            found[layer] = found[layer].with_chunk(chunk, outliers, keep)
            if pairs is not None:
                written[layer].append((chunk, place))
    if pairs is not None:
        for layer in layers:
            _write_pairs(layer_folder(pairs, layer) / "pairs" / f"{shard.number:06}.parquet", shard, written.pop(layer))
    return found


def kept_tokens(x: torch.Tensor, first: torch.Tensor) -> tuple[np.ndarray, int]:
    """Which residuals count, as (tokens,) booleans, and how many of those not at position 0 have an extreme norm."""
    outliers = torch.zeros_like(first)
    if not first.all():
        outliers[~first] = norm_outliers(x[~first.to(x.device)]).cpu()
    return (~first & ~outliers).numpy(), int(outliers.sum())


def _write_pairs(path: Path, shard: Shard, chunks: list[tuple[Chunk, np.ndarray]]) -> None:
    place = np.concatenate([place for _, place in chunks])
    order = np.argsort(place)
    indices, values, kept = (
        np.concatenate([getattr(chunk, name) for chunk, _ in chunks])[order] for name in ("indices", "values", "kept")
    )
    token, column = np.nonzero(values > 0)
    # All tokens of the shard are there, so a token's place in the order is its place in the shard.
    piece = np.searchsorted(shard.pieces, token, "right") - 1
    table = {
        "document": shard.documents[piece],
        "position": token - shard.pieces[piece],
        "token": shard.ids[token],
        "kept": kept[token],
        "feature": indices[token, column],
        "value": values[token, column],
    }
    write_table(path, pa.table(table, schema=PAIRS), PAIR_ROWS)
