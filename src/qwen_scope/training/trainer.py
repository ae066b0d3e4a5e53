"""Trains one `TopKSAE` on residuals: Gao et al.'s recipe (arXiv:2406.04093), in one process or several.

The backward pass is written out, so that no gradient of a weight matrix ever exists: `AdamRows` sums up a feature's
gradient and takes its step at once.
"""

import dataclasses
import math
from functools import partial
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope import kernels
from qwen_scope.errors import QwenScopeError
from qwen_scope.kernels.adam import AdamRows
from qwen_scope.kernels.choice import unavailable
from qwen_scope.kernels.threads import torch_alone
from qwen_scope.sae import TopKSAE
from qwen_scope.training.config import TrainConfig
from qwen_scope.training.group import Group, Parallel, Ranks
from qwen_scope.training.normalise import Normalisation
from qwen_scope.training.objective import Gradients, Objective
from qwen_scope.training.start import drawn
from qwen_scope.training.weights import Weights, as_sae, has_unit_rows, of_sae

SAMPLE = 16384
"""Residuals that are plenty to take centre, scale and first directions from."""
ALONE = Group()


class SAETrainer:
    """State of one run: weights in normalised units, their optimisers, when each feature last fired.

    The weights see (x - centre) / scale. `sae()` folds both into the biases, so what comes out follows the published
    convention (nothing subtracted, nothing scaled). They live on the device of the sample.

    Args:
        config: the recipe.
        sample: residuals that centre, scale and first directions are taken from; some ten thousand are plenty. The same
            on all ranks of a group.
        steps: steps of the whole run, for the schedule of the learning rate.
        group: processes that train this SAE together; all make the same calls.
        parallel: what they share. With `data`, each gives `step` its part of the batch; all hold the same weights, and
            one of them can save the state. With `features`, all give it the whole batch; each holds its own features,
            and its state is its own.

    Raises:
        QwenScopeError: residuals that are not finite or all the same, or features that the ranks cannot share equally.
    """

    def __init__(
        self,
        config: TrainConfig,
        sample: Float[Tensor, "tokens d_model"],
        steps: int,
        *,
        group: Group = ALONE,
        parallel: Parallel = "data",
    ):
        objective = Objective(config, True, Ranks.of(group, parallel))
        normalise = Normalisation.of(sample, config.centre)
        self._set_up(objective, normalise, drawn(objective, normalise, sample), steps)

    @classmethod
    def adapting(
        cls,
        config: TrainConfig,
        sae: TopKSAE,
        sample: Float[Tensor, "tokens d_model"],
        steps: int,
        *,
        group: Group = ALONE,
        parallel: Parallel = "data",
    ) -> "SAETrainer":
        """Goes on from a finished SAE, to adapt it to other residuals: those of a chat model, say, or of a fine-tuned one.

        Before the first step `sae()` is the same SAE; its activation is kept. Decoder rows that are not of norm 1, which
        published checkpoints do not promise, are left at any norm.

        Raises:
            QwenScopeError: an SAE of another d_sae, k or width than the recipe and the sample.
        """
        expected, found = (config.d_sae, config.k, sample.shape[1]), (sae.d_sae, sae.k, sae.d_model)
        if expected != found:
            raise QwenScopeError(
                f"expected an SAE of d_sae = {expected[0]}, k = {expected[1]} and d_model = {expected[2]}, found "
                f"{found[0]}, {found[1]} and {found[2]}; set the recipe to the SAE's"
            )
        config = dataclasses.replace(config, unit_norm=config.unit_norm and has_unit_rows(sae))
        objective = Objective(config, sae.activation == "topk_relu", Ranks.of(group, parallel))
        normalise = Normalisation.of(sample, config.centre)
        trainer = cls.__new__(cls)
        trainer._set_up(objective, normalise, of_sae(sae, normalise, objective.ranks.features), steps)
        return trainer

    @classmethod
    def restored(
        cls,
        config: TrainConfig,
        state: dict[str, Tensor],
        steps: int,
        *,
        group: Group = ALONE,
        parallel: Parallel = "data",
    ) -> "SAETrainer":
        """Goes on from `state()`, which is copied, on the device of its weights.

        What comes out is, bit for bit on a CPU with as many threads, that of a trainer that was never interrupted.

        Raises:
            QwenScopeError: a state that lacks something, or of another number of features.
        """
        trainer = cls.__new__(cls)
        try:
            weights = Weights(*(state[name].clone() for name in Weights._fields))
            normalise = Normalisation(state["centre"].clone(), float(state["scale"]))
            config = dataclasses.replace(config, unit_norm=bool(state["unit_norm"]))
            objective = Objective(config, bool(state["relu"]), Ranks.of(group, parallel))
            # Kernels other than the reference give the same bits: it is no loss where another machine lacks this one.
            kernel = get_args(kernels.Kernel)[int(state["kernel"])]
            usable = unavailable(kernel, weights.W_enc.device) is None
            trainer._set_up(objective, normalise, weights, steps, kernel if usable else None)
            trainer.steps_done, trainer.tokens_seen = int(state["steps_done"]), int(state["tokens_seen"])
            trainer.last_fired.copy_(state["last_fired"])
            for name, adam in zip(Weights._fields, trainer.optimisers, strict=True):
                moments = {moment: state[f"{name}.{moment}"] for moment in ("mean", "square")}
                adam.load_state_dict({"steps": trainer.steps_done, **moments})
        except KeyError as error:
            raise QwenScopeError(
                f"expected a trainer's state, found one without {error.args[0]}; pass what state() gave"
            ) from error
        return trainer

    def _set_up(
        self,
        objective: Objective,
        normalise: Normalisation,
        weights: Weights,
        steps: int,
        kernel: kernels.Kernel | None = None,
    ) -> None:
        config, features = objective.config, objective.ranks.features
        own = features.share(config.d_sae)
        if len(weights.W_enc) != own.stop - own.start:
            raise QwenScopeError(
                f"expected weights of {own.stop - own.start} features, found {len(weights.W_enc)}; set d_sae to "
                f"{len(weights.W_enc) * features.size}"
            )
        self.config = config
        self.steps = steps
        self.objective = objective
        self.normalise = normalise
        self.weights = weights
        adam = partial(AdamRows, betas=(config.beta1, 0.999))
        self.optimisers = (
            adam(weights.W_enc),
            adam(weights.b_enc[:, None]),
            adam(weights.decoder, unit_norm=config.unit_norm, keep_parallel=not config.remove_parallel_gradient),
            adam(weights.b_dec[None]),
        )
        self.encoder = kernels.Encoder(kernel or kernels.choose(weights.W_enc, weights.b_enc, config.k).kernel)
        self.steps_done = 0
        self.tokens_seen = 0
        self.last_fired = torch.zeros(len(weights.b_enc), dtype=torch.long, device=weights.b_enc.device)

    def state(self) -> dict[str, Tensor]:
        """All that `restored` needs, as contiguous tensors for one safetensors file; not copied.

        That the kernel is among it (its place in `kernels.Kernel`) is for exact repetition: which one is fastest is
        measured, and the reference rounds sums otherwise than the rest.
        """
        numbers = {
            "steps_done": self.steps_done,
            "tokens_seen": self.tokens_seen,
            "kernel": get_args(kernels.Kernel).index(self.encoder.kernel),
            "unit_norm": int(self.config.unit_norm),
            "relu": int(self.objective.relu),
        }
        moments = {
            f"{name}.{moment}": getattr(adam, moment)
            for name, adam in zip(Weights._fields, self.optimisers, strict=True)
            for moment in ("mean", "square")
        }
        return {
            **self.weights._asdict(),
            **moments,
            **{name: torch.tensor(number) for name, number in numbers.items()},
            "last_fired": self.last_fired,
            "centre": self.normalise.centre,
            "scale": torch.tensor(self.normalise.scale, dtype=torch.float64),
        }

    @property
    def parameters(self) -> list[Tensor]:
        """The four trained tensors; the decoder as (d_sae, d_model) rows."""
        return list(self.weights)

    @property
    def dead(self) -> Int[Tensor, " dead"]:
        """Features, among the rank's own, that have not fired for `dead_after` tokens."""
        return (self.tokens_seen - self.last_fired > self.config.dead_after).nonzero().squeeze(1)

    @property
    def dead_count(self) -> int:
        """Dead features over all ranks, which ask for it together."""
        features = self.objective.ranks.features
        return int(features.sum(torch.tensor(len(self.dead), device=self.last_fired.device)))

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
        with torch_alone():
            return self._step(self.normalise(x))

    def _step(self, x: Tensor) -> float:
        batch = self.objective.ranks.batch
        found = self.objective.forward(x, self.weights, self.encoder)
        fvu = self.objective.fvu(found)
        if not math.isfinite(fvu):
            raise QwenScopeError(
                f"expected a finite loss, found {fvu} at step {self.steps_done}; lower the learning rate"
            )
        fired = torch.zeros(len(self.last_fired), device=x.device)
        fired[found.indices[found.values > 0]] = 1
        self.tokens_seen += len(x) * batch.size
        self.last_fired[batch.sum(fired) > 0] = self.tokens_seen
        self._descend(self.objective.gradients(x, self.weights, found, self.dead))
        return fvu

    def _descend(self, gradients: Gradients) -> None:
        both = list(zip(self.optimisers, gradients, strict=True))
        *of_features, of_b_dec = (adam.squared_norm(gradient) for adam, gradient in both)
        squares = torch.tensor(sum(of_features), dtype=torch.float64, device=self.last_fired.device)
        squared = float(self.objective.ranks.features.sum(squares)) + of_b_dec
        if not math.isfinite(squared):
            raise QwenScopeError(
                f"expected finite gradients, found {squared} as their squared norm at step {self.steps_done}; lower the "
                "learning rate"
            )
        largest = self.config.clip_norm or math.inf
        factor = min(1.0, largest / (math.sqrt(squared) + 1e-6))
        rate = self.learning_rate(self.steps_done)
        for adam, gradient in both:
            adam.step(gradient, rate, factor)
        self.steps_done += 1

    def sae(self) -> TopKSAE:
        """The SAE as it is now, in the published convention; ranks call it together and each gets the whole of it."""
        activation = "topk_relu" if self.objective.relu else "topk"
        return as_sae(self.weights, self.normalise, self.config.k, activation, self.objective.ranks.features)
