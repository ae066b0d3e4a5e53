"""Residuals of a corpus on disk: harvested once from all chosen layers, in shards, then read by the trainer."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.outliers import norm_outliers


def harvest_residuals(
    backbone: Backbone,
    texts: Iterable[str],
    layers: list[int],
    folder: Path,
    *,
    tokens: int,
    context: int = 256,
    batch: int = 8,
    shard_tokens: int = 65536,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Writes the residuals of the first `tokens` tokens, rounded up to whole shards, to `folder/shard-*.safetensors`.

    Texts are cut into pieces of at most `context` tokens that never cross a text's end. Each piece's position 0 is
    left out (an attention sink, in training as in the report) and counts for nothing. Each shard holds one bf16
    (tokens, d_model) tensor `layer{n}` per layer and is written atomically; shards already there are not made again,
    so a killed run goes on where it was; another corpus, context or choice of layers needs another folder.

    Args:
        part: (i, n) makes only every n-th shard, from the i-th: n processes with one thread each share a harvest better
            than n threads of one process, which wait for each other in every layer.
    """
    pieces = _pieces(backbone, texts, context)
    total = -(-tokens // shard_tokens)
    for number in tqdm(range(total), desc="shards of residuals", unit="shard"):
        wanted: list[list[int]] = []
        size = 0
        while size < shard_tokens and (piece := next(pieces, None)) is not None:
            wanted.append(piece)
            size += len(piece) - 1
        if not wanted:
            break
        path = folder / f"shard-{number:05d}.safetensors"
        if number % part[1] == part[0] and not path.exists():
            write_safetensors(path, _read(backbone, wanted, layers, batch), {"pieces": str(len(wanted))})


def _pieces(backbone: Backbone, texts: Iterable[str], context: int) -> Iterator[list[int]]:
    assert backbone.tokenizer is not None
    for text in texts:
        ids = backbone.tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), context):
            # A remainder of a few tokens has next to no context and would cost a row of padding.
            if len(ids) - start >= min(16, context):
                yield ids[start : start + context]


def _read(backbone: Backbone, pieces: list[list[int]], layers: list[int], batch: int) -> dict[str, Tensor]:
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    # Pieces of like length share a batch, so that little of it is padding.
    by_length = sorted(pieces, key=len)
    for start in range(0, len(by_length), batch):
        rows = by_length[start : start + batch]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        residuals = backbone.residuals(ids, mask.long(), layers=layers)
        mask[:, 0] = False
        for layer, x in residuals.items():
            kept[layer].append(x.cpu()[mask].to(torch.bfloat16))
    return {f"layer{layer}": torch.cat(parts) for layer, parts in kept.items()}


def shards(folder: Path) -> list[Path]:
    """The shards of a harvest, in order.

    Raises:
        QwenScopeError: there are none.
    """
    found = sorted(folder.glob("shard-*.safetensors"))
    if not found:
        raise QwenScopeError(f"expected shards of residuals in {folder}, found none; harvest them first")
    return found


def load_residuals(paths: Iterable[Path], layer: int) -> Float[Tensor, "tokens d_model"]:
    """One layer's residuals of some shards, bf16, the norm outliers of each shard left out.

    Raises:
        QwenScopeError: a layer that was not harvested.
    """
    kept = []
    for path in paths:
        tensors, _ = read_safetensors(path)
        if f"layer{layer}" not in tensors:
            raise QwenScopeError(
                f"expected layer {layer} in {path}, found {', '.join(sorted(tensors))}; harvest that layer too"
            )
        x = tensors[f"layer{layer}"]
        kept.append(x[~norm_outliers(x)])
    return torch.cat(kept)
