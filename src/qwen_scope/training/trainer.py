"""Trains one `TopKSAE` on residuals: Gao et al.'s recipe (arXiv:2406.04093) with AuxK, in one process.

The backward pass is written out, so that no gradient of a weight matrix ever exists: `AdamRows` sums up a feature's
gradient and takes its step at once.
"""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from qwen_scope import kernels
from qwen_scope.errors import QwenScopeError
from qwen_scope.kernels.adam import AdamRows, RowGradient
from qwen_scope.kernels.pairs import group_by_feature, row_dots, sum_per_feature
from qwen_scope.sae import TopKSAE
from qwen_scope.training.autoencode import autoencode

LARGEST_NORM = 1.0
"""Gradients of a larger norm, over all parameters together, are scaled down to it."""


@dataclass(frozen=True)
class TrainConfig:
    """How one SAE is trained."""

    d_sae: int
    """Number of features."""
    k: int = 50
    """Features kept per token."""
    batch: int = 2048
    """Tokens in one step."""
    epochs: float = 1.0
    """Passes over the residuals, each in a new random order."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam, for a dictionary of 16384 features; it is scaled by 1 / sqrt(d_sae / 16384)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.3
    """Share of the steps, at the end, in which it falls to 0."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss, which gives dead features a gradient (report section 2)."""
    dead_after: int = 250_000
    """A feature that has not fired for this many tokens counts as dead. Gao et al. wait 10 M; runs here are shorter."""
    seed: int = 0
    """Of the initial directions and the order of the tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_sae:
            raise QwenScopeError(f"expected k from 1 to d_sae = {self.d_sae}, found {self.k}; choose a smaller k")
        for name in ("batch", "epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise QwenScopeError(f"expected {name} above 0, found {getattr(self, name)}; choose a larger one")


@dataclass(frozen=True)
class Normalisation:
    """x -> (x - centre) / scale, so that one learning rate fits every layer of every model."""

    centre: Float[Tensor, " d_model"]
    scale: float

    @staticmethod
    def of(x: Float[Tensor, "tokens d_model"]) -> "Normalisation":
        """Centre at the geometric median, scaled to unit mean square per dimension.

        Raises:
            QwenScopeError: NaN or infinity among the residuals.
        """
        bad = int((~x.isfinite().all(dim=1)).sum())
        if bad:
            raise QwenScopeError(
                f"expected finite residuals, found NaN or infinity in {bad} of {len(x)} tokens; leave those out"
            )
        centre = geometric_median(x.float())
        return Normalisation(centre, float((x.float() - centre).pow(2).mean().sqrt()))

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


class Gradients(NamedTuple):
    """One for each of the four parameters."""

    W_enc: RowGradient
    b_enc: Float[Tensor, " d_sae"]
    decoder: RowGradient
    b_dec: Float[Tensor, " d_model"]


class SAETrainer:
    """State of one run: parameters in normalised units, optimiser, when each feature last fired.

    The parameters see (x - centre) / scale. `sae()` folds both into the biases, so what comes out follows the published
    convention (nothing subtracted, nothing scaled) and has decoder columns of norm 1 in the residual stream's units.
    They live on the device of the sample.
    """

    def __init__(self, config: TrainConfig, sample: Float[Tensor, "tokens d_model"], steps: int):
        self.config = config
        self.steps = steps
        self.normalise = Normalisation.of(sample)
        device = sample.device
        generator = torch.Generator().manual_seed(config.seed)
        # Directions of real tokens (shuffled) with noise: fewer features are born dead than with random directions.
        rows = self.normalise(sample[torch.randint(len(sample), (config.d_sae,), generator=generator).to(device)])
        noise = torch.randn(rows.shape, generator=generator).to(device)
        self.decoder = _unit(_unit(rows) + _unit(noise))
        self.b_enc = torch.zeros(config.d_sae, device=device)
        self.b_dec = torch.zeros(sample.shape[1], device=device)
        # The encoder is the decoder's transpose up to the one factor with which the first reconstructions fit best.
        start = self.normalise(sample[:2048])
        first = autoencode(start, self.decoder, self.b_enc, self.decoder, self.b_dec, config.k).x_hat
        self.W_enc = self.decoder * ((first * start).sum() / first.pow(2).sum())
        self.encoder = kernels.Encoder(kernels.choose(self.W_enc, self.b_enc, config.k).kernel)
        self.adam_W_enc = AdamRows(self.W_enc)
        self.adam_decoder = AdamRows(self.decoder, unit_norm=True)
        self.adam_biases = torch.optim.Adam([self.b_enc, self.b_dec], fused=True)
        self.steps_done = 0
        self.tokens_seen = 0
        self.last_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)

    @property
    def parameters(self) -> list[Tensor]:
        """The four trained tensors; the decoder as (d_sae, d_model) rows."""
        return [self.W_enc, self.b_enc, self.decoder, self.b_dec]

    @property
    def dead(self) -> Int[Tensor, " dead"]:
        """Features that have not fired for `dead_after` tokens."""
        return (self.tokens_seen - self.last_fired > self.config.dead_after).nonzero().squeeze(1)

    def learning_rate(self, step: int) -> float:
        """What the schedule gives for a step, from 0: a rise, the peak, a fall."""
        rise = (step + 1) / max(1, self.config.warmup * self.steps)
        fall = (self.steps - step) / max(1, self.config.decay * self.steps)
        return self.config.learning_rate / math.sqrt(self.config.d_sae / 2**14) * max(0.0, min(1.0, rise, fall))

    @torch.no_grad()
    def step(self, x: Float[Tensor, "tokens d_model"]) -> float:
        """One optimiser step on raw residuals; gives the batch's fraction of variance unexplained before it.

        Raises:
            QwenScopeError: residuals or a loss that are not finite; no step is taken.
        """
        x = self.normalise(x)
        indices, kept = kernels.encode(x, self.W_enc, self.b_enc, self.config.k, self.encoder)
        values = kept.relu()
        error = kernels.decode(indices, values, self.decoder, self.b_dec) - x
        # Normalised by the variance: the loss is the FVU, alike for every layer and model.
        variance = (x - x.mean(0)).pow(2).sum()
        fvu = float(error.pow(2).sum() / variance)
        if not math.isfinite(fvu):
            raise QwenScopeError(
                f"expected a finite loss, found {fvu} at step {self.steps_done}; lower the learning rate"
            )
        self.tokens_seen += len(x)
        self.last_fired[indices[values > 0]] = self.tokens_seen
        self._descend(self._gradients(x, indices, values, error, variance))
        return fvu

    def _gradients(self, x: Tensor, indices: Tensor, values: Tensor, error: Tensor, variance: Tensor) -> Gradients:
        pairs = group_by_feature(indices, self.config.d_sae)
        of_x_hat = error * (2 / variance)
        # Where ReLU cut a value to 0, no gradient passes to the encoder.
        of_values = row_dots(pairs, of_x_hat, self.decoder) * (values > 0)
        b_enc = sum_per_feature(indices, of_values, self.config.d_sae)
        extra_W_enc = extra_decoder = None
        dead = self.dead
        if len(dead) and self.config.aux_coefficient:
            rows, biases, directions = self._aux_gradients(x, -error, dead)
            b_enc.index_add_(0, dead, biases)
            extra_W_enc, extra_decoder = (dead, rows), (dead, directions)
        return Gradients(
            RowGradient(pairs, of_values, x, extra_W_enc),
            b_enc,
            RowGradient(pairs, values, of_x_hat, extra_decoder),
            of_x_hat.sum(0),
        )

    def _aux_gradients(self, x: Tensor, residue: Tensor, dead: Tensor) -> tuple[Tensor, ...]:
        """AuxK: how badly the strongest dead features explain what the living ones left over."""
        W_enc, b_enc, decoder = rows = [of[dead].requires_grad_() for of in (self.W_enc, self.b_enc, self.decoder)]
        with torch.enable_grad():
            pre = F.linear(x, W_enc, b_enc)
            values, which = pre.topk(min(x.shape[1] // 2, len(dead)), dim=1)
            acts = torch.zeros_like(pre).scatter(1, which, values.relu())
            loss = (acts @ decoder - residue).pow(2).sum() / residue.pow(2).sum()
            return torch.autograd.grad(self.config.aux_coefficient * loss, rows)

    def _descend(self, gradients: Gradients) -> None:
        squares = self.adam_W_enc.squared_norm(gradients.W_enc) + self.adam_decoder.squared_norm(gradients.decoder)
        squares += float(gradients.b_enc.pow(2).sum() + gradients.b_dec.pow(2).sum())
        if not math.isfinite(squares):
            raise QwenScopeError(
                f"expected finite gradients, found {squares} as their squared norm at step {self.steps_done}; lower the "
                "learning rate"
            )
        factor = min(1.0, LARGEST_NORM / (math.sqrt(squares) + 1e-6))
        rate = self.learning_rate(self.steps_done)
        self.adam_W_enc.step(gradients.W_enc, rate, factor)
        self.adam_decoder.step(gradients.decoder, rate, factor)
        self.b_enc.grad, self.b_dec.grad = gradients.b_enc * factor, gradients.b_dec * factor
        self.adam_biases.param_groups[0]["lr"] = rate
        self.adam_biases.step()
        self.steps_done += 1

    def sae(self) -> TopKSAE:
        """The SAE as it is now, in the published convention (activation `topk_relu`)."""
        centre, scale = self.normalise.centre, self.normalise.scale
        W_enc, b_enc, decoder, b_dec = (p.detach().clone() for p in self.parameters)
        b_enc = b_enc * scale - (W_enc.double() @ centre.double()).float()
        return TopKSAE(W_enc, decoder.T, b_enc, b_dec * scale + centre, self.config.k, "topk_relu")


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def train_sae(x: Float[Tensor, "tokens d_model"], config: TrainConfig) -> TopKSAE:
    """Trains one SAE on residuals held in memory (any float dtype).

    Raises:
        QwenScopeError: fewer tokens than one batch, residuals or a loss that are not finite.
    """
    if len(x) < config.batch:
        raise QwenScopeError(f"expected at least one batch of {config.batch} tokens, found {len(x)}; harvest more text")
    per_epoch = len(x) // config.batch
    steps = max(1, round(per_epoch * config.epochs))
    generator = torch.Generator().manual_seed(config.seed + 1)
    sample = x[torch.randperm(len(x), generator=generator)[:16384]]
    trainer = SAETrainer(config, sample, steps)
    order = torch.empty(0, dtype=torch.long)
    smooth = None
    start = time.monotonic()
    with tqdm(
        total=steps * config.batch, desc=f"training {config.d_sae} features", unit="token", unit_scale=True
    ) as bar:
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(x), generator=generator)
            at = step % per_epoch * config.batch
            fvu = trainer.step(x[order[at : at + config.batch]])
            smooth = fvu if smooth is None else 0.98 * smooth + 0.02 * fvu
            bar.update(config.batch)
            bar.set_postfix(fvu=f"{smooth:.4f}", dead=len(trainer.dead), seconds=round(time.monotonic() - start))
    return trainer.sae()
