"""What fine-tuning did: perplexity of each tag's samples, and how many texts switch into another script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.samples import Sample
from qwen_scope.finetuning.switching import switch_ratio
from qwen_scope.generation import Sampling
from qwen_scope.generation.generate import generate
from qwen_scope.reading import batches
from qwen_scope.suite import Suite

LOGIT_TOKENS = 512
"""Tokens in one pass, padding included: the logits of large vocabularies take a megabyte a token."""


@dataclass(frozen=True)
class Spoken:
    """A text that the model went on with."""

    tag: str
    """The tag of the sample whose beginning it goes on from."""
    prompt: str
    """That beginning."""
    text: str
    """What was generated."""
    switched: bool
    """Whether it falls into a script of a home."""


@dataclass(frozen=True)
class Evaluation:
    """A model on samples kept back."""

    perplexity: dict[str, float]
    """By tag: exp of the mean cross-entropy of the tokens that are trained on, over all samples of the tag together."""
    losses: dict[str, list[float]]
    """By tag: the mean cross-entropy of each sample, in nats a token."""
    spoken: tuple[Spoken, ...]
    """What it generated."""

    @property
    def switch_ratio(self) -> dict[str, float]:
        """By tag: the share of texts that switch (see `qwen_scope.finetuning.switching`); empty where it was not counted."""
        tags = dict.fromkeys(each.tag for each in self.spoken)
        return {
            tag: sum(each.switched for each in self.spoken if each.tag == tag)
            / sum(each.tag == tag for each in self.spoken)
            for tag in tags
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {**asdict(self), "spoken": [asdict(each) for each in self.spoken], "switch_ratio": self.switch_ratio}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        return Evaluation(value["perplexity"], value["losses"], tuple(Spoken(**each) for each in value["spoken"]))


@torch.no_grad()
def sample_losses(backbone: Backbone, samples: Sequence[Sample]) -> list[tuple[float, int]]:
    """Sum of the cross-entropy of each sample's tokens but its prompt's and the first, and how many they are.

    Raises:
        QwenScopeError: a sample longer than the model's context.
    """
    read = [sample.tokenized(backbone.tokenizer) for sample in samples]
    found: list[tuple[float, int]] = [(0.0, 0)] * len(samples)
    for batch in batches([text for text, _ in read], backbone, LOGIT_TOKENS):
        ids = batch.ids.to(backbone.device)
        mask = None if batch.attention_mask is None else batch.attention_mask.to(backbone.device)
        logits = backbone.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none")
        for row, text in zip(loss.cpu().double(), batch.texts, strict=True):
            tokens, asked = read[text]
            kept = row[max(1, asked) - 1 : len(tokens) - 1]
            found[text] = (float(kept.sum()), len(kept))
    return found


def spoken(
    backbone: Backbone,
    suite: Suite,
    samples: Sequence[Sample],
    homes: Sequence[str],
    *,
    prompt_tokens: int,
    new_tokens: int,
    texts_each: int,
    temperature: float,
    seed: int,
) -> list[Spoken]:
    """What a model goes on with from the beginnings of samples that are not of a home, and whether it falls into a home's script.

    Args:
        homes: languages that should not appear in texts of others.
        texts_each: texts from each sample, each of its own seed; the same seeds in every call, so that models can be compared.

    Raises:
        QwenScopeError: tags that are no languages, or languages that share their scripts.
    """
    samples = [sample for sample in samples if sample.tag not in homes]
    prompts = [sample.prompt(backbone.tokenizer, prompt_tokens) for sample in samples]
    sampling = Sampling(new_tokens, temperature)
    asked = [(sample, prompt, at) for sample, prompt in zip(samples, prompts, strict=True) for at in range(texts_each)]
    if not asked:
        return []
    samplings = [replace(sampling, seed=seed + n) for n in range(len(asked))]
    generated = generate(backbone, suite, [prompt for _, prompt, _ in asked], [[] for _ in asked], samplings)
    found = []
    for (sample, prompt, _), result in zip(asked, generated, strict=True):
        switched = any(switch_ratio([result.text], sample.tag, home).switched[0] for home in homes)
        found.append(Spoken(sample.tag, prompt.text, result.text, switched))
    return found


def evaluate(
    backbone: Backbone, suite: Suite, samples: Sequence[Sample], homes: Sequence[str], **options: Any
) -> Evaluation:
    """A model on samples kept back. Where the tags are no languages of different scripts, no texts are generated.

    Args:
        homes: see `spoken`, whose options the others are.
    """
    losses, perplexity, found = sample_losses(backbone, samples), {}, []
    tags = dict.fromkeys(sample.tag for sample in samples)
    for tag in tags:
        of = [loss for loss, sample in zip(losses, samples, strict=True) if sample.tag == tag]
        perplexity[tag] = math.exp(sum(total for total, _ in of) / max(1, sum(count for _, count in of)))
    each = {
        tag: [
            total / count for (total, count), sample in zip(losses, samples, strict=True) if sample.tag == tag and count
        ]
        for tag in tags
    }
    if options["texts_each"] and tell_apart(list(tags), homes):
        found = spoken(backbone, suite, samples, homes, **options)
    return Evaluation(perplexity, each, tuple(found))


def tell_apart(tags: Sequence[str], homes: Sequence[str]) -> bool:
    """Whether scripts tell every home from every other tag."""
    try:
        for tag in tags:
            for home in homes:
                if tag not in homes:
                    switch_ratio(["-"], tag, home)
    except QwenScopeError:
        return False
    return True
