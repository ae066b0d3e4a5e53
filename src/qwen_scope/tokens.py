"""From what a user passes (text, texts, token ids, chat messages) to token ids with their place in the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qwen_scope.errors import QwenScopeError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""One chat message as the tokenizer's template takes it: `{"role": "user", "content": "…"}`."""


@dataclass(frozen=True)
class TokenizedText:
    """A text as the model reads it."""

    text: str
    """The text, after the chat template for messages. For token ids, their decoded tokens joined."""
    ids: list[int]
    """Token ids."""
    tokens: list[str]
    """Each token's own text. A token that is only part of a character shows as U+FFFD."""
    spans: list[tuple[int, int]]
    """Characters [start, end) of `text` that each token covers. Tokens that split one character share its span; special
    tokens that the tokenizer added have an empty one."""

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(
    inputs: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    thinking: bool | None = None,
    reply: bool = False,
    most: int | None = None,
) -> tuple[list[TokenizedText], bool]:
    """Any accepted input as a list of tokenized texts, and whether the input was a single one.

    Accepted: a text; a list of texts; token ids as a list, a list of lists, a (tokens,) or (batch, tokens) tensor;
    chat messages as a list of dicts, or a list of such lists.

    Args:
        thinking: for messages, opens the assistant's turn with thinking on or off (`enable_thinking` of the template);
            None reads the messages alone.
        reply: for messages, opens the assistant's turn whatever `thinking` says.
        most: refuses texts of more tokens, before anything is made for each of them.

    Raises:
        QwenScopeError: nothing to read, another kind of input, or text without a tokenizer.
    """
    if isinstance(inputs, Tensor):
        if inputs.ndim not in (1, 2) or inputs.is_floating_point():
            raise QwenScopeError(
                f"expected token ids of shape (tokens,) or (batch, tokens), found a {inputs.dtype} tensor of shape "
                f"{tuple(inputs.shape)}; pass integer ids"
            )
        inputs = inputs.tolist()
    elif isinstance(inputs, tuple):
        inputs = list(inputs)
    single = isinstance(inputs, str) or (isinstance(inputs, list) and bool(inputs) and _is(inputs[0], int, Mapping))
    items = [inputs] if single else inputs
    if not isinstance(items, list) or not items:
        raise QwenScopeError(
            f"expected text, a list of texts, token ids or chat messages, found {_describe(inputs)}; pass one of those"
        )
    return [_tokenize_one(item, tokenizer, thinking, reply, most) for item in items], single


def _tokenize_one(
    item: Any, tokenizer: "PreTrainedTokenizerBase | None", thinking: bool | None, reply: bool, most: int | None
) -> TokenizedText:
    if isinstance(item, list | tuple) and item and all(_is(part, int) for part in item):
        _check_length(item, most)
        return _from_ids([int(part) for part in item], tokenizer)
    if tokenizer is None:
        raise QwenScopeError(
            f"expected token ids since this Scope has no tokenizer, found {_describe(item)}; build it with tokenizer=…"
        )
    if isinstance(item, str):
        text, from_template = item, False
    elif isinstance(item, list | tuple) and item and all(_is(part, Mapping) for part in item):
        text, from_template = apply_template(item, tokenizer, thinking, reply), True
    else:
        raise QwenScopeError(
            f"expected text, token ids or chat messages, found {_describe(item)}; pass one kind at a time"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QwenScopeError(
            f"expected text that is valid Unicode, found {text[error.start]!a} at character {error.start}; decode the "
            "bytes with their own encoding"
        ) from error
    if not text:
        raise QwenScopeError("expected a text of at least one character, found an empty one; pass some text")
    # A chat template writes its own special tokens.
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(text, add_special_tokens=not from_template, return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])
    if not ids:
        raise QwenScopeError(f"expected a text of at least one token, found {text!r}, which has none; pass some text")
    _check_length(ids, most)
    if not fast:
        return _from_ids(ids, tokenizer)
    spans = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    return TokenizedText(text, ids, _decode_each(ids, tokenizer), spans)


class TooLong(QwenScopeError):
    """A text of more tokens than are allowed."""


def _check_length(ids: Sequence[int], most: int | None) -> None:
    if most is not None and len(ids) > most:
        raise TooLong(f"expected texts of at most {most} tokens, found one of {len(ids)}; shorten it")


def apply_template(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    thinking: bool | None = None,
    reply: bool = False,
) -> str:
    """Chat messages as the text that the tokenizer's template makes of them; `thinking` and `reply` as in `tokenize`.

    Raises:
        QwenScopeError: no template, or messages that it does not take.
    """
    if not tokenizer.chat_template:
        raise QwenScopeError(
            "expected a tokenizer with a chat template for chat messages, found one without; pass plain text instead"
        )
    # Qwen's templates look at enable_thinking only where they open the assistant's turn.
    options = {} if thinking is None else {"enable_thinking": thinking}
    options |= {"add_generation_prompt": True} if reply or options else {}
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))  # pyright: ignore
    except Exception as error:  # whatever the template's own code raises
        raise QwenScopeError(
            f"expected chat messages that the model's template takes, found {_describe(messages)} ({reason(error)}); pass "
            'dicts such as {"role": "user", "content": "…"}'
        ) from error


def _from_ids(ids: list[int], tokenizer: "PreTrainedTokenizerBase | None") -> TokenizedText:
    if tokenizer is not None and not all(0 <= token < len(tokenizer) for token in ids):
        raise QwenScopeError(
            f"expected token ids from 0 to {len(tokenizer) - 1}, found {min(ids)} to {max(ids)}; use this model's tokenizer"
        )
    tokens = [f"<{token}>" for token in ids] if tokenizer is None else _decode_each(ids, tokenizer)
    spans, end = [], 0
    for token in tokens:
        spans.append((end, end + len(token)))
        end += len(token)
    return TokenizedText("".join(tokens), ids, tokens, spans)


def _decode_each(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    return tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
