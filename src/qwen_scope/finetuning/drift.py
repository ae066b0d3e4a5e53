"""Whether SAEs still fit a model that has changed: FVU and the overlap of features before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.evaluation.fidelity import FidelityMeter
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.finetuning.samples import Sample
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import read_rows
from qwen_scope.suite import Suite

TOP = 20
"""Features of a token that are compared, the strongest ones."""
FVU_RISE = 0.05
"""A rise of the FVU by more than this is warned of. Between a base model and its instruct version outsiders saw 0.005."""
LEAST_OVERLAP = 0.5
"""A mean overlap below this is warned of. Between a base model and its instruct version outsiders saw 0.72."""


@dataclass(frozen=True)
class Fit:
    """How SAEs read a model on some texts; what two models are compared by."""

    fvu: dict[int, float]
    """By layer: the fraction of variance unexplained over the tokens that count (see `qwen_scope.evaluation.fidelity`)."""
    strongest: dict[int, Int[Tensor, "tokens top"]]
    """By layer: the `TOP` strongest features of each token but those at position 0, -1 where fewer fire."""
    ordinary: dict[int, Tensor]
    """By layer: which of these tokens are no norm outliers."""

    def save(self, path: Path) -> None:
        """Writes it to a safetensors file, atomically."""
        tensors = {f"strongest.{layer}": of.to(torch.int32) for layer, of in self.strongest.items()}
        tensors |= {f"ordinary.{layer}": of for layer, of in self.ordinary.items()}
        write_safetensors(path, tensors, {f"fvu.{layer}": repr(fvu) for layer, fvu in self.fvu.items()})

    @staticmethod
    def load(path: Path) -> Fit:
        """Reads what `save` wrote."""
        tensors, metadata = read_safetensors(path)
        layers = [int(name.removeprefix("fvu.")) for name in metadata if name.startswith("fvu.")]
        return Fit(
            {layer: float(metadata[f"fvu.{layer}"]) for layer in sorted(layers)},
            {layer: tensors[f"strongest.{layer}"].long() for layer in sorted(layers)},
            {layer: tensors[f"ordinary.{layer}"] for layer in sorted(layers)},
        )


@dataclass(frozen=True)
class LayerDrift:
    """How one layer's SAE fits before and after."""

    layer: int
    """Which, from 0."""
    fvu_before: float
    """FVU on the texts with the model as it was."""
    fvu_after: float
    """The same with the model as it is."""
    overlap: float
    """Mean over the tokens that count in both of the Jaccard index |A and B| / |A or B| of the `TOP` strongest features."""

    @property
    def warning(self) -> str:
        """A sentence if it fits worse than the thresholds allow, else nothing."""
        found = []
        if not self.fvu_after - self.fvu_before <= FVU_RISE:
            found.append(f"its FVU rose from {self.fvu_before:.3f} to {self.fvu_after:.3f}, by more than {FVU_RISE}")
        if not self.overlap >= LEAST_OVERLAP:
            found.append(f"tokens share {self.overlap:.2f} of their features with before, less than {LEAST_OVERLAP}")
        if not found:
            return ""
        return (
            f"the SAE of layer {self.layer} fits the changed model worse: {' and '.join(found)}; read its features with care, or "
            "train it further on this model (qwen-scope train --start)"
        )


@dataclass(frozen=True)
class Drift:
    """How SAEs fit a model before and after it was changed."""

    layers: tuple[LayerDrift, ...]
    """Layer by layer."""

    @property
    def warnings(self) -> list[str]:
        """What is past the thresholds, a sentence each."""
        return [layer.warning for layer in self.layers if layer.warning]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "warnings": self.warnings}

    def __str__(self) -> str:
        rows = [f"{'layer':>5} {'FVU before':>10} {'FVU after':>10} {'overlap':>8}"]
        rows += [f"{of.layer:>5} {of.fvu_before:>10.4f} {of.fvu_after:>10.4f} {of.overlap:>8.3f}" for of in self.layers]
        return "\n".join([*rows, *self.warnings])


@torch.no_grad()
def fit(backbone: Backbone, suite: Suite, samples: Sequence[Sample], layers: Sequence[int] | None = None) -> Fit:
    """How a suite's SAEs read a model on some texts.

    Raises:
        QwenScopeError: no texts, or one longer than the model's context.
    """
    texts = [sample.tokenized(backbone.tokenizer)[0] for sample in samples]
    if not any(len(text) > 1 for text in texts):
        raise QwenScopeError("expected texts of two tokens or more to measure the fit on, found none; give some")
    wanted = suite.layers if layers is None else sorted(layers)
    meters = {layer: FidelityMeter(suite.d_model, suite[layer].d_sae) for layer in wanted}
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in wanted}
    for order, residuals in read_rows(texts, backbone, wanted):
        first = torch.cat([torch.arange(len(texts[text])) == 0 for text in order])
        for layer in wanted:
            sae = suite[layer]
            x = residuals.pop(layer).to(sae.device)
            features = sae.encode(x)
            meters[layer].update(x, sae.decode(features), features, first)
            if first.all():
                continue
            rest = features.to("cpu")[~first].top(TOP)
            strongest = rest.indices.long().masked_fill(~rest.active, -1)
            parts[layer].append((strongest, ~norm_outliers(x[~first.to(x.device)]).cpu()))
    return Fit(
        {layer: meter.result().fvu for layer, meter in meters.items()},
        {layer: torch.cat([strongest for strongest, _ in of]) for layer, of in parts.items()},
        {layer: torch.cat([ordinary for _, ordinary in of]) for layer, of in parts.items()},
    )


def drift(before: Fit, after: Fit) -> Drift:
    """How the fit changed, from the same texts read before and after.

    Raises:
        QwenScopeError: fits of other layers or texts.
    """
    sizes = [{layer: len(of) for layer, of in each.strongest.items()} for each in (before, after)]
    if sizes[0] != sizes[1]:
        raise QwenScopeError(
            f"expected the same texts read at the same layers before and after, found tokens {sizes[0]} and {sizes[1]}; read "
            "both anew"
        )
    return Drift(
        tuple(
            LayerDrift(
                layer,
                before.fvu[layer],
                after.fvu[layer],
                overlap(before.strongest[layer][kept], after.strongest[layer][kept]),
            )
            for layer in before.fvu
            for kept in [before.ordinary[layer] & after.ordinary[layer]]
        )
    )


def overlap(first: Int[Tensor, "tokens top"], second: Int[Tensor, "tokens top"]) -> float:
    """Mean over tokens of the Jaccard index of two sets of features, each padded by -1; two empty sets are the same."""
    if not len(first):
        return math.nan
    shared = ((first[:, :, None] == second[:, None, :]) & (first >= 0)[:, :, None]).sum((1, 2)).double()
    either = (first >= 0).sum(1) + (second >= 0).sum(1) - shared
    return float((shared / either).masked_fill(either == 0, 1.0).mean())
