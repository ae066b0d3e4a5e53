"""Documents as pieces of token ids that never cross a document's end, each token with its place in the document."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_scope.errors import QwenScopeError
from qwen_scope.tokens import Message, apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PORTION = 2**18
"""Characters tokenized at a time: a longer document is cut there first, at the end of a line or word if there is one."""
AT_ONCE = 256
"""Most texts handed to the tokenizer together, which it spreads over threads."""


class Piece(NamedTuple):
    """A stretch of a document as the model reads it."""

    document: int
    """Which document, in their order."""
    ids: list[int]
    """Token ids."""
    begins: bool
    """Whether the document, or a portion of `PORTION` characters of it, begins here."""
    spans: list[tuple[int, int]]
    """Characters [start, end) of the document that each token covers, of its rendered text for chat messages; empty if they
    were not asked for. A special token that begins the piece, or ends the text, covers none."""


class _Portion(NamedTuple):
    document: int
    start: int
    text: str
    from_template: bool


def cut(
    documents: "Iterable[str | Sequence[Message]]",
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    *,
    spans: bool = False,
    broken: Callable[[str], object] | None = None,
) -> Iterator[Piece]:
    """Tokenizes documents and cuts them into pieces of at most `context` tokens.

    If the tokenizer begins texts with a special token, every piece begins with it. Chat messages go through the tokenizer's
    template; `broken` is told of those that it does not take, which are left out then, instead of raising.
    """
    bos: Any = tokenizer.bos_token_id
    portions = groupby(_portions(documents, tokenizer, broken), key=lambda portion: portion.from_template)
    for from_template, same in portions:
        while some := _some(same):
            texts = [portion.text for portion in some]
            encoded = tokenizer(
                texts, add_special_tokens=not from_template, return_offsets_mapping=spans, verbose=False
            )
            offsets: Any = encoded["offset_mapping"] if spans else [[]] * len(some)
            for portion, ids, places in zip(some, encoded["input_ids"], offsets, strict=True):
                yield from _cut(portion, ids, places, bos, context)


def _some(portions: Iterator[_Portion]) -> list[_Portion]:
    """The next portions, as many as make it worthwhile to start the tokenizer."""
    taken, size = [], 0
    for portion in portions:
        taken.append(portion)
        size += len(portion.text)
        if len(taken) == AT_ONCE or size >= 4 * PORTION:
            break
    return taken


def _cut(
    portion: _Portion, ids: list[int], places: list[tuple[int, int]], bos: int | None, context: int
) -> Iterator[Piece]:
    begin = 1 if ids and ids[0] == bos else 0
    if len(places) > begin + 1 and tuple(places[-1]) == (0, 0):
        # A special token that ends the text is said to be at its beginning.
        places = [*places[:-1], (places[-2][1], places[-2][1])]
    for start in range(begin, len(ids), context - begin):
        end = start + context - begin
        spans = [(portion.start + a, portion.start + b) for a, b in places[start:end]]
        if spans and begin:
            spans.insert(0, (spans[0][0], spans[0][0]))
        yield Piece(portion.document, ids[:begin] + ids[start:end], start == begin, spans)


def _portions(documents: Any, tokenizer: Any, broken: Callable[[str], object] | None) -> Iterator[_Portion]:
    """At most `PORTION` characters of a document at a time, and whether a chat template wrote them."""
    for number, document in enumerate(documents):
        from_template = not isinstance(document, str)
        try:
            text = apply_template(document, tokenizer) if from_template else document
        except QwenScopeError as error:
            # Without a template no chat can be read.
            if broken is None or not tokenizer.chat_template:
                raise
            broken(str(error))
            continue
        start = 0
        while start < len(text):
            end = start + PORTION
            if end < len(text):
                at = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
                end = at if at > 0 else end
            # Lone surrogates, which a JSON file can hold, are no text to a tokenizer.
            yield _Portion(number, start, text[start:end].encode("utf-8", "replace").decode("utf-8"), from_template)
            start = end
