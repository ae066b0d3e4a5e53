"""Adam on the rows of a weight matrix, each row right after its gradient is summed up: no gradient matrix is written."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.kernels.pairs import Pairs, as_arrays, check_pairs, compiled_loops, share_features, sum_over_pairs


@dataclass(frozen=True)
class RowGradient:
    """The gradient of a (d_sae, d_model) matrix, not added up yet: row f is `sum_over_pairs` of f, plus what is extra.

    Raises:
        QwenScopeError: weights or rows that do not belong to the pairs, or extra features out of order.
    """

    pairs: Pairs
    weights: Float[Tensor, "tokens k"]
    rows: Float[Tensor, "tokens d_model"]
    extra: tuple[Int[Tensor, " some"], Float[Tensor, "some d_model"]] | None = None
    """Features with more gradient, each once and in ascending order, and that gradient."""

    def __post_init__(self) -> None:
        check_pairs(self.pairs, self.weights, self.rows)
        if self.extra is not None and not (self.extra[0].diff() > 0).all():
            raise QwenScopeError("expected extra features in ascending order, each once, found others; sort them")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_sae, d_model), of the matrix."""
        return self.pairs.d_sae, self.rows.shape[1]

    def dense(self) -> Float[Tensor, "d_sae d_model"]:
        """The gradient as a matrix."""
        gradient = sum_over_pairs(self.pairs, self.weights, self.rows)
        return gradient if self.extra is None else gradient.index_add_(0, *self.extra)

    def arrays(self) -> tuple[Any, ...]:
        """What the compiled loops take first."""
        extra_at, extra = np.zeros(self.pairs.d_sae + 1, np.int64), np.empty((0, self.rows.shape[1]), np.float32)
        if self.extra is not None:
            extra_at = np.searchsorted(self.extra[0].numpy(), np.arange(self.pairs.d_sae + 1))
            extra = self.extra[1].detach().float().contiguous().numpy()
        return *as_arrays(self.pairs, self.weights, self.rows), extra_at, extra


class AdamRows:
    """Adam for one float32 matrix with a row per feature; the arithmetic of `torch.optim.Adam`.

    Args:
        parameter: changed in place.
        unit_norm: keeps rows at norm 1: the gradient along a row is left out, and its norm is set back after a step.
            A gradient along the row would only change the norm; left in, it would spoil Adam's moments.
        keep_parallel: leaves it in all the same.

    Raises:
        QwenScopeError: a parameter that is not contiguous float32.
    """

    def __init__(
        self,
        parameter: Float[Tensor, "d_sae d_model"],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_norm: bool = False,
        keep_parallel: bool = False,
    ):
        if parameter.dtype != torch.float32 or not parameter.is_contiguous():
            found = f"{parameter.dtype}".removeprefix("torch.") + (
                "" if parameter.is_contiguous() else ", not contiguous"
            )
            raise QwenScopeError(f"expected a contiguous float32 matrix, found {found}; convert it first")
        self.parameter = parameter
        self.betas = betas
        self.eps = eps
        self.unit_norm = unit_norm
        self.tangent = unit_norm and not keep_parallel
        self.steps = 0
        self.mean = torch.zeros_like(parameter, requires_grad=False)
        self.square = torch.zeros_like(parameter, requires_grad=False)

    def state_dict(self) -> dict[str, Any]:
        """Steps taken and the running means of the gradient and of its square, not copied."""
        return {"steps": self.steps, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of a parameter of the same shape, which is copied."""
        self.steps = state["steps"]
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])

    @torch.no_grad()
    def squared_norm(self, gradient: RowGradient | Float[Tensor, "d_sae d_model"]) -> float:
        """The squared norm of the gradient, less its part along rows of norm 1.

        Raises:
            QwenScopeError: the gradient of a matrix of another shape.
        """
        loops = self._loops(gradient)
        if loops is None or isinstance(gradient, Tensor):
            return float(self._dense(gradient).double().pow(2).sum())
        out = np.empty(gradient.pairs.d_sae)
        of_rows = (*gradient.arrays(), self.tangent, self.parameter.detach().numpy())
        share_features(gradient.pairs, partial(loops.squared_norms, *of_rows, out))
        return float(out.sum())

    @torch.no_grad()
    def step(
        self, gradient: RowGradient | Float[Tensor, "d_sae d_model"], learning_rate: float, factor: float = 1.0
    ) -> None:
        """One step against the gradient times `factor`.

        Raises:
            QwenScopeError: the gradient of a matrix of another shape.
        """
        loops = self._loops(gradient)
        self.steps += 1
        rate = learning_rate / (1 - self.betas[0] ** self.steps)
        root = (1 - self.betas[1] ** self.steps) ** 0.5
        if loops is None or isinstance(gradient, Tensor):
            self._step_in_torch(self._dense(gradient) * factor, rate, root)
            return
        numbers = (factor, *self.betas, *(1 - beta for beta in self.betas), rate, 1 / root, self.eps)
        adam = partial(
            loops.adam,
            *gradient.arrays(),
            self.tangent,
            self.unit_norm,
            self.parameter.detach().numpy(),
            self.mean.numpy(),
            self.square.numpy(),
            *(np.float32(number) for number in numbers),
        )
        # Before the first row changes: whoever looks at the version must not miss an interrupted step.
        torch.autograd.graph.increment_version(self.parameter)
        share_features(gradient.pairs, adam)

    def _loops(self, gradient: RowGradient | Tensor) -> Any:
        expected, found = tuple(self.parameter.shape), tuple(gradient.shape)
        if expected != found:
            raise QwenScopeError(f"expected a gradient of shape {expected}, found {found}; pass this parameter's own")
        if isinstance(gradient, Tensor):
            return None
        return compiled_loops(self.parameter.device, gradient.weights, gradient.rows)

    def _dense(self, gradient: RowGradient | Tensor) -> Tensor:
        found = gradient if isinstance(gradient, Tensor) else gradient.dense()
        if self.tangent:
            return found - (found * self.parameter).sum(1, keepdim=True) * self.parameter
        return found

    def _step_in_torch(self, gradient: Tensor, rate: float, root: float) -> None:
        self.mean.lerp_(gradient, 1 - self.betas[0])
        self.square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        self.parameter.addcdiv_(self.mean, (self.square.sqrt() / root).add_(self.eps), value=-rate)
        if self.unit_norm:
            self.parameter.div_(self.parameter.norm(dim=1, keepdim=True).clamp_min(1e-12))
