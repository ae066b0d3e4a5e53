"""A corpus in shards: nothing lost, every token at its place in the text."""

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope.errors import QwenScopeError
from qwen_scope.index.shards import Shards

TEXTS = [
    "the capital of France is Paris",
    "Ünïcode – 日本語 text 🙂 here",
    "x",
    "and the capital of Italy is Rome " * 9,
]


def write(folder, texts, tokenizer, **options):
    options = {"context": 16, "shard_tokens": 40, "tokens": None, **options}
    located = [(f"place {n}", text) for n, text in enumerate(texts)]
    return Shards.write(folder, lambda told: located, tokenizer, **options)


@pytest.fixture
def documents_of(tokenizer):
    return lambda shards, text: [
        (int(shard.documents[piece]), shard.ids[start:stop].tolist(), shard.starts[start:stop], shard.ends[start:stop])
        for shard in (shards[n] for n in range(len(shards)))
        for piece, (start, stop) in enumerate(zip(shard.pieces[:-1], shard.pieces[1:], strict=True))
    ]


def test_every_token_is_there_once_with_its_characters(tmp_path, tokenizer, documents_of):
    shards = write(tmp_path / "shards", TEXTS, tokenizer)
    found = documents_of(shards, TEXTS)
    for number, text in enumerate(TEXTS):
        expected = tokenizer(text, return_offsets_mapping=True)
        pieces = [piece for piece in found if piece[0] == number]
        assert [i for _, ids, _, _ in pieces for i in ids] == expected["input_ids"]
        spans = [(a, b) for _, _, starts, ends in pieces for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        assert spans == [tuple(span) for span in expected["offset_mapping"]]
        assert all(len(ids) <= 16 for _, ids, _, _ in pieces)
    about = shards.about
    assert about.tokens == sum(len(ids) for _, ids, _, _ in found) == shards.first(len(shards))
    assert (about.documents, about.pieces, about.broken) == (4, len(found), 0)
    assert [shards[n].first for n in range(len(shards))] == about.firsts
    assert all(len(shards[n]) >= 40 for n in range(len(shards) - 1))
    assert pq.read_table(tmp_path / "shards/documents.parquet").to_pydict() == {
        "document": [0, 1, 2, 3],
        "place": [f"place {n}" for n in range(4)],
    }


@given(st.integers(2, 90))
def test_a_budget_ends_with_the_piece_that_reaches_it(tmp_path_factory, tokenizer, budget: int):
    shards = write(tmp_path_factory.mktemp("shards") / "shards", TEXTS * 3, tokenizer, tokens=budget)
    assert budget <= shards.about.tokens < budget + 16


def test_long_documents_keep_their_places_across_portions(tmp_path, tokenizer, monkeypatch, documents_of):
    monkeypatch.setattr("qwen_scope.corpus.cutting.PORTION", 50)
    text = "the capital of France is Paris and more; " * 8
    for _, ids, starts, ends in documents_of(write(tmp_path / "shards", [text], tokenizer), [text]):
        assert tokenizer.decode(ids) == text[starts[0] : ends[-1]]


def test_a_special_token_at_the_beginning_covers_nothing(tmp_path, make_tokenizer_with, documents_of):
    tokenizer = make_tokenizer_with()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|bos|> $A", None, [("<|bos|>", 0)])
    shards = write(tmp_path / "shards", [TEXTS[3]], tokenizer)
    for _, ids, starts, ends in documents_of(shards, TEXTS):
        assert ids[0] == tokenizer.bos_token_id
        assert starts[0] == ends[0] == starts[1]
        assert tokenizer.decode(ids[1:]) == TEXTS[3][starts[1] : ends[-1]]


def test_a_special_token_at_the_end_covers_nothing_there(tmp_path, make_tokenizer_with, documents_of):
    tokenizer = make_tokenizer_with()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <|im_end|>", None, [("<|im_end|>", 1)])
    pieces = documents_of(write(tmp_path / "shards", [TEXTS[3]], tokenizer), TEXTS)
    _, ids, starts, ends = pieces[-1]
    assert ids[-1] == tokenizer.eos_token_id
    assert starts[-1] == ends[-1] == len(TEXTS[3])


def test_chats_that_the_template_does_not_take_are_counted(tmp_path, tokenizer):
    chats = [[{"role": role, "content": "hello"}] for role in ("user", "alien", "user")]
    shards = write(tmp_path / "shards", chats, tokenizer)
    assert (shards.about.documents, shards.about.broken) == (2, 1)
    assert "unknown role" in shards.about.broken_first[0]
    assert sorted(set(shards[0].documents.tolist())) == [0, 2]


def test_broken_lines_are_counted_and_the_first_named(tmp_path, tokenizer):
    def read(told):
        for n in range(30):
            told(f"line {n} is broken")
        yield "place", TEXTS[0]

    about = Shards.write(tmp_path / "shards", read, tokenizer, context=16, shard_tokens=40, tokens=None).about
    assert (about.broken, len(about.broken_first), about.broken_first[0]) == (30, 20, "line 0 is broken")


def test_nothing_is_left_of_a_corpus_that_fails(tmp_path, tokenizer):
    def read(told):
        yield "place", TEXTS[0]
        raise QwenScopeError("the disk is on fire")

    with pytest.raises(QwenScopeError, match="on fire"):
        Shards.write(tmp_path / "shards", read, tokenizer, context=16, shard_tokens=4, tokens=None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(QwenScopeError, match="found none that is whole"):
        Shards.open(tmp_path / "shards")
