"""How faithfully an SAE's reconstructions stand for the residuals: figures defined once, accumulated over batches."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qwen_scope.evaluation.density import Density
from qwen_scope.features import SparseFeatures
from qwen_scope.outliers import norm_outliers


@dataclass(frozen=True)
class Fidelity:
    """Figures over the tokens of a sample.

    *Kept* tokens are those that are neither first in their text (an attention sink) nor norm outliers (see
    `qwen_scope.outliers`); how many were left out is said in `first_tokens` and `norm_outliers`.
    """

    tokens: int
    """All tokens measured."""
    first_tokens: int
    """Tokens at position 0."""
    norm_outliers: int
    """Tokens elsewhere whose norm is extreme."""
    fvu: float
    """Fraction of variance unexplained over kept tokens: `sum |x - x_hat|^2 / sum |x - mean(x)|^2`, both sums and the
    mean over the same tokens. 0 is perfect, 1 is no better than the mean; it can be larger."""
    fvu_without_first: float
    """The same over all tokens but those at position 0, norm outliers included."""
    fvu_all: float
    """The same over all tokens."""
    cosine: float
    """Mean over kept tokens of the cosine between x and x_hat."""
    l0: float
    """Mean over kept tokens of the number of features with value > 0."""
    short_rows: int
    """Tokens, of all, with fewer than k positive pre-activations: there, and only there, the conventions `topk` (keeps
    negative values) and `topk_relu` (makes them 0) differ."""
    never_fired: int
    """Features that fire (value > 0) at no kept token."""
    always_fired: list[int]
    """Features that fire at every kept token."""
    density: Density
    """At which share of the kept tokens features fire."""

    @property
    def explained_variance(self) -> float:
        """`1 - fvu`, over kept tokens."""
        return 1 - self.fvu


class FidelityMeter:
    """Accumulates `Fidelity` over batches, in float64."""

    def __init__(self, d_model: int, d_sae: int):
        self._all, self._without_first, self._kept = _Variance(d_model), _Variance(d_model), _Variance(d_model)
        self._fired = torch.zeros(d_sae, dtype=torch.long)
        self._cosines = 0.0
        self._short = 0
        self._outliers = 0

    def update(
        self,
        x: Float[Tensor, "tokens d_model"],
        x_hat: Float[Tensor, "tokens d_model"],
        features: SparseFeatures,
        first: Bool[Tensor, " tokens"],
    ) -> None:
        """Adds a batch.

        Args:
            x: residuals.
            x_hat: their reconstructions.
            features: what they were reconstructed from; values under the SAE's own convention.
            first: which of them are at position 0 of their text.
        """
        x, x_hat, first, active = x.cpu().double(), x_hat.cpu().double(), first.cpu(), features.active.cpu()
        outliers = torch.zeros_like(first)
        if not first.all():
            outliers[~first] = norm_outliers(x[~first])
        kept = ~first & ~outliers
        self._all.update(x, x_hat)
        self._without_first.update(x[~first], x_hat[~first])
        self._kept.update(x[kept], x_hat[kept])
        self._outliers += int(outliers.sum())
        self._cosines += float(torch.cosine_similarity(x[kept], x_hat[kept], dim=1).sum())
        # Fewer than k positive pre-activations means that a kept value is not positive, under either convention.
        self._short += int((~active).any(dim=1).sum())
        fired = features.indices.cpu()[kept][active[kept]]
        self._fired += torch.bincount(fired, minlength=len(self._fired))

    def result(self) -> Fidelity:
        """The figures so far; a fraction over no tokens at all is NaN."""
        kept = self._kept.tokens
        return Fidelity(
            tokens=self._all.tokens,
            first_tokens=self._all.tokens - self._without_first.tokens,
            norm_outliers=self._outliers,
            fvu=self._kept.fvu,
            fvu_without_first=self._without_first.fvu,
            fvu_all=self._all.fvu,
            cosine=self._cosines / kept if kept else float("nan"),
            l0=float(self._fired.sum()) / kept if kept else float("nan"),
            short_rows=self._short,
            never_fired=int((self._fired == 0).sum()),
            always_fired=(self._fired == kept).nonzero().flatten().tolist() if kept else [],
            density=Density.of(self._fired, kept),
        )


class _Variance:
    """Error and variance sums of a set of tokens that is seen once."""

    def __init__(self, d_model: int):
        self.tokens = 0
        self._sum = torch.zeros(d_model, dtype=torch.float64)
        self._squares = 0.0
        self._error = 0.0
        # Deviations are taken from the first batch's mean: sums of squares about a far-away origin would cancel.
        self._origin: Tensor | None = None

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        if not len(x):
            return
        if self._origin is None:
            self._origin = x.mean(0)
        centred = x - self._origin
        self.tokens += len(x)
        self._sum += centred.sum(0)
        self._squares += float(centred.pow(2).sum())
        self._error += float((x - x_hat).pow(2).sum())

    @property
    def fvu(self) -> float:
        if not self.tokens:
            return float("nan")
        variance = self._squares - float(self._sum.pow(2).sum()) / self.tokens
        return self._error / variance if variance > 0 else float("nan")


def fvu(x: Float[Tensor, "tokens d_model"], x_hat: Float[Tensor, "tokens d_model"]) -> float:
    """Fraction of variance unexplained of one batch, as `Fidelity.fvu` defines it."""
    meter = _Variance(x.shape[1])
    meter.update(x.cpu().double(), x_hat.cpu().double())
    return meter.fvu
