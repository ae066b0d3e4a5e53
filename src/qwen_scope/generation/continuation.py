"""`Continuation`: one text while it is being generated, knowing nothing of the model and the texts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qwen_scope.generation.result import Candidate, Finish, GeneratedToken, Generation
from qwen_scope.generation.sampling import Sampling
from qwen_scope.steering.changes import Change
from qwen_scope.tokens import TokenizedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes bytes to that are no whole character."""


class Continuation:
    """One text while it is being generated.

    Args:
        prompt: what it continues.
        row: the changes it is generated under.
        sampling: how tokens are drawn, and when to stop.
        tokenizer: decodes tokens; without one their numbers are shown.
        eos: tokens by which the model ends its text.
        most: tokens that fit into the model's context, prompt included; None if nobody knows.
    """

    def __init__(
        self,
        prompt: TokenizedText,
        row: Sequence[Change],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None,
        eos: frozenset[int],
        most: int | None,
    ):
        self.prompt, self.row, self.sampling = prompt, list(row), sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.tokens: list[GeneratedToken] = []
        """What has been generated."""
        self.finish: Finish | None = None
        """Why it has ended; None while it goes on."""
        self.steered_tokens = [0] * len(self.row)
        """For each change, at how many tokens it was made."""
        self._tokenizer, self._eos = tokenizer, eos
        self._room = sampling.max_new_tokens if most is None else min(sampling.max_new_tokens, most - len(prompt))
        self._ids: list[int] = []
        # Tokens from `_shown` on are decoded anew, with those from `_before` on for the spaces between.
        self._before = self._shown = 0
        self._text = ""
        self._told = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt and those generated."""
        return len(self.prompt) + len(self._ids)

    @property
    def last(self) -> int:
        """The token that the model reads next."""
        return self._ids[-1]

    @property
    def held(self) -> bool:
        """Whether some of its text is not told yet: the start of a character, or of what may become a stop text."""
        return self._told < len(self._text) or self._shown < len(self._ids)

    def take(self, id: int, logprob: float, candidates: list[Candidate]) -> GeneratedToken | None:
        """Goes on by a token, or ends."""
        if id in self._eos and not self.sampling.ignore_eos:
            self._end("stop")
            return None
        self._ids.append(id)
        self._text += self._decoded()
        # What was told already cannot be the start of a stop text.
        stopped = [at for text in self.sampling.stop if (at := self._text.find(text, self._told)) >= 0]
        full = len(self._ids) >= self._room
        if stopped:
            self._text = self._text[: min(stopped)]
        ready = len(self._text) if stopped or full else self._safe()
        piece, self._told = self._text[self._told : ready], max(self._told, ready)
        own = f"<{id}>" if self._tokenizer is None else self._tokenizer.decode([id])
        token = GeneratedToken(id, str(own), piece, logprob, candidates)
        self.tokens.append(token)
        if stopped or full:
            self._end("stop" if stopped else "length")
        return token

    def cancel(self) -> None:
        """Ends because nobody wants the rest."""
        self._end("cancelled")

    def rest(self) -> str:
        """Text that was held back, since it might have become a stop text, once it has ended."""
        rest, self._told = self._text[self._told :], len(self._text)
        return rest

    def result(self) -> Generation:
        """What has been generated."""
        tokens = list(self.tokens)
        if tokens:
            told = sum(len(token.piece) for token in tokens)
            # What was held back to the end hangs on the last token.
            tokens[-1] = replace(tokens[-1], piece=tokens[-1].piece + self._text[told:])
        return Generation(
            prompt=self.prompt.text,
            prompt_ids=list(self.prompt.ids),
            text=self._text,
            tokens=tokens,
            finish=self.finish or "cancelled",
            steering=" ".join(str(change.edit) for change in self.row),
            seed=self.sampling.seed,
            steered_tokens=list(self.steered_tokens),
        )

    def _end(self, why: Finish) -> None:
        self.finish = why
        self._text += self._decoded(whole=False)

    def _decoded(self, whole: bool = True) -> str:
        """The text of the tokens that have not been shown; nothing while they end within a character."""
        if self._tokenizer is None:
            new = "".join(f"<{id}>" for id in self._ids[self._shown :])
            self._shown = len(self._ids)
            return new
        before = self._decode(self._ids[self._before : self._shown])
        now = self._decode(self._ids[self._before :])
        if whole and now.endswith(PARTIAL):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _safe(self) -> int:
        """How much of the text no stop text can still take away."""
        held = 0
        for text in self.sampling.stop:
            for size in range(min(len(text) - 1, len(self._text)), held, -1):
                # Looking at one character first spares making nearly all of these pieces.
                if text[size - 1] == self._text[-1] and self._text.endswith(text[:size]):
                    held = size
                    break
        return len(self._text) - held
