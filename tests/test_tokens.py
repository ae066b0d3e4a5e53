"""Every kind of input becomes token ids with their place in the text, or one clear sentence."""

import unicodedata

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError
from qwen_scope.tokens import TokenizedText, TooLong, tokenize

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class SlowTokenizer:
    """A tokenizer without offsets, one token a word, as far as `tokenize` sees one."""

    is_fast = False
    chat_template = None
    words = ("the ", "capital ", "of ", "France ")

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, text, add_special_tokens, return_offsets_mapping, verbose):
        assert not return_offsets_mapping, "slow tokenizers raise here"
        return {"input_ids": [self.words.index(word + " ") for word in text.split()]}

    def batch_decode(self, ids, clean_up_tokenization_spaces):
        return ["".join(self.words[i] for i in some) for some in ids]


# Kinds of input


def test_a_text(tokenizer):
    [text], single = tokenize("the capital of France", tokenizer)
    assert single
    assert text.text == "the capital of France"
    assert text.ids == tokenizer("the capital of France")["input_ids"]
    assert text.tokens == ["the", " capital", " of", " France"]
    assert text.spans == [(0, 3), (3, 11), (11, 14), (14, 21)]
    assert len(text) == 4


def test_several_texts(tokenizer):
    one, _ = tokenize("the capital", tokenizer)
    other, _ = tokenize("France", tokenizer)
    for several in (["the capital", "France"], ("the capital", "France")):
        assert tokenize(several, tokenizer) == ([*one, *other], False)
    assert tokenize(["France"], tokenizer) == (other, False)


@pytest.mark.parametrize("given_as", [list, tuple, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_token_ids(tokenizer, given_as):
    ids = tokenizer("the capital of France")["input_ids"]
    [text], single = tokenize(given_as(ids), tokenizer)
    assert single
    assert text == tokenize("the capital of France", tokenizer)[0][0]


@pytest.mark.parametrize("given_as", [list, tuple, torch.tensor])
def test_several_lists_of_token_ids(tokenizer, given_as):
    ids = [tokenizer("the capital of")["input_ids"], tokenizer("France, and Rome")["input_ids"][:3]]
    texts, single = tokenize(given_as(ids), tokenizer)
    assert not single
    assert [text.ids for text in texts] == ids


def test_lists_of_token_ids_may_differ_in_length(tokenizer):
    texts, _ = tokenize([[5], [6, 7, 8]], tokenizer)
    assert [len(text) for text in texts] == [1, 3]


def test_token_ids_without_a_tokenizer():
    [text], single = tokenize([7, 3], None)
    assert single
    assert text == TokenizedText("<7><3>", [7, 3], ["<7>", "<3>"], [(0, 3), (3, 6)])


OPENED = "<|im_start|>assistant\n"


@pytest.mark.parametrize(("thinking", "end"), [(None, ""), (True, OPENED), (False, f"{OPENED}<think>\n\n</think>\n\n")])
def test_chat_messages(tokenizer, thinking, end):
    expected = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n" + end
    [text], single = tokenize(QUESTION, tokenizer, thinking=thinking)
    assert single
    assert text.text == expected
    assert text.tokens[0] == "<|im_start|>"
    assert text.ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert "".join(text.tokens) == expected
    several, single = tokenize([QUESTION, QUESTION], tokenizer, thinking=thinking)
    assert not single
    assert several == [text, text]


def test_texts_ids_and_messages_can_be_mixed_in_a_list(tokenizer):
    texts, single = tokenize(["France", [5, 6], QUESTION], tokenizer)
    assert not single
    assert [text.text[:6] for text in texts[:1]] == ["France"]
    assert texts[1].ids == [5, 6]
    assert texts[2].tokens[0] == "<|im_start|>"


def test_special_tokens_are_added_to_text_but_not_to_chat(make_tokenizer_with):
    from tokenizers import processors

    tokenizer = make_tokenizer_with()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    text = tokenize("France", tokenizer)[0][0]
    assert (text.ids[0], text.tokens[0], text.spans[0]) == (0, "<|bos|>", (0, 0))
    assert text.spans[1][0] == 0
    assert 0 not in tokenize(QUESTION, tokenizer)[0][0].ids


def test_a_slow_tokenizer():
    [text], _ = tokenize("the capital of France", SlowTokenizer())
    assert text.ids == [0, 1, 2, 3]
    assert text.text == "the capital of France "
    assert [text.text[slice(*span)] for span in text.spans] == text.tokens


# Spans


@given(st.text(min_size=1, max_size=40))
@example("🦉")
@example("e\u0301 \u212b ｶﾞ")
@example("a\ufffdb <|im_end|> \u200d👩‍👩‍👧\r\n\t")
def test_spans_point_into_the_text(tokenizer, text):
    found = tokenize(text, tokenizer)[0][0]
    assert found.text == text
    assert len(found.ids) == len(found.tokens) == len(found.spans)
    assert all(0 <= start < end <= len(text) for start, end in found.spans)
    assert found.spans == sorted(found.spans)
    # The tokenizer composes characters as Qwen's does; where that changes the text, its tokens spell the composed one.
    if unicodedata.is_normalized("NFC", text):
        assert {i for start, end in found.spans for i in range(start, end)} == set(range(len(text)))
        for token, (start, end) in zip(found.tokens, found.spans, strict=True):
            # A token that is only part of a character has no text of its own.
            assert token == text[start:end] or "\ufffd" in token


def test_tokens_within_one_character_share_its_span(tokenizer):
    found = tokenize("a🦉b", tokenizer)[0][0]
    assert found.spans == [(0, 1), *[(1, 2)] * 4, (2, 3)]
    assert found.tokens == ["a", *["\ufffd"] * 4, "b"]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_spans_of_token_ids_point_into_their_joined_text(tokenizer, ids):
    found = tokenize(ids, tokenizer)[0][0]
    assert found.ids == ids
    assert [found.text[start:end] for start, end in found.spans] == found.tokens


# Bad input


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ("", "an empty one"),
        (["France", ""], "an empty one"),
        ([], "list \\[\\]"),
        ((), "list \\[\\]"),
        ([[]], "list \\[\\]"),
        (None, "NoneType None"),
        (7, "int 7"),
        (b"bytes", "bytes b'bytes'"),
        ({"role": "user"}, "dict"),
        ([1.0, 2.0], "float 1.0"),
        ([[1, 2.5]], "list \\[1, 2.5\\]"),
        ([1, "France"], "list|int 1"),
        (["France", 1], "int 1"),
        ([QUESTION[0], "France"], "dict|list"),
        ([True], "bool True"),
        (torch.tensor([1.0, 2.0]), "float32 tensor of shape \\(2,\\)"),
        (torch.tensor(5), "shape \\(\\)"),
        (torch.ones(1, 1, 1, dtype=torch.long), "shape \\(1, 1, 1\\)"),
        (torch.empty(0, dtype=torch.long), "list \\[\\]"),
        (torch.empty(2, 0, dtype=torch.long), "list \\[\\]"),
        (torch.tensor([True, False]), "bool"),
        ([-1, 5], "-1 to 5"),
        ([5, 320], "5 to 320"),
        ([{"content": "no role"}], "role"),
        ([{"role": "narrator", "content": "x"}], "unknown role"),
    ],
)
def test_input_that_cannot_be_read(tokenizer, inputs, found):
    with pytest.raises(QwenScopeError, match=f"expected .*found .*{found}.*;") as error:
        tokenize(inputs, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inputs", ["France", ["France"], QUESTION, [1.5]])
def test_text_without_a_tokenizer(inputs):
    with pytest.raises(QwenScopeError, match=r"no tokenizer, found (str|list|float) .*(Fran|1\.5)"):
        tokenize(inputs, None)


def test_messages_without_a_template(make_tokenizer_with):
    with pytest.raises(QwenScopeError, match="chat template"):
        tokenize(QUESTION, make_tokenizer_with(chat_template=None))


def test_text_without_a_single_token(make_tokenizer_with):
    from tokenizers import normalizers

    tokenizer = make_tokenizer_with()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    with pytest.raises(QwenScopeError, match="at least one token"):
        tokenize(" ", tokenizer)


def test_long_input_is_cut_in_the_message(tokenizer):
    with pytest.raises(QwenScopeError) as error:
        tokenize(dict.fromkeys(range(1000)), tokenizer)
    assert len(str(error.value)) < 250


def test_texts_of_too_many_tokens_are_refused_before_they_are_taken_apart(tokenizer):
    (text,), _ = tokenize("the capital of France", tokenizer)
    assert len(tokenize("the capital of France", tokenizer, most=len(text))[0][0]) == len(text)
    for long in ("the capital of France", text.ids):
        with pytest.raises(TooLong, match=f"at most {len(text) - 1} tokens, found one of {len(text)}"):
            tokenize(long, tokenizer, most=len(text) - 1)
