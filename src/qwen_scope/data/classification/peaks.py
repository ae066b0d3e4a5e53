"""How strongly a few features fire in texts, and at which token most: what a rule decides by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from qwen_scope.corpus import Document
from qwen_scope.corpus.cutting import Piece, cut
from qwen_scope.errors import QwenScopeError
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import read_rows
from qwen_scope.tokens import TokenizedText

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

HELD_TOKENS = 16384
"""Tokens whose residuals of all layers are held before they are encoded."""
LONGEST = 8192
"""Tokens that the model reads at once at most, however long its context: attention's time grows with the square."""


@dataclass(frozen=True, eq=False)
class Peaks:
    """The highest value of some features in some texts. Position 0 and norm outliers do not count."""

    values: Float[ndarray, "texts features"]
    """That value, 0 where the feature never fires."""
    tokens: Int[ndarray, "texts features"]
    """At which token of the text it is, the first of equals; -1 where the feature never fires."""
    ids: list[list[int]]
    """Tokens of each text."""


@torch.no_grad()
def peaks(
    scope: Scope,
    texts: Sequence[Document],
    features: Sequence[tuple[int, int]],
    *,
    told: Callable[[int], object] = lambda tokens: None,
) -> Peaks:
    """Reads texts through the model and the SAEs of the layers that the features are of.

    Args:
        texts: texts or chat messages. One longer than the model's context, or than `LONGEST`, is read in pieces, as a harvest
            does; the highest value of all counts.
        features: layer and number of each.
        told: is called after each pass of the model with the number of its tokens.

    Raises:
        QwenScopeError: a layer or feature that is not there, chat messages without a template that takes them.
    """
    tokenizer = scope.backbone.tokenizer
    if tokenizer is None:
        raise QwenScopeError("expected a Scope with a tokenizer to read texts, found none; build it with tokenizer=…")
    layers = sorted({layer for layer, _ in features})
    columns = {layer: _columns(scope, layer, features) for layer in layers}
    pieces = list(cut(texts, tokenizer, min(scope.backbone.context_length or LONGEST, LONGEST)))
    starts, ids = _starts(pieces, len(texts))
    owners = np.array([piece.document for piece in pieces], dtype=np.int64)
    held = HELD_TOKENS * len(layers) * scope.backbone.d_model * scope.backbone.model.dtype.itemsize
    tokenized = [TokenizedText("", piece.ids, [], []) for piece in pieces]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for order, residuals in read_rows(tokenized, scope.backbone, layers, held_bytes=held, told=told):
        lengths = np.array([len(pieces[piece].ids) for piece in order])
        row_piece = np.repeat(np.array(order), lengths)
        within = np.arange(len(row_piece)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        for layer in layers:
            x = residuals.pop(layer)
            kept = torch.from_numpy(within > 0) & ~norm_outliers(x).cpu()
            sae = scope.suite[layer]
            encoded = sae.encode(x.to(sae.device))
            column = columns[layer].to(encoded.indices.device)[encoded.indices]
            rows, at = ((column >= 0) & encoded.active & kept.to(column.device)[:, None]).nonzero(as_tuple=True)
            hits = rows.cpu().numpy()
            found.append(
                (
                    owners[row_piece[hits]],
                    column[rows, at].cpu().numpy(),
                    encoded.values[rows, at].float().cpu().numpy(),
                    starts[row_piece[hits]] + within[hits],
                )
            )
    values = np.zeros((len(texts), len(features)), np.float32)
    tokens = np.full((len(texts), len(features)), -1, np.int64)
    if found:
        text, feature, value, token = (np.concatenate(parts) for parts in zip(*found, strict=True))
        # Of those that are assigned to one place, the last stays: the highest value, the first token of equals.
        by = np.lexsort((-token, value))
        values[text[by], feature[by]] = value[by]
        tokens[text[by], feature[by]] = token[by]
    return Peaks(values, tokens, ids)


def _columns(scope: Scope, layer: int, features: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which of the features each of a layer's is; -1 for none."""
    columns = torch.full((scope.suite[layer].d_sae,), -1, dtype=torch.long)
    for at, (of, number) in enumerate(features):
        if of == layer:
            if number >= len(columns):
                raise QwenScopeError(
                    f"expected a feature from {layer}/0 to {layer}/{len(columns) - 1}, found {layer}/{number}; use the suite "
                    "that it is of"
                )
            columns[number] = at
    return columns


def _starts(pieces: Sequence[Piece], texts: int) -> tuple[np.ndarray, list[list[int]]]:
    """How many tokens of its text come before each piece, and all tokens of each text."""
    starts, ids = np.zeros(len(pieces), dtype=np.int64), [[] for _ in range(texts)]
    for at, piece in enumerate(pieces):
        starts[at] = len(ids[piece.document])
        ids[piece.document] += piece.ids
    return starts, ids
