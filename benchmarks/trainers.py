"""What trains: the same SAE from the same start, one optimiser step at a time, by us, by dense autograd and by peers."""

from importlib import import_module
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from contenders import Sizes, residuals
from memory import MIB
from torch import Tensor

from qwen_scope.training.trainer import SAETrainer, TrainConfig

LEARNING_RATE = 1e-4
NEVER = 2**62


class Trainer(Protocol):
    includes: str
    """What its step does, in words."""

    def __init__(self, start: SAETrainer) -> None:
        """Takes over the weights, not the optimiser."""
        ...

    def step(self, x: Tensor) -> float:
        """One optimiser step; gives the loss before it."""
        ...

    def fvu(self, loss: float, x: Tensor) -> float:
        """What that loss is as a fraction of variance unexplained."""
        ...


def started(sizes: Sizes, seed: int) -> SAETrainer:
    """Our trainer before its first step, whose weights all contenders start from. No feature ever counts as dead."""
    config = TrainConfig(sizes.d_sae, sizes.k, dead_after=NEVER, seed=seed)
    return SAETrainer(config, residuals(16384, sizes.d_model, seed), steps=1000)


class QwenScope:
    includes = (
        "input normalised, forward, backward, gradient norm clipped, the decoder gradient's part along each row removed, "
        "Adam, decoder rows set back to norm 1, count of dead features"
    )

    def __init__(self, start: SAETrainer) -> None:
        self.trainer = start

    @property
    def about(self) -> dict[str, Any]:
        """Which kernel encodes, and what it keeps; known after the first step."""
        choice, kept = self.trainer.encoder.choice, self.trainer.encoder.nbytes / MIB
        assert choice is not None, "no step was taken yet"
        return {"kernel": choice.kernel, "kept_beside_weights_mib": round(kept, 1)}

    def step(self, x: Tensor) -> float:
        return self.trainer.step(x)

    def fvu(self, loss: float, x: Tensor) -> float:
        return loss


class WithAutograd:
    """Whatever is trained by `backward` and one of torch's optimisers."""

    normalise: Any
    optimiser: torch.optim.Optimizer

    def step(self, x: Tensor) -> float:
        loss = self.loss(self.normalise(x))
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def loss(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def fvu(self, loss: float, x: Tensor) -> float:
        return loss


class Dense(WithAutograd):
    includes = (
        "input normalised, forward and backward through dense (tokens, d_sae) activations, Adam at torch's defaults"
    )

    def __init__(self, start: SAETrainer) -> None:
        self.k, self.normalise = start.config.k, start.normalise
        self.parameters = [p.detach().clone().requires_grad_() for p in start.parameters]
        self.optimiser = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)

    def loss(self, x: Tensor) -> Tensor:
        W_enc, b_enc, decoder, b_dec = self.parameters
        pre_acts = F.linear(x, W_enc, b_enc)
        kept, indices = pre_acts.topk(self.k, dim=-1)
        acts = torch.zeros_like(pre_acts).scatter(-1, indices, kept.relu())
        return (acts @ decoder + b_dec - x).pow(2).sum() / variance(x)


class Sparsify(WithAutograd):
    includes = "input normalised, SparseCoder's forward, backward, Adam(fused=True)"

    def __init__(self, start: SAETrainer) -> None:
        sparsify, W_enc = import_module("sparsify"), start.parameters[0]
        # As a transcoder it does not subtract b_dec from its input, which ours does not either.
        config = sparsify.SparseCoderConfig(num_latents=len(W_enc), k=start.config.k, transcode=True)
        self.normalise = start.normalise
        self.sae = sparsify.SparseCoder(W_enc.shape[1], config)
        copy(start, self.sae.encoder.weight, self.sae.encoder.bias, self.sae.W_dec, self.sae.b_dec)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=LEARNING_RATE, fused=True)

    def loss(self, x: Tensor) -> Tensor:
        return self.sae(x).fvu


class SAELens(WithAutograd):
    includes = "input normalised, TopKTrainingSAE's training_forward_pass, backward, Adam(fused=True)"

    def __init__(self, start: SAETrainer) -> None:
        topk_sae, W_enc = import_module("sae_lens.saes.topk_sae"), start.parameters[0]
        config = topk_sae.TopKTrainingSAEConfig(
            d_in=W_enc.shape[1],
            d_sae=len(W_enc),
            k=start.config.k,
            apply_b_dec_to_input=False,
            rescale_acts_by_decoder_norm=False,
            normalize_activations="none",
        )
        self.step_input = topk_sae.TrainStepInput
        self.normalise = start.normalise
        self.sae = topk_sae.TopKTrainingSAE(config)
        copy(start, self.sae.W_enc.T, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=LEARNING_RATE, fused=True)

    def loss(self, x: Tensor) -> Tensor:
        nothing_dead = {"coefficients": {}, "dead_neuron_mask": None}
        given = self.step_input(sae_in=x, n_training_steps=0, is_logging_step=False, **nothing_dead)
        return self.sae.training_forward_pass(given).loss

    def fvu(self, loss: float, x: Tensor) -> float:
        """Its loss is the mean over tokens of the squared error."""
        return loss * len(x) / float(variance(self.normalise(x)))


TRAINERS: dict[str, type[Trainer]] = {
    "qwen_scope": QwenScope,
    "dense": Dense,
    "sae_lens": SAELens,
    "sparsify": Sparsify,
}


def variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).pow(2).sum()


@torch.no_grad()
def copy(start: SAETrainer, *parameters: Tensor) -> None:
    for parameter, value in zip(parameters, start.parameters, strict=True):
        parameter.copy_(value)
