"""`SweepConfig`: how a sweep is run and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep is run and judged."""

    strengths: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0)
    """Multiples of the steering given; 0, which is unsteered, always comes with them."""
    instruction: str = ""
    """What one would ask for instead of steering: the control that is only prompted. Without one, there is no such control."""
    random_features: int = 5
    """Random steerings to compare with: other features of the same layers, of like density and norm, at the same strengths in
    raw units."""
    seeds: int = 1
    """Texts for each prompt and strength."""
    max_new_tokens: int = 40
    """Tokens generated at most."""
    temperature: float = 0.7
    """0 takes the most likely token always; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draws from the most likely tokens that together have this probability."""
    seed: int = 0
    """What everything random follows from: texts, random features, halves of the prompts, resamples."""
    perplexity_factor: float = 3.0
    """A strength counts as coherent if the median perplexity of its texts is at most so many times that of unsteered ones …"""
    repetition_margin: float = 0.1
    """… and their mean share of repeated runs of four tokens is at most so much above that of unsteered ones, since a loop of a
    few words has a low perplexity."""
    resamples: int = 2000
    """Resamples of the prompts, for confidence intervals."""

    def __post_init__(self) -> None:
        if not self.strengths or not all(map(math.isfinite, self.strengths)) or max(self.strengths) <= 0:
            raise QwenScopeError(
                f"expected finite strengths, one of them above 0, found {self.strengths}; such as -1 0.5 1 2"
            )
        for name, least in (("random_features", 1), ("seeds", 1), ("max_new_tokens", 1), ("resamples", 100)):
            if getattr(self, name) < least:
                raise QwenScopeError(
                    f"expected {name} of at least {least}, found {getattr(self, name)}; give that many"
                )
        if not self.perplexity_factor >= 1 or not self.repetition_margin >= 0:
            raise QwenScopeError(
                f"expected a perplexity factor of at least 1 and a repetition margin of at least 0, found "
                f"{self.perplexity_factor} and {self.repetition_margin}; unsteered text must count as coherent"
            )

    @property
    def all_strengths(self) -> list[float]:
        """In order, each once, 0 among them."""
        return sorted({0.0, *(float(strength) for strength in self.strengths)})
