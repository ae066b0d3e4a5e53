"""`Trace`: what a steering did to a text, token by token, so that nobody has to believe that it did something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.steering.changes import Change, Changes, Layout
from qwen_scope.suite import Suite

NOTHING = 1e-6
"""Nats of divergence below which a distribution counts as unchanged: what rounding alone makes is smaller."""


@dataclass(frozen=True)
class EditTrace:
    """What one edit did."""

    edit: str
    """The edit as text."""
    strength: float
    """Its strength in raw units of activation; the factor of `scale`; 0 for `ablate`."""
    positions: list[int]
    """The positions steered."""
    change: float | None
    """Median over them of |change| / |residual|, all edits of the layer together; None if there are none."""
    largest_change: float | None
    """The largest of these."""
    before: float | None
    """Mean value of the feature there, of the same text read without steering; None if nothing was steered."""
    after: float | None
    """The same, read after the layer was written to."""


@dataclass(frozen=True)
class Trace:
    """What a steering did to a text."""

    edits: list[EditTrace]
    """Edit by edit."""
    kl: list[float]
    """For each generated token, KL(steered || unsteered) in nats of the distribution that it was drawn from, given the same
    tokens before it; where nothing was generated, of the token that would be next."""
    top_changed: float
    """Share of these where the most likely token is another."""

    @property
    def steered(self) -> bool:
        """Whether any residual changed."""
        return any(edit.largest_change for edit in self.edits)

    @property
    def effective(self) -> bool:
        """Whether what the model says next changed anywhere by more than rounding."""
        return max(self.kl, default=0.0) > NOTHING

    def __str__(self) -> str:
        lines = []
        for edit in self.edits:
            if not edit.positions:
                lines.append(f"{edit.edit}: steered no token of this text")
                continue
            spread = (
                f"{edit.positions[0]} to {edit.positions[-1]}" if len(edit.positions) > 1 else str(edit.positions[0])
            )
            lines.append(
                f"{edit.edit} (raw {edit.strength:.4g}): {len(edit.positions)} tokens at {spread}, change {edit.change:.1%} of "
                f"the residual (at most {edit.largest_change:.1%}), feature {edit.before:.4g} -> {edit.after:.4g}"
            )
        if not self.steered:
            lines.append("no effect: nothing was changed")
        elif not self.effective:
            lines.append("no effect: the residual was changed, but no token became more or less likely")
        else:
            lines.append(
                f"next tokens: KL {mean(self.kl):.3g} nats on average, {max(self.kl):.3g} at most; another most likely token at "
                f"{self.top_changed:.0%}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {**asdict(self), "steered": self.steered, "effective": self.effective, "summary": str(self)}


@torch.no_grad()
def trace(backbone: Backbone, suite: Suite, ids: Sequence[int], prompt_length: int, row: Sequence[Change]) -> Trace:
    """Reads a text with and without steering, each in one forward pass, and compares.

    Args:
        ids: token ids of the prompt and all that was generated.
        prompt_length: how many of them are the prompt's.
        row: the changes that were made.
    """
    changes = Changes([row], suite)
    # The last token generated was never read.
    read, kept = (ids[:-1], len(ids) - prompt_length) if len(ids) > prompt_length else (ids, 1)
    positions = torch.arange(len(read))[None]
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def noted(layer: int, write: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def writer(x: Tensor) -> Tensor:
            out = write(x)
            seen[layer] = x[0], out[0]
            return out

        return writer

    def unchanged(layer: int) -> Callable[[Tensor], Tensor]:
        def writer(x: Tensor) -> Tensor:
            plain[layer] = x[0]
            return x

        return writer

    plain: dict[int, Tensor] = {}
    writers = changes.writers(Layout(positions, [prompt_length]))
    with backbone.editing({layer: noted(layer, write) for layer, write in writers.items()}):
        steered = backbone.next_token_logits(read, kept)
    with backbone.editing({layer: unchanged(layer) for layer in writers}):
        unsteered = backbone.next_token_logits(read, kept)
    kl, top_changed = _divergence(steered, unsteered)
    return Trace([_edit(change, suite, prompt_length, len(read), seen, plain) for change in row], kl, top_changed)


def _divergence(
    steered: Float[Tensor, "tokens vocabulary"], unsteered: Float[Tensor, "tokens vocabulary"]
) -> tuple[list[float], float]:
    kl = []
    for mine, other in zip(steered, unsteered, strict=True):  # a row at a time, since vocabularies are large
        p, q = mine.double().log_softmax(0), other.double().log_softmax(0)
        kl.append(float((p.exp() * (p - q)).sum().clamp_min(0)))
    return kl, float((steered.argmax(1) != unsteered.argmax(1)).double().mean())


def _edit(
    change: Change,
    suite: Suite,
    prompt_length: int,
    tokens: int,
    seen: dict[int, tuple[Tensor, Tensor]],
    plain: dict[int, Tensor],
) -> EditTrace:
    edit = change.edit
    where = edit.where.mask(torch.arange(tokens), prompt_length).nonzero()[:, 0]
    if not len(where):
        return EditTrace(str(edit), change.strength, [], None, None, None, None)
    arrived, left = (x[where.to(x.device)] for x in seen[edit.layer])
    sizes = ((left.float() - arrived.float()).norm(dim=1) / arrived.float().norm(dim=1)).tolist()
    sae = suite[edit.layer]

    def reading(x: Tensor) -> float:
        return float(sae.encode(x.to(sae.device)).activation(edit.number).mean())

    unsteered = plain[edit.layer][where.to(left.device)]
    return EditTrace(
        str(edit), change.strength, where.tolist(), median(sizes), max(sizes), reading(unsteered), reading(left)
    )
