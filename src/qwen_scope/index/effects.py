"""Logit effects: the tokens that a feature's direction promotes and suppresses by itself."""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.index.ranking import COLUMNS, Highest, Ranked, products

PROBE = 1000.0
"""How large the probes of the final norm are: so large that the epsilon in its root is lost."""


class LogitEffects(NamedTuple):
    """The tokens whose logits each direction raises and lowers most."""

    promoted: Ranked
    """Highest effect first; `numbers` are token ids."""
    suppressed: Ranked
    """Lowest effect first."""


class LinearNorm(NamedTuple):
    """What a final norm does to a direction when the stream it is added to is large and has nothing of the direction."""

    gain: Float[Tensor, " d_model"]
    """The scale of each dimension."""
    removes_mean: bool
    """Whether the mean over the dimensions is taken out first, as LayerNorm does and RMSNorm does not."""

    def __call__(self, directions: Float[Tensor, "features d_model"]) -> Float[Tensor, "features d_model"]:
        """The directions after it, up to one positive factor, which depends on the stream."""
        if self.removes_mean:
            directions = directions - directions.mean(dim=1, keepdim=True)
        return directions * self.gain


@torch.no_grad()
def logit_effects(
    backbone: Backbone, directions: Float[Tensor, "features d_model"], count: int = 10, vocabulary: int | None = None
) -> LogitEffects:
    """The tokens that each direction promotes and suppresses: the largest and smallest entries of `W_U (g * d)`.

    g is the scale of the final norm (for LayerNorm, d has its mean taken out first) and W_U the unembedding; the mean over
    the vocabulary is subtracted, since adding the same to all logits changes no probability. This is the derivative of the
    logits along d where the last layer's residual is orthogonal to d and has a root mean square of 1; elsewhere the norm
    divides by that root mean square, the same for all tokens, and takes out what is parallel to the residual. Left out are
    the layers between the feature's own and the last, and a final soft-capping of logits. Known as direct logit attribution
    (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

    Of equal effects the lower token id comes first. Products are made in blocks of `ranking.BLOCK_BYTES`.

    Args:
        directions: decoder directions, such as `sae.decoder_rows()`, in any float dtype; computed in float32.
        count: how many tokens are kept at either end; all, if there are fewer.
        vocabulary: how many rows of the unembedding are real tokens. Default: as many as the tokenizer has.

    Raises:
        QwenScopeError: a model without unembedding, of another width, or with a final norm of an unknown kind.
    """
    unembedding = backbone.unembedding.detach()
    if directions.shape[1] != unembedding.shape[1]:
        raise QwenScopeError(
            f"expected directions of width {unembedding.shape[1]}, which {backbone.name} has before its unembedding, found "
            f"{directions.shape[1]}; use the model the SAE was trained on"
        )
    if vocabulary is None and backbone.tokenizer is not None:
        vocabulary = len(backbone.tokenizer)
    tokens = unembedding[:vocabulary]
    norm = linear_norm(backbone.final_norm, directions.shape[1])
    rows = norm(directions.detach().float().to(norm.gain.device)).to(unembedding.device)
    sums = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in tokens.split(COLUMNS)])
    mean = (rows @ (sums.sum(dim=0) / len(tokens)).float())[:, None]
    count = min(count, len(tokens))
    promoted, suppressed = (Highest(len(rows), count, rows.device) for _ in range(2))
    for some, first, effects in products(rows, tokens):
        effects -= mean[some]
        promoted.add(effects, some, first)
        suppressed.add(effects.neg_(), some, first)
    lowest = suppressed.result()
    return LogitEffects(promoted.result(), Ranked(lowest.numbers, 0 - lowest.values))


@torch.no_grad()
def linear_norm(norm: nn.Module, d_model: int) -> LinearNorm:
    """What a final norm does to directions, found by probing it: its class may store the scale, or the scale less 1.

    Raises:
        QwenScopeError: it is neither of the kind of RMSNorm, nor of LayerNorm, nor nothing at all.
    """
    if isinstance(norm, nn.Identity):
        return LinearNorm(torch.ones(d_model), removes_mean=False)
    # A copy, so that a model in bfloat16 does not round what is found.
    exact = copy.deepcopy(norm).float()
    device = next((parameter.device for parameter in exact.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    # No entry is near 0, so that the scale can be told from each.
    probe = (1 + torch.rand(d_model, generator=generator)) * torch.tensor([1.0, -1.0]).repeat(d_model)[:d_model]
    check = torch.randn(d_model, generator=generator)

    def through(x: Tensor) -> Tensor:
        # The norm of zeros is its bias, which no direction changes.
        both = torch.stack([PROBE * x, torch.zeros_like(x)])[None].to(device)
        out = exact(both)[0].cpu()
        return out[0] - out[1]

    for removes_mean in (False, True):
        x, y = (v - v.mean() if removes_mean else v for v in (probe, check))
        gain = through(probe) * x.square().mean().sqrt() / x
        if torch.allclose(
            through(check), gain * y / y.square().mean().sqrt(), rtol=1e-3, atol=1e-4 * float(gain.abs().max())
        ):
            return LinearNorm(gain, removes_mean)
    raise QwenScopeError(
        f"expected a final norm that divides by a root mean square and scales, found {type(norm).__name__}, which does "
        "something else; logit effects need RMSNorm or LayerNorm"
    )
