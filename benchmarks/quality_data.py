"""The residuals that quality.py trains and measures on: read once from the bundled model, then kept in a folder."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from contenders import Sizes, residuals
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.bundled import MODEL_NAME
from qwen_scope.training.blocks import BlockCache, Blocks, kept_rows, read_block
from qwen_scope.training.pieces import Pieces

DEPENDS_ON = ("model", "corpus", "seed", "context", "buffer_tokens", "held_out")
"""What residuals follow from, beside block and layer: a folder made from something else is refused."""


@dataclass(frozen=True)
class Data:
    """What is read of the corpus, and in which order it is trained on."""

    layer: int
    context: int
    corpus_tokens: int
    """The first tokens of the corpus, which training and held-out documents are drawn from."""
    blocks: int
    """Blocks of shuffled text that are trained on, of those that the tokens give."""
    buffer_tokens: int
    """Residuals in a block, which are shuffled once more."""
    held_out: int
    seed: int = 0


def read_corpus(data: Data, corpus: Path, folder: Path) -> None:
    """Writes the residuals to a folder; those already there are not read again.

    Position 0 of every piece is left out.
    """
    backbone = Backbone.from_pretrained(dtype="bfloat16")
    assert backbone.tokenizer is not None
    tokens = folder / "tokens"
    pieces = (
        Pieces.open(tokens)
        if tokens.exists()
        else Pieces.write(
            tokens, texts(corpus), backbone.tokenizer, context=data.context, tokens=data.corpus_tokens + data.held_out
        )
    )
    about = {**asdict(data), "model": MODEL_NAME, "corpus": pieces.fingerprint()}
    train, held_out = pieces.split(data.held_out, data.seed)
    blocks = Blocks(pieces, train, data.seed, data.buffer_tokens)
    if len(blocks) < data.blocks:
        raise SystemExit(
            f"expected {data.blocks} blocks of text, found {len(blocks)}; give a longer corpus than {corpus}"
        )
    wanted = [("heldout", 0, held_out), *(("train", n, blocks.of(n)) for n in range(data.blocks))]
    for part, number, chosen in wanted:
        cache = BlockCache(folder / part, {name: about[name] for name in DEPENDS_ON})
        if not cache.load(number, [data.layer]):
            print(f"reading the residuals of {part} block {number}", flush=True)
            cache.save(number, read_block(backbone, pieces, chosen, [data.layer]))


def texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def write_random(data: Data, sizes: Sizes, folder: Path) -> None:
    """Gaussian residuals in place of a corpus', to see whether everything runs."""
    for number in range(data.blocks):
        x = residuals(data.buffer_tokens, sizes.d_model, data.seed + number + 1)
        BlockCache(folder / "train", {}).save(number, {data.layer: x})
    held_out = residuals(data.held_out, sizes.d_model, data.seed)
    BlockCache(folder / "heldout", {}).save(0, {data.layer: held_out})


def training_tokens(data: Data, folder: Path, tokens: int) -> Tensor:
    """The first `tokens` residuals to train on, (tokens, d_model), in the order in which all train on them."""
    parts, found = [], 0
    for number in range(data.blocks):
        x = kept(data, folder / "train", number)
        generator = torch.Generator().manual_seed(data.seed + number)
        parts.append(x[torch.randperm(len(x), generator=generator)])
        found += len(x)
        if found >= tokens:
            return torch.cat(parts)[:tokens]
    raise SystemExit(f"expected {tokens} tokens in {data.blocks} blocks, found {found}; read more blocks")


def held_out_tokens(data: Data, folder: Path) -> Tensor:
    return kept(data, folder / "heldout", 0).float()


def kept(data: Data, folder: Path, number: int) -> Tensor:
    """A block's residuals, norm outliers left out."""
    x = BlockCache(folder, {}).load(number, [data.layer])[data.layer]
    return x[kept_rows(x)]
