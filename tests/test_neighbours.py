"""Neighbours by direction and by tokens, against matrices that hold everything."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError, TopKSAE
from qwen_scope.index import ranking
from qwen_scope.index.neighbours import similar, together

# Nearest decoder directions


@pytest.mark.parametrize("columns", [7, 128, 8192])
def test_similar_directions_are_those_of_the_whole_matrix(make_sae, monkeypatch, columns):
    monkeypatch.setattr(ranking, "COLUMNS", columns)
    monkeypatch.setattr(ranking, "BLOCK_BYTES", 4 * columns * 50)
    sae = make_sae()
    found = similar(sae, count=6)
    rows = sae.W_dec.T.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    values, numbers = cosines.sort(dim=1, descending=True, stable=True)
    np.testing.assert_array_equal(found.numbers, numbers[:, :6].numpy())
    np.testing.assert_allclose(found.values, values[:, :6].numpy(), rtol=0, atol=1e-6)


def test_equal_directions_are_in_order_of_their_numbers_and_zeros_are_near_nothing():
    directions = torch.tensor([[1.0, 0], [2, 0], [0, 0], [3, 0], [-1, 0], [0, 5]])
    sae = TopKSAE(torch.zeros(6, 2), directions.T, torch.zeros(6), torch.zeros(2), k=1)
    found = similar(sae, count=10)
    assert found.numbers[0].tolist() == [1, 3, 2, 5, 4]
    assert found.values[0].tolist() == [1, 1, 0, 0, -1]
    assert found.numbers[2].tolist() == [0, 1, 3, 4, 5]
    assert found.numbers.dtype == np.int32
    assert found.values.dtype == np.float32


def test_a_single_feature_has_no_neighbours():
    sae = TopKSAE(torch.ones(1, 2), torch.ones(2, 1), torch.zeros(1), torch.zeros(2), k=1)
    assert similar(sae).numbers.shape == (1, 0)


# Features that fire at the same tokens


def brute_force(indices: torch.Tensor, values: torch.Tensor, d_sae: int, count: int) -> tuple[list, list]:
    """From the matrix of all pairs of features."""
    fires = torch.zeros(len(indices), d_sae).scatter(1, indices.long(), (values > 0).float()).double()
    both = fires.T @ fires
    fired = both.diagonal()
    shares = (both / (fired[:, None] + fired - both).clamp_min(1)).where(both >= 2, 0).fill_diagonal_(0)
    values, numbers = shares.sort(dim=1, descending=True, stable=True)
    kept = [int((row > 0).sum()) for row in values[:, :count]]
    return (
        [row[:n].tolist() for row, n in zip(numbers, kept, strict=True)],
        [row[:n].tolist() for row, n in zip(values, kept, strict=True)],
    )


@given(
    tokens=st.integers(1, 40),
    d_sae=st.integers(2, 30),
    k=st.integers(1, 6),
    count=st.integers(1, 5),
    offset=st.sampled_from([-0.5, 0.0, 3.0]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 10**6),
)
def test_together_is_what_the_matrix_of_all_pairs_says(tokens, d_sae, k, count, offset, dtype, seed):
    k = min(k, d_sae)
    generator = torch.Generator().manual_seed(seed)
    # Some features are far more frequent than others, as they are in life.
    weights = torch.rand(d_sae, generator=generator).pow(3) + 1e-3
    indices = torch.multinomial(weights.expand(tokens, d_sae), k, generator=generator).to(dtype)
    values = torch.randn(tokens, k, generator=generator) + offset
    found = together(indices, values, d_sae, count)
    numbers, shares = brute_force(indices, values, d_sae, count)
    for f in range(d_sae):
        assert found.numbers[f, : len(numbers[f])].tolist() == numbers[f]
        np.testing.assert_allclose(found.values[f, : len(numbers[f])], shares[f], rtol=1e-6)
        assert (found.numbers[f, len(numbers[f]) :] == -1).all()
        assert not found.values[f, len(numbers[f]) :].any()


def test_what_fires_once_has_no_neighbours_and_is_none():
    indices = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4]])
    values = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 0, 1]])
    found = together(indices, values, d_sae=6, count=2)
    assert found.numbers.tolist() == [[1, -1], [0, -1], *[[-1, -1]] * 4]
    np.testing.assert_allclose(found.values[:2, 0], [2 / 3, 2 / 3], rtol=1e-6)
    assert found.numbers.dtype == np.int32
    assert found.values.dtype == np.float32


def test_together_does_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(60, generator=generator)[:8] for _ in range(500)])
    values = torch.ones(500, 8)
    alone = together(indices, values, 60)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = together(indices, values, 60)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(alone.numbers, shared.numbers)
    np.testing.assert_array_equal(alone.values, shared.values)


def test_a_number_that_is_no_feature():
    with pytest.raises(QwenScopeError, match="expected features from 0 to 9, found 3 to 10"):
        together(torch.tensor([[3, 10]]), torch.ones(1, 2), d_sae=10)
