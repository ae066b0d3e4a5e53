"""The loss that keeps features down, on tensors alone: no dictionary is encoded, only the chosen rows of it are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from qwen_scope.finetuning.restraints import Restraints
from qwen_scope.outliers import norm_outliers
from qwen_scope.suite import Suite


class Excess(NamedTuple):
    """By how much the restrained features of a layer exceed their limits at the tokens that count."""

    total: Float[Tensor, ""]
    """Sum over tokens and features of ReLU(pre-activation - limit); carries the gradient."""
    above: Int[Tensor, ""]
    """Pairs of token and feature that exceed the limit."""
    pairs: Int[Tensor, ""]
    """Pairs that have one."""


@dataclass(frozen=True)
class Rows:
    """The restrained features of one layer: their rows of the encoder and their limits."""

    W_enc: Float[Tensor, "features d_model"]
    """Their rows of the encoder, in float32."""
    b_enc: Float[Tensor, " features"]
    """Their biases."""
    limits: Float[Tensor, "tags features"]
    """How high each may be on samples of each tag, infinity where it is left alone."""

    @staticmethod
    def of(restraints: Restraints, suite: Suite) -> dict[int, Rows]:
        """The rows of each layer, copied out of the suite, whose other weights are not needed then."""
        found = {}
        for layer in restraints.layers:
            features = [feature for feature in restraints.features if feature.layer == layer]
            numbers = torch.tensor([feature.number for feature in features])
            sae = suite[layer]
            limits = [[feature.limits.get(tag, float("inf")) for feature in features] for tag in restraints.tags]
            found[layer] = Rows(
                sae.W_enc.detach()[numbers.to(sae.device)].float().clone(),
                sae.b_enc.detach()[numbers.to(sae.device)].float().clone(),
                torch.tensor(limits, device=sae.device),
            )
        return found

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(self.W_enc.to(device), self.b_enc.to(device), self.limits.to(device))

    def excess(
        self,
        x: Float[Tensor, "batch tokens d_model"],
        tags: Int[Tensor, "batch tokens"],
        counted: Bool[Tensor, "batch tokens"],
    ) -> Excess:
        """By how much the features exceed their limits.

        Args:
            x: residuals after the layer; computed in float32 at least, also under autocast.
            tags: the number of the tag of each token's sample.
            counted: which tokens count, of those whose norm is no outlier (see `qwen_scope.outliers`): limits leave them out too,
                and the few that there are would drown all others.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            counted = counted.clone()
            counted[counted.clone()] = ~norm_outliers(x.detach()[counted])
            pre = functional.linear(x, self.W_enc.to(x.dtype), self.b_enc.to(x.dtype))
            # Infinity where a feature is left alone: nothing exceeds it, and no gradient comes of it.
            limits = self.limits.to(x.dtype)[tags].masked_fill(~counted[..., None], float("inf"))
            over = (pre - limits).relu()
        return Excess(over.sum(), (over > 0).sum(), limits.isfinite().sum())
