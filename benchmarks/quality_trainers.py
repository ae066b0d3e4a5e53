"""Who trains in quality.py: ours and the peers, each by its own trainer and recipe, on the same batches in the same order.

A contender takes the batches one by one and gives back something that reconstructs.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
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
from qwen_scope.training.normalise import Normalisation

SAMPLE = 16384
"""The first training tokens, from which centre, scale and whatever else a trainer measures before it starts are taken."""
WARMUP, DECAY = 0.05, 0.2
"""Shares of the steps: the rise of sparsify's Adam, which by default takes 1000 steps, and the fall at sae-lens' end."""


class Batches:
    """The training tokens in batches, in their order; notes when each was asked for."""

    def __init__(self, tokens: Tensor, batch: int, normalise: Normalisation | None) -> None:
        self.tokens, self.batch, self.normalise = tokens, batch, normalise
        self.moments: list[float] = []

    def __len__(self) -> int:
        return len(self.tokens) // self.batch

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        self.moments.append(time.perf_counter())
        return self.seen(self.tokens[number * self.batch : (number + 1) * self.batch])

    def seen(self, x: Tensor) -> Tensor:
        """Residuals as this contender's trainer gets them."""
        return self.normalise(x) if self.normalise else x.float()

    @property
    def sample(self) -> Tensor:
        return self.seen(self.tokens[:SAMPLE])


class Trained(Protocol):
    @property
    def unfired_for(self) -> Tensor:
        """For each feature, how many training tokens ago it fired last."""
        ...

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, and the features that fired at any of the tokens."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    package: str
    label: str
    """What is added to the package's name."""
    rates: tuple[float, ...]
    """Learning rates to try, around the best one."""
    default_rate: float
    """What the package takes when none is given, at 9216 features."""
    normalised: bool
    """Whether residuals are centred at their mean and scaled to unit mean square before its trainer gets them."""
    training: str
    """What it does, in words."""
    train: Callable[[Batches, Sizes, float], Trained]


@dataclass(frozen=True)
class Ours:
    sae: Any
    unfired_for: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.sae.encode(x)
        return self.sae.decode(features), features.indices[features.values > 0]


def qwen_scope(batches: Batches, sizes: Sizes, rate: float) -> Ours:
    config = TrainConfig(sizes.d_sae, sizes.k, batch=batches.batch, learning_rate=rate)
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
        return self.layer((self.batches.sample[:1] if number < 0 else self.batches[number])[None])


class Numbers:
    """What sparsify takes for a data set: one sequence per batch, whose ids all say which."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": torch.full((self.batches.batch,), number)}


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
    batch = batches.batch
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
    "qwen_scope": Recipe(
        "qwen_scope",
        "",
        (1e-3, 2e-3, 3e-3, 4e-3),
        2e-3,
        False,
        "SAETrainer with the defaults of TrainConfig but for the learning rate, which is for 16384 features and scaled by "
        "1 / sqrt(d_sae / 16384): centred and scaled by itself, decoder from directions of tokens, Adam, warm-up over 5 % of "
        "the steps and decay over the last 30 %, AuxK 1/32 on features that have not fired for 250 000 tokens",
        qwen_scope,
    ),
    "sparsify_signum": Recipe(
        "sparsify",
        ", signum",
        (2.5e-3, 5e-3, 1e-2, 2e-2),
        6.67e-3,
        True,
        "Trainer.fit with its default optimiser (sign descent in a schedule-free wrapper, momentum 0.95, constant learning "
        "rate), on a stand-in model whose one layer gives the residuals: SparseCoder with its own random start, b_dec at the "
        "mean of the first batch, decoder rows set to norm 1 before and the gradient along them removed after each pass; "
        "no AuxK, which is its default",
        partial(sparsify, "signum"),
    ),
    "sparsify_adam": Recipe(
        "sparsify",
        ", Adam",
        (4e-3, 8e-3, 1.2e-2),
        2.67e-4,
        True,
        "the same with optimizer='adam': torch's Adam, linear decay over the whole run after a warm-up of 5 % of the steps "
        "(its default of 1000 steps would not end in so short a run)",
        partial(sparsify, "adam"),
    ),
    "sae_lens": Recipe(
        "sae_lens",
        "",
        (1.5e-3, 3e-3, 6e-3),
        3e-4,
        True,
        "SAETrainer.fit with TopKTrainingSAE and their defaults (tied start with decoder rows of norm 0.1, activations rescaled "
        "by decoder norms, Adam, gradient norm clipped at 1, AuxK for features that have not fired for 1000 steps) but "
        "for normalize_activations='expected_average_only_in' and a decay over the last 20 % of the steps, both as in "
        "its tutorials",
        sae_lens,
    ),
}
