"""A corpus as pieces of token ids: where it is cut, what is held out, what a damaged folder says."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError
from qwen_scope.training.pieces import SHORTEST_REST, Pieces

WORDS = "the capital of France is Paris and Rome is the capital of Italy "


def write(folder: Path, documents, tokenizer, context: int = 20, tokens: int | None = None) -> Pieces:
    return Pieces.write(folder / "pieces", documents, tokenizer, context=context, tokens=tokens)


def all_pieces(found: Pieces) -> list[list[int]]:
    return [found[number] for number in range(len(found))]


def test_no_piece_crosses_a_documents_end(tmp_path, tokenizer):
    documents = [WORDS * 3, "Paris", WORDS, "I", ""]
    found = write(tmp_path, documents, tokenizer)
    expected = []
    for document in documents:
        ids = tokenizer(document)["input_ids"] if document else []
        for start in range(0, len(ids), 20):
            if len(ids[start : start + 20]) >= (SHORTEST_REST if start else 2):
                expected.append(ids[start : start + 20])
    assert all_pieces(found) == expected
    assert found.largest == max(map(max, expected))
    assert found.rows.tolist() == [len(piece) - 1 for piece in expected]
    # Documents that give no piece are not counted.
    assert found.documents.tolist() == sorted(found.documents.tolist())
    assert set(found.documents.tolist()) == set(range(found.documents[-1] + 1))
    assert [text.ids for text in found.texts([0, 1])] == expected[:2]
    assert found.exhausted


def test_every_piece_begins_as_the_tokenizer_begins_texts(tmp_path, make_tokenizer_with):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer_with()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    found = write(tmp_path, [WORDS * 4], tokenizer)
    plain = tokenizer(WORDS * 4, add_special_tokens=False)["input_ids"]
    assert len(found) > 2
    assert all(piece[0] == tokenizer.bos_token_id and len(piece) <= 20 for piece in all_pieces(found))
    together = [token for piece in all_pieces(found) for token in piece[1:]]
    assert together == plain[: len(together)]


def test_chats_go_through_the_template(tmp_path, tokenizer):
    chat = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "Rome"}]
    found = write(tmp_path, [WORDS, chat, WORDS], tokenizer, context=200)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (WORDS, text, WORDS)]
    assert all_pieces(found) == ids
    with pytest.raises(QwenScopeError, match="template"):
        write(tmp_path / "wrong", [[{"role": "nobody", "content": "x"}]], tokenizer)


def test_long_documents_are_tokenized_in_portions(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("qwen_scope.corpus.cutting.PORTION", 100)
    text = (WORDS * 20).strip()
    found = write(tmp_path, [text, "x" * 350], tokenizer, context=200)
    assert "".join(tokenizer.decode(piece) for piece in all_pieces(found)) == text + "x" * 350
    assert found.documents.tolist() == sorted(found.documents.tolist())


def test_lone_surrogates_are_replaced(tmp_path, tokenizer):
    assert len(write(tmp_path, ["Paris \ud800 Rome Paris"], tokenizer)) == 1


def test_only_as_many_tokens_as_asked_for(tmp_path, tokenizer):
    def endless():
        while True:
            yield WORDS

    found = write(tmp_path, endless(), tokenizer, tokens=500)
    assert 500 <= found.starts[-1] < 520
    assert not found.exhausted


def test_nothing_to_read(tmp_path, tokenizer):
    with pytest.raises(QwenScopeError, match="two or more tokens, found none"):
        write(tmp_path, ["", "I"], tokenizer)
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_an_interruption_leaves_nothing(tmp_path, tokenizer):
    def killed():
        yield WORDS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, killed(), tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["about.json", "ids.u32", "starts.npy", "cut"])
def test_damaged_folders(tmp_path, tokenizer, damage):
    write(tmp_path, [WORDS], tokenizer)
    folder = tmp_path / "pieces"
    if damage == "cut":
        (folder / "ids.u32").write_bytes((folder / "ids.u32").read_bytes()[:-8])
    else:
        (folder / damage).unlink()
    with pytest.raises(QwenScopeError, match=r"expected a tokenized corpus .* delete that folder"):
        Pieces.open(folder)


def fake(documents: list[list[int]]) -> Pieces:
    """Pieces of given lengths, a list for each document."""
    lengths = [length for document in documents for length in document]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    numbers = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    return Pieces(np.zeros(starts[-1], np.uint32), starts, numbers, 99, 0, True)


@given(
    st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=6), min_size=1, max_size=20),
    st.integers(2, 500),
    st.integers(0, 5),
)
def test_what_is_held_out(documents, wanted, seed):
    pieces = fake(documents)
    train, held = pieces.split(wanted, seed)
    assert sorted([*train, *held]) == list(range(len(pieces)))
    lengths = np.diff(pieces.starts)
    allowed = min(wanted, int(pieces.starts[-1]) // 10)
    if allowed:
        # Just enough: without the piece drawn last it would be too little.
        assert allowed <= lengths[held].sum() < allowed + 30
    # Of each document, what is held out is its end; at most one is held out in part.
    in_part = 0
    for number in range(len(documents)):
        own = np.flatnonzero(pieces.documents == number)
        back = np.isin(own, held)
        assert (np.diff(back.astype(int)) >= 0).all()
        in_part += bool(back.any() and not back.all())
    assert in_part <= 1
    again = pieces.split(wanted, seed)
    assert np.array_equal(train, again[0])


def test_a_fingerprint_tells_corpora_apart(tmp_path, tokenizer):
    one, same, other = (
        write(tmp_path / name, [text], tokenizer) for name, text in (("a", WORDS), ("b", WORDS), ("c", WORDS[::-1]))
    )
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert json.loads((tmp_path / "a" / "pieces" / "about.json").read_text())["context"] == 20
