"""Where training starts: weights drawn from a seed and from residuals."""

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.training.normalise import Normalisation
from qwen_scope.training.objective import Objective
from qwen_scope.training.weights import Weights

FIT_TOKENS = 2048
"""Tokens on which the encoder's first scale is fitted."""


def drawn(objective: Objective, normalise: Normalisation, sample: Float[Tensor, "tokens d_model"]) -> Weights:
    """Decoder rows of norm 1, biases 0; the same for a seed and a sample, on the sample's device.

    Tied, rows are directions of real tokens mixed with noise: fewer features are born dead than with random ones. The
    encoder is the decoder's transpose times the one factor with which the first reconstructions fit best. Where ranks share
    the features, each keeps its own of those that one process would draw.
    """
    config, device = objective.config, sample.device
    own = objective.ranks.features.share(config.d_sae)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randint(len(sample), (config.d_sae,), generator=generator)[own]

    def noise() -> Tensor:
        return _unit(torch.randn(config.d_sae, sample.shape[1], generator=generator)[own].to(device))

    biases = torch.zeros(len(chosen), device=device), torch.zeros(sample.shape[1], device=device)
    first = noise()
    if not config.tied_init:
        return Weights(first, biases[0], noise(), biases[1])
    decoder = _unit(_unit(normalise(sample[chosen.to(device)])) + first)
    start = normalise(sample[:FIT_TOKENS])
    x_hat = objective.forward(start, Weights(decoder, biases[0], decoder, biases[1])).errors[-1] + start
    return Weights(decoder * ((x_hat * start).sum() / x_hat.pow(2).sum()), biases[0], decoder, biases[1])


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
