"""`Encoder`: what one SAE keeps to be encoded fast, made when first needed and again when the weights change."""

import threading
import warnings
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.kernels import reference
from qwen_scope.kernels.choice import Choice, Kernel, choose, screen_of, screening_pays
from qwen_scope.kernels.screen import BoundBroken


class Encoder:
    """Encodes with the path chosen for one pair of weights and bias.

    Args:
        kernel: a path to use instead of the one that `choose` finds.

    Raises:
        QwenScopeError: no such kernel.

    Trainable weights are prepared at every call. Frozen ones are when they have changed, which shows in torch's version of
    them, in the bias or in a sample of the weights. A change through `.data` of a few rows may show nowhere: call `forget()`
    after it.
    """

    def __init__(self, kernel: Kernel | None = None):
        if kernel is not None and kernel not in get_args(Kernel):
            raise QwenScopeError(
                f"expected a kernel out of {', '.join(get_args(Kernel))}, found {kernel!r}; choose one"
            )
        self.kernel: Kernel | None = kernel
        self._choice: Choice | None = None
        self._screen: Any = None
        self._chosen_for = 0
        self._prepared_for: tuple[Any, ...] | None = None
        self._numbers: list[Tensor] = []
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
            if screen is None:
                break
            try:
                return screen.encode(x, k)
            except BoundBroken:
                self.forget()
        else:
            self._give_up("its product is less precise than the bound assumes")
            self._remember(W_enc, b_enc)
        return reference.encode(x, W_enc, b_enc, k)

    def adopt(self, screen: Any, W_enc: Tensor, b_enc: Tensor, k: int, choice: Choice) -> None:
        """Takes a screen that somebody else has prepared for these weights, chosen for this k."""
        self._screen, self._choice, self._chosen_for = screen, choice, k
        self._remember(W_enc, b_enc)

    def _prepared(self, W_enc: Tensor, b_enc: Tensor, k: int) -> Any:
        with self._lock:
            if not screening_pays(k, len(b_enc)):
                self._choice = self._choice or Choice("reference", "more than a quarter of the features is kept")
                return None
            changed = self._prepared_for != self._state(W_enc, b_enc) or not self._same_numbers(W_enc, b_enc)
            # Fused optimisers change weights without counting the version up.
            if changed or W_enc.requires_grad or b_enc.requires_grad or k > 2 * self._chosen_for:
                self._choice = Choice(self.kernel, "asked for") if self.kernel else choose(W_enc, b_enc, k)
                self._chosen_for = k
                self._screen = screen_of(self._choice.kernel, W_enc, b_enc)
                if self._screen is None and self._choice.kernel != "reference":
                    self._choice = Choice("reference", "the weights are too large, not finite or of another dtype")
                self._remember(W_enc, b_enc)
            return self._screen

    def _remember(self, W_enc: Tensor, b_enc: Tensor) -> None:
        self._prepared_for, self._numbers = self._state(W_enc, b_enc), [t.clone() for t in _sample(W_enc, b_enc)]

    def _same_numbers(self, W_enc: Tensor, b_enc: Tensor) -> bool:
        return all(torch.equal(*pair) for pair in zip(self._numbers, _sample(W_enc, b_enc), strict=True))

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


def _sample(W_enc: Tensor, b_enc: Tensor) -> list[Tensor]:
    """The bias and some weights from all over the matrix; none on a GPU, where looking would mean waiting."""
    if W_enc.device.type != "cpu":
        return []
    rows, columns = (max(1, size // 32) for size in W_enc.shape)
    return [b_enc.detach(), W_enc.detach()[::rows, ::columns]]
