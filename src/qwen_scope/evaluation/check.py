"""The self-check: fidelity of every layer, the model's loss with reconstructions spliced in, and classic mistakes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.evaluation.density import DENSE, LOG10_EDGES
from qwen_scope.evaluation.fidelity import Fidelity, FidelityMeter
from qwen_scope.evaluation.mistakes import find_mistakes
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import Batch, batches
from qwen_scope.suite import Suite, ranges
from qwen_scope.tokens import TokenizedText

LOSS_BATCH_TOKENS = 512
"""Logits of a batch are (tokens, vocabulary) floats, so fewer tokens at a time than for features."""
DIAGNOSED_TOKENS = 1024
"""Tokens on which classic mistakes are tried."""


@dataclass(frozen=True)
class LayerCheck:
    """One layer's figures."""

    layer: int
    """Which decoder layer, from 0."""
    d_sae: int
    """Number of features."""
    k: int
    """Features kept per token."""
    activation: str
    """Convention for pre-activations below 0."""
    fidelity: Fidelity
    """Reconstruction against residual."""
    loss: float
    """Mean cross-entropy, in nats, of predicting each next token, of the model as it is."""
    loss_spliced: float
    """The same with this layer's residuals replaced by their reconstructions, except at position 0."""
    loss_zeroed: float
    """The same with them replaced by zeros instead, except at position 0."""
    mistakes: list[str]
    """What seems wrong, one sentence each (see `find_mistakes`)."""
    kernel: str
    """Which path encoded (`qwen_scope.kernels.choice.Kernel`), and why it was chosen."""

    @property
    def loss_recovered(self) -> float:
        """`(loss_zeroed - loss_spliced) / (loss_zeroed - loss)`: 1 is as good as the model, 0 as bad as nothing.

        NaN where zeroing the layer does not change the loss.
        """
        lost = self.loss_zeroed - self.loss
        return (self.loss_zeroed - self.loss_spliced) / lost if lost else float("nan")

    @property
    def densest(self) -> dict[str, float]:
        """Name and density of the densest features, of those that are dense (see `Density.densest`)."""
        return {f"{self.layer}/{feature}": share for feature, share in self.fidelity.density.densest.items()}

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values for JSON."""
        density = {"log10_edges": list(LOG10_EDGES), **asdict(self.fidelity.density), "densest": self.densest}
        fidelity = {**asdict(self.fidelity), "explained_variance": self.fidelity.explained_variance, "density": density}
        return {**asdict(self), "fidelity": fidelity, "loss_recovered": self.loss_recovered}


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. Position 0 keeps its own residual in the losses: it is a sink that SAEs are not trained on."""

    model: str
    """What was read."""
    suite: str
    """Through which SAEs."""
    trained_on: str | None
    """The backbone the suite says it was trained on."""
    texts: int
    """Texts read."""
    layers: list[LayerCheck]
    """Figures of each layer."""

    @property
    def ok(self) -> bool:
        """Whether no mistake was found."""
        return not any(layer.mistakes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values for JSON."""
        return {**asdict(self), "ok": self.ok, "layers": [layer.to_dict() for layer in self.layers]}

    def __repr__(self) -> str:
        tokens = self.layers[0].fidelity.tokens
        lines = [
            f"{self.suite} on {self.model}: {self.texts} texts, {tokens} tokens; position 0 and norm outliers left out "
            "where not said otherwise; another sample of text gives other figures",
            f"{'layer':>5} {'k':>4} {'L0':>6} {'FVU':>7} {'FVU+out':>7} {'FVU all':>7} {'cosine':>6} {'loss':>6} {'spliced':>7} "
            f"{'zeroed':>6} {'recovered':>9} {'short':>5} {'outliers':>8} {'never':>6} {'dense':>5} {'always':>6}",
        ]
        for row in self.layers:
            f = row.fidelity
            lines.append(
                f"{row.layer:>5} {row.k:>4} {f.l0:>6.1f} {f.fvu:>7.4f} {f.fvu_without_first:>7.4f} {f.fvu_all:>7.4f} "
                f"{f.cosine:>6.3f} {row.loss:>6.3f} {row.loss_spliced:>7.3f} {row.loss_zeroed:>6.2f} "
                f"{row.loss_recovered:>9.1%} {f.short_rows:>5} {f.norm_outliers:>8} {f.never_fired:>6} "
                f"{f.density.dense:>5} {len(f.always_fired):>6}"
            )
        lines.append(
            "FVU: fraction of variance unexplained, 1 - variance explained (+out: with norm outliers, all: with position 0 "
            "too); loss in nats a token; short: rows with fewer than k positive pre-activations, where topk and topk_relu "
            f"differ; dense: features that fire at more than {DENSE:.0%} of the tokens"
        )
        densest = [next(iter(row.densest.items())) for row in self.layers if row.densest]
        if densest:
            lines.append("densest feature of its layer: " + ", ".join(f"{name} {share:.0%}" for name, share in densest))
        kernels: dict[str, list[int]] = {}
        for row in self.layers:
            kernels.setdefault(row.kernel, []).append(row.layer)
        lines += [f"encoded by {kernel} at layers {ranges(layers)}" for kernel, layers in kernels.items()]
        found = [f"layer {row.layer}: {mistake}" for row in self.layers for mistake in row.mistakes]
        lines += [f"MISTAKE at {line}" for line in found] or ["no mistake found"]
        return "\n".join(lines)


@torch.no_grad()
def check(backbone: Backbone, suite: Suite, texts: Sequence[TokenizedText], layers: Sequence[int]) -> CheckReport:
    """Measures SAEs on texts; see `CheckReport` and `LayerCheck` for what the figures mean.

    Raises:
        QwenScopeError: no text has two tokens, one is longer than the model's context, or the model predicts nothing.
    """
    if all(len(text) < 2 for text in texts):
        raise QwenScopeError(
            "expected at least one text of two or more tokens to predict, found none; give longer texts"
        )
    last = len(backbone.layers) - 1
    captured = sorted({near for layer in layers for near in (layer - 1, layer, layer + 1) if 0 <= near <= last})
    meters = {layer: FidelityMeter(suite.d_model, suite[layer].d_sae) for layer in layers}
    losses = {layer: {"spliced": _Mean(), "zeroed": _Mean()} for layer in layers}
    loss = _Mean()
    samples: dict[int, list[Tensor]] = {layer: [] for layer in captured}
    sampled = 0
    todo = batches(texts, backbone, LOSS_BATCH_TOKENS)
    with tqdm(total=len(todo) * (1 + 2 * len(layers)), desc="checking", unit="pass", leave=False) as bar:
        for batch in todo:
            residuals: dict[int, Tensor] = {}
            loss.add(*_loss(backbone, batch, {layer: _keeping(residuals, layer) for layer in captured}))
            bar.update()
            first = torch.zeros_like(batch.real)
            first[:, 0] = True
            rows = {layer: x[batch.real.to(x.device)].float() for layer, x in residuals.items()}
            if sampled < DIAGNOSED_TOKENS:
                for layer in captured:
                    samples[layer].append(rows[layer][~first[batch.real].to(rows[layer].device)])
                sampled += len(samples[captured[0]][-1])
            for layer in layers:
                sae = suite[layer]
                features = sae.encode(rows[layer].to(sae.device))
                x_hat = sae.decode(features)
                meters[layer].update(rows[layer], x_hat, features, first[batch.real])
                spliced = residuals[layer].clone()
                spliced[batch.real.to(spliced.device)] = x_hat.to(spliced)
                for name, replacement in (("spliced", spliced), ("zeroed", torch.zeros_like(spliced))):
                    losses[layer][name].add(*_loss(backbone, batch, {layer: _splicing(replacement)}))
                    bar.update()
    checked = []
    for layer in layers:
        sae = suite[layer]
        near = {other: torch.cat(samples[other]) for other in captured if abs(other - layer) <= 1}
        keep = ~norm_outliers(near[layer])
        near = {other: x[keep.to(x.device)].to(sae.device) for other, x in near.items()}
        checked.append(
            LayerCheck(
                layer=layer,
                d_sae=sae.d_sae,
                k=sae.k,
                activation=sae.activation,
                fidelity=meters[layer].result(),
                loss=loss.value,
                loss_spliced=losses[layer]["spliced"].value,
                loss_zeroed=losses[layer]["zeroed"].value,
                mistakes=find_mistakes(sae, layer, near),
                kernel=str(sae.encoder.choice),
            )
        )
    return CheckReport(backbone.name, suite.name, suite.backbone, len(texts), checked)


class _Mean:
    """A mean over tokens that come in batches."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count


def _keeping(residuals: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    def keep(x: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens d_model"]:
        residuals[layer] = x
        return x

    return keep


def _splicing(replacement: Tensor) -> Callable[[Tensor], Tensor]:
    def splice(x: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens d_model"]:
        return torch.cat([x[:, :1], replacement[:, 1:]], dim=1)

    return splice


def _loss(backbone: Backbone, batch: Batch, edits: dict[int, Callable[[Tensor], Tensor]]) -> tuple[float, int]:
    """Summed next-token cross-entropy in nats and the number of predictions, of one edited pass."""
    mask = batch.attention_mask
    device = backbone.device
    with backbone.editing(edits):
        output = backbone.model(
            input_ids=batch.ids.to(device), attention_mask=None if mask is None else mask.to(device), use_cache=False
        )
    logits = getattr(output, "logits", None)
    if logits is None:
        raise QwenScopeError(
            f"expected a model that predicts tokens, found {type(backbone.model).__name__} without an output head; load it "
            "with AutoModelForCausalLM"
        )
    # A token is a target if it is real; padding is on the right, so its predecessor is real too.
    targets = batch.ids[:, 1:].to(logits.device).where(batch.real[:, 1:].to(logits.device), -100)
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return float(total), int((targets >= 0).sum())
