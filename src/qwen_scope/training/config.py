"""`TrainConfig`: the recipe of one SAE. Its fields are plain, and their docstrings are the help of the command line."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from qwen_scope.errors import QwenScopeError

Centre = Literal["median", "mean", "none"]
"""What is subtracted from the residuals: their geometric median, their mean, or nothing."""


@dataclass(frozen=True)
class TrainConfig:
    """How one SAE is trained; the defaults are the recipe of Gao et al. 2024 (arXiv:2406.04093) for short runs."""

    d_sae: int
    """Number of features."""
    k: int = 50
    """Features kept per token."""
    batch: int = 2048
    """Tokens in one step, over all processes together."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam, for a dictionary of 16384 features; it is scaled by 1 / sqrt(d_sae / 16384)."""
    beta1: float = 0.8
    """How much of Adam's running mean of the gradient each step keeps. Less than the usual 0.9 fits a little better, the more
    so the shorter the run; with 0.5 more features end dead."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.3
    """Share of the steps, at the end, in which it falls to 0."""
    clip_norm: float = 1.0
    """Gradients of a larger norm, over all parameters together, are scaled down to it; 0 clips nothing."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss, which gives dead features a gradient; 0 leaves it out."""
    dead_after: int = 250_000
    """A feature that has not fired for this many tokens counts as dead. Gao et al. wait 10 M; runs here are shorter."""
    centre: Centre = "median"
    """Where b_dec starts: at the geometric median of the residuals, at their mean, or at 0."""
    tied_init: bool = True
    """Start the decoder near directions of real tokens and the encoder as its transpose, scaled to fit best; otherwise
    both start at random directions of norm 1, independent of each other."""
    unit_norm: bool = True
    """Set decoder rows back to norm 1 after each step."""
    remove_parallel_gradient: bool = True
    """Leave out the part of a decoder row's gradient along the row, which would only change its norm and spoil Adam's
    moments; only where rows are kept at norm 1."""
    batch_topk: bool = False
    """BatchTopK (Bussmann et al. 2024, arXiv:2412.06410): in training, keep the batch * k strongest activations of the
    whole batch instead of k of each token, of which no token can have more than 4 k. Afterwards the SAE keeps k of each
    token as any other."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka (Bussmann et al. 2025, arXiv:2503.17547): shares of the dictionary, ascending, each of which must explain
    the residuals by itself: the loss is the mean of their FVUs and of the whole dictionary's."""
    seed: int = 0
    """Of the initial directions and the order of the tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_sae:
            raise QwenScopeError(f"expected k from 1 to d_sae = {self.d_sae}, found {self.k}; choose a smaller k")
        if self.seed < 0:
            raise QwenScopeError(f"expected a seed from 0, found {self.seed}; choose another")
        for name in ("batch", "learning_rate", "dead_after"):
            if not getattr(self, name) > 0:
                raise QwenScopeError(f"expected {name} above 0, found {getattr(self, name)}; choose a larger one")
        for name in ("clip_norm", "aux_coefficient"):
            if not getattr(self, name) >= 0:
                raise QwenScopeError(
                    f"expected {name} of at least 0, found {getattr(self, name)}; choose 0 to leave it out"
                )
        if not 0 <= self.beta1 < 1:
            raise QwenScopeError(f"expected beta1 from 0 to below 1, found {self.beta1}; choose one such as 0.9")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise QwenScopeError(
                    f"expected {name} from 0 to 1, found {getattr(self, name)}; it is a share of the steps"
                )
        if not all(low < high for low, high in pairwise((0.0, *self.prefixes, 1.0))):
            found = ", ".join(map(str, self.prefixes))
            raise QwenScopeError(
                f"expected prefixes in ascending order between 0 and 1, found {found}; leave out 1, the whole dictionary"
            )
