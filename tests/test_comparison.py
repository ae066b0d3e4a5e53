"""Two groups of texts compared: against counting by hand."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError, Scope
from qwen_scope.comparison import By, Comparison, compare
from qwen_scope.contrast import Firing, contrast
from qwen_scope.features import SparseFeatures
from qwen_scope.text_features import TextFeatures, text_features
from qwen_scope.tokens import TokenizedText

FRANCE = "the capital of France is Paris"
ITALY = "the capital of Italy is Rome, and Paris"


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


def text_of(ids: list[int], rows: list[dict[int, float]], d_sae: int = 6) -> TextFeatures:
    """A text whose tokens fire the features given."""
    k = 2
    indices = torch.tensor([(list(row) + [n for n in range(d_sae) if n not in row])[:k] for row in rows])
    values = torch.tensor([(list(row.values()) + [0.0] * k)[:k] for row in rows])
    tokenized = TokenizedText("x" * len(ids), ids, ["x"] * len(ids), [(n, n + 1) for n in range(len(ids))])
    return text_features(tokenized, {3: SparseFeatures(indices, values, d_sae)})


FIRST = text_of([5, 6, 7, 8], [{0: 9.0}, {1: 2.0}, {1: 4.0, 2: 1.0}, {3: 1.0}])
SECOND = text_of([5, 6, 9], [{0: 9.0}, {1: 2.0}, {4: 6.0}])


def rates(found: Comparison) -> dict[str, tuple[float, float]]:
    return {of.name: (of.first_rate, of.second_rate) for of in found.features}


def test_rates_and_means_are_shares_of_the_tokens_that_count():
    found = compare([FIRST], [SECOND])
    # Position 0 does not count, so three tokens stand against two.
    assert rates(found) == {
        "3/4": (0, 1 / 2),
        "3/2": (1 / 3, 0),
        "3/3": (1 / 3, 0),
        "3/1": (2 / 3, 1 / 2),
    }
    one = next(of for of in found.features if of.name == "3/1")
    assert (one.first_mean, one.second_mean) == (pytest.approx(6 / 3), pytest.approx(2 / 2))
    assert [of.name for of in compare([FIRST], [SECOND], by="mean").features] == ["3/4", "3/1", "3/2", "3/3"]
    assert [of.name for of in compare([FIRST], [SECOND], top=2).features] == ["3/4", "3/2"]


def test_what_is_left_out():
    whole = compare([FIRST], [SECOND], skip_first=False)
    assert "3/0" in rates(whole)
    assert rates(whole)["3/4"] == (0, 1 / 3)
    for left_out in ({"skip_common_tokens": True}, {"skip_common_prefix": True}):
        found = compare([FIRST], [SECOND], skip_first=False, **left_out)
        assert [kept.tolist() for kept in found.first_counted] == [[False, False, True, True]]
        assert [kept.tolist() for kept in found.second_counted] == [[False, False, True]]
        assert rates(found)["3/1"] == (1 / 2, 0)
    # Token 6 is common to both groups, though not at one place; a prefix is one of all texts or none.
    late = text_of([4, 6], [{4: 1.0}, {1: 1.0}])
    kept = compare([FIRST, late], [SECOND], skip_first=False, skip_common_tokens=True).first_counted
    assert [of.tolist() for of in kept] == [[False, False, True, True], [True, False]]
    kept = compare([FIRST, late], [SECOND], skip_first=False, skip_common_prefix=True).first_counted
    assert all(of.all() for of in kept)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_a_common_prefix_is_what_all_texts_begin_with(first: list[list[int]], second: list[list[int]]):
    together = [*first, *second]
    shared = 0
    while all(len(ids) > shared and ids[shared] == together[0][shared] for ids in together):
        shared += 1
    groups = [[text_of(ids, [{0: 1.0}] * len(ids)) for ids in group] for group in (first, second)]
    try:
        found = compare(*groups, skip_first=False, skip_common_prefix=True)
    except QwenScopeError:
        assert any(all(len(ids) == shared for ids in group) for group in (first, second))
        return
    assert all(kept.tolist() == [at >= shared for at in range(len(kept))] for kept in found.first_counted)


@pytest.mark.parametrize("by", ["rate", "mean", "z"])
def test_a_scope_compares_as_counting_its_features_does(scope, by: By):
    groups = [[FRANCE, "Paris"], [ITALY]]
    found = scope.compare(*groups, by=by, top=128)
    texts = [scope.features(group) for group in groups]
    for layer in scope.layers:
        kept = [[text[layer][1:] for text in group if len(text) > 1] for group in texts]
        dense = [torch.cat([of.to_dense() for of in group]).clamp_min(0) for group in kept]
        share = [(of > 0).double().mean(0) for of in dense]
        mean = [of.double().mean(0) for of in dense]
        counts = []
        for group in kept:
            joined = SparseFeatures(
                torch.cat([of.indices for of in group]), torch.cat([of.values for of in group]), group[0].d_sae
            )
            owners = torch.arange(len(group)).repeat_interleave(torch.tensor([len(of) for of in group]))
            counts.append(Firing.of(joined, owners))
        z = contrast(*counts).z
        here = [of for of in found.features if of.layer == layer]
        for of in here:
            assert (of.first_rate, of.second_rate) == tuple(pytest.approx(float(s[of.number])) for s in share)
            assert (of.first_mean, of.second_mean) == tuple(pytest.approx(float(m[of.number])) for m in mean)
            assert of.z == pytest.approx(float(z[of.number]))
        size = {"rate": share[0] - share[1], "mean": mean[0] - mean[1], "z": z}[by].abs()
        assert len(here) == int((size > 1e-9).sum())
        ranked = [abs(of.difference(by)) for of in here]
        assert ranked == sorted(ranked, reverse=True)
        assert ranked[0] == pytest.approx(float(size.max()))
    assert [of.layer for of in found.features] == sorted(of.layer for of in found.features)


def test_one_text_a_side_layers_and_the_values_of_a_feature(scope):
    found = scope.compare(FRANCE, ITALY, layers=[2, 0], top=3)
    assert [of.layer for of in found.features] == [0, 0, 0, 2, 2, 2]
    name = found.features[0].name
    first, second = found.activations(name)
    number = found.features[0].number
    for values, text in ((first, FRANCE), (second, ITALY)):
        torch.testing.assert_close(values, [scope.features(text)[0].activation(number)])
    with pytest.raises(QwenScopeError, match="one of the layers read"):
        found.activations("1/3")
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["first"][0]["tokens"] == scope.features(FRANCE).tokens
    assert told["features"][0]["name"] == name
    assert name in repr(found)


def test_what_cannot_be_compared_is_a_sentence(scope):
    with pytest.raises(QwenScopeError, match="none in the second group"):
        scope.compare([FRANCE], [])
    with pytest.raises(QwenScopeError, match=r"none in the first once .*leave out less"):
        scope.compare("the", ITALY)
    with pytest.raises(QwenScopeError, match="leave out less"):
        scope.compare(FRANCE, FRANCE, skip_common_tokens=True)
    with pytest.raises(QwenScopeError, match="top = 0"):
        scope.compare(FRANCE, ITALY, top=0)
    read = [scope.features(FRANCE, layers=0)], [scope.features(ITALY, layers=1)]
    with pytest.raises(QwenScopeError, match="none in common"):
        compare(*read)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_order_is_a_sentence(scope):
    with pytest.raises(QwenScopeError, match="found 'size'"):
        scope.compare(FRANCE, ITALY, by="size")  # pyright: ignore
