"""Trains one `TopKSAE` on residuals: Gao et al.'s recipe (arXiv:2406.04093) with AuxK, in plain torch, one process."""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from qwen_scope.devices import as_dtype
from qwen_scope.errors import QwenScopeError
from qwen_scope.sae import TopKSAE
from qwen_scope.training.autoencode import Autoencoded, autoencode


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
    product_dtype: str = "bfloat16"
    """Of the encoder's matrix product while training; the SAE that comes out is float32."""
    seed: int = 0
    """Of the initial directions and the order of the tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_sae:
            raise QwenScopeError(f"expected k from 1 to d_sae = {self.d_sae}, found {self.k}; choose a smaller k")
        for name in ("batch", "epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise QwenScopeError(f"expected {name} above 0, found {getattr(self, name)}; choose a larger one")
        as_dtype(self.product_dtype)


@dataclass(frozen=True)
class Normalisation:
    """x -> (x - centre) / scale, so that one learning rate fits every layer of every model."""

    centre: Float[Tensor, " d_model"]
    scale: float

    @staticmethod
    def of(x: Float[Tensor, "tokens d_model"]) -> "Normalisation":
        """Centre at the geometric median, scaled to unit mean square per dimension."""
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


class SAETrainer:
    """State of one run: parameters in normalised units, optimiser, when each feature last fired.

    The parameters see (x - centre) / scale. `sae()` folds both into the biases, so what comes out follows the published
    convention (nothing subtracted, nothing scaled) and has decoder columns of norm 1 in the residual stream's units.
    """

    def __init__(self, config: TrainConfig, sample: Float[Tensor, "tokens d_model"], steps: int):
        self.config = config
        self.normalise = Normalisation.of(sample)
        generator = torch.Generator().manual_seed(config.seed)
        # Directions of real tokens (shuffled) with noise: fewer features are born dead than with random directions.
        rows = self.normalise(sample)[torch.randint(len(sample), (config.d_sae,), generator=generator)]
        noise = torch.randn(rows.shape, generator=generator)
        directions = _unit(_unit(rows) + _unit(noise))
        self.decoder = directions.clone().requires_grad_()
        # The encoder is the decoder's transpose up to the one factor with which the first reconstructions fit best.
        start = self.normalise(sample[:2048])
        no_bias = torch.zeros(config.d_sae), torch.zeros(start.shape[1])
        first = autoencode(start, directions, no_bias[0], directions, no_bias[1], config.k)
        factor = (first.x_hat * start).sum() / first.x_hat.pow(2).sum()
        self.W_enc = (directions * factor).requires_grad_()
        self.b_enc = torch.zeros(config.d_sae).requires_grad_()
        self.b_dec = torch.zeros(sample.shape[1]).requires_grad_()
        peak = config.learning_rate / math.sqrt(config.d_sae / 2**14)
        self.optimizer = torch.optim.Adam(self.parameters, lr=peak, betas=(0.9, 0.999), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self._rate(step, steps))
        self.product_dtype = as_dtype(config.product_dtype)
        self.tokens_seen = 0
        self.last_fired = torch.zeros(config.d_sae, dtype=torch.long)

    @property
    def parameters(self) -> list[Tensor]:
        """The four trained tensors; the decoder as (d_sae, d_model) rows."""
        return [self.W_enc, self.b_enc, self.decoder, self.b_dec]

    @property
    def dead(self) -> Int[Tensor, " dead"]:
        """Features that have not fired for `dead_after` tokens."""
        return (self.tokens_seen - self.last_fired > self.config.dead_after).nonzero().squeeze(1)

    def _rate(self, step: int, steps: int) -> float:
        rise = (step + 1) / max(1, self.config.warmup * steps)
        fall = (steps - step) / max(1, self.config.decay * steps)
        return max(0.0, min(1.0, rise, fall))

    def step(self, x: Float[Tensor, "tokens d_model"]) -> float:
        """One optimiser step on raw residuals; gives the batch's fraction of variance unexplained before it."""
        x = self.normalise(x)
        out = autoencode(x, self.W_enc, self.b_enc, self.decoder, self.b_dec, self.config.k, self.product_dtype)
        error = (out.x_hat - x).pow(2).sum(1).mean()
        # Normalised by the variance: the loss is the FVU, alike for every layer and model.
        variance = (x - x.mean(0)).pow(2).sum(1).mean()
        loss = error / variance
        self.tokens_seen += len(x)
        self.last_fired[out.indices[out.values > 0]] = self.tokens_seen
        dead = self.dead
        if len(dead):
            loss = loss + self.config.aux_coefficient * self._aux_loss(x, out, dead)
        loss.backward()
        self._keep_decoder_norms()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.decoder.copy_(_unit(self.decoder))
        return float((error / variance).detach())

    def _aux_loss(self, x: Tensor, out: Autoencoded, dead: Tensor) -> Tensor:
        """AuxK: how badly the strongest dead features explain what the living ones left over."""
        residue = (x - out.x_hat).detach()
        pre = torch.nn.functional.linear(x, self.W_enc[dead], self.b_enc[dead])
        values, which = pre.topk(min(x.shape[1] // 2, len(dead)), dim=1)
        acts = torch.zeros_like(pre).scatter(1, which, values.relu())
        return (acts @ self.decoder[dead] - residue).pow(2).sum(1).mean() / residue.pow(2).sum(1).mean()

    def _keep_decoder_norms(self) -> None:
        # The gradient along a unit-norm row only changes the norm, which is set back anyway; left in, it would spoil
        # Adam's moments.
        grad = self.decoder.grad
        assert grad is not None
        grad.sub_((grad * self.decoder.detach()).sum(1, keepdim=True) * self.decoder.detach())

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
        QwenScopeError: fewer tokens than one batch, or a loss that is no longer finite.
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
            if not math.isfinite(fvu):
                raise QwenScopeError(f"expected a finite loss, found {fvu} at step {step}; lower the learning rate")
            smooth = fvu if smooth is None else 0.98 * smooth + 0.02 * fvu
            bar.update(config.batch)
            bar.set_postfix(fvu=f"{smooth:.4f}", dead=len(trainer.dead), seconds=round(time.monotonic() - start))
    return trainer.sae()
