"""Blocks of residuals: every piece once a pass, rows as the model gives them, nothing lost between blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen_scope import Backbone, QwenScopeError
from qwen_scope.training.blocks import BlockCache, Blocks, drawn, kept_rows, left_over, read_block
from qwen_scope.training.pieces import Pieces

TEXTS = [
    "the capital of France is Paris",
    "Rome is the capital of Italy: what is the capital of Spain? " * 3,
    "Paris is",
]


@pytest.fixture(scope="module")
def pieces(tokenizer, tmp_path_factory) -> Pieces:
    return Pieces.write(tmp_path_factory.mktemp("corpus") / "p", TEXTS * 5, tokenizer, context=24, tokens=None)


@pytest.mark.parametrize("buffer", [1, 50, 10_000])
def test_every_piece_is_in_one_block(pieces, buffer):
    chosen = np.arange(1, len(pieces))
    blocks = Blocks(pieces, chosen, 0, buffer)
    assert sorted(np.concatenate([blocks.of(n) for n in range(len(blocks))])) == chosen.tolist()
    for n in range(len(blocks) - 1):
        rows = pieces.rows[blocks.of(n)]
        assert rows.sum() >= 1
        # It ends with the piece that reaches the next multiple.
        assert rows.sum() < buffer + 2 * pieces.rows.max()
    same, other = Blocks(pieces, chosen, 0, buffer), Blocks(pieces, chosen, 1, buffer)
    assert np.array_equal(same.of(0), blocks.of(0))
    order, others = (np.concatenate([b.of(n) for n in range(len(b))]) for b in (blocks, other))
    assert not np.array_equal(order, others), "another seed, another order"


def test_each_pass_visits_all_blocks_in_another_order(pieces):
    blocks = Blocks(pieces, np.arange(len(pieces)), 0, 30)
    count = len(blocks)
    assert count > 5
    passes = [[blocks.number(visit) for visit in range(p * count, (p + 1) * count)] for p in range(3)]
    assert passes[0] == list(range(count))
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert passes[1] != passes[0] != passes[2] != passes[1]


def test_rows_are_shuffled_by_the_number_of_the_visit_alone(pieces):
    blocks = Blocks(pieces, np.arange(len(pieces)), 0, 30)
    rows = torch.arange(0, 100, 2)
    assert sorted(blocks.shuffled(rows, 3).tolist()) == rows.tolist()
    assert blocks.shuffled(rows, 3).tolist() == blocks.shuffled(rows, 3).tolist() != blocks.shuffled(rows, 4).tolist()
    assert Blocks(pieces, np.arange(len(pieces)), 1, 30).shuffled(rows, 3).tolist() != blocks.shuffled(rows, 3).tolist()


def test_a_block_holds_every_token_but_position_0(model, pieces):
    backbone = Backbone(model)
    layers = [0, 2]
    numbers = range(6)
    found = read_block(backbone, pieces, list(numbers), layers, forward_tokens=60)
    by_length = sorted(numbers, key=lambda n: -len(pieces[n]))
    for layer in layers:
        alone = [backbone.residuals(torch.tensor([pieces[n]]), layers=[layer])[layer][0, 1:] for n in by_length]
        assert found[layer].shape == (sum(pieces.rows[list(numbers)]), backbone.d_model)
        torch.testing.assert_close(found[layer], torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_reading_tells_how_far_it_is_and_keeps_the_models_dtype(make_model, pieces):
    backbone = Backbone(make_model("llama").bfloat16())
    told: list[int] = []
    found = read_block(backbone, pieces, [0, 1, 2], [1], forward_tokens=24, told=told.append)
    assert found[1].dtype == torch.bfloat16
    assert len(told) == 3
    assert sum(told) == len(found[1])


# Batches across blocks


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 12))
def test_nothing_is_lost_or_doubled_between_blocks(sizes, batch):
    carried = torch.empty(0, 1)
    batches: list[Tensor] = []
    given_rows, start = [], 0
    for number, size in enumerate(sizes):
        x = torch.arange(start, start + size, dtype=torch.float32)[:, None]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(number))
        given_rows += x[order].flatten().tolist()
        batches += list(drawn(x, order, carried, batch))
        carried = left_over(x, order, carried, batch)
        start += size
    assert all(len(rows) == batch for rows in batches)
    assert len(carried) < batch
    assert [*torch.cat([*batches, carried]).flatten().tolist()] == given_rows


def test_outliers_are_not_trained_on():
    x = torch.ones(10, 4)
    x[3] *= 6
    x[7] *= 4.9
    assert kept_rows(x.bfloat16()).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


# Cache


def test_a_cache_gives_back_what_was_written(tmp_path):
    cache = BlockCache(tmp_path / "cache", {"model": "tiny", "context": 24})
    x = torch.randn(5, 4).bfloat16()
    assert cache.load(3, [1, 2]) == {}
    cache.save(3, {1: x, 2: 2 * x})
    found = BlockCache(tmp_path / "cache", {"model": "tiny", "context": 24}).load(3, [2, 5])
    assert list(found) == [2]
    assert torch.equal(found[2], 2 * x)
    assert cache.load(4, [2]) == {}


def test_a_cache_of_something_else(tmp_path):
    BlockCache(tmp_path, {"model": "tiny", "context": 24})
    with pytest.raises(QwenScopeError, match="found context 24 and not 32; use another folder"):
        BlockCache(tmp_path, {"model": "tiny", "context": 32})
