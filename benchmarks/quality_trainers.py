"""Who trains in quality.py: ours and the peers, each by its own trainer and recipe, on the same batches in the same order.

A contender takes the batches one by one and gives back something that reconstructs. Peers are given what suits so short
a run, where their own default does not: see what each one's `includes` says.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from contenders import Sizes
from torch import Tensor, nn

from qwen_scope.training import SAETrainer, TrainConfig
from qwen_scope.training.trainer import SAMPLE

WARMUP, DECAY = 0.05, 0.2
"""Shares of the steps: the rise of sparsify's Adam, which by default takes 1000 steps, and the fall at sae-lens' end."""


class Batches:
    """The training tokens in batches, in their order; notes when each was asked for."""

    def __init__(self, tokens: Tensor, batch: int) -> None:
        self.parts = tokens.split(batch)
        self.moments: list[float] = []

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Tensor:
        if number >= len(self):
            raise IndexError(number)
        self.moments.append(time.perf_counter())
        return self.parts[number].float()

    @property
    def sample(self) -> Tensor:
        """The first tokens, for what is measured before training."""
        return torch.cat(self.parts[: -(-SAMPLE // len(self.parts[0]))]).float()


class Trained(Protocol):
    unfired_for: Tensor
    """For each feature, how many training tokens ago it fired last."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, and the features that fired at any of the tokens."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    package: str
    label: str
    rates: tuple[float, ...]
    """Learning rates to try, around the best one known."""
    default_rate: float
    """What the package takes when none is given, at 576 -> 9216."""
    includes: str
    train: Callable[[Batches, Sizes, float], Trained]


@dataclass(frozen=True)
class Ours:
    sae: Any
    unfired_for: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.sae.encode(x)
        return self.sae.decode(features), features.indices[features.values > 0]


def qwen_scope(batches: Batches, sizes: Sizes, rate: float) -> Ours:
    config = TrainConfig(sizes.d_sae, sizes.k, batch=len(batches.parts[0]), learning_rate=rate)
    trainer = SAETrainer(config, batches.sample, len(batches))
    for x in batches:
        trainer.step(x)
    return Ours(trainer.sae(), trainer.tokens_seen - trainer.last_fired)


class Replay(nn.Module):
    """What sparsify takes for a model: one layer, whose output are the residuals of the batch asked for."""

    device = torch.device("cpu")

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.batches = batches

    @property
    def base_model(self) -> "Replay":
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[-1]])}

    def forward(self, input_ids: Tensor) -> Tensor:
        number = int(input_ids[0, 0])
        return self.layer(self.batches.parts[0][None].float() if number < 0 else self.batches[number][None])


class Numbers:
    """What sparsify takes for a data set: one sequence per batch, whose ids all say which."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": torch.full((len(self.batches.parts[number]),), number)}


@dataclass(frozen=True)
class FromSparsify:
    sae: Any
    unfired_for: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.sae(x)
        return found.sae_out, found.latent_indices[found.latent_acts > 0]


def sparsify(optimizer: str, batches: Batches, sizes: Sizes, rate: float) -> FromSparsify:
    package, trainer = import_module("sparsify"), import_module("sparsify.trainer")
    with tempfile.TemporaryDirectory() as folder:
        config = package.TrainConfig(
            package.SparseCoderConfig(num_latents=sizes.d_sae, k=sizes.k),
            batch_size=1,
            optimizer=optimizer,
            lr=rate,
            lr_warmup_steps=round(WARMUP * len(batches)),
            hookpoints=["layer"],
            save_every=len(batches) + 2,
            save_dir=folder,
            log_to_wandb=False,
        )
        run = trainer.Trainer(config, Numbers(batches), Replay(batches))
        run.fit()
        # What it saved: its optimiser averages weights, and the average is what it hands out.
        sae = package.SparseCoder.load_from_disk(Path(folder) / "unnamed" / "layer")
    return FromSparsify(sae, run.num_tokens_since_fired["layer"])


@dataclass(frozen=True)
class FromSAELens:
    sae: Any
    unfired_for: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.sae.encode(x)
        return self.sae.decode(acts), (acts > 0).any(0).nonzero().squeeze(1)


def sae_lens(batches: Batches, sizes: Sizes, rate: float) -> FromSAELens:
    topk_sae, config = import_module("sae_lens.saes.topk_sae"), import_module("sae_lens.config")
    trainer = import_module("sae_lens.training.sae_trainer")
    torch.manual_seed(0)
    sae = topk_sae.TopKTrainingSAE(
        topk_sae.TopKTrainingSAEConfig(
            d_in=sizes.d_model, d_sae=sizes.d_sae, k=sizes.k, normalize_activations="expected_average_only_in"
        )
    )
    batch = len(batches.parts[0])
    measured = batches.sample.split(batch)
    run = trainer.SAETrainer(
        config.SAETrainerConfig(
            total_training_samples=len(batches) * batch,
            train_batch_size_samples=batch,
            lr=rate,
            lr_end=rate / 10,
            lr_decay_steps=round(DECAY * len(batches)),
            n_batches_for_norm_estimate=len(measured),
        ),
        sae,
        chain(measured, batches),
    )
    run.fit()
    return FromSAELens(sae, run.n_forward_passes_since_fired * batch)


RECIPES = {
    "qwen_scope": Recipe("qwen_scope", "", (1e-3, 2e-3, 4e-3, 8e-3), 2e-3, "", qwen_scope),
    "sparsify_signum": Recipe("sparsify", ", signum", (2.5e-3, 5e-3, 1e-2), 6.67e-3, "", partial(sparsify, "signum")),
    "sparsify_adam": Recipe("sparsify", ", Adam", (1e-3, 2e-3, 4e-3), 2.67e-4, "", partial(sparsify, "adam")),
    "sae_lens": Recipe("sae_lens", "", (1e-3, 2e-3, 4e-3), 3e-4, "", sae_lens),
}
