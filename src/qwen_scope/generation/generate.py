"""Texts generated in Python: many at once, each under its own steering, or one as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tqdm import tqdm

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.generation.batch import Batch
from qwen_scope.generation.continuation import Continuation
from qwen_scope.generation.result import GeneratedToken, Generation
from qwen_scope.generation.sampling import Sampling
from qwen_scope.steering.changes import Change
from qwen_scope.steering.trace import trace as traced
from qwen_scope.suite import Suite
from qwen_scope.tokens import TokenizedText

ROWS = 32
"""Texts generated at once: each step reads all weights once for all of them."""


def continuation(backbone: Backbone, prompt: TokenizedText, row: Sequence[Change], sampling: Sampling) -> Continuation:
    """A text to be generated, which a `Batch` can take in.

    Raises:
        QwenScopeError: a prompt that leaves no room in the model's context, tokens that it does not have, or positions to
            steer that the prompt does not have.
    """
    most, vocabulary = backbone.context_length, backbone.config.vocab_size
    if most is not None and len(prompt) >= most:
        raise QwenScopeError(
            f"expected a prompt of less than {most} tokens, the context of {backbone.name}, found {len(prompt)}; shorten it"
        )
    if not 0 <= min(prompt.ids) <= max(prompt.ids) < vocabulary:
        raise QwenScopeError(
            f"expected token ids from 0 to {vocabulary - 1}, which {backbone.name} knows, found {min(prompt.ids)} to "
            f"{max(prompt.ids)}; use this model's tokenizer"
        )
    for change in row:
        change.edit.where.check(len(prompt))
    return Continuation(prompt, row, sampling, backbone.tokenizer, backbone.end_tokens, most)


def generate(
    backbone: Backbone,
    suite: Suite,
    prompts: Sequence[TokenizedText],
    rows: Sequence[Sequence[Change]],
    samplings: Sequence[Sampling],
    *,
    trace: bool = False,
    progress: bool = True,
) -> list[Generation]:
    """Texts that continue prompts, each under its own changes and sampling, in the order given.

    Raises:
        QwenScopeError: what `continuation` and `Batch.add` refuse.
    """
    texts = [
        continuation(backbone, prompt, row, sampling)
        for prompt, row, sampling in zip(prompts, rows, samplings, strict=True)
    ]
    batch, waiting = Batch(backbone, suite), list(reversed(texts))
    with tqdm(total=len(texts), desc="generating", unit="text", disable=len(texts) < 8 or not progress) as bar:
        while waiting or batch.rows:
            while waiting and len(batch.rows) < ROWS:
                batch.add(waiting.pop())
            for _, error in batch.step():
                raise error
            bar.update(len(texts) - len(waiting) - len(batch.rows) - bar.n)
    results = [text.result() for text in texts]
    if trace:
        results = [
            replace(
                result, trace=traced(backbone, suite, [*result.prompt_ids, *result.ids], len(result.prompt_ids), row)
            )
            for result, row in zip(results, rows, strict=True)
        ]
    return results


def stream(
    backbone: Backbone, suite: Suite, prompt: TokenizedText, row: Sequence[Change], sampling: Sampling
) -> Iterator[GeneratedToken]:
    """The tokens of one text as they are generated. Other threads can use the model in between.

    Raises:
        QwenScopeError: what `continuation` and `Batch.add` refuse.
    """
    text = continuation(backbone, prompt, row, sampling)
    batch = Batch(backbone, suite)
    batch.add(text)
    told = 0
    while True:
        # While text is held back its last token waits: if nothing more comes, what was held back belongs to it.
        waiting = text.finish is None and text.held
        for token in text.tokens[told : len(text.tokens) - waiting]:
            told += 1
            last = text.finish is not None and told == len(text.tokens)
            yield replace(token, piece=token.piece + text.rest()) if last else token
        if text.finish is not None:
            return
        for _, error in batch.step():
            raise error


def stream_all(
    backbone: Backbone,
    suite: Suite,
    prompts: Sequence[TokenizedText],
    rows: Sequence[Sequence[Change]],
    samplings: Sequence[Sampling],
) -> Iterator[list[Generation]]:
    """Texts that are generated together: after each step what there is of all, at last the whole.

    Other threads can use the model between steps, and whoever stops to ask ends all.

    Raises:
        QwenScopeError: what `continuation` and `Batch.add` refuse.
    """
    texts = [
        continuation(backbone, prompt, row, sampling)
        for prompt, row, sampling in zip(prompts, rows, samplings, strict=True)
    ]
    batch = Batch(backbone, suite)
    for text in texts:
        batch.add(text)
    while batch.rows:
        yield [text.result() for text in texts]
        for _, error in batch.step():
            raise error
    yield [text.result() for text in texts]
