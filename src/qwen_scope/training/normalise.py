"""The units that the trainer works in: residuals centred and scaled, so that one learning rate fits every layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.training.config import Centre


@dataclass(frozen=True)
class Normalisation:
    """x -> (x - centre) / scale, so that one learning rate fits every layer of every model."""

    centre: Float[Tensor, " d_model"]
    """What is subtracted, in the residual stream's units."""
    scale: float
    """Root mean square per dimension of what is left, in the same units."""

    @staticmethod
    def of(x: Float[Tensor, "tokens d_model"], centre: Centre = "median") -> "Normalisation":
        """Scaled to unit mean square per dimension around the centre.

        Raises:
            QwenScopeError: NaN or infinity among the residuals, or residuals that are all the same.
        """
        bad = int((~x.isfinite().all(dim=1)).sum())
        if bad:
            raise QwenScopeError(
                f"expected finite residuals, found NaN or infinity in {bad} of {len(x)} tokens; leave those out"
            )
        x = x.float()
        middle = {"median": geometric_median, "mean": lambda x: x.mean(0), "none": lambda x: torch.zeros_like(x[0])}
        point = middle[centre](x)
        scale = float((x - point).pow(2).mean().sqrt())
        if not scale > 0:
            raise QwenScopeError(f"expected residuals that vary, found {len(x)} equal ones; train on more text")
        return Normalisation(point, scale)

    def __call__(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """Residuals in the units that the trainer works in."""
        return (x.float() - self.centre) / self.scale


def geometric_median(x: Float[Tensor, "tokens d_model"], steps: int = 50) -> Float[Tensor, " d_model"]:
    """The point with the least summed distance to all rows, by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - point).norm(dim=1).clamp_min(1e-6)
        new = (weights @ x) / weights.sum()
        if (new - point).norm() <= 1e-5 * point.norm():
            return new
        point = new
    return point
