"""`Fired`: which features each item of a set fires, as one sparse matrix of items by features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from qwen_scope.corpus import Document
from qwen_scope.errors import QwenScopeError
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import read_rows
from qwen_scope.tokens import TokenizedText, tokenize

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

Position = Literal["last", "any"]
"""Where an item must fire a feature: at its `last` token, whatever that is (the report, section 4), or at `any` token but the
first and norm outliers (the report, section 5, which leaves out none)."""


@dataclass(frozen=True, eq=False)
class Fired:
    """Which features each item fires, in the compressed rows of a sparse matrix: item i fires
    `features[starts[i] : starts[i + 1]]`, in ascending order, no feature twice."""

    starts: Int[ndarray, " items_and_one"]
    """Where each item begins, and where the last one ends."""
    features: Int[ndarray, " pairs"]
    """Numbers of features, int32."""
    values: Float[ndarray, " pairs"]
    """The highest value of each there, float32."""
    d_sae: int
    """Width of the dictionary."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Int[ndarray, " d_sae"]:
        """By how many items each feature is fired."""
        return np.bincount(self.features, minlength=self.d_sae)

    @property
    def items(self) -> Int[ndarray, " pairs"]:
        """Which item each pair is of."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def of(self, item: int) -> Int[ndarray, " fired"]:
        """The features that one item fires."""
        return self.features[self.starts[item] : self.starts[item + 1]]

    def take(self, items: Int[ndarray, " taken"]) -> Fired:
        """The same of some items, in the order given, repeated where they are."""
        lengths = np.diff(self.starts)[items]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + np.repeat(self.starts[:-1][items], lengths)
        return Fired(starts, self.features[at], self.values[at], self.d_sae)


@dataclass(frozen=True, eq=False)
class Read:
    """What one pass of the model over a set's items gives."""

    fired: dict[int, Fired]
    """By layer, which features each item fires."""
    means: dict[int, Float[ndarray, "items d_model"]]
    """By layer, the mean residual over the same tokens, float32; empty if not asked for."""
    lengths: Int[ndarray, " items"]
    """Tokens of each item."""


def fired(
    scope: Scope, texts: Sequence[Document], layer: int, position: Position = "last", *, progress: bool = True
) -> Fired:
    """Which features of one layer each item fires; see `read`."""
    return read(scope, texts, [layer], position, progress=progress).fired[layer]


def read(
    scope: Scope,
    texts: Sequence[Document],
    layers: Sequence[int],
    position: Position = "last",
    *,
    means: bool = False,
    progress: bool = True,
    places: Sequence[str] | None = None,
) -> Read:
    """Reads each item through the model and its SAEs, and keeps which features it fires (value > 0) and how much at most.

    Args:
        texts: texts or chat messages; each is read whole, alone.
        layers: whose features, all from one pass of the model.
        position: see `Position`.
        means: whether to keep mean residuals too, as linear probes need them.
        progress: whether to show a bar.
        places: where each text was, to say which one cannot be read.

    Raises:
        QwenScopeError: an item that cannot be read or is longer than the model's context, or a layer that is not there.
    """
    if places is None:
        tokenized, _ = tokenize(list(texts), scope.backbone.tokenizer)
    else:
        tokenized = [readable(scope, text, where) for text, where in zip(texts, places, strict=True)]
    return read_tokens(scope, tokenized, layers, position, means=means, progress=progress)


def readable(scope: Scope, document: Document, where: str) -> TokenizedText:
    """A text as the model reads it.

    Raises:
        QwenScopeError: it cannot be read, or is longer than the model's context; says where it was.
    """
    limit = scope.backbone.context_length
    try:
        (text,), _ = tokenize([document], scope.backbone.tokenizer)
    except QwenScopeError as error:
        raise QwenScopeError(f"{error} ({where})") from error
    if limit is not None and len(text) > limit:
        raise QwenScopeError(
            f"expected an item of at most {limit} tokens, the model's context, in {where}, found {len(text)}; shorten it"
        )
    return text


def read_tokens(
    scope: Scope,
    texts: Sequence[TokenizedText],
    layers: Sequence[int],
    position: Position = "last",
    *,
    means: bool = False,
    progress: bool = True,
) -> Read:
    """The same of texts that are tokenized already."""
    if position not in get_args(Position):
        raise QwenScopeError(f"expected position 'last' or 'any', found {position!r}; choose one of the two")
    for layer in layers:
        scope.suite[layer]
    widths = {layer: scope.suite[layer].d_sae for layer in layers}
    parts: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {layer: [] for layer in layers}
    pooled = {layer: np.zeros((len(texts), scope.backbone.d_model), np.float32) for layer in layers if means}
    total = sum(map(len, texts))
    with tqdm(total=total, desc="reading", unit="token", disable=not progress or len(texts) < 64) as bar:
        for order, residuals in read_rows(texts, scope.backbone, layers, told=bar.update):
            lengths = torch.tensor([len(texts[text]) for text in order])
            owner = torch.repeat_interleave(torch.arange(len(order)), lengths)
            for layer in layers:
                x = residuals.pop(layer)
                kept = _kept(x, lengths, position)
                if means:
                    pooled[layer][order] = _means(x[kept.to(x.device)], owner[kept], len(order))
                parts[layer] += _pairs(scope, layer, x, kept, owner, order)
    return Read(
        {layer: _joined(parts.pop(layer), widths[layer]) for layer in layers},
        pooled,
        np.array([len(text) for text in texts]),
    )


def _kept(x: Tensor, lengths: Tensor, position: Position) -> Tensor:
    """Which rows count, of texts that lie one after another."""
    ends = lengths.cumsum(0)
    if position == "last":
        return ends - 1
    first = torch.zeros(len(x), dtype=torch.bool)
    first[ends - lengths] = True
    return (~first & ~norm_outliers(x).cpu()).nonzero()[:, 0]


def _means(x: Tensor, owner: Tensor, items: int) -> np.ndarray:
    total = torch.zeros(items, x.shape[1], dtype=torch.float64).index_add_(0, owner, x.cpu().double())
    counts = torch.bincount(owner, minlength=items).clamp_min(1)
    return (total / counts[:, None]).float().numpy()


def _pairs(
    scope: Scope, layer: int, x: Tensor, kept: Tensor, owner: Tensor, order: list[int]
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Each text with the features it fires, in ascending order, and the highest value of each."""
    if not len(kept):
        return [(text, np.empty(0, np.int32), np.empty(0, np.float32)) for text in order]
    sae = scope.suite[layer]
    features = sae.encode(x[kept.to(x.device)].to(sae.device))
    active = features.active.cpu()
    owners = owner[kept][:, None].expand_as(active)[active].numpy()
    numbers = features.indices.cpu()[active].numpy()
    values = features.values.cpu()[active].float().numpy()
    # By owner, then feature, then the highest value first: the first of each pair is kept.
    by = np.lexsort((-values, numbers, owners))
    owners, numbers, values = owners[by], numbers[by], values[by]
    leads = np.ones(len(owners), dtype=bool)
    leads[1:] = (owners[1:] != owners[:-1]) | (numbers[1:] != numbers[:-1])
    owners, numbers, values = owners[leads], numbers[leads].astype(np.int32), values[leads]
    cuts = np.searchsorted(owners, np.arange(len(order) + 1))
    return [(text, numbers[a:b], values[a:b]) for text, a, b in zip(order, cuts[:-1], cuts[1:], strict=True)]


def _joined(parts: list[tuple[int, np.ndarray, np.ndarray]], d_sae: int) -> Fired:
    parts.sort(key=lambda part: part[0])
    starts = np.concatenate([[0], np.cumsum([len(numbers) for _, numbers, _ in parts])]).astype(np.int64)
    return Fired(
        starts,
        np.concatenate([numbers for _, numbers, _ in parts]),
        np.concatenate([values for *_, values in parts]),
        d_sae,
    )
