"""Trains one SAE on residuals held in memory: the loop around `SAETrainer` for experiments and tests."""

import time

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from qwen_scope.errors import QwenScopeError
from qwen_scope.sae import TopKSAE
from qwen_scope.training.config import TrainConfig
from qwen_scope.training.trainer import SAMPLE, SAETrainer


def train_sae(x: Float[Tensor, "tokens d_model"], config: TrainConfig, epochs: float = 1.0) -> TopKSAE:
    """Trains one SAE on residuals held in memory (any float dtype).

    Args:
        epochs: passes over the residuals, each in a new random order; may be a fraction.

    Raises:
        QwenScopeError: fewer tokens than one batch, no epoch, residuals or a loss that are not finite.
    """
    if len(x) < config.batch:
        raise QwenScopeError(f"expected at least one batch of {config.batch} tokens, found {len(x)}; harvest more text")
    if not epochs > 0:
        raise QwenScopeError(f"expected epochs above 0, found {epochs}; choose a larger number")
    per_epoch = len(x) // config.batch
    steps = max(1, round(per_epoch * epochs))
    generator = torch.Generator().manual_seed(config.seed + 1)
    sample = x[torch.randperm(len(x), generator=generator)[:SAMPLE]]
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
