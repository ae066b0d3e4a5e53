"""What a step of the trainer minimises, and its gradients, written out over the (token, feature) pairs that were kept.

The loss is the fraction of variance unexplained (FVU), plus AuxK on dead features (Gao et al. 2024, arXiv:2406.04093).
Two variations: BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) keeps the strongest activations of the whole batch;
Matryoshka (Bussmann et al. 2025, arXiv:2503.17547) takes the mean of the FVUs of nested prefixes of the dictionary.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qwen_scope import kernels
from qwen_scope.kernels.adam import RowGradient
from qwen_scope.kernels.pairs import Pairs, group_by_feature, row_dots, sum_per_feature
from qwen_scope.kernels.threads import torch_together
from qwen_scope.training.config import TrainConfig
from qwen_scope.training.group import Group, Ranks
from qwen_scope.training.weights import Weights

MANY_DEAD = 256
"""From so many dead features on, AuxK's products are large enough for torch's threads, which spin for a while after."""
CANDIDATES = 4
"""BatchTopK looks for the batch's strongest activations among this many times k of each token."""


class Pass(NamedTuple):
    """One pass of a batch through the SAE; of a rank's own features, where ranks share them."""

    indices: Int[Tensor, "tokens kept"]
    """The features kept of each token, strongest first."""
    values: Float[Tensor, "tokens kept"]
    """Their activations; 0 where a token keeps fewer."""
    trained: Bool[Tensor, "tokens kept"]
    """Where a gradient passes to the encoder: not where ReLU made a value 0."""
    errors: Float[Tensor, "prefixes tokens d_model"]
    """Reconstruction less residual, for each prefix of the dictionary; the last is the whole of it."""
    variance: Float[Tensor, ""]
    """Summed squared distance of the batch from its mean."""


class Gradients(NamedTuple):
    """One for each of the four weights; biases as matrices of one column and one row."""

    W_enc: RowGradient | Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, "d_sae 1"]
    decoder: RowGradient | Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, "1 d_model"]


@dataclass(frozen=True)
class Objective:
    """The loss of one recipe, forward and backward."""

    config: TrainConfig
    relu: bool
    """Whether kept pre-activations below 0 become 0 (activation `topk_relu`)."""
    ranks: Ranks

    def forward(
        self, x: Float[Tensor, "tokens d_model"], weights: Weights, encoder: kernels.Encoder | None = None
    ) -> Pass:
        """Encodes and decodes normalised residuals; without an encoder, by the reference."""
        indices, values, kept = self._keep(x, weights, encoder)
        # Normalised by the variance: the loss is the FVU, alike for every layer and model.
        mean = self.ranks.batch.sum(x.mean(0)) / self.ranks.batch.size
        variance = self.ranks.batch.sum((x - mean).pow(2).sum())
        return Pass(indices, values, kept, self._errors(x, indices, values, weights), variance)

    def fvu(self, of: Pass) -> float:
        """Fraction of variance unexplained by the whole dictionary."""
        return float(self.ranks.batch.sum(of.errors[-1].pow(2).sum()) / of.variance)

    def gradients(
        self, x: Float[Tensor, "tokens d_model"], weights: Weights, of: Pass, dead: Int[Tensor, " dead"]
    ) -> Gradients:
        """Of the loss, over the whole batch.

        Args:
            dead: features to revive, in ascending order.
        """
        d_sae = len(weights.b_enc)
        pairs = group_by_feature(of.indices, d_sae)
        of_x_hat = of.errors * (2 / (of.variance * len(of.errors)))
        if len(of_x_hat) > 1:
            # A feature shares in the errors of the prefix that it comes in with, and in those of all larger ones.
            of_x_hat = of_x_hat.flip(0).cumsum(0).flip(0)
        layered, rows = self._layered(pairs), of_x_hat.flatten(0, 1)
        of_values = row_dots(layered, rows, weights.decoder).view(len(of_x_hat), *of.indices.shape)
        of_values = of_values.gather(0, self._level(of.indices)[None])[0] if len(of_x_hat) > 1 else of_values[0]
        of_values = of_values * of.trained
        b_enc = sum_per_feature(of.indices, of_values, d_sae)
        extra_W_enc = extra_decoder = None
        if self.config.aux_coefficient and self._over_features(len(dead), x):
            with torch_together() if len(dead) >= MANY_DEAD else nullcontext():
                of_rows, of_biases, of_directions = self._aux_gradients(x, -of.errors[-1], weights, dead)
            b_enc.index_add_(0, dead, of_biases)
            extra_W_enc, extra_decoder = (dead, of_rows), (dead, of_directions)
        return self._over_batch(
            Gradients(
                RowGradient(pairs, of_values, x, extra_W_enc),
                b_enc[:, None],
                RowGradient(layered, of.values.repeat(len(of_x_hat), 1), rows, extra_decoder),
                of_x_hat[0].sum(0)[None],
            )
        )

    def _keep(self, x: Tensor, weights: Weights, encoder: kernels.Encoder | None) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, activations and where they are trained, as in `Pass`."""
        config, features = self.config, self.ranks.features
        candidates = min(config.k * (CANDIDATES if config.batch_topk else 1), config.d_sae)
        indices, values = kernels.encode(x, weights.W_enc, weights.b_enc, min(candidates, len(weights.b_enc)), encoder)
        kept = None
        if features.size > 1:
            kept = strongest(values, candidates, features)
        if config.batch_topk:
            found = values if kept is None else values.masked_fill(~kept, -torch.inf)
            every = self.ranks.batch.gather(features.gather(found)).flatten()
            kept = found >= every.topk(config.k * len(x) * self.ranks.batch.size).values[-1]
        if kept is not None:
            # Values are in descending order, so what is kept comes first in each row.
            widest = max(1, int(kept.sum(1).max()))
            indices, kept = indices[:, :widest].contiguous(), kept[:, :widest]
            values = values[:, :widest] * kept
        if self.relu:
            values = values.relu()
            return indices, values, values > 0
        return indices, values, torch.ones_like(values, dtype=torch.bool) if kept is None else kept

    def _ends(self, device: torch.device) -> Int[Tensor, " ends"]:
        """Where among a rank's own features each prefix but the last, which is all, ends."""
        own = self.ranks.features.share(self.config.d_sae)
        ends = [max(1, round(share * self.config.d_sae)) for share in self.config.prefixes]
        return torch.tensor([min(max(end, own.start), own.stop) - own.start for end in ends], device=device).long()

    def _level(self, features: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The number of the smallest prefix that a feature is in."""
        return torch.bucketize(features, self._ends(features.device), right=True)

    def _errors(self, x: Tensor, indices: Tensor, values: Tensor, weights: Weights) -> Tensor:
        features, nothing = self.ranks.features, torch.zeros_like(weights.b_dec)
        bias = weights.b_dec if features.rank == 0 else nothing
        if not self.config.prefixes:
            return (features.sum(kernels.decode(indices, values, weights.decoder, bias)) - x)[None]
        level = self._level(indices)
        parts = [
            kernels.decode(indices, values * (level == number), weights.decoder, nothing if number else bias)
            for number in range(len(self.config.prefixes) + 1)
        ]
        return features.sum(torch.stack(parts)).cumsum(0) - x

    def _layered(self, pairs: Pairs) -> Pairs:
        """Pairs for rows of all prefixes' tokens, one prefix after the other: each pair stands in its feature's prefix.

        Features of one prefix lie together in `order`, so shifting them is all that is needed.
        """
        if not self.config.prefixes:
            return pairs
        level = self._level(torch.arange(pairs.d_sae, device=pairs.order.device))
        shift = level.repeat_interleave(pairs.starts.diff()) * pairs.indices.numel()
        return Pairs(pairs.indices.repeat(len(self.config.prefixes) + 1, 1), pairs.starts, pairs.order + shift)

    def _aux_gradients(
        self, x: Tensor, residue: Tensor, weights: Weights, dead: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """AuxK, of encoder rows, biases and decoder rows: how badly the strongest dead features explain the residue.

        The residue is what the living ones left over; the loss is its FVU, with d_model / 2 dead features a token.
        """
        features = self.ranks.features
        W_enc, b_enc, decoder = (of[dead] for of in weights[:3])
        pre = F.linear(x, W_enc, b_enc)
        most = min(x.shape[1] // 2, self._over_features(len(dead), x))
        values, which = pre.topk(min(most, len(dead)), dim=1)
        if features.size > 1:
            own = F.pad(values, (0, most - values.shape[1]), value=-torch.inf)
            values = values * strongest(own, most, features)[:, : values.shape[1]]
        acts = torch.zeros_like(pre).scatter_(1, which, values.relu())
        factor = 2 * self.config.aux_coefficient / self.ranks.batch.sum(residue.pow(2).sum())
        of_reconstruction = (features.sum(acts @ decoder) - residue) * factor
        of_acts = (of_reconstruction @ decoder.T) * (acts > 0)
        return of_acts.T @ x, of_acts.sum(0), acts.T @ of_reconstruction

    def _over_features(self, count: int, x: Tensor) -> int:
        features = self.ranks.features
        return count if features.size == 1 else int(features.sum(torch.tensor(count, device=x.device)))

    def _over_batch(self, gradients: Gradients) -> Gradients:
        batch = self.ranks.batch
        if batch.size == 1:
            return gradients
        dense = (part.dense() if isinstance(part, RowGradient) else part for part in gradients)
        return Gradients(*(batch.sum(part) for part in dense))


def strongest(values: Float[Tensor, "tokens own"], k: int, features: Group) -> Bool[Tensor, "tokens own"]:
    """Which of a rank's candidates are among the k strongest of their token over all ranks, equal ones by the lower feature.

    Args:
        values: pre-activations in descending order, as many on each rank.
    """
    own = values.shape[1]
    every = features.gather(values).transpose(0, 1).flatten(1)
    # Ranks hold features in ascending order, and so does each row among equals: a stable sort keeps the lower one first.
    places = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
    count = (places // own == features.rank).sum(1)
    return torch.arange(own, device=values.device) < count[:, None]
