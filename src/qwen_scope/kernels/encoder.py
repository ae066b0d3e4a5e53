"""`Encoder`: what one SAE keeps to be encoded fast, made when first needed and again when the weights change."""

import threading
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.kernels import reference
from qwen_scope.kernels.choice import Choice, Kernel, choose, screen_of
from qwen_scope.kernels.screen import BoundBroken


class Encoder:
    """Encodes with the path chosen for one pair of weights and bias.

    Args:
        kernel: a path to use instead of the one that `choose` finds.

    Changed weights are noticed by their version, as every in-place operation of torch counts it up. Changes through
    `.data` do not; those show when an exact value lies above its bound, or through `forget()`.
    """

    def __init__(self, kernel: Kernel | None = None):
        self.kernel: Kernel | None = kernel
        self._choice: Choice | None = None
        self._screen: Any = None
        self._prepared_for: tuple[Any, ...] | None = None
        self._lock = threading.Lock()

    @property
    def choice(self) -> Choice | None:
        """The path in use and why; None before the first use."""
        return self._choice

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the weights."""
        return 0 if self._screen is None else self._screen.nbytes

    def forget(self) -> None:
        """Prepares anew at the next use."""
        self._prepared_for = None

    @torch.no_grad()
    def encode(
        self,
        x: Float[Tensor, "tokens d_model"],
        W_enc: Float[Tensor, "d_sae d_model"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
    ) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """The k largest pre-activations of each token, strongest first, equal ones by the lower feature.

        Raises:
            QwenScopeError: pre-activations that are not finite, or a kernel that cannot be used here.
        """
        for _ in range(2):
            screen = self._prepared(W_enc, b_enc, k)
            if screen is None or not screen.can_serve(k):
                break
            try:
                return screen.encode(x, k)
            except BoundBroken:
                self.forget()
        else:
            self._give_up("its product is less precise than the bound assumes")
            self._prepared_for = self._state(W_enc, b_enc)
        return reference.encode(x, W_enc, b_enc, k)

    def adopt(self, screen: Any, W_enc: Tensor, b_enc: Tensor, choice: Choice) -> None:
        """Takes a screen that somebody else has prepared for these weights."""
        self._screen, self._choice = screen, choice
        self._prepared_for = self._state(W_enc, b_enc)

    def _prepared(self, W_enc: Tensor, b_enc: Tensor, k: int) -> Any:
        with self._lock:
            if self._prepared_for != self._state(W_enc, b_enc):
                self._choice = Choice(self.kernel, "asked for") if self.kernel else choose(W_enc, b_enc, k)
                self._screen = screen_of(self._choice.kernel, W_enc, b_enc)
                self._prepared_for = self._state(W_enc, b_enc)
            return self._screen

    def _give_up(self, why: str) -> None:
        assert self._choice is not None
        warnings.warn(f"the kernel {self._choice.kernel} cannot be used: {why}; using the reference", stacklevel=4)
        self._choice, self._screen = Choice("reference", why), None

    def _state(self, W_enc: Tensor, b_enc: Tensor) -> tuple[Any, ...]:
        # Inference tensors count no versions; they cannot be changed outside of inference mode either.
        versions = [0 if t.is_inference() else t._version for t in (W_enc, b_enc)]
        return (self.kernel, W_enc.data_ptr(), b_enc.data_ptr(), W_enc.shape, W_enc.dtype, W_enc.device, *versions)

    def __getstate__(self) -> dict[str, Any]:
        return {"kernel": self.kernel}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
