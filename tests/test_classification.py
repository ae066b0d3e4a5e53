"""Rules of features: against counting by hand, scikit-learn's own scores and checks, and what is left after a kill."""

import importlib.util
import json
import os
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from index_maker import write_index
from scipy import sparse
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from qwen_scope import QwenScopeError, Scope, Suite
from qwen_scope.cli import main
from qwen_scope.data.classification import (
    Evaluation,
    FeatureEncoder,
    OrRule,
    Rule,
    Sets,
    SparseRule,
    apply,
    cross,
    described,
    evaluate,
    fit_rule,
)
from qwen_scope.data.classification.baselines import BASELINES, Seen
from qwen_scope.data.classification.peaks import peaks
from qwen_scope.data.classification.rules import rate_differences
from qwen_scope.data.classification.scores import length_weights, scores
from qwen_scope.data.classification.splitting import check_apart, classes, held_back
from qwen_scope.data.items import Items
from qwen_scope.stopping import Stopped

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "scripts" / "classification_evidence"
KINDS = ["sparse", "or", "or-layers"]
PLACES = ["the capital of France", "Paris is the capital", "the capital of Italy is Rome", "France and Italy"]
CODE = ["x = 1  # a", "def f(x): return 2 * x", "print(y[0])", "for i in range(10): j += i"]


def labelled(positive: list[str], negative: list[str], name: str = "set") -> Items:
    texts = [*positive, *negative]
    labels = ["place"] * len(positive) + ["code"] * len(negative)
    return Items(list(texts), labels, [f"line {n} of {name}" for n in range(1, len(texts) + 1)])


def many(texts: list[str], count: int, start: int = 0) -> list[str]:
    """So many texts, all different."""
    return [f"{texts[n % len(texts)]} {n}" for n in range(start, start + count)]


TRAIN = labelled(many(PLACES, 16), many(CODE, 16), "train")
TEST = labelled(many(PLACES, 8, 100), many(CODE, 12, 100), "test")


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer, layers=[1, 2])


def maxima(scope: Scope, texts: list[str], layer: int) -> np.ndarray:
    """The highest value of each feature in each text, at all positions but the first."""
    return np.stack(
        [found[layer][1:].to_dense().clamp_min(0).max(0).values.numpy() for found in scope.features(list(texts))]
    )


# Estimators


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([OrRule(2), SparseRule(3, folds=2)])
def test_estimators_pass_scikit_learns_own_checks(estimator, check):
    check(estimator)


def noise(texts: int = 120, features: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features that say nothing of the class."""
    chance = np.random.default_rng(seed)
    X = chance.random((texts, features)) * (chance.random((texts, features)) < 0.3)
    return X, np.arange(texts) % 2


def test_rate_differences_are_what_counting_gives():
    X, y = noise()
    found = rate_differences(sparse.csr_matrix(X), y, eps=0.2)
    for feature in range(X.shape[1]):
        fires = [sum(X[row, feature] > 0.2 for row in range(len(y)) if y[row] == which) for which in (1, 0)]
        assert found[feature] == pytest.approx(fires[0] / sum(y) - fires[1] / (len(y) - sum(y)))


def test_the_or_rule_is_the_reports():
    X, y = noise()
    delta = rate_differences(sparse.csr_matrix(X), y)
    for k in (1, 2, 5):
        rule = OrRule(k).fit(X, np.where(y == 1, "yes", "no"))
        best = sorted(range(X.shape[1]), key=lambda feature: (-delta[feature], feature))[:k]
        assert rule.features_.tolist() == best
        assert rule.differences_ == pytest.approx(delta[best])
        expected = ["yes" if any(X[row, feature] > 0 for feature in best) else "no" for row in range(len(X))]
        assert rule.predict(X).tolist() == expected
        assert (rule.predict(sparse.csr_matrix(X)) == rule.predict(X)).all()


def test_over_layers_the_best_feature_of_each_of_the_best_layers_is_taken():
    X, y = noise()
    widths = [10, 25, 5]
    delta = rate_differences(sparse.csr_matrix(X), y)
    best = [int(delta[:10].argmax()), 10 + int(delta[10:35].argmax()), 35 + int(delta[35:].argmax())]
    best.sort(key=lambda feature: -delta[feature])
    assert OrRule(3, widths=widths).fit(X, y).features_.tolist() == best
    assert OrRule(2, widths=widths).fit(X, y).features_.tolist() == best[:2]
    with pytest.raises(QwenScopeError, match="sum to the 40 columns"):
        OrRule(2, widths=[3]).fit(X, y)


def test_planted_features_are_found():
    X, y = noise(200)
    chance = np.random.default_rng(1)
    planted = {3: 1, 17: 1, 30: 0}  # two fire in positive texts, one in negative ones
    for feature, which in planted.items():
        X[:, feature] = (y == which) * (chance.random(200) < 0.75) * (0.5 + chance.random(200))
    rule = SparseRule(10).fit(X, y)
    assert set(planted) <= set(rule.features_.tolist())
    weights = dict(zip(rule.features_.tolist(), rule.weights_, strict=True))
    assert weights[3] > 0
    assert weights[17] > 0
    assert weights[30] < 0
    assert f1_score(y, rule.predict(X)) > 0.9
    assert OrRule(2).fit(X, y).features_.tolist() in ([3, 17], [17, 3])


def test_of_rules_that_do_the_same_the_sparse_one_has_the_fewest_features():
    X, y = noise(200)
    X[:, 5] = y
    assert SparseRule(20).fit(X, y).features_.tolist() == [5]


def test_the_sparse_rule_is_a_weighted_vote():
    X, y = noise()
    rule = SparseRule(5).fit(X, y)
    assert len(rule.features_) <= 5
    assert rule.scales_ == pytest.approx(X[:, rule.features_].max(0))
    for row in range(10):
        vote = sum(
            weight * min(X[row, feature] / scale, 1) ** 0.5
            for feature, weight, scale in zip(rule.features_, rule.weights_, rule.scales_, strict=True)
        )
        assert rule.decision_function(X[row : row + 1])[0] == pytest.approx(vote + rule.intercept_ - rule.threshold_)
    probabilities = rule.predict_proba(X)
    assert probabilities.sum(1) == pytest.approx(1)
    assert ((probabilities[:, 1] > 0.5) == (rule.predict(X) == 1)).all()


# Scores


def test_scores_are_scikit_learns():
    chance = np.random.default_rng(0)
    truth = (chance.random(90) < 0.4).astype(int)
    scored = truth + chance.normal(size=90) - 0.5
    lengths = chance.integers(5, 50, 90)
    found, called = scores(truth, scored, lengths, resamples=200, seed=3), scored > 0
    assert found.f1 == pytest.approx(f1_score(truth, called))
    assert found.precision == pytest.approx(precision_score(truth, called))
    assert found.recall == pytest.approx(recall_score(truth, called))
    assert found.accuracy == pytest.approx(accuracy_score(truth, called))
    assert found.auc == pytest.approx(roc_auc_score(truth, scored))
    assert found.average_precision == pytest.approx(average_precision_score(truth, scored))
    weights = length_weights(truth, lengths)
    assert found.f1_length_matched == pytest.approx(f1_score(truth, called, sample_weight=weights))
    assert found.auc_length_matched == pytest.approx(roc_auc_score(truth, scored, sample_weight=weights))
    chance = np.random.default_rng(3)
    rows = [chance.integers(90, size=90) for _ in range(200)]
    low, high = np.quantile([f1_score(truth[row], called[row], zero_division=0) for row in rows], [0.025, 0.975])
    assert (found.f1_low, found.f1_high) == (pytest.approx(low), pytest.approx(high))
    assert found == scores(truth, scored, lengths, resamples=200, seed=3)


def test_lengths_are_matched_bin_by_bin():
    # Of four short texts one is positive, of four long ones three are; nothing is of middle length.
    truth = np.array([1, 0, 0, 0, 1, 1, 1, 0])
    lengths = np.array([5, 5, 5, 5, 90, 90, 90, 90])
    assert length_weights(truth, lengths) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1])


def test_what_length_alone_tells_is_nothing_when_lengths_are_matched():
    chance = np.random.default_rng(0)
    truth = (chance.random(400) < 0.5).astype(int)
    lengths = chance.integers(5, 40, 400) + 15 * truth
    found = scores(truth, lengths - 30.0, lengths)
    assert found.auc > 0.8
    assert found.auc_length_matched == pytest.approx(0.5, abs=0.12)
    apart = scores(truth, truth - 0.5, 10 + 100 * truth)
    assert (apart.f1, apart.f1_length_matched, apart.auc_length_matched) == (1, None, None)


# Sets


def test_one_class_only_and_no_labels_are_refused():
    with pytest.raises(
        QwenScopeError, match=r"expected at least 1 of the test texts with the label 'place'.* found 4 and 0"
    ):
        classes("test", labelled(PLACES, []), "place")
    with pytest.raises(QwenScopeError, match=r"found 0 and 8 .labels 'code', 'place'"):
        classes("discovery", labelled(PLACES, CODE), "toxic")
    with pytest.raises(QwenScopeError, match="expected labels of the discovery texts"):
        classes("discovery", replace(TRAIN, labels=None), "place")
    assert classes("test", labelled(["a"], ["b", "c"]), "place").tolist() == [1, 0, 0]


def test_texts_in_both_sets_are_refused_unless_allowed(scope):
    test = labelled(["the  CAPITAL of France 0", *many(PLACES, 6, 50)], many(CODE, 6, 50), "test")
    with pytest.raises(QwenScopeError, match="found 1 that are, such as line 1 of test, which is line 1 of train"):
        check_apart(TRAIN, test)
    for learn in (fit_rule, evaluate):
        arguments = {"test": test} if learn is fit_rule else {}
        positional = (TRAIN,) if learn is fit_rule else (TRAIN, test)
        with pytest.raises(QwenScopeError, match="or allow duplicates"):
            learn(scope, *positional, positive="place", **arguments)
    assert fit_rule(scope, TRAIN, "place", kind="or", test=test, allow_duplicates=True).tested_on["place"] == 7


def test_what_is_kept_back_is_a_share_of_each_label_and_never_a_text_that_stays():
    items = labelled([*many(PLACES, 20), *["the same"] * 5], many(CODE, 40))
    train, test = held_back(items, 0.25, seed=1)
    check_apart(train, test)
    assert sorted(train.texts + test.texts) == sorted(items.texts)
    assert 4 <= test.labels.count("place") <= 10
    assert test.labels.count("code") == 10
    assert held_back(items, 0.25, seed=1)[1].texts == test.texts != held_back(items, 0.25, seed=2)[1].texts


# What texts fire


def test_peaks_are_the_highest_values_and_where_they_are(scope):
    features = [(2, 7), (1, 3), (2, 100), (1, 64), (1, 4)]
    texts = [*PLACES, *CODE]
    found = peaks(scope, texts, features)
    assert [len(ids) for ids in found.ids] == [len(each) for each in scope.features(texts)]
    for at, (layer, number) in enumerate(features):
        assert found.values[:, at] == pytest.approx(maxima(scope, texts, layer)[:, number], rel=1e-4)
        for row, text in enumerate(scope.features(texts)):
            values = text[layer].activation(number).clamp_min(0)
            values[0] = 0
            expected = int(values.argmax()) if values.any() else -1
            assert found.tokens[row, at] == expected
    assert (found.tokens >= 0).any(0).sum() >= 3  # or this would say little


def test_a_text_beyond_the_context_is_read_in_pieces(scope):
    context = scope.backbone.context_length
    (ids,) = peaks(scope, [" ".join(CODE * 20)], [(1, 3)]).ids
    assert len(ids) > context
    feature = [(1, number) for number in range(128)]
    found = peaks(scope, [" ".join(CODE * 20)], feature)
    parts = scope.features([ids[start : start + context] for start in range(0, len(ids), context)])
    dense = [part[1][1:].to_dense().clamp_min(0).max(0).values.numpy() for part in parts]
    assert found.values[0] == pytest.approx(np.max(dense, 0), rel=1e-4)
    assert found.tokens.max() > context


def test_a_feature_that_is_not_there_is_a_sentence(scope, llama, suite):
    with pytest.raises(QwenScopeError, match="expected a feature from 1/0 to 1/127, found 1/128"):
        peaks(scope, ["a text"], [(1, 128)])
    with pytest.raises(QwenScopeError, match="expected a Scope with a tokenizer"):
        peaks(Scope(llama, suite), ["a text"], [(1, 1)])


def test_the_encoder_gives_the_highest_values_and_works_in_pipelines(scope):
    texts, y = TRAIN.texts, [label == "place" for label in TRAIN.labels]
    encoder = FeatureEncoder(scope, layers=[2, 1])
    X = encoder.fit_transform(texts)
    assert X.toarray() == pytest.approx(np.hstack([maxima(scope, texts, layer) for layer in (2, 1)]), rel=1e-4)
    names = encoder.get_feature_names_out()
    assert (names[0], names[127], names[128], len(names)) == ("2/0", "2/127", "1/0", 256)
    assert FeatureEncoder(scope).get_feature_names_out()[0] == "1/0"
    pipeline = make_pipeline(FeatureEncoder(scope), OrRule(2)).fit(texts, y)
    assert (pipeline.predict(texts) == y).mean() > 0.8
    assert cross_val_score(pipeline, texts, y, cv=2).min() > 0.6


# Rules


@pytest.fixture(scope="module")
def rules(scope) -> dict[str, Rule]:
    return {kind: fit_rule(scope, TRAIN, "place", kind=kind, most=4, test=TEST) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_decides_as_the_estimator_it_is_made_of(scope, rules, kind):
    rule, y = rules[kind], classes("train", TRAIN, "place")
    if kind == "or":
        layers = [max(scope.layers, key=lambda layer: rate_differences(csr(scope, TRAIN, [layer]), y).max())]
    else:
        layers = scope.layers
    model = {
        "or": OrRule(4),
        "or-layers": OrRule(4, widths=[128, 128]),
        "sparse": SparseRule(4),
    }[kind].fit(csr(scope, TRAIN, layers), y)
    expected = model.decision_function(csr(scope, TEST, layers))
    found = rule.decide(scope, TEST.texts)
    assert [decision.score for decision in found] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [decision.positive for decision in found] == (expected > 0).tolist()
    assert set(rule.layers) <= set(layers)
    assert rule.scores["f1"] == pytest.approx(f1_score(classes("test", TEST, "place"), expected > 0))
    assert rule.learnt_from == {"code": 16, "place": 16}
    for term in rule.terms:
        layer, number = map(int, term.feature.split("/"))
        fires = maxima(scope, TRAIN.texts, layer)[:, number] > 0
        assert (term.positive_rate, term.negative_rate) == (fires[:16].mean(), fires[16:].mean())


def csr(scope: Scope, items: Items, layers: list[int]) -> sparse.csr_matrix:
    return FeatureEncoder(scope, layers).transform(items.texts)


@pytest.mark.parametrize("kind", KINDS)
def test_what_reasons_add_is_the_score(scope, rules, kind):
    rule = rules[kind]
    for text in [*PLACES, *CODE, "x"]:
        found = rule.explain(scope, text)
        assert found.decision.score == pytest.approx(found.rest + sum(reason.adds for reason in found.reasons))
        assert found.decision.fired == [reason.feature for reason in found.reasons]
        tokens = scope.features(text).tokens
        for reason in found.reasons:
            assert reason.token == tokens[reason.position]
            assert f"»{reason.token}«" in reason.around
            assert reason.around.replace("»", "").replace("«", "") in text
    assert rule.explain(scope, "x").reasons == []
    assert "no feature of the rule fires" in str(rule.explain(scope, "x"))
    assert "place: " in str(rule.explain(scope, PLACES[0]))


def test_a_saved_rule_is_the_same_rule(rules, tmp_path):
    for rule in rules.values():
        rule.save(tmp_path / "rule.json")
        loaded = Rule.load(tmp_path / "rule.json")
        assert loaded == rule
        assert loaded.digest == rule.digest
    assert len({rule.digest for rule in rules.values()}) > 1


DAMAGED = [
    ("[]", "found another file"),
    ('{"format": "qwen-scope rule 2"}', "found another file"),
    ("{", "found no JSON"),
    ("[" * 100_000, "found no JSON"),
    ({"terms": []}, "no features"),
    ({"terms": "15/3"}, "whole rule"),
    ({"terms": None}, "whole rule"),
    ({"kind": "and"}, "the kind 'and'"),
    ({"threshold": None}, "a number missing"),
    ({"intercept": float("nan")}, "a number missing"),
    ({"more": 1}, "an unknown more"),
    ({"fingerprints": {}}, "other fingerprints"),
    ({"positive": 3}, "a text missing"),
    ({"learnt_from": {"a": "b"}}, "a count of texts"),
    ({"scores": {"f1": "high"}}, "a score that is no number"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=[str(n) for n in range(len(DAMAGED))])
@pytest.mark.usefixtures("unchecked")
def test_a_damaged_rule_is_a_sentence(rules, tmp_path, change, message):
    path = tmp_path / "rule.json"
    rules["or"].save(path)
    content = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(content)
    with pytest.raises(QwenScopeError, match=message):
        Rule.load(path)


@pytest.mark.usefixtures("unchecked")
def test_a_damaged_term_is_a_sentence(rules, tmp_path):
    path = tmp_path / "rule.json"
    rules["or"].save(path)
    whole = json.loads(path.read_text())
    for change in ({"feature": "x"}, {"scale": 0}, {"weight": "1"}, {"more": 1}, {"examples": [1]}):
        path.write_text(json.dumps(whole | {"terms": [whole["terms"][0] | change, *whole["terms"][1:]]}))
        with pytest.raises(QwenScopeError, match="expected a whole rule"):
            Rule.load(path)
    path.write_text(json.dumps(whole | {"terms": [whole["terms"][0]] * 2}))
    with pytest.raises(QwenScopeError, match="one twice"):
        Rule.load(path)
    with pytest.raises(QwenScopeError, match="found none"):
        Rule.load(tmp_path / "nothing.json")


def test_a_rule_of_other_saes_is_refused(scope, rules, llama, tokenizer, make_sae):
    others = Scope(llama, Suite.of({1: make_sae(seed=8), 2: make_sae(seed=9)}, name="others"), tokenizer)
    less = Scope(llama, Suite.of({0: make_sae(seed=0)}, name="less"), tokenizer)
    for other in (others, less):
        for use in (lambda s: rules["sparse"].decide(s, ["a text"]), lambda s: rules["sparse"].explain(s, "a text")):
            with pytest.raises(QwenScopeError, match="which the rule was learnt with"):
                use(other)


def test_an_index_says_what_a_rules_features_are_about(rules, tmp_path):
    index = write_index(tmp_path / "index", {1: 128})
    index.label("1/3", "courts of law")
    rule = rules["sparse"]
    terms = [replace(rule.terms[0], feature=name) for name in ("1/3", "1/0", "1/9", "2/1")]
    found = described(replace(rule, terms=terms), index)
    assert [term.label for term in found.terms] == ["courts of law", None, None, None]
    assert found.terms[0].examples[0] == "the »court« held that the contract was void"
    assert found.terms[1].examples[0] == "the match ended after a late »goal« by the home team"
    assert found.terms[2].examples == found.terms[3].examples == []
    assert "courts of law" in str(found)
    with pytest.raises(QwenScopeError, match="expected an index of another suite"):
        described(replace(rule, suite="another suite"), index)


# Comparisons


@pytest.fixture
def one_draw(monkeypatch) -> None:
    module = sys.modules["qwen_scope.data.classification.evaluate"]
    monkeypatch.setattr(module, "DRAWS", 1)
    monkeypatch.setattr(module, "FRACTIONS", (1.0,))


@pytest.mark.usefixtures("one_draw")
def test_an_evaluation_has_every_method_and_counts_as_one_would(scope, tmp_path):
    found = evaluate(scope, TRAIN, TEST, "place", most=4)
    names = [outcome.method for outcome in found.outcomes]
    assert names[: len(BASELINES)] == list(BASELINES)
    assert names[len(BASELINES) :] == [
        *(f"OR of {k}" for k in (1, 2, 5, 10)),
        "sparse rule of up to 4",
        "OR of the best of 2 layers",
        "sparse rule of up to 4, 2 layers",
    ]
    by_name = {outcome.method: outcome for outcome in found.outcomes}
    assert by_name["bag of words"].layers == []
    assert by_name["OR of 2"].layers == [found.layer]
    assert by_name["OR of the best of 2 layers"].layers == [1, 2]
    truth = classes("test", TEST, "place")
    largest = {
        layer: rate_differences(csr(scope, TRAIN, [layer]), classes("train", TRAIN, "place")).max() for layer in (1, 2)
    }
    assert found.largest_difference == pytest.approx(largest)
    assert found.layer == max(largest, key=lambda layer: largest[layer])
    for k, value in found.f1_by_k.items():
        rule = OrRule(k).fit(csr(scope, TRAIN, [found.layer]), TRAIN.labels)
        assert value == pytest.approx(f1_score(truth, rule.decision_function(csr(scope, TEST, [found.layer])) > 0))
    assert found.f1_by_k[5] == by_name["OR of 5"].scores.f1
    assert [of[1.0] for of in found.f1_by_fraction.values()] == [by_name[n].scores.f1 for n in found.f1_by_fraction]
    assert by_name["bag of words"].scores.f1 == 1
    found.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["outcomes"][0]["method"] == "length alone"
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "sparse rule of up to 4, 2 layers" in str(found)


@pytest.mark.usefixtures("one_draw")
def test_a_saved_evaluation_is_the_same_one_and_another_file_is_a_sentence(scope, tmp_path):
    found = evaluate(scope, TRAIN, TEST, "place", most=4)
    found.save(tmp_path)
    path = tmp_path / "evaluation.json"
    assert Evaluation.load(path) == found
    content = json.loads(path.read_text())
    outcome = content["outcomes"][0]
    for damaged in (
        [],
        {**content, "outcomes": []},
        {**content, "layer": None},
        {**content, "outcomes": [{**outcome, "scores": {**outcome["scores"], "f1": None}}]},
        {**content, "outcomes": [{**outcome, "scores": {"f1": 1.0}}]},
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(QwenScopeError, match=r"another file or a damaged one .*make it again"):
            Evaluation.load(path)
    path.write_text("{")
    with pytest.raises(QwenScopeError, match="no JSON"):
        Evaluation.load(path)
    with pytest.raises(QwenScopeError, match="found none"):
        Evaluation.load(tmp_path / "nowhere.json")


def test_a_comparison_needs_four_texts_of_each_class(scope):
    with pytest.raises(QwenScopeError, match=r"at least 4 of the discovery texts.* found 3 and 8"):
        evaluate(scope, labelled(many(PLACES, 3), many(CODE, 8)), TEST, "place")


def test_every_baseline_learns_a_class_that_is_in_all_it_may_see():
    chance = np.random.default_rng(0)
    y = np.arange(80) % 2
    words = ["good morning to you" if each else "the bad evening ends" for each in y]
    features = sparse.csr_matrix(np.where(np.arange(30) == 4, y[:, None], chance.random((80, 30)) < 0.2))
    seen = Seen(
        words, 10 + 30 * y + chance.integers(5, size=80), features, chance.normal(size=(80, 6)) + 3 * y[:, None]
    )
    for name, method in BASELINES.items():
        scored = method(seen.take(np.arange(40)), y[:40], seen.take(np.arange(40, 80)))
        assert ((scored > 0) == (y[40:] == 1)).mean() > 0.9, name


def test_words_are_found_where_no_spaces_are_and_none_at_all_say_nothing():
    chance = np.random.default_rng(0)
    y = np.arange(240) % 2
    words = ["".join(chance.permutation(list("天地人你我他" + ("好善" if each else "坏恶")))) for each in y]
    seen = Seen(words, np.arange(240) + 3, sparse.csr_matrix((240, 4)), np.zeros((240, 2)))
    first, second = seen.take(np.arange(120)), seen.take(np.arange(120, 240))
    assert ((BASELINES["bag of words"](first, y[:120], second) > 0) == y[120:]).all()
    assert not BASELINES["L1 logistic, all features"](first, y[:120], second).any()
    silent = Seen(["+ -"] * 120, first.lengths, first.features, first.residual)
    assert not BASELINES["bag of words"](silent, y[:120], silent).any()


@pytest.mark.usefixtures("one_draw")
def test_labels_are_plain_text_in_plots_and_terminals(scope, tmp_path):
    label = "$\\x_{\x1b[31m"
    train, test = (
        replace(items, labels=[label if each == "place" else each for each in items.labels]) for items in (TRAIN, TEST)
    )
    found = evaluate(scope, train, test, label, most=2)
    assert found.save(tmp_path).read_bytes().startswith(b"\x89PNG")
    rule = fit_rule(scope, train, label, kind="or", most=2)
    assert "\x1b" not in str(found) + str(rule)


def test_a_text_beyond_the_context_is_named_where_it_cannot_be_learnt_from(scope):
    items = labelled([*many(PLACES, 4), "the capital " * 200], many(CODE, 5), "train")
    with pytest.raises(QwenScopeError, match="the model's context, in line 5 of train, found"):
        fit_rule(scope, items, "place")


@pytest.mark.parametrize("kind", KINDS)
def test_rules_of_no_features_are_refused(scope, kind):
    with pytest.raises(QwenScopeError, match="of at least 1 feature, found 0"):
        fit_rule(scope, TRAIN, "place", kind=kind, most=0)


def test_a_crossing_is_what_each_rule_does_in_each_set(scope):
    first = Sets.read(scope, TRAIN, TEST)
    second = Sets.read(
        scope, labelled(many(CODE, 12), many(PLACES, 12)), labelled(many(CODE, 5, 50), many(PLACES, 5, 50))
    )
    found = cross({"one": first, "other": second}, "place", k=3)
    rules = [OrRule(3).fit(csr(scope, of.train, [found.layer]), of.train.labels) for of in (first, second)]
    for row, rule in enumerate(rules):
        for column, of in enumerate((first, second)):
            scored = rule.decision_function(csr(scope, of.test, [found.layer]))
            assert found.f1[row][column] == pytest.approx(f1_score(classes("test", of.test, "place"), scored > 0))
    a, b = (set(rule.features_) for rule in rules)
    assert found.jaccard == [[1, len(a & b) / len(a | b)], [len(a & b) / len(a | b), 1]]
    assert "Jaccard" in str(found)
    assert cross({"one": first}, "place", layer=1).layer == 1
    with pytest.raises(QwenScopeError, match="read at layer 7"):
        cross({"one": first}, "place", layer=7)


# Applying


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Texts and a chat, one that the model's template does not take, a blank one, a line that is no JSON."""
    rows = [{"text": text} for text in many([*PLACES, *CODE], 9)]
    rows += [{"text": " "}, {"text": "the capital\u2028of\nFrance"}]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), "{", json.dumps({"text": "the last one"})]) + "\n")
    return path


@pytest.fixture
def few_at_once(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["qwen_scope.data.classification.apply"], "AT_ONCE", 4)


@pytest.mark.usefixtures("few_at_once")
def test_applying_decides_every_text(scope, rules, corpus, tmp_path):
    rule, out = rules["sparse"], tmp_path / "new" / "out.jsonl"
    done = apply(rule, scope, corpus, out)
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    texts = [*many([*PLACES, *CODE], 9), "the capital\u2028of\nFrance", "the last one"]
    assert [row["text"] for row in rows] == texts
    expected = rule.decide(scope, texts)
    assert [row["positive"] for row in rows] == [decision.positive for decision in expected]
    assert [row["score"] for row in rows] == pytest.approx([decision.score for decision in expected], abs=1e-4)
    assert [row["fired"] for row in rows] == [decision.fired for decision in expected]
    assert rows[0]["place"] == f"line 1 of {corpus}"
    assert {row["rule"] for row in rows} == {rule.digest}
    assert (done.texts, done.positive, done.undecided) == (11, sum(d.positive for d in expected), 0)
    assert done.left_out == 1
    assert f"line 12 of {corpus}" in done.left_out_first[0]


@pytest.mark.usefixtures("few_at_once")
def test_a_run_killed_anywhere_goes_on_to_the_same_file(scope, rules, corpus, tmp_path):
    out = tmp_path / "out.jsonl"
    first = apply(rules["sparse"], scope, corpus, out)
    whole = out.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in [0, 1, *ends, *(end - 1 for end in ends), *(end + 5 for end in ends[:-1])]:
        out.write_bytes(whole[:cut])
        assert apply(rules["sparse"], scope, corpus, out) == first
        assert out.read_bytes() == whole, cut


@pytest.mark.usefixtures("few_at_once")
def test_two_runs_do_not_write_one_file(scope, rules, corpus, tmp_path):
    out = tmp_path / "out.jsonl"
    with filelock.FileLock(tmp_path / ".out.jsonl.lock"), pytest.raises(QwenScopeError, match="found another run"):
        apply(rules["sparse"], scope, corpus, out)
    apply(rules["sparse"], scope, corpus, out)
    assert not (tmp_path / ".out.jsonl.lock").exists()


@pytest.mark.usefixtures("few_at_once")
def test_rows_of_another_rule_or_corpus_are_kept_and_refused(scope, rules, corpus, tmp_path):
    out = tmp_path / "out.jsonl"
    apply(rules["sparse"], scope, corpus, out)
    whole = out.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "a text"}) + "\n")
    with pytest.raises(QwenScopeError, match="found another row where line 1 of"):
        apply(rules["or"], scope, corpus, out)
    with pytest.raises(QwenScopeError, match="found another row where line 1 of"):
        apply(rules["sparse"], scope, other, out)
    assert out.read_bytes() == whole
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[:3]))
    with pytest.raises(QwenScopeError, match="more rows than the corpus has texts"):
        apply(rules["sparse"], scope, corpus, out)
    assert out.read_bytes() == whole
    for others in ("not ours\n", "nor this", '{"place": "line 1 of another', '{"text": "a corpus of one line"}'):
        out.write_text(others)
        with pytest.raises(QwenScopeError, match="choose another file"):
            apply(rules["sparse"], scope, corpus, out)
        assert out.read_text() == others
    with pytest.raises(QwenScopeError, match="expected a file outside the corpus"):
        apply(rules["sparse"], scope, tmp_path, tmp_path / "more.jsonl")
    with pytest.raises(QwenScopeError, match="cannot be done"):
        apply(rules["sparse"], scope, corpus, tmp_path)


def test_a_chat_that_the_template_refuses_does_not_cost_the_others(scope, rules, tmp_path):
    chats = [[{"role": role, "content": "the capital of France"}] for role in ("user", "nobody", "user")]
    corpus, out = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    corpus.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    done = apply(rules["sparse"], scope, corpus, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"] for row in rows] == chats
    assert rows[1]["positive"] is None
    assert "expected chat messages that the model's template takes" in rows[1]["error"]
    assert rows[0]["score"] == rows[2]["score"]
    assert (done.texts, done.undecided) == (3, 1)
    assert apply(rules["sparse"], scope, corpus, out) == done


def test_messages_that_tell_their_time_are_written(scope, rules, tmp_path):
    said = datetime(2024, 5, 6, tzinfo=UTC)
    chats = [[{"role": "user", "content": text, "timestamp": said}] for text in PLACES]
    pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "chats.parquet")
    out = tmp_path / "out.jsonl"
    done = apply(rules["sparse"], scope, tmp_path / "chats.parquet", out)
    assert (done.texts, done.undecided) == (4, 0)
    assert json.loads(out.read_text().splitlines()[0])["messages"][0]["timestamp"] == str(said)


@pytest.mark.usefixtures("few_at_once")
def test_ctrl_c_keeps_what_is_written(scope, rules, corpus, tmp_path, monkeypatch):
    out, expected = tmp_path / "out.jsonl", tmp_path / "expected.jsonl"
    apply(rules["sparse"], scope, corpus, expected)
    chunks, decide = 0, Rule.decide

    def interrupted(self, *arguments, **options):
        nonlocal chunks
        chunks += 1
        if chunks == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return decide(self, *arguments, **options)

    monkeypatch.setattr(Rule, "decide", interrupted)
    with pytest.raises(Stopped, match="stopped after 4 texts"):
        apply(rules["sparse"], scope, corpus, out)
    assert out.read_bytes() == b"".join(expected.read_bytes().splitlines(keepends=True)[:4])
    apply(rules["sparse"], scope, corpus, out)
    assert out.read_bytes() == expected.read_bytes()


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, llama, tokenizer, suite) -> list[str]:
    """Options that name a tiny model and its SAEs in files."""
    folder = tmp_path_factory.mktemp("tiny")
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    suite.save_pretrained(folder / "suite")
    return ["--model", str(folder / "model"), "--suite", str(folder / "suite")]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, items in (("train", TRAIN), ("test", TEST)):
        rows = [{"text": text, "label": label} for text, label in zip(items.texts, items.labels, strict=True)]
        rows.append({"text": "no label here"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.usefixtures("one_draw")
def test_the_command_from_labelled_texts_to_a_sorted_corpus(capsys, tiny, files, tmp_path):
    rule, train, test = str(tmp_path / "rule.json"), str(files / "train.jsonl"), str(files / "test.jsonl")
    main(["classify", "fit", train, rule, "--positive", "place", "--test", test, "--most", "4", *tiny])
    printed = capsys.readouterr()
    assert "'place' rather than code" in printed.out
    assert "on 20 test texts: f1 " in printed.out
    assert "left out 1 rows" in printed.err
    assert "expected a value of label in line 33" in printed.err
    learnt = Rule.load(rule)
    assert learnt.scores["f1"] > 0.8

    main(["classify", "explain", rule, PLACES[0], CODE[0], "--json", *tiny])
    explained = json.loads(capsys.readouterr().out)
    assert [each["text"] for each in explained] == [PLACES[0], CODE[0]]
    assert explained[0]["decision"]["score"] == pytest.approx(
        explained[0]["rest"] + sum(reason["adds"] for reason in explained[0]["reasons"])
    )
    main(["classify", "explain", rule, PLACES[0], *tiny])
    assert "before any feature fires" in capsys.readouterr().out

    out = tmp_path / "out.jsonl"
    main(["classify", "apply", rule, test, str(out), *tiny])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    said = sum(row["positive"] for row in rows)
    assert f"{said} of 21 texts are 'place'" in capsys.readouterr().out
    main(["classify", "apply", rule, test, str(out), "--json", *tiny])
    assert json.loads(capsys.readouterr().out)["positive"] == said

    main(["classify", "evaluate", train, str(tmp_path / "compared"), "--positive", "place", "--most", "4", *tiny])
    assert "bag of words" in capsys.readouterr().out
    assert json.loads((tmp_path / "compared" / "evaluation.json").read_text())["test"] == {"code": 4, "place": 4}


def test_without_test_texts_some_are_kept_back(capsys, tiny, files, tmp_path):
    rule = tmp_path / "rule.json"
    main(["classify", "fit", str(files / "train.jsonl"), str(rule), "--positive", "place", "--json", *tiny])
    found = json.loads(capsys.readouterr().out)
    assert found["learnt_from"] == {"code": 12, "place": 12}
    assert found["tested_on"] == {"code": 4, "place": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "{train}", "{rule}", "--positive", "nowhere"], "found 0 and 24"),
        (["fit", "{train}", "{rule}", "--positive", "place", "--test", "{train}"], "or allow duplicates"),
        (["fit", "{train}", "{rule}", "--positive", "place", "--label", "kind"], "kind"),
        (["fit", "{train}", "{rule}", "--positive", "place", "--most", "0"], "expected --most of at least 1"),
        (["evaluate", "{train}", "{rule}", "--positive", "place", "--most", "0"], "expected --most of at least 1"),
        (["explain", "{train}", "a text"], "expected a rule"),
        (["explain", "{train}"], "expected a text to explain"),
        (["apply", "{rule}", "{train}", "out.jsonl"], "expected a rule"),
    ],
)
def test_what_cannot_be_is_one_sentence(capsys, tiny, files, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [each.format(train=files / "train.jsonl", rule=tmp_path / "rule.json") for each in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["classify", *given, *tiny])
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qwen-scope: ")
    assert message in error
    assert not (tmp_path / "rule.json").exists()


# The bundled model


SPORT = [
    "The striker scored twice in the second half.",
    "They won the match after extra time.",
    "She beat the champion in straight sets.",
    "The coach praised his team after the game.",
    "A late goal sent the club into the final.",
    "He ran the last lap faster than anyone.",
    "The goalkeeper saved two penalties.",
    "Rain delayed the start of the cricket test.",
]
COOKING = [
    "Boil the potatoes until they are soft.",
    "Add salt and a little butter to the sauce.",
    "Whisk the eggs with sugar and flour.",
    "Let the dough rest for an hour.",
    "Fry the onions slowly in olive oil.",
    "Serve the soup hot with fresh bread.",
    "Roast the chicken with garlic and lemon.",
    "Grate the cheese over the pasta.",
]


@pytest.mark.real
def test_on_the_bundled_model_sport_is_told_from_cooking(bundled):
    scope = Scope(bundled, Suite.from_pretrained(), layers=[15, 23])
    train = Items(SPORT + COOKING, ["sport"] * 8 + ["cooking"] * 8, [f"text {n}" for n in range(16)])
    rule = fit_rule(scope, train, "sport", kind="sparse", most=5)
    said = rule.decide(scope, ["The team lost the final match.", "Chop the carrots and fry them in a pan."])
    assert [decision.positive for decision in said] == [True, False]
    from qwen_scope.index import FeatureIndex

    told = described(rule, FeatureIndex.open())
    assert all(term.examples for term in told.terms)


# The evidence


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classification_evidence", EVIDENCE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_figures_say(script):
    page = ROOT / "docs" / "classification.md"
    assert script.with_tables(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8")


def test_the_figures_are_of_all_methods_on_texts_enough(script):
    found = json.loads((EVIDENCE / "results.json").read_text(encoding="utf-8"))
    assert len(found["tasks"]) >= 7
    for task in found["tasks"].values():
        assert {*BASELINES, "OR of 1", "OR of 5"} <= {outcome["method"] for outcome in task["outcomes"]}
        assert min(task["test"].values()) >= 25
        assert {"1", "2", "5", "32"} <= set(task["f1_by_k"])
