"""Texts through a backbone in batches: the one place that pads, masks and keeps to the model's context."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.tokens import TokenizedText

BATCH_TOKENS = 2048
"""Tokens, padding included, in one forward pass: enough to keep matrix products busy, little enough for a laptop."""
RESIDUAL_BYTES = 512 * 2**20
"""Residuals of all layers held before they are encoded: the more, the less often each layer's weights are needed."""


@dataclass(frozen=True)
class Batch:
    """Some texts as one padded batch of token ids."""

    texts: list[int]
    """Which of the texts are its rows."""
    ids: Int[Tensor, "batch tokens"]
    """Token ids, padded on the right."""
    real: Bool[Tensor, "batch tokens"]
    """Where a token is real and not padding."""

    @property
    def attention_mask(self) -> Int[Tensor, "batch tokens"] | None:
        """As models take it; None where nothing is padded, which is the faster path."""
        return None if self.real.all() else self.real.long()


def batches(texts: Sequence[TokenizedText], backbone: Backbone, most: int = BATCH_TOKENS) -> list[Batch]:
    """Groups texts so that those of like length share a batch of at most `most` tokens (or are alone in one).

    Raises:
        QwenScopeError: a text longer than the model's context, or token ids that the model does not have.
    """
    limit, vocabulary = backbone.context_length, backbone.config.vocab_size
    for text in texts:
        if not 0 <= min(text.ids) <= max(text.ids) < vocabulary:
            raise QwenScopeError(
                f"expected token ids from 0 to {vocabulary - 1}, which {backbone.name} knows, found "
                f"{min(text.ids)} to {max(text.ids)}; use this model's tokenizer"
            )
        if limit is not None and len(text) > limit:
            raise QwenScopeError(
                f"expected texts of at most {limit} tokens, the context of {backbone.name}, found one of {len(text)}; "
                "split it"
            )
    groups: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        # The first row of a group is its longest, which all others are padded to.
        if groups and (len(groups[-1]) + 1) * len(texts[groups[-1][0]]) <= most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_padded(group, texts) for group in groups]


def _padded(group: list[int], texts: Sequence[TokenizedText]) -> Batch:
    rows = [torch.tensor(texts[i].ids) for i in group]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(group, ids, torch.arange(ids.shape[1]) < lengths[:, None])


def read(
    texts: Sequence[TokenizedText],
    backbone: Backbone,
    layers: Sequence[int],
    *,
    forward_tokens: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[Batch, dict[int, Float[Tensor, "batch tokens d_model"]]]]:
    """The residuals of every text at some layers, batch by batch, each from one forward pass.

    Args:
        forward_tokens: most tokens in one pass, padding included; by default `BATCH_TOKENS`.
        progress: whether to show a bar.

    Raises:
        QwenScopeError: a text longer than the model's context, or a layer the model does not have.
    """
    todo = batches(texts, backbone) if forward_tokens is None else batches(texts, backbone, forward_tokens)
    for batch in tqdm(todo, desc="reading", unit="batch", disable=len(todo) < 8 or not progress):
        yield batch, backbone.residuals(batch.ids, batch.attention_mask, layers=layers)


def read_rows(
    texts: Sequence[TokenizedText],
    backbone: Backbone,
    layers: Sequence[int],
    *,
    forward_tokens: int | None = None,
    held_bytes: int | None = None,
    told: Callable[[int], object] | None = None,
) -> Iterator[tuple[list[int], dict[int, Float[Tensor, "tokens d_model"]]]]:
    """The residuals of real tokens alone, of as many texts at a time as `held_bytes` hold at all layers together (by default
    `RESIDUAL_BYTES`).

    Gives which texts they are, in the order of their rows, and each layer's rows. So each layer's SAE is needed once for
    many batches, not once for each: what makes suites bearable that do not fit into memory. `told` is called after each
    pass of the model with the number of its tokens, and no bar is shown. For the other arguments and errors see `read`.
    """
    order: list[int] = []
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    held = 0
    for batch, residuals in read(texts, backbone, layers, forward_tokens=forward_tokens, progress=told is None):
        if told is not None:
            told(int(batch.real.sum()))
        rows = {layer: x[batch.real.to(x.device)] for layer, x in residuals.items()}
        size = sum(x.nbytes for x in rows.values())
        if order and held + size > (held_bytes or RESIDUAL_BYTES):
            yield order, _joined(parts)
            order, held = [], 0
            parts = {layer: [] for layer in layers}
        order += batch.texts
        held += size
        for layer, x in rows.items():
            parts[layer].append(x)
    if order:
        yield order, _joined(parts)


def _joined(parts: dict[int, list[Tensor]]) -> dict[int, Tensor]:
    # Taken out one by one, so that only one layer is held twice.
    return {layer: torch.cat(parts.pop(layer)) for layer in list(parts)}
