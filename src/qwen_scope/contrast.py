"""Which features separate two groups of texts: counts in, scores out. Knows no model and no text.

The score is the likelihood ratio of Dunning (1993), "Accurate Methods for the Statistics of Surprise and Coincidence", with
the informative prior of Monroe, Colaresi and Quinn (2008), "Fightin' Words: Lexical Feature Selection and Evaluation for
Identifying the Content of Political Conflict". Counts are first divided by a design effect, after Rao and Scott (1992), "A
Simple Method for the Analysis of Clustered Binary Data", because the tokens of one text are no independent witnesses.

Monroe's own score, the log-odds ratio over its standard error, is not used: where one group lacks a feature, that error
comes from the prior alone and hides the surest differences (Hauck and Donner 1977). docs/find.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.features import SparseFeatures

PRIOR_TOKENS = 100.0
"""Tokens that the prior is worth: so many are added to each group, at which a feature fires as often as its density says.
The more, the less a common feature is worth that differs a little in a few tokens."""
COMMON_WORTH = 30.0
"""Degrees of freedom that the features' common design effect is worth against a feature's own, which few texts leave
uncertain."""


@dataclass(frozen=True)
class Firing:
    """At how many tokens each feature fires in a group of texts; what two groups are compared by. Groups can be added."""

    fired: Float[Tensor, " features"]
    """Tokens at which each feature fires, in float64 as all of these."""
    activation: Float[Tensor, " features"]
    """Sum of its values there."""
    tokens: int
    """Tokens of the group."""
    texts: int = 0
    """Texts they are from, each a witness of its own; 0 where it is not known which tokens belong together."""
    squares: Float[Tensor, " features"] | float = 0.0
    """Sum over texts of the square of the tokens at which the feature fires in the text."""
    crosses: Float[Tensor, " features"] | float = 0.0
    """Sum over texts of that number times the text's tokens."""
    token_squares: float = 0.0
    """Sum over texts of the square of the text's tokens."""

    @staticmethod
    def of(features: SparseFeatures, texts: Int[Tensor, " tokens"]) -> Firing:
        """Counts of some tokens.

        Args:
            features: of each token that counts (see `qwen_scope.outliers` for those that should not), on the CPU.
            texts: which text each token is from, by any numbers; a text may not be spread over several groups.
        """
        present, text, lengths = texts.unique(return_inverse=True, return_counts=True)
        active, d_sae = features.active, features.d_sae
        numbers = features.indices[active].long()
        values = features.values[active].double()
        owners = text[:, None].expand_as(active)[active]
        pairs, times = (owners * d_sae + numbers).unique(return_counts=True)
        of_pair, counts, sizes = pairs % d_sae, times.double(), lengths[pairs // d_sae].double()

        def per_feature(where: Tensor, what: Tensor) -> Tensor:
            return torch.zeros(d_sae, dtype=torch.float64).index_add_(0, where, what)

        return Firing(
            fired=per_feature(of_pair, counts),
            activation=per_feature(numbers, values),
            tokens=len(texts),
            texts=len(present),
            squares=per_feature(of_pair, counts.square()),
            crosses=per_feature(of_pair, counts * sizes),
            token_squares=float(lengths.double().square().sum()),
        )

    def __add__(self, other: Firing) -> Firing:
        """Both groups as one; no text may be in both."""
        return Firing(
            self.fired + other.fired,
            self.activation + other.activation,
            self.tokens + other.tokens,
            self.texts + other.texts,
            self.squares + other.squares,
            self.crosses + other.crosses,
            self.token_squares + other.token_squares,
        )

    @property
    def rate(self) -> Float[Tensor, " features"]:
        """Share of the tokens at which each feature fires."""
        return self.fired / self.tokens

    @property
    def mean(self) -> Float[Tensor, " features"]:
        """Mean value where the feature fires; NaN where it never does."""
        return self.activation / self.fired

    @property
    def spread(self) -> Float[Tensor, " features"]:
        """Variance of `fired` if each text is a witness of its own: `m / (m - 1) * sum over texts of (fired - rate * tokens)²`,
        m the number of texts; 0 for fewer than two."""
        if self.texts < 2:
            return torch.zeros_like(self.fired)
        squares = self.squares - 2 * self.rate * self.crosses + self.rate.square() * self.token_squares
        return squares.clamp_min(0) * (self.texts / (self.texts - 1))

    @property
    def binomial(self) -> Float[Tensor, " features"]:
        """Variance of `fired` if each token were a witness of its own."""
        return self.tokens * self.rate * (1 - self.rate)


@dataclass(frozen=True)
class Contrast:
    """How each feature's firing differs between two groups of texts."""

    z: Float[Tensor, " features"]
    """The root of the likelihood ratio, as good as a normal variable where nothing separates the groups: above 0 where the
    feature fires more often in the first group."""
    design_effect: Float[Tensor, " features"]
    """How many tokens are worth one independent one, 1 or more; counts were divided by it."""
    p: Float[Tensor, " features"]
    """Two-sided p-value of z as a normal variable."""


def contrast(first: Firing, second: Firing, density: Float[Tensor, " features"] | None = None) -> Contrast:
    """Compares how often features fire in two groups of texts.

    Args:
        density: at which share of tokens each feature fires in general. Default: in both groups together.

    Raises:
        QwenScopeError: a group without tokens, or other numbers of features.
    """
    if not first.tokens or not second.tokens:
        raise QwenScopeError(
            f"expected tokens in both groups of texts, found {first.tokens} and {second.tokens}; give each a text of at least "
            "two tokens, as the first one never counts"
        )
    if density is None:
        density = (first.fired + second.fired) / (first.tokens + second.tokens)
    if not len(first.fired) == len(second.fired) == len(density):
        raise QwenScopeError(
            f"expected counts of the same features, found {len(first.fired)}, {len(second.fired)} and densities of "
            f"{len(density)}; compare texts at one layer"
        )
    effect = design_effect(first, second)
    fired = [group.fired / effect + PRIOR_TOKENS * density for group in (first, second)]
    tokens = [group.tokens / effect + PRIOR_TOKENS for group in (first, second)]
    together = (fired[0] + fired[1]) / (tokens[0] + tokens[1])
    gained = torch.zeros_like(together)
    for n, of in zip(fired, tokens, strict=True):
        gained += _likelihood(n, of, n / of) - _likelihood(n, of, together)
    z = (2 * gained).clamp_min(0).sqrt() * (fired[0] / tokens[0] - fired[1] / tokens[1]).sign()
    return Contrast(z, effect, torch.special.erfc(z.abs() / 2**0.5))


def _likelihood(fired: Tensor, tokens: Tensor, rate: Tensor) -> Tensor:
    """Logarithm of the likelihood of a rate, but for what does not depend on it."""
    # A rate of rounding errors above 1 would have no logarithm.
    rests = (tokens - fired).clamp_min(0)
    return torch.special.xlogy(fired, rate) + torch.special.xlogy(rests, (1 - rate).clamp_min(0))


def design_effect(*groups: Firing) -> Float[Tensor, " features"]:
    """By how much counts vary more between texts than independent tokens would: 1 where no group has two texts.

    A feature's own estimate is mixed with that of all features together, which is worth `COMMON_WORTH` degrees of freedom.
    """
    several = [group for group in groups if group.texts > 1]
    if not several:
        return torch.ones_like(groups[0].fired)
    spread = torch.stack([group.spread for group in several]).sum(0)
    binomial = torch.stack([group.binomial for group in several]).sum(0)
    if not binomial.any():
        return torch.ones_like(spread)
    common = spread.sum() / binomial.sum()
    own = torch.where(binomial > 0, spread / binomial, common)
    freedom = sum(group.texts - 1 for group in several)
    return ((freedom * own + COMMON_WORTH * common) / (freedom + COMMON_WORTH)).clamp_min(1)


def false_discovery(p: Float[Tensor, " tests"]) -> Float[Tensor, " tests"]:
    """q-values of Benjamini and Hochberg (1995): the share of false finds to expect among those with as small a q or smaller."""
    order = p.argsort()
    ranked = p[order] * len(p) / torch.arange(1, len(p) + 1, dtype=p.dtype)
    # The least of all that come after, from the end.
    q = ranked.flip(0).cummin(0).values.flip(0).clamp_max(1)
    return torch.empty_like(q).scatter_(0, order, q)
