"""`Batch`: texts that are generated together, each under its own steering. Texts join and leave between steps.

A prompt is read alone, and every following token in one forward pass of all texts: so a text is the same whatever is
generated beside it, but for rounding in the last bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.generation.cache import RowCache, prompt_cache
from qwen_scope.generation.continuation import Continuation
from qwen_scope.generation.result import Candidate
from qwen_scope.generation.sampling import draw
from qwen_scope.steering.changes import Changes, Layout
from qwen_scope.suite import Suite


class Batch:
    """Texts that are generated together.

    Args:
        backbone: the model.
        suite: whose SAEs read what some edits depend on.
    """

    def __init__(self, backbone: Backbone, suite: Suite):
        self.backbone, self.suite = backbone, suite
        self.rows: list[Continuation] = []
        """The texts that go on."""
        self._cache = RowCache()
        self._changes = Changes([], suite)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states held."""
        return self._cache.nbytes

    @torch.no_grad()
    def add(self, text: Continuation) -> None:
        """Reads a prompt and draws the first token after it; the text joins unless it ends there.

        Raises:
            QwenScopeError: positions to steer that the prompt does not have, a model with another kind of memory, or a steering
                so strong that the model's numbers break.
        """
        length = len(text.prompt)
        for change in text.row:
            change.edit.where.check(length)
        changes = Changes([text.row], self.suite)
        cache = prompt_cache(self.backbone.config)
        ids = torch.tensor([text.prompt.ids], device=self.backbone.device)
        with self.backbone.editing(changes.writers(Layout(torch.arange(length)[None], [length]))):
            out = self.backbone.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        text.steered_tokens = list(changes.touched[0])
        broken = self._draw(out.logits[:, -1], [text])
        if broken:
            raise broken[0][1]
        if text.finish is None:
            self._cache.join(cache, length)
            self._collect()
            self.rows.append(text)
            self._changes = Changes([row.row for row in self.rows], self.suite)

    @torch.no_grad()
    def step(self) -> list[tuple[Continuation, QwenScopeError]]:
        """Generates one more token of every text; those that end leave. Gives the texts whose numbers broke, which leave too."""
        if not self.rows:
            return []
        self._cache.before_step()
        lengths = self._cache.lengths
        positions = torch.tensor(lengths)[:, None]
        ids = torch.tensor([[row.last] for row in self.rows], device=self.backbone.device)
        writers = self._changes.writers(Layout(positions, [len(row.prompt) for row in self.rows]))
        with self.backbone.editing(writers):
            out = self.backbone.model(
                input_ids=ids,
                attention_mask=self._cache.attention_mask(self.backbone.device),
                position_ids=positions.to(self.backbone.device),
                past_key_values=self._cache.cache,
                use_cache=True,
            )
        self._cache.after_step()
        broken = self._draw(out.logits[:, -1], self.rows)
        gone = {id(text) for text, _ in broken} | {id(row) for row in self.rows if row.finish is not None}
        if gone:
            self._remove(gone)
        return broken

    def remove(self, text: Continuation) -> None:
        """Takes out a text that nobody wants to go on; does nothing if it has left."""
        if text in self.rows:
            text.cancel()
            self._remove({id(text)})

    def _remove(self, gone: set[int]) -> None:
        self._collect()
        for at in reversed(range(len(self.rows))):
            if id(self.rows[at]) in gone:
                self._cache.leave(at)
                self.rows[at] = self.rows[-1]
                self.rows.pop()
        self._changes = Changes([row.row for row in self.rows], self.suite)

    def _collect(self) -> None:
        """Adds up at how many tokens the changes were made, before the rows change."""
        for row, touched in zip(self.rows, self._changes.touched, strict=True):
            row.steered_tokens = [a + b for a, b in zip(row.steered_tokens, touched, strict=True)]

    def _draw(
        self, logits: Float[Tensor, "batch vocabulary"], rows: list[Continuation]
    ) -> list[tuple[Continuation, QwenScopeError]]:
        logits = logits.float()
        normaliser = logits.logsumexp(1)
        best = logits.argmax(1).tolist()
        most = max(row.sampling.candidates for row in rows)
        top = [x.tolist() for x in (logits - normaliser[:, None]).topk(min(most, logits.shape[1]))] if most else None
        # Infinite residuals make NaN; those whose squares are infinite come out of a norm as zeros, and say nothing.
        lowest, highest = logits.aminmax(dim=1)
        sound = (normaliser.isfinite() & (lowest < highest)).tolist()
        chosen = [
            (best[at] if row.sampling.temperature == 0 else draw(logits[at], row.sampling, row.generator))
            if sound[at]
            else 0
            for at, row in enumerate(rows)
        ]
        picked = torch.tensor(chosen, device=logits.device)[:, None]
        logprobs = (logits.gather(1, picked)[:, 0] - normaliser).tolist()
        broken = []
        for at, row in enumerate(rows):
            if not sound[at]:
                row.cancel()
                broken.append((row, _broken(row)))
                continue
            candidates = []
            if top is not None:
                pairs = list(zip(top[1][at], top[0][at], strict=True))[: row.sampling.candidates]
                candidates = [Candidate(id, self._text(id), logprob) for id, logprob in pairs]
            row.take(chosen[at], logprobs[at], candidates)
        return broken

    def _text(self, id: int) -> str:
        tokenizer = self.backbone.tokenizer
        return f"<{id}>" if tokenizer is None else str(tokenizer.decode([id]))


def _broken(row: Continuation) -> QwenScopeError:
    steering = " ".join(str(change.edit) for change in row.row) or "nothing"
    return QwenScopeError(
        f"expected probabilities after token {row.length - 1}, found numbers that are none under the steering {steering}; use a "
        "smaller strength"
    )
