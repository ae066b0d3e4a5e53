"""Which features fire on a span of a text and not elsewhere in it: what to steer against where an answer goes wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from qwen_scope.errors import QwenScopeError
from qwen_scope.index.find import Findings, compare, count_firing, searched
from qwen_scope.tokens import TokenizedText, tokenize

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex

Span = str | tuple[int, int]
"""A piece of the text, which stands for every place where it occurs, or the characters [start, end) of it, from 0."""


def diagnose(
    index: FeatureIndex,
    text: Any,
    spans: Span | Sequence[Span],
    *,
    layers: Sequence[int] | int | None = None,
    count: int = 20,
    only: bool = False,
) -> Findings:
    """The features that fire more often on some spans of a text than elsewhere in it, surest first.

    Tokens that overlap a span are one group, all others of the text the other, and they are compared as `find` compares
    texts, with one difference: all tokens are of one text, so nobody knows how much they depend on each other. Each counts as
    a witness of its own (a design effect of 1). q is the share of false finds if they were, so it is too small, most of all
    for a span of several tokens about one thing; the order is what to go by.

    Args:
        index: whose model and SAEs read the text, and whose densities say how common features are.
        text: one text, chat messages or token ids, as for `Scope.features`.
        spans: one span or several; see `Span`. Of messages, characters count after the chat template; of token ids, in the
            tokens' own texts joined.
        layers: which layers to search; all of the index unless told.
        count: how many features at most.
        only: only features that fire nowhere else in the text.

    Raises:
        QwenScopeError: several texts, a span that the text does not have, one without a token that counts, or one beside
            which none is left; a layer that is not there.
    """
    wanted = searched(index, layers, count)
    texts, single = tokenize(text, index.scope.backbone.tokenizer)
    if not single:
        raise QwenScopeError(f"expected one text to diagnose, found {len(texts)}; pass one at a time")
    here = _overlapping(texts[0], _characters(texts[0].text, spans))
    span = [token for token, chosen in zip(texts[0].tokens, here, strict=True) if chosen]
    for chosen, what in ((here[1:], "in the span"), ([not each for each in here[1:]], "beside the span")):
        if not any(chosen):
            raise QwenScopeError(
                f"expected tokens {what} to compare (the first of a text never counts), found none in {_short(texts[0].text)}; "
                "name a part of a longer text"
            )
    counted, reads = count_firing(index.scope, texts, [(~torch.tensor(here)).long()], wanted)
    for layer, groups in counted.items():
        for group, what in zip(groups, ("in the span", "beside it"), strict=True):
            if not group.tokens:
                raise QwenScopeError(
                    f"expected tokens {what} that count, found at layer {layer} only norm outliers; search other layers"
                )
    return compare(index, counted, reads, count=count, only=only, span=span)


def _characters(text: str, spans: Span | Sequence[Span]) -> list[tuple[int, int]]:
    """Spans as characters [start, end) of the text."""
    single = isinstance(spans, str) or _is_range(spans)
    found: list[tuple[int, int]] = []
    for span in [spans] if single else list(spans):
        if isinstance(span, str) and span:
            # Also those that overlap each other.
            places = [(each.start(), each.start() + len(span)) for each in re.finditer(f"(?={re.escape(span)})", text)]
            if not places:
                raise QwenScopeError(
                    f"expected a span that is in the text, found {_short(span)}, not in {_short(text)}; copy it from there"
                )
            found += places
        elif _is_range(span) and 0 <= span[0] < span[1] <= len(text):
            found.append((span[0], span[1]))
        else:
            raise QwenScopeError(
                f"expected spans as pieces of the text or (start, end) of its {len(text)} characters, found {_short(span)}; "
                "correct it"
            )
    if not found:
        raise QwenScopeError("expected a span of the text to diagnose, found none; name a piece of it")
    return found


def _is_range(span: Any) -> TypeGuard[tuple[int, int]]:
    return isinstance(span, tuple) and len(span) == 2 and all(type(each) is int for each in span)


def _overlapping(text: TokenizedText, places: list[tuple[int, int]]) -> list[bool]:
    """Whether each token overlaps any of some places; one that covers no characters never does."""
    return [any(start < b and a < end for a, b in places if start < end) for start, end in text.spans]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…" + shown[0] * isinstance(value, str)
