"""What is always measured of generated texts: how likely the unsteered model finds them, and how much they repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwen_scope.backbone import Backbone
from qwen_scope.reading import batches
from qwen_scope.tokens import TokenizedText

LOGIT_BYTES = 256 * 2**20
"""Most bytes of logits of one forward pass: vocabularies are large."""
GRAM = 4
"""Tokens in a row whose repetition is counted."""


@torch.no_grad()
def perplexities(
    backbone: Backbone, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> list[float | None]:
    """The perplexity of each output given its prompt under the unsteered model: exp of the mean negative logarithm of its
    tokens' probabilities, at temperature 1. None for an output without tokens.

    Args:
        prompts: token ids.
        outputs: token ids that follow them.

    Raises:
        QwenScopeError: a prompt and output together longer than the model's context.
    """
    found: list[float | None] = [None] * len(outputs)
    there = [at for at, ids in enumerate(outputs) if ids]
    # The last token is read by nobody.
    texts = [TokenizedText("", [*prompts[at], *outputs[at]][:-1], [], []) for at in there]
    most = max(1, LOGIT_BYTES // (4 * backbone.config.vocab_size))
    for batch in batches(texts, backbone, most) if texts else []:
        mask = batch.attention_mask
        logits = backbone.model(
            input_ids=batch.ids.to(backbone.device),
            attention_mask=None if mask is None else mask.to(backbone.device),
            use_cache=False,
        ).logits
        for row, text in enumerate(batch.texts):
            at = there[text]
            start, ids = len(prompts[at]) - 1, torch.tensor(list(outputs[at]), device=logits.device)
            here = logits[row, start : start + len(ids)].float().log_softmax(1)
            found[at] = math.exp(-float(here.gather(1, ids[:, None]).double().mean()))
    return found


def repetition(ids: Sequence[int]) -> float:
    """The share of a text's runs of four tokens that occurred in it before: 1 - distinct / all; 0 for a text of less than four
    tokens."""
    grams = [tuple(ids[at : at + GRAM]) for at in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
