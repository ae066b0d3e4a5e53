"""Which features are specific to a tag (such as a language), and how high they normally are on samples of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.finetuning.restraints import Restrained, Restraints
from qwen_scope.finetuning.samples import Sample
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import read_rows
from qwen_scope.suite import Suite, ranges

LEAST_TOKENS = 100
"""Tokens of each tag that count, at least: of fewer, a mean says little."""


@dataclass(frozen=True)
class Means:
    """What a layer's residuals and features are on average, on samples of each tag."""

    activation: Float[Tensor, "tags d_sae"]
    """Mean activation of each feature: 0 where it is not among the k kept, or not above 0."""
    residual: Float[Tensor, "tags d_model"]
    """Mean residual; what is linear in the residual, such as a pre-activation, has its mean there."""
    tokens: Float[Tensor, " tags"]
    """Tokens that counted."""

    def monolinguality(self, tag: int) -> Float[Tensor, " d_sae"]:
        """Mean activation on a tag less the mean over the other tags of their means (SASFT, arXiv:2507.14894)."""
        others = torch.arange(len(self.activation)) != tag
        return self.activation[tag] - self.activation[others].mean(0)


@torch.no_grad()
def means(
    backbone: Backbone, suite: Suite, samples: Sequence[Sample], tags: Sequence[str], layers: Sequence[int]
) -> dict[int, Means]:
    """The means of each layer over the tokens of each tag, in float64, on the CPU.

    Left out are position 0, norm outliers (see `qwen_scope.outliers`) and the tokens of prompts, which are not trained on.

    Raises:
        QwenScopeError: fewer than `LEAST_TOKENS` tokens of a tag, or a sample longer than the model's context.
    """
    read = [sample.tokenized(backbone.tokenizer) for sample in samples]
    texts = [text for text, _ in read]
    number = torch.tensor([tags.index(sample.tag) for sample in samples])
    counted = [torch.arange(len(text)) >= max(1, asked) for text, asked in read]
    sums = {
        layer: [
            torch.zeros(len(tags), suite[layer].d_sae, dtype=torch.float64),
            torch.zeros(len(tags), suite.d_model, dtype=torch.float64),
            torch.zeros(len(tags), dtype=torch.float64),
        ]
        for layer in layers
    }
    for order, residuals in read_rows(texts, backbone, layers):
        owner = torch.cat([number[text].expand(len(texts[text])) for text in order])
        wanted = torch.cat([counted[text] for text in order])
        for layer in layers:
            x = residuals.pop(layer)
            kept = wanted.to(x.device) & ~norm_outliers(x)
            if not kept.any():
                continue
            sae, of = suite[layer], owner[kept.cpu()]
            features = sae.encode(x[kept].to(sae.device)).to("cpu")
            activation, residual, tokens = sums[layer]
            flat = (of[:, None] * sae.d_sae + features.indices.long()).flatten()
            activation.view(-1).index_add_(0, flat, features.values.clamp_min(0).double().flatten())
            residual.index_add_(0, of, x[kept].cpu().double())
            tokens.index_add_(0, of, torch.ones(len(of), dtype=torch.float64))
    for layer, (_, _, tokens) in sums.items():
        for tag, count in zip(tags, tokens.tolist(), strict=True):
            if count < LEAST_TOKENS:
                raise QwenScopeError(
                    f"expected at least {LEAST_TOKENS} tokens of {tag!r} to measure at layer {layer}, found {count:.0f}; give "
                    "more samples of it"
                )
    return {
        layer: Means(activation / tokens[:, None], residual / tokens[:, None], tokens)
        for layer, (activation, residual, tokens) in sums.items()
    }


def specific_features(
    backbone: Backbone,
    suite: Suite,
    samples: Sequence[Sample],
    homes: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    count: int = 2,
    features: Mapping[str, Sequence[str]] | None = None,
) -> Restraints:
    """The features most specific to some tags by monolinguality, and how high they are on samples of the other tags.

    A limit (SASFT's alpha) is the mean pre-activation of a feature over the tokens of a tag; how it is counted says `means`.

    Args:
        backbone: the model before fine-tuning.
        suite: SAEs of it.
        samples: a small set of at least two tags, such as languages.
        homes: the tags whose features are to be kept down elsewhere, such as `("zh",)`.
        layers: where to look; by default the last two of the suite, as SASFT does.
        count: features of each layer for each home, at most; only those of a monolinguality above 0 are taken.
        features: instead of searching, these features for each home.

    Raises:
        QwenScopeError: a home without samples, no other tag, too little text, or no feature that is specific.
    """
    tags = sorted({sample.tag for sample in samples})
    if missing := [home for home in homes if home not in tags]:
        raise QwenScopeError(
            f"expected samples of {missing[0]!r} to find its features, found only {', '.join(tags) or 'none'}; add some"
        )
    if not homes or len(tags) < 2:
        raise QwenScopeError(
            f"expected one or more tags to find features of and samples of another tag, found {', '.join(homes) or 'none'} and "
            f"samples of {', '.join(tags) or 'none'}; add some"
        )
    given = {home: [parse_feature(name) for name in (features or {}).get(home, ())] for home in homes}
    named = sorted({layer for pairs in given.values() for layer, _ in pairs})
    wanted = named or sorted(suite.layers[-2:] if layers is None else set(layers))
    if missing_layers := [layer for layer in wanted if layer not in suite.layers]:
        raise QwenScopeError(
            f"expected layers among {ranges(suite.layers)} of {suite.name}, found {missing_layers[0]}; choose some of those"
        )
    found = means(backbone, suite, samples, tags, wanted)
    restrained = []
    for home in homes:
        at = tags.index(home)
        for layer, measured in found.items():
            specific = measured.monolinguality(at)
            best = [n for n in specific.topk(min(count, len(specific))).indices.tolist() if specific[n] > 0]
            sae = suite[layer]
            for n in [n for of, n in given[home] if of == layer] if named else best:
                if n >= sae.d_sae:
                    raise QwenScopeError(f"expected features that {suite.name} has, found {layer}/{n}; choose another")
                limits = measured.residual @ sae.W_enc[n].detach().cpu().double() + float(sae.b_enc[n])
                others = {tag: float(limits[i]) for i, tag in enumerate(tags) if tag != home}
                restrained.append(Restrained(f"{layer}/{n}", home, others, float(specific[n])))
    if not restrained:
        raise QwenScopeError(
            f"expected features that fire more on {', '.join(homes)} than elsewhere, found none at layers {ranges(wanted)}; "
            "look at others"
        )
    counted = dict(zip(tags, found[wanted[0]].tokens.long().tolist(), strict=True))
    return Restraints.of(restrained, suite, tags, backbone.tokenizer, counted)
