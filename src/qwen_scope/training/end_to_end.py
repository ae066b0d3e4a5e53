"""Fine-tunes a finished SAE so that the language model goes on as before where the reconstruction stands for the residual.

The KL divergence between next-token distributions as a loss is that of Braun et al. 2024 (arXiv:2405.12241); that a short
phase of it after ordinary training is enough, and that the reconstruction error must stay in the loss, is from Karvonen 2025
(arXiv:2503.17272).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from qwen_scope import kernels
from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.sae import Activation, TopKSAE
from qwen_scope.training.autoencode import autoencode
from qwen_scope.training.normalise import Normalisation
from qwen_scope.training.weights import Weights, as_sae, has_unit_rows, of_sae


@dataclass(frozen=True)
class EndToEndConfig:
    """How an SAE is fine-tuned end to end."""

    steps: int
    """Batches to take, one optimiser step each."""
    learning_rate: float = 1e-4
    """Adam's learning rate in the first step, in the trainer's units; it falls to 0 linearly."""
    fvu_weight: float = 1.0
    """Weight of the fraction of variance unexplained beside the KL divergence in nats; 0 leaves it out, and then nothing
    holds the reconstruction to the residual."""
    clip_norm: float = 1.0
    """Gradients of a larger norm, over all parameters together, are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise QwenScopeError(f"expected {name} above 0, found {getattr(self, name)}; choose a larger one")
        if not self.fvu_weight >= 0:
            raise QwenScopeError(
                f"expected fvu_weight of at least 0, found {self.fvu_weight}; choose 0 to leave it out"
            )


def finetune_end_to_end(
    backbone: Backbone, sae: TopKSAE, layer: int, batches: Iterable[Int[Tensor, "batch tokens"]], config: EndToEndConfig
) -> TopKSAE:
    """A new SAE, fine-tuned on the KL divergence from the model to the model with the reconstruction spliced in.

    Position 0, an attention sink that SAEs are not trained on, keeps its own residual. The language model is not changed.
    Decoder rows of norm 1 stay so, and the SAE keeps its k and activation.

    Args:
        batches: token ids, rows of one length without padding.

    Raises:
        QwenScopeError: an SAE of another width than the model, a layer the model does not have, too few batches or
            tokens, or a loss that is not finite.
    """
    if sae.d_model != backbone.d_model:
        raise QwenScopeError(
            f"expected an SAE of width {backbone.d_model} for {backbone.name}, found {sae.d_model}; use the model it was "
            "trained on"
        )
    tuned: _Tuned | None = None
    done = 0
    with _frozen(backbone.model), tqdm(total=config.steps, desc="fine-tuning end to end", unit="step") as bar:
        for ids in islice(batches, config.steps):
            if ids.shape[1] < 2:
                raise QwenScopeError(
                    f"expected rows of at least 2 tokens, found {ids.shape[1]}; pass longer pieces of text"
                )
            if tuned is None:
                tuned = _Tuned(sae, backbone.residuals(ids, layers=[layer])[layer][:, 1:].flatten(0, 1), config)
            kl, fvu = _losses(backbone, layer, ids, tuned)
            loss = kl + config.fvu_weight * fvu
            norm = tuned.step(loss, config.learning_rate * (1 - done / config.steps))
            if not math.isfinite(norm) or not math.isfinite(loss.item()):
                raise QwenScopeError(
                    f"expected a finite loss and gradient, found {loss.item()} and {norm} at step {done}; lower the "
                    "learning rate"
                )
            done += 1
            bar.update()
            bar.set_postfix(kl=f"{kl.item():.4f}", fvu=f"{fvu.item():.4f}")
    if tuned is None or done < config.steps:
        raise QwenScopeError(f"expected {config.steps} batches, found {done}; pass more or choose fewer steps")
    return tuned.sae()


class _Tuned:
    """The SAE's weights in normalised units, trainable, and their optimiser."""

    def __init__(self, sae: TopKSAE, x: Float[Tensor, "tokens d_model"], config: EndToEndConfig):
        self.config = config
        self.k = sae.k
        self.activation: Activation = sae.activation
        self.normalise = Normalisation.of(x)
        self.weights = Weights(*(tensor.requires_grad_() for tensor in of_sae(sae, self.normalise)))
        self.unit_norm = has_unit_rows(sae)
        self.encoder = kernels.Encoder(kernels.choose(*self.weights[:2], sae.k).kernel)
        self.optimiser = torch.optim.Adam(self.weights)

    def reconstruct(self, x: Float[Tensor, "tokens d_model"]) -> tuple[Tensor, Tensor]:
        """The reconstruction in the residual stream's units, and its fraction of variance unexplained."""
        x = self.normalise(x)
        x_hat = autoencode(x, *self.weights, self.k, self.encoder, self.activation).x_hat
        fvu = (x_hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        return x_hat * self.normalise.scale + self.normalise.centre, fvu

    def step(self, loss: Tensor, learning_rate: float) -> float:
        """One step; gives the norm of the gradients before they were clipped."""
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.clip_norm).item()
        self.optimiser.param_groups[0]["lr"] = learning_rate
        self.optimiser.step()
        if self.unit_norm:
            with torch.no_grad():
                decoder = self.weights.decoder
                decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(1e-12))
        return norm

    def sae(self) -> TopKSAE:
        """The SAE as it is now."""
        return as_sae(self.weights, self.normalise, self.k, self.activation)


def _losses(backbone: Backbone, layer: int, ids: Tensor, tuned: _Tuned) -> tuple[Tensor, Tensor]:
    """KL divergence in nats per token, and the fraction of variance unexplained, both over all positions but 0."""
    fvus: list[Tensor] = []

    def splice(x: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens d_model"]:
        x_hat, fvu = tuned.reconstruct(x[:, 1:].flatten(0, 1))
        fvus.append(fvu)
        return torch.cat([x[:, :1], x_hat.view_as(x[:, 1:]).to(x.dtype)], dim=1)

    with torch.no_grad():
        before = _log_probabilities(backbone, ids, {})
    after = _log_probabilities(backbone, ids, {layer: splice})
    kl = F.kl_div(after, before, reduction="sum", log_target=True) / len(before)
    return kl, fvus[0].to(kl.device)


def _log_probabilities(
    backbone: Backbone, ids: Tensor, edits: dict[int, Callable[[Tensor], Tensor]]
) -> Float[Tensor, "tokens vocabulary"]:
    with backbone.editing(edits):
        logits = backbone.model(input_ids=ids.to(backbone.device), use_cache=False).logits
    return logits[:, 1:].flatten(0, 1).float().log_softmax(dim=-1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient is computed for the language model's own weights while the block runs."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_()
