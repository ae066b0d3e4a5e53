"""`FiniteSteps`: a trainer that stops before a loss or gradient that is no number reaches the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from qwen_scope.errors import QwenScopeError


class FiniteSteps(Trainer):
    """Put before a trainer of transformers' kind, stops training where it would go on with weights that are no numbers.

    transformers by default hides such losses from its log and goes on. In half precision with a gradient scaler, which skips
    steps of infinite gradients by itself, only losses are looked at.

    Raises:
        QwenScopeError: while training, a loss or gradient that is not finite; it names the last good checkpoint.
    """

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As ever, but for the check of the loss."""
        loss = super().training_step(model, *args, **kwargs)
        self._check_finite("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16 and grad_norm is not None:
            self._check_finite("gradient", float(grad_norm))
        return grad_norm

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        folder = str(self.args.output_dir)
        last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise QwenScopeError(
            f"expected a finite {what}, found {value} in step {self.state.global_step + 1}; lower the learning rate or look "
            f"at the data: {good}"
        )
