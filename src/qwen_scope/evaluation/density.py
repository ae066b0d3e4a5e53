"""How often features fire: a histogram of their densities, and the dense ones by number."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

LOG10_EDGES = tuple(edge / 2 for edge in range(-12, 1))
"""Edges of the histogram's bins, as log10 of the density: half decades from 10^-6 to 1."""
DENSE = 0.1
"""A feature that fires at a larger share of the tokens than this is called dense."""
NAMED = 5
"""So many of the dense features are named."""


@dataclass(frozen=True)
class Density:
    """Densities of one SAE's features.

    The density of a feature is the share of kept tokens (see `Fidelity`) at which it fires, that is at which its value
    is above 0. A sample of n tokens shows none between 0 and 1 / n.
    """

    histogram: list[int]
    """Features per bin of `LOG10_EDGES`, lower edge included; the first bin takes rarer ones too, the last takes density
    1. Features that never fired are in none (see `Fidelity.never_fired`)."""
    dense: int
    """Features whose density is above `DENSE`."""
    densest: dict[int, float]
    """Number and density of the `NAMED` densest of these, densest first."""

    @staticmethod
    def of(fired: Int[Tensor, " d_sae"], tokens: int) -> "Density":
        """Densities of features that fired so many times each, on so many tokens."""
        density = fired[fired > 0].double() / max(tokens, 1)
        # Inner edges alone: what lies beyond the outer ones belongs to the first and the last bin.
        inner = torch.tensor([10**edge for edge in LOG10_EDGES[1:-1]], dtype=torch.float64)
        bins = torch.bincount(torch.bucketize(density, inner, right=True), minlength=len(LOG10_EDGES) - 1)
        densest = fired.double().div(max(tokens, 1)).sort(descending=True, stable=True)
        dense = int((densest.values > DENSE).sum())
        top = slice(min(dense, NAMED))
        pairs = zip(densest.indices[top].tolist(), densest.values[top].tolist(), strict=True)
        return Density(bins.tolist(), dense, dict(pairs))
