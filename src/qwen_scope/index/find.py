"""Which features separate these texts from those, or from the corpus of an index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

import torch

from qwen_scope.contrast import Contrast, Firing, contrast, false_discovery
from qwen_scope.errors import QwenScopeError
from qwen_scope.index.feature import Label, Token
from qwen_scope.index.read_shard import kept_tokens
from qwen_scope.reading import read_rows
from qwen_scope.tokens import TokenizedText, tokenize

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope


@dataclass(frozen=True)
class Found:
    """A feature that fires more often in the positive texts."""

    layer: int
    """Which decoder layer, from 0."""
    number: int
    """Which feature of the layer."""
    z: float
    """How surely it fires more often there, see `qwen_scope.contrast`."""
    q: float
    """Share of false finds to expect among all features with a q as small, of all that were compared; with a single text a
    side it is too small, since nobody knows how much texts vary."""
    positive_rate: float
    """At which share of the positive texts' tokens it fires."""
    negative_rate: float
    """The same of the negative ones."""
    density: float
    """The same of the index's corpus."""
    positive_mean: float | None
    """Its mean value where it fires in the positive texts; None if it never does."""
    negative_mean: float | None
    """The same of the negative ones."""
    label: Label | None
    """What it is about, if anybody has said so."""
    top_tokens: list[Token]
    """Where its examples in the index peak, most frequent first."""

    @property
    def name(self) -> str:
        """`layer/number`."""
        return f"{self.layer}/{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"name": self.name, **asdict(self), "top_tokens": [token._asdict() for token in self.top_tokens]}


@dataclass(frozen=True)
class Read:
    """What was read of a group of texts."""

    texts: int
    """How many."""
    tokens: int
    """Their tokens; of a diagnosis, those of the span, or all others of the text."""
    first_tokens: int
    """Of these, left out since they are at position 0."""
    norm_outliers: dict[int, int]
    """By layer, tokens left out besides for their extreme norm (see `qwen_scope.outliers`)."""


@dataclass(frozen=True, repr=False)
class Findings(Sequence[Found]):
    """What `find` and `diagnose` give: features in a list, surest first, and what they rest on."""

    features: list[Found]
    """Those found."""
    positive: Read
    """What was read of the positive texts."""
    negative: Read | None
    """The same of the negative ones; None if they are the index's corpus."""
    compared: int
    """How many features fire in either group, and so were compared."""
    span: list[str] | None = None
    """The tokens that a diagnosis is of; None if whole texts were compared."""

    @overload
    def __getitem__(self, at: int) -> Found: ...
    @overload
    def __getitem__(self, at: slice) -> list[Found]: ...
    def __getitem__(self, at: int | slice) -> Found | list[Found]:
        """Of the features found, in their order."""
        return self.features[at]

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Found]:
        return iter(self.features)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {**asdict(self), "features": [found.to_dict() for found in self]}

    def __repr__(self) -> str:
        from qwen_scope.index.find_text import findings_text

        return findings_text(self)


def find(
    index: FeatureIndex,
    positive: Any,
    negative: Any = None,
    *,
    layers: Sequence[int] | int | None = None,
    count: int = 20,
    only: bool = False,
) -> Findings:
    """The features that fire more often in some texts than in others, surest first.

    Counted are tokens at which a feature's value is above 0; position 0 and norm outliers are left out. Swap the two groups
    for what fires less often.

    Args:
        index: whose model and SAEs read the texts, and whose densities say how common features are.
        positive: one text or several, or whatever else `Scope.features` takes.
        negative: what to compare with. Default: the corpus of the index.
        layers: which layers to search; all of the index unless told.
        count: how many features at most.
        only: only features that fire at none of the negative tokens: what fires here but not there.

    Raises:
        QwenScopeError: a layer that is not there, texts that cannot be read, or too short to count.
    """
    wanted = searched(index, layers, count)
    tokenizer = index.scope.backbone.tokenizer
    groups = [tokenize(texts, tokenizer)[0] for texts in (positive, negative) if texts is not None]
    # All are read together, so that norms have one median.
    counted, reads = count_firing(
        index.scope,
        [text for group in groups for text in group],
        [torch.full((len(text),), number) for number, group in enumerate(groups) for text in group],
        wanted,
    )
    return compare(index, counted, reads, count=count, only=only)


def searched(index: FeatureIndex, layers: Sequence[int] | int | None, count: int) -> list[int]:
    """The layers to search, in order.

    Raises:
        QwenScopeError: none, one that is not there, or a count below 1.
    """
    if count < 1:
        raise QwenScopeError(f"expected to look for at least 1 feature, found count = {count}; ask for one or more")
    wanted = index.layers if layers is None else sorted({layers} if isinstance(layers, int) else set(layers))
    if not wanted:
        raise QwenScopeError("expected at least one layer to search, found none; leave layers out for all")
    for layer in wanted:
        index.check((layer, 0))
    return wanted


@torch.no_grad()
def count_firing(
    scope: Scope, texts: list[TokenizedText], groups: list[torch.Tensor], layers: Sequence[int]
) -> tuple[dict[int, list[Firing]], list[Read]]:
    """Counts of each group by layer, and what was read of it.

    Args:
        groups: by text, the number of the group that each of its tokens is in, from 0 and without gaps, as (tokens,).
    """
    numbers = range(int(torch.cat(groups).max()) + 1)
    lengths = torch.tensor([len(text) for text in texts])
    counted: dict[int, list[list[Firing]]] = {layer: [[] for _ in numbers] for layer in layers}
    outliers = [dict.fromkeys(layers, 0) for _ in numbers]
    for order, residuals in read_rows(texts, scope.backbone, layers):
        text = torch.tensor(order).repeat_interleave(lengths[order])
        group = torch.cat([groups[n] for n in order])
        first = torch.cat([torch.ones(1, dtype=torch.bool), text[1:] != text[:-1]])
        for layer in layers:
            x, sae = residuals.pop(layer), scope.suite[layer]
            kept = torch.from_numpy(kept_tokens(x, first)[0])
            features = sae.encode(x.to(sae.device)).to("cpu")
            for number in numbers:
                mine = group == number
                outliers[number][layer] += int((mine & ~first & ~kept).sum())
                if (mine & kept).any():
                    counted[layer][number].append(Firing.of(features[mine & kept], text[mine & kept]))
    totals = {}
    for layer, by_group in counted.items():
        none = torch.zeros(scope.suite[layer].d_sae, dtype=torch.float64)
        totals[layer] = [sum(parts, Firing(none, none, 0)) for parts in by_group]
    reads = [
        Read(
            sum(bool((group == number).any()) for group in groups),
            sum(int((group == number).sum()) for group in groups),
            sum(int(group[0] == number) for group in groups),
            outliers[number],
        )
        for number in numbers
    ]
    return totals, reads


def compare(
    index: FeatureIndex,
    counted: dict[int, list[Firing]],
    reads: list[Read],
    *,
    count: int,
    only: bool,
    span: list[str] | None = None,
) -> Findings:
    """The features that fire more often in the first group than in the second (without one, in the index's corpus).

    Args:
        counted: counts of the groups by layer.
        reads: what was read of each group.
        span: the tokens of a diagnosis.

    Raises:
        QwenScopeError: a group without a token that counts.
    """
    wanted = list(counted)
    compared: dict[int, tuple[Firing, Firing, Contrast]] = {}
    z, p, fires, shown = [], [], [], []
    for layer in wanted:
        density, corpus = _corpus(index, layer)
        here, there = (*counted[layer], corpus)[:2]
        scores = contrast(here, there, density)
        compared[layer] = here, there, scores
        z.append(scores.z)
        p.append(scores.p)
        fires.append(here.fired + there.fired > 0)
        shown.append((here.fired > 0) & (scores.z > 0) & ((there.fired == 0) | (not only)))
    # What fires nowhere tells nothing, and would only make all the others less sure.
    candidates = torch.cat(fires)
    q = torch.ones(len(candidates), dtype=torch.float64)
    q[candidates] = false_discovery(torch.cat(p)[candidates])
    order = torch.cat(z).where(torch.cat(shown), -torch.inf).argsort(descending=True, stable=True)
    starts = list(accumulate((len(scores) for scores in z), initial=0))
    found = []
    for at in order[: min(count, int(torch.cat(shown).sum()))].tolist():
        place = bisect_right(starts, at) - 1
        layer = wanted[place]
        found.append(_found(index, (layer, at - starts[place]), *compared[layer], q=float(q[at])))
    return Findings(found, reads[0], reads[1] if len(reads) > 1 else None, int(candidates.sum()), span)


def _corpus(index: FeatureIndex, layer: int) -> tuple[torch.Tensor, Firing]:
    """Densities of a layer's features, and the index's corpus as a group of texts."""
    table = index.table(layer, ["fired", "density", "mean"])
    fired, density, mean = (
        torch.tensor(table.column(name).fill_null(0).to_pylist(), dtype=torch.float64)
        for name in ("fired", "density", "mean")
    )
    return density, Firing(fired, fired * mean, index.about.kept(layer))


def _found(
    index: FeatureIndex, name: tuple[int, int], here: Firing, there: Firing, scores: Contrast, q: float
) -> Found:
    layer, number = name
    feature = index[name]
    return Found(
        layer=layer,
        number=number,
        z=float(scores.z[number]),
        q=q,
        positive_rate=float(here.rate[number]),
        negative_rate=float(there.rate[number]),
        density=feature.density,
        positive_mean=float(here.mean[number]) if here.fired[number] else None,
        negative_mean=float(there.mean[number]) if there.fired[number] else None,
        label=feature.label,
        top_tokens=feature.top_tokens,
    )
