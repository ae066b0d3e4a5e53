"""What sets fire, and all that is reckoned from it: the closed forms against every subset there is."""

import csv
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats

from qwen_scope import QwenScopeError, Scope, Suite
from qwen_scope.bundled import MODEL_NAME
from qwen_scope.cli import main
from qwen_scope.cli.common import Source
from qwen_scope.corpus import rows
from qwen_scope.data import Footprint
from qwen_scope.data.compare import differences
from qwen_scope.data.coverage import coverage, missed, redundancy, representative, sampled_coverage
from qwen_scope.data.fired import Fired, fired, read
from qwen_scope.data.footprint import About, check_comparable
from qwen_scope.data.footprints import footprints
from qwen_scope.data.items import read_items
from qwen_scope.data.overlap import additions, overlaps
from qwen_scope.data.panel import (
    agreements,
    partial_similarity,
    performance_redundancy,
    performance_similarity,
    read_scores,
)
from qwen_scope.data.study import study
from qwen_scope.outliers import norm_outliers

EVIDENCE = Path(__file__).parent.parent / "scripts" / "benchmark_evidence"
TEXTS = ["the capital of France", "Rome", "Italy", "of", "the capital of Italy is Rome, and Paris", "a"]
Sets = list[frozenset[int]]


def fired_by(items: Sets, d_sae: int = 8) -> Fired:
    """What fires where each item fires the features given, each at a value of its number and one."""
    numbers = [sorted(item) for item in items]
    starts = np.cumsum([0, *map(len, numbers)]).astype(np.int64)
    flat = np.array([n for item in numbers for n in item], dtype=np.int32)
    return Fired(starts, flat, (flat + 1).astype(np.float32), d_sae)


def footprint_of(items: Sets | Fired, name: str = "set", **about: Any) -> Footprint:
    of = items if isinstance(items, Fired) else fired_by(items)
    given: dict[str, Any] = {
        "layer": 1,
        "position": "last",
        "model": "tiny",
        "suite": "tiny suite",
        "fingerprint": "0123",
    }
    whole = About(name, "a list", None, len(of), 0, None, **{**given, **about})
    return Footprint(whole, of, [f"item {n}" for n in range(1, len(of) + 1)])


def random_footprint(
    items: int, d_sae: int, seed: int, rates: np.ndarray | None = None, name: str = "set"
) -> Footprint:
    """Items that fire each feature by chance, at its rate."""
    chance = np.random.default_rng(seed)
    fires = chance.random((items, d_sae)) < (chance.random(d_sae) ** 3 if rates is None else rates)
    return footprint_of(fired_by([frozenset(np.flatnonzero(row).tolist()) for row in fires], d_sae), name)


some_sets = st.lists(st.frozensets(st.integers(0, 7)), min_size=1, max_size=6)


def union(items: Sets) -> frozenset[int]:
    return frozenset().union(*items)


def expected_features(items: Sets, n: int) -> Fraction:
    """How many features n random items fire on average, by trying all."""
    sizes = [len(union(list(part))) for part in combinations(items, n)]
    return Fraction(sum(sizes), len(sizes))


@given(some_sets)
def test_coverage_is_that_of_all_subsets(items: Sets):
    whole = len(union(items))
    sizes = np.arange(len(items) + 1)
    by_hand = [float(expected_features(items, n) / whole) if whole else 0.0 for n in sizes.tolist()]
    np.testing.assert_allclose(coverage(fired_by(items).counts, len(items), sizes), by_hand, atol=1e-12)


@given(some_sets, st.data())
def test_redundancy_is_that_of_all_subsets(items: Sets, data: st.DataObject):
    n = data.draw(st.integers(1, len(items)))
    found = redundancy(fired_by(items), n)
    parts = [expected_features(items, k) for k in range(1, n + 1)]
    assert found.features == pytest.approx(float(parts[-1]), abs=1e-12)
    assert found.items == n
    if parts[-1]:
        covered = [part / parts[-1] for part in parts]
        assert found.redundancy == pytest.approx(float(sum(covered) / parts[-1]))
        assert found.mean_coverage == pytest.approx(float(sum(covered) / n))
        assert 0.5 - 1e-9 <= found.mean_coverage <= 1 + 1e-9
    if n == len(items):
        assert redundancy(fired_by(items)) == found


def test_chances_stay_exact_for_many_items():
    times, sizes = np.array([1, 3, 40, 5000, 9999]), np.array([1, 77, 5000, 9960])
    found = missed(times, 10_000, sizes)
    for row, m in enumerate(times.tolist()):
        for col, n in enumerate(sizes.tolist()):
            exact = Fraction(math.comb(10_000 - m, n), math.comb(10_000, n))
            assert found[row, col] == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


def test_sampling_agrees_with_the_closed_form():
    of = random_footprint(30, 50, seed=1).fired
    sizes = np.array([0, 1, 3, 10, 29, 30])
    sampled = sampled_coverage(of, sizes, draws=4000, seed=0)
    np.testing.assert_allclose(sampled, coverage(of.counts, 30, sizes), atol=0.01)
    assert (sampled[0], sampled[-1]) == (0, 1)


@pytest.mark.parametrize("size", [0, 7])
def test_sizes_that_a_set_does_not_have_are_refused(size: int):
    items = [frozenset({1, 2})] * 6
    with pytest.raises(QwenScopeError, match="expected 1 to 6 items"):
        redundancy(fired_by(items), size)
    with pytest.raises(QwenScopeError, match="expected subsets of 1 to 6 items"):
        overlaps([footprint_of(items)], size=size)
    with pytest.raises(QwenScopeError, match="expected sizes from 0 to 6"):
        coverage(fired_by(items).counts, 6, np.array([1, 7]))


@given(some_sets)
def test_representative_subset_keeps_its_guarantee(items: Sets):
    chosen, shares = representative(fired_by(items), len(items))
    whole = union(items)
    assert len(set(chosen.tolist())) == len(chosen)
    for n in range(1, len(chosen) + 1):
        taken = len(union([items[at] for at in chosen[:n]]))
        best = max(len(union(list(part))) for part in combinations(items, n))
        assert shares[n - 1] == pytest.approx(taken / len(whole))
        assert taken >= (1 - (1 - 1 / n) ** n) * best
    if whole:
        assert shares[-1] == 1
        assert len(items[chosen[0]]) == max(map(len, items))


def test_representative_subset_by_hand():
    items = [frozenset({0}), frozenset({1, 2, 3}), frozenset({3, 4, 5}), frozenset({0, 4}), frozenset({6})]
    chosen, shares = representative(fired_by(items), 9)
    assert chosen.tolist() == [1, 2, 0, 4]  # the earlier of two that add as much; the fourth adds nothing any more
    assert shares.tolist() == [3 / 7, 5 / 7, 6 / 7, 1]
    assert representative(fired_by(items), 2)[0].tolist() == [1, 2]
    assert not len(representative(fired_by([frozenset()]), 3)[0])


def test_items_can_be_taken_out_and_repeated():
    items = [frozenset({0, 3}), frozenset(), frozenset({2})]
    taken = fired_by(items).take(np.array([2, 0, 0, 1]))
    assert [taken.of(n).tolist() for n in range(4)] == [[2], [0, 3], [0, 3], []]
    assert taken.values.tolist() == [3, 1, 4, 1, 4]
    assert taken.counts.tolist() == [2, 0, 1, 2, 0, 0, 0, 0]


@given(some_sets, some_sets, st.data())
def test_matched_overlap_is_that_of_all_pairs_of_subsets(first: Sets, second: Sets, data: st.DataObject):
    n = data.draw(st.integers(1, min(len(first), len(second))))
    found = overlaps([footprint_of(first), footprint_of(second)], size=n)
    assert found.size == n
    for (row, of), (col, other) in [((0, first), (1, second)), ((1, second), (0, first))]:
        pairs = [(union(list(a)), union(list(b))) for a in combinations(of, n) for b in combinations(other, n)]
        own = sum(len(a) for a, _ in pairs)
        assert found.matched[row, col] == pytest.approx(sum(len(a & b) for a, b in pairs) / own if own else 0)


@given(some_sets, st.integers(1, 3))
def test_a_set_is_held_against_other_items_of_its_own(items: Sets, n: int):
    n = min(n, len(items))
    found = overlaps([footprint_of(items)], size=n).matched[0, 0]
    at = range(len(items))
    pairs = [(a, b) for a in combinations(at, n) for b in combinations(at, n) if not set(a) & set(b)]
    if not pairs:
        assert math.isnan(found)
        return
    fires = [(union([items[i] for i in a]), union([items[i] for i in b])) for a, b in pairs]
    own = sum(len(a) for a, _ in fires)
    assert found == pytest.approx(sum(len(a & b) for a, b in fires) / own if own else 0)


def test_overlaps_by_hand():
    small, large = [frozenset({0, 1}), frozenset({1, 2})], [frozenset({1, 2, 3}), frozenset({4, 5, 6}), frozenset()]
    nothing = [frozenset(), frozenset()]
    found = overlaps([footprint_of(small, "small"), footprint_of(large, "large"), footprint_of(nothing, "nothing")])
    assert found.names == ["small", "large", "nothing"]
    assert found.asymmetric.tolist() == [[1, 2 / 3, 0], [2 / 6, 1, 0], [0, 0, 0]]
    assert found.symmetric.tolist() == [[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 0]]
    assert found.size == 1
    # One item of the small set fires feature 1 always, 0 and 2 half of the time; one of the large set any a third of the time.
    assert found.matched[0, 1] == pytest.approx((1 / 3 + 1 / 6) / 2)
    assert found.matched[1, 0] == pytest.approx((1 / 3 + 1 / 6) / 2)
    assert found.low is None


def test_footprints_grow_with_their_sets_and_matched_figures_do_not():
    rates = np.random.default_rng(5).random(400) ** 6
    small, large = (random_footprint(n, 400, n, rates) for n in (50, 800))
    found = overlaps([small, large])
    assert found.asymmetric[0, 1] > 0.95
    assert found.asymmetric[1, 0] < 0.8
    assert found.matched[0, 1] == pytest.approx(found.matched[1, 0], abs=0.03)
    assert found.matched[0, 0] == pytest.approx(found.matched[0, 1], abs=0.05)
    whole, part = (redundancy(large.fired, n).mean_coverage for n in (None, 50))
    assert redundancy(small.fired).mean_coverage == pytest.approx(part, abs=0.02)
    assert whole > part + 0.05


def test_half_sample_intervals_cover_what_is_true_of_the_sets_that_items_come_from():
    chance = np.random.default_rng(0)
    rates = chance.random((2, 60)) ** 3
    n, inside = 15, 0
    p = 1 - (1 - rates) ** n
    truth = float((p[0] * p[1]).sum() / p[0].sum())
    for seed in range(60):
        sets = [random_footprint(40, 60, 1000 * seed + at, rates[at]) for at in range(2)]
        found = overlaps(sets, size=n, resamples=100, seed=seed)
        assert found.low is not None
        assert found.high is not None
        assert np.isnan(np.diag(found.low)).all()
        assert found.low[0, 1] <= found.matched[0, 1] <= found.high[0, 1]
        assert found.high[0, 1] - found.low[0, 1] < 0.25
        inside += found.low[0, 1] <= truth <= found.high[0, 1]
    assert inside >= 52  # 57 of 60 are expected


def test_intervals_need_subsets_of_half_a_set():
    with pytest.raises(QwenScopeError, match="at most 2 items for intervals"):
        overlaps([footprint_of([frozenset({1})] * 5)], size=3, resamples=10)


def test_additions_by_hand():
    sets = {"a": [frozenset({0, 1, 2})], "b": [frozenset({1, 2})], "c": [frozenset({2, 3}), frozenset({4})]}
    found = additions([footprint_of(items, name) for name, items in sets.items()])
    assert [(each.name, each.adds, each.alone) for each in found] == [("a", 3, 1), ("c", 2, 2), ("b", 0, 0)]
    assert [each.covered for each in found] == [3 / 5, 1, 1]


def test_differences_are_those_of_the_exact_test_in_its_order():
    first, second = (random_footprint(n, 300, n, name=f"{n}") for n in (60, 90))
    found = differences(first, second, most_q=1.0)
    counts = np.stack([first.fired.counts, second.fired.counts])
    assert {each.feature for each in found} == {f"1/{n}" for n in np.flatnonzero(counts.any(0))}
    exact = {}
    for each in found:
        a, b = counts[:, int(each.feature.split("/")[1])]
        table = [[a, 60 - a], [b, 90 - b]]
        tails = [stats.fisher_exact(table, alternative=side).pvalue for side in ("less", "greater")]
        exact[each.feature] = min(1.0, 2 * min(tails))
        assert each.p == pytest.approx(exact[each.feature], rel=1e-9)
        assert (each.first, each.second) == (a / 60, b / 90)
    q = stats.false_discovery_control([each.p for each in found])
    np.testing.assert_allclose([each.q for each in found], q)
    assert [each.p for each in found] == sorted(each.p for each in found)


def test_planted_differences_are_found_and_no_others():
    rates = np.random.default_rng(0).random(500) * 0.3
    planted = rates.copy()
    planted[:10], planted[10:20] = 0.9, 0.0
    rates[10:20] = 0.5
    found = differences(random_footprint(100, 500, 1, planted), random_footprint(100, 500, 2, rates))
    more = {each.feature for each in found if each.first > each.second}
    less = {each.feature for each in found if each.first < each.second}
    assert {f"1/{n}" for n in range(10)} <= more
    assert {f"1/{n}" for n in range(10, 20)} <= less
    assert len(found) <= 22
    assert not differences(random_footprint(100, 500, 3, rates), random_footprint(100, 500, 4, rates))
    assert not differences(footprint_of([frozenset()]), footprint_of([frozenset()]))


def some_scores(models: int, items: int, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    return (chance.random((models, items)) < np.linspace(0.2, 0.9, models)[:, None]).astype(float)


def test_performance_redundancy_is_the_mean_of_kendall_over_subsets():
    scores = some_scores(5, 6, seed=3)
    for n in (2, 5, 6):
        parts = [list(part) for part in combinations(range(6), n)]
        taus = [stats.kendalltau(scores.mean(1), scores[:, part].mean(1)).statistic for part in parts]
        found = performance_redundancy(scores, sizes=np.array([n]), draws=600)
        assert found == pytest.approx(np.nan_to_num(taus).mean(), abs=0.03)
    assert performance_redundancy(scores, sizes=np.array([6])) == pytest.approx(1)
    alike = np.repeat(np.linspace(0, 1, 5)[:, None], 40, 1)
    assert performance_redundancy(alike) == pytest.approx(1)
    assert performance_redundancy(np.ones((3, 4))) == 0


def test_similarity_is_pearson_and_partial_similarity_that_of_regressions_rests():
    scores = {
        name: some_scores(7, items, seed) for seed, (name, items) in enumerate([("a", 9), ("b", 20), ("mmlu", 30)])
    }
    scores["flat"] = np.ones((7, 3))
    means = {name: of.mean(1) for name, of in scores.items()}
    direct, partial = performance_similarity(scores), partial_similarity(scores, "mmlu")
    assert direct[0, 1] == pytest.approx(stats.pearsonr(means["a"], means["b"]).statistic)
    assert direct[2, 2] == pytest.approx(1)
    assert np.isnan(direct[3]).all()
    base = np.stack([np.ones(7), means["mmlu"]], 1)
    rests = [means[name] - base @ np.linalg.lstsq(base, means[name], rcond=None)[0] for name in "ab"]
    assert partial[0, 1] == pytest.approx(stats.pearsonr(*rests).statistic)
    ab, az, bz = direct[0, 1], direct[0, 2], direct[1, 2]
    assert partial[1, 0] == pytest.approx((ab - az * bz) / math.sqrt((1 - az**2) * (1 - bz**2)))
    assert np.isnan(partial[2]).all()
    assert np.isnan(partial[0, 3])


def test_agreements_are_correlations_over_sets_and_pairs():
    sets = [random_footprint(20 + 10 * n, 100, n, name=f"set {n}") for n in range(5)]
    scores = {footprint.name: some_scores(8, len(footprint), 10 + n) for n, footprint in enumerate(sets)}
    scores["general"] = some_scores(8, 50, 99)
    found = {each.measure: each for each in agreements(sets, scores, general="general", draws=5)}
    assert len(found) == 6
    upper, own = np.triu_indices(5, 1), {f.name: scores[f.name] for f in sets}
    x, y = overlaps(sets).symmetric[upper], performance_similarity(own)[upper]
    direct = found["overlap against similarity"]
    assert direct.count == 10
    assert direct.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert direct.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    y = partial_similarity(scores, "general")[:5, :5][upper]
    assert found["overlap against similarity less general"].pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    x = [redundancy(f.fired, 20).redundancy for f in sets]
    y = [performance_redundancy(own[f.name], draws=5) for f in sets]
    found_redundancy = found["redundancy, size-matched against performance redundancy"]
    assert found_redundancy.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    among = {each.measure: each for each in agreements(sets, own, general="set 0", draws=1)}
    assert among["overlap against similarity less set 0"].count == 6


def test_what_is_no_panel_is_refused(tmp_path: Path):
    sets = [random_footprint(10, 20, n, name=f"set {n}") for n in range(3)]
    scores = {f"set {n}": some_scores(4, 10, n) for n in range(3)}
    with pytest.raises(QwenScopeError, match="at least 3 sets"):
        agreements(sets[:2], scores)
    with pytest.raises(QwenScopeError, match="found none of set 2"):
        agreements(sets, {name: scores[name] for name in ("set 0", "set 1")})
    with pytest.raises(QwenScopeError, match="the general set mmlu"):
        agreements(sets, scores, general="mmlu")
    with pytest.raises(QwenScopeError, match="at least 2 models"):
        performance_redundancy(some_scores(1, 5, 0))
    with pytest.raises(QwenScopeError, match="finite numbers"):
        performance_redundancy(np.full((3, 5), np.nan))
    with pytest.raises(QwenScopeError, match="the same models"):
        performance_similarity({"a": some_scores(3, 5, 0), "b": some_scores(4, 5, 0)})
    with pytest.raises(QwenScopeError, match="general set among"):
        partial_similarity(scores, "mmlu")
    with pytest.raises(QwenScopeError, match="at least 3 models"):
        partial_similarity({"a": some_scores(2, 5, 0)}, "a")
    for flat in (np.ones((3, 5)), np.full((7, 3), 0.1)):
        with pytest.raises(QwenScopeError, match="models that differ"):
            partial_similarity({"a": flat}, "a")
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"a": [[1, 0], [0.5, 1]]}))
    assert read_scores(path)["a"].tolist() == [[1, 0], [0.5, 1]]
    for wrong in ('{"a": [[1, 0], [1]]}', '{"a": [["x"]]}', "[1]", "{"):
        path.write_text(wrong)
        with pytest.raises(QwenScopeError, match="expected scores such as"):
            read_scores(path)


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


def expected_firing(scope: Scope, text: str, rows: list[int], layer: int) -> dict[int, float]:
    """The features that some tokens of a text fire, and the highest value of each, from `Scope.features`."""
    features: dict[int, float] = {}
    of = scope.features(text)[layer]
    for row in rows:
        for number, value in zip(of.indices[row].tolist(), of.values[row].tolist(), strict=True):
            if value > 0:
                features[number] = max(value, features.get(number, 0.0))
    return features


def check_fired(scope: Scope, found: Fired, rows: list[list[int]], layer: int) -> None:
    assert len(found) == len(TEXTS)
    for item, text in enumerate(TEXTS):
        expected = expected_firing(scope, text, rows[item], layer)
        part = slice(found.starts[item], found.starts[item + 1])
        assert found.features[part].tolist() == sorted(expected)
        np.testing.assert_allclose(found.values[part], [expected[n] for n in sorted(expected)], rtol=1e-4)


def test_last_is_what_the_last_token_fires(scope: Scope):
    lengths = [len(scope.features(text).tokens) for text in TEXTS]
    assert {1} < set(lengths)
    found = read(scope, TEXTS, [0, 2], "last")
    for layer in (0, 2):
        check_fired(scope, found.fired[layer], [[n - 1] for n in lengths], layer)
    assert found.lengths.tolist() == lengths
    assert fired(scope, TEXTS, 2).features.tolist() == found.fired[2].features.tolist()


def test_any_leaves_out_the_first_token_and_norm_outliers(scope: Scope, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen_scope.outliers.NORM_OUTLIER", 1.1)
    layer = 1
    residuals = [scope.backbone.residuals(torch.tensor([ids]), layers=[layer])[layer][0] for ids in token_ids(scope)]
    odd = norm_outliers(torch.cat(residuals)).split([len(x) for x in residuals])
    rows = [[row for row in range(1, len(x)) if not out[row]] for x, out in zip(residuals, odd, strict=True)]
    left_out = sum(len(x) - 1 for x in residuals) - sum(map(len, rows))
    assert 0 < left_out < sum(map(len, rows))
    found = read(scope, TEXTS, [layer], "any", means=True)
    check_fired(scope, found.fired[layer], rows, layer)
    for item, (x, kept) in enumerate(zip(residuals, rows, strict=True)):
        mean = x[kept].mean(0) if kept else torch.zeros(x.shape[1])
        np.testing.assert_allclose(found.means[layer][item], mean.numpy(), rtol=1e-4, atol=1e-5)
    assert not found.fired[layer].of(TEXTS.index("a")).size


def token_ids(scope: Scope) -> list[list[int]]:
    assert scope.backbone.tokenizer is not None
    return [scope.backbone.tokenizer(text)["input_ids"] for text in TEXTS]


def test_what_is_fired_does_not_depend_on_what_is_read_together(scope: Scope):
    together = read(scope, TEXTS * 3, [1], "any").fired[1]
    for item, text in enumerate(TEXTS):
        alone = read(scope, [text], [1], "any").fired[1]
        for copy in range(3):
            assert together.of(item + copy * len(TEXTS)).tolist() == alone.features.tolist()


def test_another_position_or_layer_is_refused(scope: Scope, unchecked: None):
    with pytest.raises(QwenScopeError, match="'last' or 'any'"):
        fired(scope, TEXTS, 1, "first")  # pyright: ignore
    with pytest.raises(QwenScopeError, match="found 9"):
        Footprint.of(scope, TEXTS, layer=9)


def test_a_footprint_is_saved_and_loaded(scope: Scope, tmp_path: Path):
    made = Footprint.of(scope, TEXTS, layer=1, position="any", name="cities")
    assert repr(made) == f"Footprint('cities', 6 items, {len(made.features)} features of layer 1, any)"
    assert made.about.suite == "tiny suite"
    assert made.places == [f"item {n}" for n in range(1, 7)]
    read = Footprint.of(scope, read_items(TEXTS), layer=1, position="any", name="cities")
    assert (read.about, read.places) == (made.about, made.places)
    np.testing.assert_array_equal(read.fired.features, made.fired.features)
    made.with_asked({"source": "é", "count": None}).save(tmp_path / "deep" / "a.safetensors")
    again = Footprint.load(tmp_path / "deep" / "a.safetensors")
    assert again.about == replace(made.about, asked={"source": "é", "count": None})
    assert (again.places, again.fired.d_sae, len(again)) == (made.places, 128, 6)
    for name in ("starts", "features", "values"):
        np.testing.assert_array_equal(getattr(again.fired, name), getattr(made.fired, name))


DAMAGES: dict[str, Callable[[dict, dict], object]] = {
    "a tensor is gone": lambda tensors, _: tensors.pop("values"),
    "values are fewer": lambda tensors, _: tensors.update(values=tensors["values"][:-1]),
    "items are fewer": lambda tensors, _: tensors.update(starts=tensors["starts"][:-1]),
    "nothing starts": lambda tensors, _: tensors.update(starts=tensors["starts"][:0]),
    "items run back": lambda tensors, _: tensors["starts"].__setitem__(1, 99),
    "a feature is too large": lambda tensors, _: tensors["features"].__setitem__(-1, 8),
    "a feature is below 0": lambda tensors, _: tensors["features"].__setitem__(0, -1),
    "a feature comes twice": lambda tensors, _: tensors["features"].__setitem__(1, 0),
    "nothing says what it is of": lambda _, words: words.pop("about"),
    "what it is of is cut": lambda _, words: words.update(about=words["about"][:20]),
    "what it is of is a list": lambda _, words: words.update(about="[]"),
    "places are fewer": lambda _, words: words.update(places="[]"),
    "features are no numbers of features": lambda tensors, _: tensors.update(features=tensors["features"].float()),
    "the width is no number": lambda _, words: words.update(d_sae="wide"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_footprint_is_refused(damage: str, tmp_path: Path, unchecked: None):
    path = tmp_path / "a.safetensors"
    footprint_of([frozenset({0, 1, 3}), frozenset({2, 7})]).save(path)
    with safe_open(path, framework="pt") as file:
        tensors, words = {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    DAMAGES[damage](tensors, words)
    save_file(tensors, path, words)
    with pytest.raises(QwenScopeError, match="expected a whole footprint") as caught:
        Footprint.load(path)
    assert "make it again" in str(caught.value)


def test_other_files_are_no_footprints(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(QwenScopeError, match="found none"):
        Footprint.load(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "another"})
    with pytest.raises(QwenScopeError, match="expected a footprint"):
        Footprint.load(path)
    footprint_of([frozenset({0})]).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(QwenScopeError, match="do not parse"):
        Footprint.load(path)


@pytest.mark.parametrize("other", [{"layer": 2}, {"fingerprint": "4567"}, {"position": "any"}], ids=str)
def test_footprints_of_other_features_are_refused(other: dict[str, Any]):
    items = [frozenset({0, 1})] * 3
    pair = [footprint_of(items, "a"), footprint_of(items, "b", **other)]
    for compare in (check_comparable, overlaps, additions, study, lambda two: differences(*two)):
        with pytest.raises(QwenScopeError, match=r"expected footprints of one (SAE|position), found a .* and b"):
            compare(pair)


def test_no_footprints_are_refused():
    with pytest.raises(QwenScopeError, match="found none"):
        study([])


ROWS = [
    {"question": "What is 1 + 1?", "choices": ["one", "two"], "answer": "B"},
    {"question": "  ", "choices": ["a", "b"], "answer": "A"},
    {"question": "Who?", "choices": ["me"], "answer": "A"},
    {"question": "Where?", "choices": ["here", "there"], "answer": None},
    {"question": None, "choices": ["x", "y"], "answer": "A"},
    {"question": "When?", "choices": ["now", "then"], "answer": "B"},
]


def lines(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def write_table(folder: Path, kind: str, found: list[dict[str, Any]]) -> Path:
    """The same rows as a file or folder of some kind."""
    path = folder / f"set.{kind}"
    if kind == "jsonl":
        lines(path, found)
    elif kind == "json":
        path.write_text(json.dumps(found))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(found), path)
    elif kind == "saved":
        datasets.Dataset.from_list(found).save_to_disk(path)
    else:
        path.mkdir()
        lines(path / "a.jsonl", found[:2])
        lines(path / "b.jsonl", found[2:])
    return path


KINDS = ["jsonl", "json", "csv", "parquet", "saved", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_gives_some_columns_of_every_kind_of_table(kind: str, tmp_path: Path):
    flat = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]
    path = write_table(tmp_path, kind, flat)
    empty = "" if kind == "csv" else None
    expected = [{name: empty if value is None else value for name, value in row.items()} for row in flat]
    found = list(rows(path, ("answer", "question")))
    assert [row for _, row in found] == expected
    assert list(found[0][1]) == ["answer", "question"]
    assert all(where.startswith(("row ", "line ")) for where, _ in found)
    assert len({where for where, _ in found}) == len(ROWS)
    assert [value for _, value in rows(path, "question")] == [row["question"] for row in expected]
    with pytest.raises(QwenScopeError, match="the column 'other'"):
        list(rows(path, ("answer", "other")))


def test_rows_without_a_column_named_are_those_of_the_text(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [{"id": 1, "text": "a"}, {"id": 2, "text": " "}, {"id": 3}])
    assert [value for _, value in rows(path, None)] == ["a", " ", None]


def test_plain_texts_have_no_columns(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(QwenScopeError, match="found a plain text"):
        list(rows(tmp_path / "a.txt", ("question", "answer")))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "csv"])
def test_a_template_makes_texts_and_rows_that_lack_a_part_are_counted(kind: str, tmp_path: Path):
    path = write_table(tmp_path, kind, ROWS)
    template = "{{Q}} {question}\n{choices[1]} ({choices[0]})"
    with pytest.raises(QwenScopeError, match=r"expected a value of question in (row|line)"):
        read_items(path, template=template)
    told: list[str] = []
    found = read_items(path, template=template, label="answer", broken=told.append)
    assert found.texts == ["{Q} What is 1 + 1?\ntwo (one)", "{Q} When?\nthen (now)"]
    assert found.labels == ["B", "B"]
    assert [sentence.split(" in ")[0] for sentence in told] == [
        "expected a value of question",
        f"expected all that {template!r} names",
        "expected a value of answer",
        "expected a value of question",
    ]
    assert len(found) == len(found.places) == 2
    assert read_items(path, template=template, count=1).texts == found.texts[:1]


def test_blank_items_of_a_column_are_refused_or_counted(tmp_path: Path):
    path = write_table(tmp_path, "jsonl", ROWS)
    with pytest.raises(QwenScopeError, match=r"expected a text in line 2 of .* found a blank one"):
        read_items(path, column="question")
    told: list[str] = []
    found = read_items(path, column="question", broken=told.append)
    assert len(found) == 4
    assert [sentence.split(" of ")[0] for sentence in told] == [
        "expected a text in line 2",
        "expected a text in line 5",
    ]
    assert found.labels is None
    labelled = read_items(path, column="question", label="answer", broken=told.append)
    assert (labelled.texts, labelled.labels) == (["What is 1 + 1?", "Who?", "When?"], ["B", "A", "B"])


def test_what_stands_for_nothing_and_labels_that_are_no_text_are_left_out(tmp_path: Path):
    odd = [{"q": 1, "l": 2}, {"q": float("nan"), "l": 1}, {"q": "a", "l": float("nan")}, {"q": "b", "l": "\ud800"}]
    told: list[str] = []
    found = read_items(lines(tmp_path / "odd.jsonl", odd), template="{q}", label="l", broken=told.append)
    assert (found.texts, found.labels) == (["1"], ["2"])
    expected = ["a value of q in line 2", "a value of l in line 3", "valid Unicode in line 4"]
    assert all(said in sentence for said, sentence in zip(expected, told, strict=True))


def test_lists_and_folders_of_texts_are_sets_too(tmp_path: Path):
    chat = [{"role": "user", "content": "hello"}]
    told: list[str] = []
    found = read_items(["a", "  ", chat, "b", []], broken=told.append)
    assert (found.texts, found.places) == (["a", chat, "b"], ["item 1", "item 3", "item 4"])
    assert len(told) == 2
    assert read_items(["a", "b"], count=1).texts == ["a"]
    with pytest.raises(QwenScopeError, match="expected a text in item 2"):
        read_items(["a", ""])
    for name, text in (("a.txt", "one"), ("b.txt", "two")):
        (tmp_path / name).write_text(text)
    assert read_items(tmp_path).texts == ["one", "two"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"template": "{question}", "column": "question"}, "found both"),
        ({"template": "Question:"}, "name columns"),
        ({"template": "{question"}, "fix it"),
        ({"template": "{}"}, "found {}"),
        ({"template": "{0}"}, "found {0}"),
        ({"template": "{question.__class__}"}, "found {question.__class__}"),
        ({"template": "{question!r}"}, "found {question}"),
        ({"template": "{question:>{width}}"}, "found {question}"),
        ({"template": "{other}"}, "the column 'other'"),
        ({"column": "question", "label": "kind"}, "the column 'kind'"),
        ({"column": "question", "count": 0}, "at least 1 item"),
    ],
)
def test_what_cannot_be_asked_of_a_set(options: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(QwenScopeError) as caught:
        read_items(write_table(tmp_path, "jsonl", ROWS), **options)
    assert sentence in str(caught.value)


def test_sets_without_items_are_refused(tmp_path: Path):
    empty = lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(
        QwenScopeError, match=r"expected items in .*found none that can be used .expected a text in line 1 of"
    ):
        read_items(empty, broken=lambda sentence: None)
    with pytest.raises(QwenScopeError, match="expected items in the list"):
        read_items([])
    with pytest.raises(QwenScopeError, match="found a list of texts"):
        read_items(["a"], template="{text}")
    with pytest.raises(QwenScopeError, match="found nothing at"):
        read_items(tmp_path / "b.jsonl")


def test_items_that_cannot_be_read_are_counted_with_the_first_reason(scope: Scope, tmp_path: Path):
    long = "the capital " * 300
    path = lines(tmp_path / "set.jsonl", [{"text": text} for text in ["Rome", "", long, "Paris is"]])
    told: list[str] = []
    made = Footprint.of(scope, path, layer=1, broken=told.append)
    assert (made.name, made.about.items, made.about.left_out, len(told)) == ("set", 2, 2, 2)
    assert made.about.left_out_first == told[0]
    assert "at most 256 tokens" in told[1]
    assert [place.split(" of ")[0] for place in made.places] == ["line 1", "line 4"]
    assert made.fired.features.tolist() == fired(scope, ["Rome", "Paris is"], 1).features.tolist()
    with pytest.raises(QwenScopeError, match="expected an item of at most 256 tokens, the model's context, in item 2"):
        Footprint.of(scope, ["Rome", long], layer=1)
    with pytest.raises(
        QwenScopeError, match="that the model can read, found none; the first: expected an item of at most"
    ):
        Footprint.of(scope, [long], layer=1, broken=told.append)


def test_chats_that_the_template_refuses_do_not_cost_the_others(scope: Scope, tmp_path: Path):
    chats = [[{"role": role, "content": "Rome"}] for role in ("user", "nobody", "user")]
    path, told = lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats]), list[str]()
    made = Footprint.of(scope, path, layer=1, broken=told.append)
    assert (len(made), made.about.left_out) == (2, 1)
    assert "the model's template takes" in told[0]
    assert f"line 2 of {path}" in told[0]
    with pytest.raises(QwenScopeError, match=r"the model's template takes.*line 2 of"):
        Footprint.of(scope, path, layer=1)


def nobody() -> Scope:
    raise AssertionError("a set is read again")


def test_kept_footprints_are_made_again_only_if_something_changed(scope: Scope, tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [{"q": text} for text in TEXTS] + [{"q": ""}])
    other = tmp_path / "texts"
    other.mkdir()
    (other / "b.txt").write_text("Rome")
    sets: list[dict[str, Any]] = [
        {"name": "a", "source": str(path), "column": "q"},
        {"name": "b", "source": str(other)},
    ]
    options: dict[str, Any] = {"layer": 1, "position": "last", "read_with": {"suite": None}}

    def made(get: Callable[[], Scope], **changed: Any) -> list[Footprint]:
        return footprints(get, sets, tmp_path / "kept", **{**options, **changed})

    first = made(lambda: scope)
    assert [(f.name, len(f), f.about.left_out) for f in first] == [("a", 6, 1), ("b", 1, 0)]
    assert [f.about for f in made(nobody)] == [f.about for f in first]
    for changed in ({"position": "any"}, {"layer": 2}, {"count": 3}, {"read_with": {"suite": "other"}}):
        with pytest.raises(AssertionError, match="read again"):
            made(nobody, **changed)
    (other / "b.txt").write_text("Rome is")
    asked: list[Scope] = []
    again = made(lambda: asked.append(scope) or scope)
    assert len(asked) == 1
    assert again[0].about == first[0].about
    assert len(made(nobody)) == 2


def test_a_set_that_fails_leaves_those_before_it(scope: Scope, tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [{"text": "Rome"}])
    sets = [{"name": "a", "source": str(path)}, {"name": "b", "source": str(tmp_path / "b.jsonl")}]
    with pytest.raises(QwenScopeError, match="found nothing at"):
        footprints(lambda: scope, sets, tmp_path / "kept", layer=1)
    lines(tmp_path / "b.jsonl", [{"text": "Paris"}])
    assert len(footprints(lambda: scope, sets, tmp_path / "kept", layer=1)) == 2
    with pytest.raises(QwenScopeError, match="expected a name of letters"):
        footprints(nobody, [{"name": "../a", "source": str(path)}], tmp_path / "kept", layer=1)


EVIL = "<script>alert('$x$')</script>"


def test_a_study_is_figures_plots_and_a_page(tmp_path: Path):
    sets = [random_footprint(30 + n, 200, n, name=EVIL if n == 0 else f"set {n}") for n in range(3)]
    evil = replace(sets[0].about, left_out=2, left_out_first="<b>a blank one</b>", model="<i>m</i>")
    sets[0] = Footprint(evil, sets[0].fired, sets[0].places)
    found = study(sets, resamples=20)
    assert found.size == 15
    for each, footprint in zip(found.sets, sets, strict=True):
        assert each.whole == redundancy(footprint.fired)
        assert each.matched == redundancy(footprint.fired, 15)
        assert (each.curve[0], each.curve[-1]) == ((0, 0), (1, 1))
        chosen = [footprint.places.index(place) for place in each.representative]
        share = len(np.flatnonzero(footprint.fired.take(np.array(chosen)).counts)) / len(footprint.features)
        assert share >= 0.9
    page = found.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "study.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert written["overlaps"]["low"][0][0] is None
    assert written["differences"] is None
    for name in ("coverage", "overlaps"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    html = page.read_text()
    assert not any(tag in html for tag in ("<script", "<b>", "<i>"))
    assert "&lt;script&gt;" in html
    assert "left out 2 rows" in html
    assert html.count("<table>") == 3
    assert f"{EVIL}: left out 2 rows" in str(found)


def test_a_study_of_two_sets_compares_their_features_and_one_of_scores_says_how_they_agree():
    rates = np.full(40, 0.3)
    rates[7] = 0.0
    first, second = random_footprint(60, 40, 1, rates, "first"), random_footprint(60, 40, 2, np.full(40, 0.3), "second")
    found = study([first, second], resamples=0)
    assert found.differences is not None
    assert [each.feature for each in found.differences] == ["1/7"]
    assert "less frequent in first than in second" in str(found)
    assert found.overlaps.low is None
    third = random_footprint(60, 40, 3, name="third")
    scores = {name: np.ones((4, 60)) for name in ("first", "second", "third")}
    judged = study([first, second, third], resamples=0, scores=scores)
    assert judged.differences is None
    agreement = judged.to_dict()["agreements"][2]
    assert agreement == {"measure": "overlap against similarity", "pearson": None, "spearman": None, "count": 0}
    assert "Pearson nan" in str(judged)


@pytest.mark.parametrize("items", [1, 2, 3])
def test_the_smallest_sets_can_be_studied(items: int, tmp_path: Path):
    found = study([footprint_of([frozenset({1, 2})] * items, "a"), footprint_of([frozenset()] * 3, "b")], resamples=5)
    assert found.size == 1
    assert found.save(tmp_path).exists()
    assert [each.whole.features for each in found.sets] == [2, 0]


def test_many_sets_can_be_drawn():
    found = study([random_footprint(10, 30, n, name=f"set {n}") for n in range(12)], resamples=0)
    assert all(picture.startswith(b"\x89PNG") for picture in found.pictures().values())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["benchmarks", *arguments])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out, spec = str(tmp_path / "out"), tmp_path / "spec.json"
    assert "found none; try: qwen-scope benchmarks" in refused(capsys, out)
    assert "found a twice" in refused(capsys, out, "x/a.jsonl", "a=b.jsonl")
    assert "found 2; run the command for each" in refused(capsys, out, "a.jsonl", "--layer", "7", "15")
    assert "--resamples of 0 or more" in refused(capsys, out, "a.jsonl", "--resamples", "-1")
    assert "expected scores such as" in refused(capsys, out, "a.jsonl", "--scores", str(tmp_path / "none.json"))
    assert "none that reads" in refused(capsys, out, "--spec", str(spec))
    for wrong in ("[{}]", "{}", '[{"name": "a", "source": 1}]', '[{"name": "a", "source": "b", "count": "1"}]'):
        spec.write_text(wrong)
        assert "expected a list of sets" in refused(capsys, out, "--spec", str(spec))
    assert not (tmp_path / "out").exists()


def test_the_command_reads_anew_with_a_suite_that_was_trained_on(
    llama, tokenizer, make_sae, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    given = ["benchmarks", str(tmp_path / "out"), str(texts), "--layer", "1", "--resamples", "0", "--json"]
    given += ["--model", str(tmp_path / "model"), "--suite", str(tmp_path / "suite")]

    def trained(seed: int) -> Any:
        Suite.of({1: make_sae(seed=seed)}, name="mine").save_pretrained(tmp_path / "suite")
        main(given)
        return json.loads(capsys.readouterr().out)["sets"][0]["about"]

    first, second = trained(1), trained(2)
    assert first["fingerprint"] != second["fingerprint"]
    assert first["model"] == "model"  # and not where it lies on this machine
    monkeypatch.setattr(Source, "open", lambda self: nobody())
    main(given)


@pytest.mark.real
def test_the_command_from_files_to_a_page_and_again_without_reading(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sums = [{"q": f"What is {n} plus {n + 1}?", "a": str(2 * n + 1)} for n in range(8)]
    lines(tmp_path / "sums.jsonl", [*sums, {"q": "", "a": "0"}])
    (tmp_path / "french.csv").write_text("q,a\n" + "".join(f"Le chat {n} dort,oui\n" for n in range(6)))
    code = lines(tmp_path / "code.jsonl", [{"text": f"def f{n}(x):\n    return x + {n}\n"} for n in range(5)])
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps([{"name": "code", "source": code.name}]))
    sets = [f"sums={tmp_path / 'sums.jsonl'}", str(tmp_path / "french.csv")]
    arguments = ["benchmarks", str(tmp_path / "out"), *sets, "--template", r"Q: {q}\nA: {a}", "--resamples", "10"]
    arguments += ["--spec", str(spec)]
    main(arguments)
    printed = capsys.readouterr().out
    assert "sums: left out 1 rows, the first: expected a value of q in line 9 of" in printed
    assert f"open in a browser: {tmp_path / 'out' / 'report.html'}" in printed
    kept = {path.stem: Footprint.load(path) for path in (tmp_path / "out" / "footprints").iterdir()}
    assert {name: len(of) for name, of in kept.items()} == {"sums": 8, "french": 6, "code": 5}
    assert kept["code"].about.model == MODEL_NAME
    scope = Scope.from_pretrained(layers=[15])
    last = scope.features("Q: Le chat 3 dort\nA: oui")[15][-1]
    assert kept["french"].fired.of(3).tolist() == sorted(last.indices[last.active].tolist())

    monkeypatch.setattr(Source, "open", lambda self: nobody())
    main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [each["about"]["name"] for each in found["sets"]] == ["sums", "french", "code"]
    assert found == json.loads((tmp_path / "out" / "study.json").read_text())
    with pytest.raises(AssertionError, match="read again"):
        main([*arguments, "--layer", "7"])


def evidence() -> ModuleType:
    """The script that makes the figures of the document."""
    spec = importlib.util.spec_from_file_location("benchmark_evidence_run", EVIDENCE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((EVIDENCE / "result.json").read_text(encoding="utf-8"))


def test_tables_and_plot_are_those_of_the_committed_figures():
    run = evidence()
    page = run.PAGE.read_text(encoding="utf-8")
    assert run.with_tables(page) == page
    assert {mark[1] for mark in run.MARKED.findall(page)} == {"sets", "groups", "planted"}
    assert f"]({run.PLOT.parent.name}/{run.PLOT.name})" in page
    assert run.PLOT.stat().st_size < 150_000


def test_the_evidence_is_of_eight_real_sets_or_more(committed: dict[str, Any]):
    for of in committed["positions"].values():
        assert len(of["sets"]) >= 8
        assert min(each["items"] for each in of["sets"].values()) >= 2 * of["size"]
        assert {each["left_out"] for each in of["sets"].values()} == {0}
        low, matched, high = (np.array(of[name]) for name in ("low", "matched", "high"))
        apart = ~np.eye(len(matched), dtype=bool)
        assert (low <= high)[apart].all()
        assert ((low <= matched) & (matched <= high))[apart].mean() > 0.95


def test_planted_mixtures_are_where_the_equations_expect_them(committed: dict[str, Any]):
    rows = committed["planted"]
    assert [row["share"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    for row in rows:
        for name in ("features", "redundancy", "overlap"):
            of = row[name]
            room = (of["high"] - of["low"]) / 2  # the measured mixture is one of many
            assert of["low"] <= of["expected"] <= of["high"]
            assert of["low"] - room <= of["measured"] <= of["high"] + room
    assert np.all(np.diff([row["overlap"]["expected"] for row in rows]) > 0)
    assert np.all(np.diff([row["overlap"]["measured"] for row in rows]) > 0)


def test_what_is_expected_of_mixtures_is_the_mean_of_all():
    run = evidence()
    items = (
        [frozenset({0, 1}), frozenset({1, 2}), frozenset({1})],
        [frozenset({2, 3}), frozenset({4}), frozenset({1, 4})],
    )
    a, b = (fired_by(part) for part in items)
    held_out = np.isin(np.arange(8), [1, 2])
    run.MIXED = 3
    drawn = [
        run.measures([a.take(np.array(x)).counts, b.take(np.array(y)).counts], held_out)
        for x in combinations(range(3), 2)
        for y in combinations(range(3), 1)
    ]
    features, redundant, overlap = (np.array(each) for each in zip(*drawn, strict=True))
    expected = run.expectation(a, 2, b, 1, held_out)
    # Of ratios the expectations are taken first.
    assert expected[0] == pytest.approx(features.mean())
    assert expected[1] == pytest.approx((redundant * features**2).mean() / features.mean() ** 2)
    assert expected[2] == pytest.approx((overlap * features).mean() / features.mean())
