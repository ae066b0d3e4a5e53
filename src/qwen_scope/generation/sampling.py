"""`Sampling`: how tokens are drawn, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import QwenScopeError

MOST_CANDIDATES = 100
"""Most likely tokens kept beside each one generated, at most."""
LOWEST_TEMPERATURE = 1e-6
"""Lower ones draw the same, and would overflow."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when to stop."""

    max_new_tokens: int = 64
    """Tokens generated at most."""
    temperature: float | int = 0.0
    """0 takes the most likely token always; 1 draws from the model's own distribution."""
    top_p: float | int = 1.0
    """Draws from the most likely tokens that together have this probability."""
    top_k: int = 0
    """Draws from so many most likely tokens; 0 from all."""
    seed: int = 0
    """What chance depends on: texts of one seed differ only where their distributions do."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation, and are left out."""
    candidates: int = 0
    """Most likely tokens kept with each token generated."""
    ignore_eos: bool = False
    """Go on where the model would end its text."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_new_tokens", 1, 2**31),
            ("top_k", 0, 2**31),
            ("candidates", 0, MOST_CANDIDATES),
            ("seed", -(2**63), 2**63 - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise QwenScopeError(f"expected {name} from {least} to {most}, found {value!r}; choose one of those")
        for name, zero, most in (("temperature", True, 100.0), ("top_p", False, 1.0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not 0 <= value <= most or (value == 0 and not zero):
                raise QwenScopeError(
                    f"expected {name} {'from' if zero else 'above'} 0 up to {most:g}, found {value!r}; choose one of those"
                )
        if not isinstance(self.stop, tuple):
            raise QwenScopeError(
                f"expected stop texts as a tuple such as ('\\n',), found a {type(self.stop).__name__}; pass one"
            )
        if len(self.stop) > 16 or any(not isinstance(text, str) or not 0 < len(text) <= 1000 for text in self.stop):
            raise QwenScopeError("expected up to 16 stop texts of 1 to 1000 characters, found others; shorten them")


def draw(logits: Float[Tensor, " vocabulary"], sampling: Sampling, generator: torch.Generator) -> int:
    """One token, by the Gumbel trick: equal noise for each token of the vocabulary in every step of a seed, so that two texts
    of one seed draw the same token unless their distributions tell it apart."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits[None].float()
    nothing: Any = torch.empty(1, 0, dtype=torch.long, device=logits.device)
    scores = TemperatureLogitsWarper(max(float(sampling.temperature), LOWEST_TEMPERATURE))(nothing, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(nothing, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(float(sampling.top_p))(nothing, scores)
    noise = torch.empty(len(logits)).exponential_(generator=generator)
    return int((scores[0] - noise.log().to(scores.device)).argmax())
