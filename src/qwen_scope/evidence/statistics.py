"""Means over prompts, and how sure they are: the bootstrap over prompts, which are what would differ in another try."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

LEVEL = 0.95
"""Of all confidence intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    """Over all prompts and seeds."""
    low: float
    """Lower bound, at a level of 95 %."""
    high: float
    """Upper bound."""


def bootstrap(values: Float[ndarray, "prompts seeds"], resamples: int, seed: int) -> Interval:
    """The mean, and its percentile interval under resampling of whole prompts, with all of their seeds, with replacement.

    Args:
        values: one for each text, or the difference of two texts of one prompt and seed: then the pairs stay together.
        resamples: how many times it is drawn again.
        seed: what the draws follow from, so that the same values give the same interval.
    """
    by_prompt = values.mean(axis=1)
    drawn = np.random.default_rng(seed).integers(0, len(by_prompt), (resamples, len(by_prompt)))
    means = by_prompt[drawn].mean(axis=1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(by_prompt.mean()), float(low), float(high))
