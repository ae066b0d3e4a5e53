"""What separates two groups of texts: closed forms, brute force, and calibration on data in which nothing does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen_scope import QwenScopeError
from qwen_scope.contrast import (
    COMMON_WORTH,
    Firing,
    contrast,
    design_effect,
    false_discovery,
)
from qwen_scope.features import SparseFeatures


def known(*fired: float, tokens: int) -> Firing:
    """A group of which nobody knows the texts."""
    counts = torch.tensor(fired, dtype=torch.float64)
    return Firing(counts, counts, tokens)


def in_texts(counts: list[list[int]], tokens: list[int]) -> Firing:
    """A group of texts: how often each feature fires in each of them."""
    numbers = torch.tensor(counts, dtype=torch.float64)
    lengths = torch.tensor(tokens, dtype=torch.float64)[:, None]
    return Firing(
        fired=numbers.sum(0),
        activation=numbers.sum(0),
        tokens=sum(tokens),
        texts=len(tokens),
        squares=numbers.square().sum(0),
        crosses=(numbers * lengths).sum(0),
        token_squares=float(lengths.square().sum()),
    )


# Counts


@given(
    tokens=st.integers(1, 30),
    d_sae=st.integers(1, 12),
    k=st.integers(1, 5),
    texts=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_counts_are_those_of_the_dense_matrix(tokens, d_sae, k, texts, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(k, d_sae)
    indices = torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(tokens)])
    features = SparseFeatures(indices, torch.randn(tokens, k, generator=generator), d_sae)
    # Any numbers may name the texts.
    text = 7 * torch.randint(texts, (tokens,), generator=generator)
    found = Firing.of(features, text)
    dense = features.to_dense().double().clamp_min(0)
    by_text = [dense[text == number] for number in text.unique()]
    counts = torch.stack([(rows > 0).sum(0) for rows in by_text]).double()
    lengths = torch.tensor([len(rows) for rows in by_text])[:, None].double()
    torch.testing.assert_close(found.fired, (dense > 0).double().sum(0))
    torch.testing.assert_close(found.activation, dense.sum(0))
    assert (found.tokens, found.texts) == (tokens, len(by_text))
    torch.testing.assert_close(found.rate, counts.sum(0) / tokens)
    torch.testing.assert_close(found.mean, dense.sum(0) / counts.sum(0), equal_nan=True)
    m = len(by_text)
    expected = (counts - found.rate * lengths).square().sum(0) * (m / (m - 1) if m > 1 else 0)
    torch.testing.assert_close(found.spread, expected, rtol=1e-9, atol=1e-9)

    # In parts that keep texts whole it is the same.
    cut = text <= 7
    if cut.any() and not cut.all():
        joined = Firing.of(features[cut], text[cut]) + Firing.of(features[~cut], text[~cut])
        assert (joined.tokens, joined.texts) == (found.tokens, found.texts)
        for name in ("fired", "activation", "spread"):
            torch.testing.assert_close(getattr(joined, name), getattr(found, name), rtol=1e-9, atol=1e-9)


# The score


def test_the_score_by_hand():
    found = contrast(known(30, tokens=100), known(10, tokens=200), torch.tensor([0.2], dtype=torch.float64))
    # 20 of 100 tokens are added to both.
    counts, rates, both = ((50, 150), (30, 270)), (50 / 200, 30 / 300), 80 / 500
    gained = sum(
        fires * math.log(rate / both) + rests * math.log((1 - rate) / (1 - both))
        for (fires, rests), rate in zip(counts, rates, strict=True)
    )
    assert found.z.item() == pytest.approx(math.sqrt(2 * gained))
    assert found.p.item() == pytest.approx(math.erfc(math.sqrt(gained)))
    assert found.design_effect.item() == 1


@given(
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=6),
    densities=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_swapping_the_groups_turns_the_sign(counts, densities):
    first, second = (
        known(*each, tokens=tokens) for each, tokens in zip(zip(*counts, strict=True), (40, 60), strict=True)
    )
    density = torch.tensor(densities[: len(counts)], dtype=torch.float64)
    there, back = contrast(first, second, density), contrast(second, first, density)
    torch.testing.assert_close(there.z, -back.z)
    torch.testing.assert_close(there.p, back.p)
    assert there.z.isfinite().all()


def test_the_same_rate_scores_nothing():
    found = contrast(
        known(0, 3, 20, tokens=20), known(0, 3, 20, tokens=20), torch.tensor([0, 0.1, 1], dtype=torch.float64)
    )
    assert found.z.tolist() == [0, 0, 0]
    assert found.p.tolist() == [1, 1, 1]


def test_more_tokens_say_more_and_common_features_less():
    density = torch.tensor([0.001, 0.3], dtype=torch.float64)
    few = contrast(known(5, 5, tokens=10), known(1, 1, tokens=10), density)
    many = contrast(known(50, 50, tokens=100), known(10, 10, tokens=100), density)
    assert few.z[0] > few.z[1] > 0
    assert (many.z > 2 * few.z).all()


def test_what_one_group_lacks_is_the_surer_the_more_often_it_fires_in_the_other():
    density, fired = torch.full((3,), 1e-4, dtype=torch.float64), torch.tensor([5, 10, 15], dtype=torch.float64)
    z = contrast(known(5, 10, 15, tokens=20), known(0, 0, 0, tokens=20), density).z
    assert z[0] > 2.5
    assert (z.diff() > 0.8).all()
    # The log-odds ratio over its standard error says next to nothing, and hardly more for more.
    odds = [(fired + 0.01, 119.99 - fired), (0.01, 119.99)]
    ratio = torch.log(odds[0][0] / odds[0][1]) - math.log(odds[1][0] / odds[1][1])
    error = (1 / odds[0][0] + 1 / odds[0][1] + 1 / odds[1][0] + 1 / odds[1][1]).sqrt()
    assert (ratio / error).max() < 1


def test_a_rare_feature_that_fires_once_is_no_find():
    # As one in a thousand would, where the density is one in a thousand.
    density = torch.tensor([1e-3], dtype=torch.float64)
    found = contrast(known(1, tokens=50), known(1000, tokens=10**6), density)
    assert 0 < found.z.item() < 2
    assert contrast(known(0, tokens=50), known(1000, tokens=10**6), density).z.abs().item() < 0.5


def test_what_always_or_never_fires_scores_nothing():
    found = contrast(known(7, 0, tokens=7), known(30, 0, tokens=30), torch.tensor([1, 0], dtype=torch.float64))
    assert found.z.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_without_densities_both_groups_say_how_common_features_are():
    first, second = known(8, 0, tokens=10), known(1, 3, tokens=20)
    given_them = contrast(first, second, torch.tensor([9 / 30, 3 / 30], dtype=torch.float64))
    torch.testing.assert_close(contrast(first, second).z, given_them.z)


def test_groups_that_cannot_be_compared(unchecked):
    with pytest.raises(QwenScopeError, match="expected tokens in both groups of texts, found 5 and 0"):
        contrast(known(1, tokens=5), known(0, tokens=0))
    with pytest.raises(QwenScopeError, match="expected counts of the same features, found 1, 2 and densities of 2"):
        contrast(known(1, tokens=5), known(1, 2, tokens=5), torch.zeros(2, dtype=torch.float64))


# Tokens of one text are no independent witnesses


def test_the_design_effect_by_hand():
    # The first feature fires in one text of three only, the second alike in all.
    group = in_texts([[5, 2], [0, 2], [0, 2]], [10, 10, 10])
    own = torch.tensor([3 / 2 * (10 / 3) ** 2 * (1 + 1 / 4 + 1 / 4) / (30 * 1 / 6 * 5 / 6), 0], dtype=torch.float64)
    binomial = torch.tensor([30 * 1 / 6 * 5 / 6, 30 * 1 / 5 * 4 / 5], dtype=torch.float64)
    common = (own * binomial).sum() / binomial.sum()
    expected = ((2 * own + COMMON_WORTH * common) / (2 + COMMON_WORTH)).clamp_min(1)
    torch.testing.assert_close(design_effect(group), expected)
    # A group of unknown texts has no say, but the effect holds for it too.
    torch.testing.assert_close(design_effect(group, known(3, 3, tokens=50)), expected)
    assert design_effect(known(3, 3, tokens=50)).tolist() == [1, 1]
    assert design_effect(in_texts([[0, 4], [0, 4]], [4, 4])).tolist() == [1, 1]


def test_texts_that_say_everything_several_times_are_worth_one_token_each():
    generator = torch.Generator().manual_seed(0)
    fires = [(torch.rand(40, 6, generator=generator) < share).long() for share in (0.5, 0.2)]
    density = torch.full((6,), 0.1, dtype=torch.float64)
    repeated = contrast(*(in_texts((7 * each).tolist(), [7] * 40) for each in fires), density)
    torch.testing.assert_close(repeated.design_effect, torch.full((6,), 7 * 40 / 39, dtype=torch.float64))
    single = contrast(*(in_texts(each.tolist(), [1] * 40) for each in fires), density)
    torch.testing.assert_close(repeated.z, single.z)
    # Tokens that count as witnesses each would be surer by far.
    alone = contrast(*(known(*(7 * each.sum(0)).tolist(), tokens=280) for each in fires), density)
    assert (alone.z > 1.5 * repeated.z).all()


@pytest.mark.parametrize("texts", [5, 20])
def test_where_nothing_separates_the_groups_little_is_found(texts):
    # Each text has its own rate, as texts about something do; both groups are of the same kind.
    generator = torch.Generator().manual_seed(texts)
    features, tokens = 4000, 30
    rates = torch.rand(2 * texts, features, generator=generator).pow(4) * 0.5
    counts = torch.stack([torch.binomial(torch.full_like(rates, tokens), rates, generator=generator)])[0]
    density = rates.mean(0).double()
    halves = [in_texts(half.long().tolist(), [tokens] * texts) for half in counts.split(texts)]
    found = contrast(*halves, density)
    assert (found.p < 0.05).double().mean() < 0.05
    assert false_discovery(found.p).min() > 0.1
    # As independent witnesses, tokens would claim a lot.
    alone = contrast(*(known(*half.fired.tolist(), tokens=half.tokens) for half in halves), density)
    assert (alone.p < 0.05).double().mean() > 0.1
    assert false_discovery(alone.p).min() < 0.01


# Many features at once


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_q_values_are_as_benjamini_and_hochberg_define_them(values: list[float]):
    p = torch.tensor(values, dtype=torch.float64)
    q = false_discovery(p)
    for at, value in enumerate(values):
        # The least share of false finds that any threshold at or above this p would let through.
        thresholds = [other for other in values if other >= value]
        expected = min(other * len(values) / sum(each <= other for each in values) for other in thresholds)
        assert q[at].item() == pytest.approx(min(expected, 1))


def test_no_p_values_give_no_q_values():
    empty: Tensor = torch.zeros(0, dtype=torch.float64)
    assert false_discovery(empty).shape == (0,)
