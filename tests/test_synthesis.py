"""Texts made for features that a set lacks: what they fire is read as anybody would read it, budgets hold to the token, and
nothing that was paid for is lost.

The endpoints are real servers on this machine.
"""

import importlib.util
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock
import pyarrow as pa
import pytest
import torch
import transformers
from conftest import DENSE, build, random_sae
from label_maker import WORDS, Reply, Server, completion, labelled_index, serving

from qwen_scope import QwenScopeError, Scope, Suite, TopKSAE
from qwen_scope.cli import main
from qwen_scope.data.synthesis import SynthesisConfig, synthesize
from qwen_scope.data.synthesis.alike import Seen, runs_of, words_of
from qwen_scope.data.synthesis.explain import Explanation
from qwen_scope.data.synthesis.kept import Kept, Key, Reading, Text
from qwen_scope.data.synthesis.prompts import question, read_relevance, read_text
from qwen_scope.data.synthesis.purse import Purse, Spent
from qwen_scope.data.synthesis.targets import candidates, judge, targets_of
from qwen_scope.data.synthesis.verify import reading
from qwen_scope.fingerprint import fingerprint
from qwen_scope.index.endpoint import Endpoint, EndpointError
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.layout import FEATURES, write_features
from qwen_scope.stopping import Stopped

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "scripts" / "synthesis_evidence"
WIDTH = 64
DEAF = 4
"""A feature that hears nothing but what is written along its own direction."""
QUICK = SynthesisConfig(max_new_tokens=12, attempts=2, examples=2, control=False)
REMOTE = replace(QUICK, method="endpoint", answer_tokens=20)


@pytest.fixture(scope="module")
def scope(tokenizer) -> Scope:
    model = build(transformers.LlamaConfig(**{**DENSE, "max_position_embeddings": 4096}))
    sae = random_sae(d_sae=WIDTH, activation="topk_relu")
    W_enc, W_dec, b_enc = sae.W_enc.clone(), sae.W_dec.clone(), sae.b_enc.clone()
    direction = torch.nn.functional.normalize(torch.arange(1.0, 33.0), dim=0)
    # The others hear nothing of it.
    W_enc -= (W_enc @ direction)[:, None] * direction
    W_enc[DEAF], W_dec[:, DEAF], b_enc[DEAF] = direction, direction, -60.0
    suite = Suite.of({1: TopKSAE(W_enc, W_dec, b_enc, sae.b_dec, 8, "topk_relu")}, name="tiny suite")
    return Scope(model, suite, tokenizer)


@pytest.fixture
def index(scope: Scope, tmp_path: Path) -> FeatureIndex:
    """Ten features fire in its corpus, at a word each."""
    folder = tmp_path / "index"
    labelled_index(folder, width=WIDTH, fingerprint=fingerprint(scope.suite, [1]))
    rows = FeatureIndex.open(folder).table(1).to_pylist()
    for row in rows:
        row["max"] = None if row["dead"] else 8.0
    write_features(folder, 1, pa.Table.from_pylist(rows, FEATURES))
    return FeatureIndex.open(folder)


def endpoint(server: Server, **options) -> Endpoint:
    return Endpoint(server.address, "a model", **{"retries": 0, "timeout": 10.0, "answer_tokens": 20, **options})


def fires(scope: Scope, text: str) -> set[int]:
    """Numbers of the features that a text fires at any token but the first, counted by hand."""
    found = scope.features(text, layers=1)[1]
    return set(found.indices[1:][found.values[1:] > 0].tolist())


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def texts_of(folder: Path) -> list[dict[str, Any]]:
    """The texts of a synthesis, in a fixed order."""
    found = (folder / "attempts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in found if line.startswith('{"row": "text"') and line.endswith("}")]
    return sorted(rows, key=lambda row: (row["arm"], row["feature"], row["attempt"], row["style"]))


def writer() -> Callable[[str], Reply]:
    """Writes a text about the word that a question is about, another one each time it is asked the same."""
    times: dict[str, int] = {}

    def answer(question: str) -> Reply:
        times[question] = times.get(question, 0) + 1
        words = re.findall(r"with '(\w+)'", question)
        word = words[-1] if words else "nothing"
        return completion(f"{word} {word[::-1]} {times[question]} of {word}")

    return answer


# What is alike


def test_words_are_compared_without_case_signs_and_forms():
    assert words_of("The CAT, sat!") == ("the", "cat", "sat") == words_of("the “cat” sat")
    assert words_of("ﬁne Ｔext") == ("fine", "text")
    assert words_of("天気です") == ("天", "気", "で", "す")
    assert words_of(" ## \n->") == ("##", "->")
    assert runs_of(words_of("a b c d"), 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert runs_of(words_of("a b"), 3) == {("a", "b")}
    assert runs_of((), 3) == set()


def test_duplicates_are_the_same_words_or_half_of_all_runs():
    seen = Seen(2, 0.5)
    seen.add("one two three four", "first")
    assert seen.like("One, two: three. Four!") == "first"
    # Runs: 3 and 3; two in common of four in all is half, one of five is not.
    assert seen.like("one two three five") == "first"
    assert seen.like("one two six seven") is None
    assert Seen(2, 0.51).like("anything") is None
    strict = Seen(2, 0.51)
    strict.add("one two three four", "first")
    assert strict.like("one two three five") is None


def test_a_whole_set_is_seen_as_its_texts_are():
    texts = [f"{a} {b} {c} {d}" for a in "abc" for b in "def" for c in "ghi" for d in "jkl"]
    one, whole = Seen(2, 0.5), Seen(2, 0.5)
    for number, text in enumerate(texts, 1):
        one.add(text, f"seed {number}")
    whole.add_all(texts, "seed")
    for text in [*texts, "a d g x", "x d g y", "a", "", "a d a d", "l k j i"]:
        assert one.like(text) == whole.like(text)
    assert whole.like("a d g x") == "seed 1"
    assert whole.like("x d g y") is None


def test_a_text_that_repeats_an_example_is_one_however_much_comes_besides():
    example = "the match ended after a late goal by the team"
    more = "and then some other words that nobody has ever seen before went on and on until the very end of it all"
    seen = Seen(3, 0.5)
    seen.add(example, "usual")
    assert seen.like(f"{example} {more}") is None
    seen = Seen(3, 0.5)
    seen.add(example, "shown", shown=True)
    assert seen.like(f"{example} {more}") == "shown"
    # An example of a few words is an idiom, that a text may well have.
    seen = Seen(3, 0.5)
    seen.add("a late goal by the", "short", shown=True)
    assert seen.like(f"a late goal by the way {more}") is None
    assert seen.like("A late goal by the!") == "short"


# What may be spent


def test_a_purse_never_spends_more_than_it_has():
    purse = Purse(tokens=100)
    assert purse.hold(Spent(30, 30))
    assert not purse.hold(Spent(30, 11))
    purse.settle(Spent(30, 30), Spent(30, 5))
    assert purse.spent == Spent(30, 5)
    assert purse.hold(Spent(35, 30))
    assert not purse.hold(Spent(0, 1))
    money = Purse(money=1.0, price_in=1e5, price_out=2e5)
    assert money.hold(Spent(4, 3))
    assert not money.hold(Spent(1, 0))
    money.settle(Spent(4, 3), Spent(4, 1))
    assert money.cost(money.spent) == pytest.approx(0.6)
    half = money.part(0.5)
    assert half.money == pytest.approx(0.2)
    assert half.hold(Spent(2, 0))
    assert not half.hold(Spent(1, 0))


# What is asked and read


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("A plain text.", "A plain text."),
        ("Here is a text:\n\nThe <<goal>> came late.", "The goal came late."),
        ('"Quoted."', "Quoted."),
        ('"One," she said, "and two."', '"One," she said, "and two."'),
        ("Dear all:", "Dear all:"),
        ("   ", ""),
    ],
)
def test_texts_are_read_out_of_answers(answer: str, text: str):
    assert read_text(answer) == text


def test_a_text_that_was_cut_ends_at_its_last_sentence():
    assert read_text("One. Two! And thr", cut=True) == "One. Two!"
    assert read_text("Version 1.5 of what", cut=True) == "Version 1.5 of what"
    assert read_text("今日は。明日", cut=True) == "今日は。"
    assert read_text("One. Two! And thr") == "One. Two! And thr"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7.0),
        ("8/10", 8.0),
        ("8 out of 10.", 8.0),
        ("Sports, so:\n**9.5**", 9.5),
        ("Relevance: 10", 10.0),
        ("**2**/10", 2.0),
        ("3 (out of 10)", 3.0),
        ("A 4 on a scale from 0 to 10.", 4.0),
        ("15/905 is about sports: 6 of 10", 6.0),
    ],
)
def test_relevance_is_the_last_number(answer: str, score: float):
    assert read_relevance(answer) == score


@pytest.mark.parametrize("answer", ["very", "11", "7\nor so", "-", "-3"])
def test_an_answer_without_a_relevance_is_none(answer: str):
    with pytest.raises(EndpointError, match="expected a number from 0 to 10"):
        read_relevance(answer)


def test_a_label_explains_a_feature_before_its_examples_do(index: FeatureIndex):
    by_examples = Explanation.of(index, (1, 0), 2)
    assert (by_examples.label, by_examples.by) == (None, "examples")
    asked = question(by_examples, QUICK)
    assert "with 'goal' in it" in asked
    assert asked.count("\n- ") == 2
    assert QUICK.kind in asked
    index.label("1/0", "late goals")
    labelled = Explanation.of(index, (1, 0), 2)
    assert (str(labelled), labelled.by) == ("late goals", "hand")
    assert "late goals" in question(labelled, QUICK)
    assert "- " not in question(labelled, QUICK)


def test_a_list_goes_on_where_its_last_number_is(index: FeatureIndex):
    asked = question(Explanation.of(index, (1, 0), 2), replace(QUICK, asking="list"))
    assert re.fullmatch(r"Texts:\n1\. [^\n]*goal[^\n]*\n2\. [^\n]*goal[^\n]*\n3\.", asked)


# Reading back


def test_a_text_is_read_alone(scope: Scope):
    text = "the capital of France is Paris"
    found = reading(scope, 1, text, 0, range(WIDTH))
    assert set(found.fires) == fires(scope, text)
    features = scope.features(text, layers=1)[1]
    own = max(found.fires)
    values = features.values[1:][features.indices[1:] == own]
    again = reading(scope, 1, text, own, [])
    assert again.value == pytest.approx(float(values.max()))
    assert again.fires == []
    assert reading(scope, 1, " \n", 0, range(WIDTH)) == Reading(0.0, [])
    assert reading(scope, 1, "word " * 5000, 0, range(WIDTH)) == Reading(0.0, [])


def test_steering_cannot_pass_for_firing(scope: Scope, index: FeatureIndex, tmp_path: Path):
    """While the model is steered the feature does fire; the text that it writes does not fire it."""
    with scope.steered(f"1/{DEAF}:240"):
        assert DEAF in fires(scope, "the capital of France is")
    config = replace(QUICK, method="steer", strength=30.0)
    report = synthesize(scope, index, [f"1/{DEAF}"], tmp_path / "out", config)
    assert [row["steering"] for row in texts_of(tmp_path / "out")] == [f"1/{DEAF}:240@generated"] * 2
    (target,) = report.targets
    assert (target.attempts, target.fired, target.kept, target.value, target.after) == (2, 0, 0, 0.0, False)
    assert (report.after, report.silent) == (0.0, 2)
    assert lines(tmp_path / "out", "data.jsonl") == []


# The whole


@pytest.mark.parametrize("config", [QUICK, replace(QUICK, method="steer"), replace(QUICK, asking="list")])
def test_every_text_that_is_kept_fires_its_target(
    scope: Scope, index: FeatureIndex, tmp_path: Path, config: SynthesisConfig
):
    names = [f"1/{n}" for n in range(6)]
    seeds = ["Rome", "Paris is the capital"]
    config = replace(config, control=True)
    report = synthesize(scope, index, names, tmp_path / "out", config, seeds=seeds)
    before = {n for text in seeds for n in fires(scope, text)} & set(range(6))
    assert 0 < len(before) < 6
    assert report.seeds.fires == sorted(before)
    assert report.before == len(before) / 6
    rows = lines(tmp_path / "out", "data.jsonl")
    covered = set(before)
    for row in rows:
        number = int(row["target"].removeprefix("1/"))
        assert number not in before
        assert number in fires(scope, row["text"])
        assert row["fires"] == [f"1/{n}" for n in sorted(fires(scope, row["text"]) & set(range(6)))]
        covered |= fires(scope, row["text"])
        assert row["value"] > 0
        assert row["share_of_maximum"] == pytest.approx(row["value"] / 8)
        assert (row["method"], row["model"], row["verified"]) == (config.method, "tiny", True)
        assert row["steering"] == (f"1/{number}:8@generated" if config.method == "steer" else "")
        assert WORDS[number] in row["prompt"]
        assert row["seed"] == row["attempt"]
    assert report.after == len(covered & set(range(6))) / 6
    assert [t.after for t in report.targets] == [n in covered for n in range(6)]
    # The control is about others, is read for the same targets, and takes as much.
    control = [row for row in texts_of(tmp_path / "out") if row["arm"] == "random"]
    assert control
    assert {row["feature"] for row in control} <= {f"1/{n}" for n in range(6, len(WORDS))}
    assert report.control is not None
    spent = report.control.tokens_read + report.control.tokens_written
    last = max(row["read"] + row["written"] for row in control)
    assert 0 <= spent - (report.aimed.tokens_read + report.aimed.tokens_written) < last
    by_chance = before | {n for row in control for n in fires(scope, row["text"] or "x")}
    assert report.after_control == len(by_chance & set(range(6))) / 6
    missing = set(range(6)) - before
    aimed = [row for row in texts_of(tmp_path / "out") if row["arm"] == "aimed"]
    by_any = before | {n for row in aimed for n in fires(scope, row["text"] or "x")}
    assert report.after_any == len(by_any & set(range(6))) / 6 >= report.after
    assert report.difference is not None
    assert report.difference.mean == pytest.approx((len(by_any & missing) - len(by_chance & missing)) / len(missing))
    hits = [len(fires(scope, row["text"] or "x") & missing) / len(missing) for row in control]
    assert report.control.rate == pytest.approx(sum(hits) / len(hits))
    assert report.aimed.rate == sum(t.fired for t in report.targets) / len(aimed)
    assert report == synthesize(scope, index, names, tmp_path / "out", config, seeds=seeds)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["coverage"]["after"] == report.after


def test_no_more_is_written_for_a_target_that_has_enough(scope: Scope, index: FeatureIndex, tmp_path: Path):
    config = replace(REMOTE, attempts=4, per_target=2)
    with serving(writer()) as server:
        report = synthesize(scope, index, ["1/0", f"1/{DEAF}"], tmp_path, config, endpoint=endpoint(server))
    plenty, deaf = report.targets
    assert (plenty.attempts, plenty.kept) == (2, 2)
    assert (deaf.attempts, deaf.kept) == (4, 0)


def test_duplicates_are_left_out(scope: Scope, index: FeatureIndex, tmp_path: Path):
    config = replace(REMOTE, attempts=3, per_target=3)
    with serving(lambda _: completion("the capital of Italy, which is Rome")) as server:
        report = synthesize(scope, index, ["1/0"], tmp_path / "one", config, endpoint=endpoint(server))
        assert (report.kept, report.duplicates, report.targets[0].fired) == (1, 2, 3)
        # Of one that the seed set has nothing is kept.
        seeds = ["Tokyo", "The capital of Italy which is ROME!"]
        target = next(n for n in fires(scope, "the capital of Italy, which is Rome") if n < len(WORDS) and n != DEAF)
        report = synthesize(scope, index, [f"1/{target}"], tmp_path / "two", config, endpoint=endpoint(server))
        assert report.kept == 1
        report = synthesize(
            scope, index, [f"1/{target}"], tmp_path / "three", config, seeds=seeds, endpoint=endpoint(server)
        )
        assert report.kept == 0


def test_an_example_that_was_shown_is_no_new_text(scope: Scope, index: FeatureIndex, tmp_path: Path):
    shown = Explanation.of(index, (1, 0), 2).plain[0]
    with serving(lambda _: completion(f"{shown}!")) as server:
        report = synthesize(scope, index, ["1/0"], tmp_path, REMOTE, endpoint=endpoint(server))
    assert report.kept == 0
    assert report.duplicates == report.targets[0].fired > 0


def test_texts_are_rewritten_and_answered(scope: Scope, index: FeatureIndex, tmp_path: Path):
    numbers = count(1)

    def answer(question: str) -> Reply:
        if question.startswith("Rewrite"):
            text = question.partition("Text: ")[2]
            return completion(text[::-1] if "in verse" in question else f"is it {text.upper().replace(' ', ' or ')}?")
        if question.startswith("Here"):
            return completion(f"some text number {next(numbers)} about nothing much")
        return completion("An answer.")

    config = replace(REMOTE, styles=("as a question", "in verse"), answers=True, attempts=1)
    with serving(answer) as server:
        report = synthesize(scope, index, ["1/0", "1/1"], tmp_path, config, endpoint=endpoint(server))
    rows = lines(tmp_path, "data.jsonl")
    assert {row["style"] for row in rows} == {"", "as a question", "in verse"}
    assert all(row["answer"] == "An answer." for row in rows)
    first = {row["target"]: row["text"] for row in rows if not row["style"]}
    for row in rows:
        assert int(row["target"][2:]) in fires(scope, row["text"])
        if row["style"]:
            assert f"Rewrite this text {row['style']}" in row["prompt"]
            assert row["prompt"].endswith(first[row["target"]])
    assert report.answers == report.kept == len(rows)
    # What is asked for an answer is the text alone.
    assert {row["text"] for row in rows} <= set(server.asked)


def test_the_loaded_model_answers_too(scope: Scope, index: FeatureIndex, tmp_path: Path):
    config = replace(QUICK, answers=True, answer_tokens=5, styles=("in verse",), tokens=100_000)
    report = synthesize(scope, index, ["1/0", "1/1"], tmp_path, config)
    assert report.answers == report.kept > 0
    assert all(row["written"] <= 5 for row in lines(tmp_path, "attempts.jsonl") if row.get("row") == "reply")


# Budgets


def test_two_runs_do_not_spend_one_budget(scope, index, tmp_path):
    with filelock.FileLock(tmp_path / "lock"), pytest.raises(QwenScopeError, match="found another run"):
        synthesize(scope, index, ["1/0"], tmp_path, QUICK)


def test_the_loaded_model_stops_before_the_budget(scope: Scope, index: FeatureIndex, tmp_path: Path):
    names = [f"1/{n}" for n in range(len(WORDS))]
    free = synthesize(scope, index, names, tmp_path / "free", QUICK)
    whole = free.aimed.tokens_read + free.aimed.tokens_written
    asked = [row["read"] + QUICK.max_new_tokens for row in texts_of(tmp_path / "free") if row["attempt"] == 0]
    budget = sum(asked[:3]) + asked[3] - 1
    config = replace(QUICK, tokens=budget)
    report = synthesize(scope, index, names, tmp_path / "bound", config)
    spent = report.aimed.tokens_read + report.aimed.tokens_written
    assert report.aimed.texts >= 3
    assert spent <= budget < whole
    assert report.ended == "the budget was spent"
    # Not one more would have been sure to fit.
    rest = [row for row in texts_of(tmp_path / "free") if row["attempt"] == 0][report.aimed.texts :]
    assert spent + rest[0]["read"] + QUICK.max_new_tokens > budget
    # Nothing more is written by the same call, and more money goes on from there.
    before = texts_of(tmp_path / "bound")
    assert synthesize(scope, index, names, tmp_path / "bound", config) == report
    assert texts_of(tmp_path / "bound") == before
    again = synthesize(scope, index, names, tmp_path / "bound", QUICK)
    assert again.targets == free.targets


def test_the_control_has_half_of_the_budget(scope: Scope, index: FeatureIndex, tmp_path: Path):
    config = replace(QUICK, control=True, tokens=4000, attempts=4, per_target=4)
    report = synthesize(scope, index, ["1/0", "1/1"], tmp_path, config)
    assert report.control is not None
    aimed, control = (s.tokens_read + s.tokens_written for s in (report.aimed, report.control))
    assert 0 < aimed <= 2000
    assert 0 < control <= 4000 - aimed


def test_the_control_takes_as_much_where_far_more_is_held_back(scope: Scope, index: FeatureIndex, tmp_path: Path):
    """A question takes 12 tokens, and some hundreds are held back for it."""
    with serving(writer()) as server:
        report = synthesize(
            scope, index, ["1/0", "1/1"], tmp_path / "a", replace(REMOTE, control=True), endpoint=endpoint(server)
        )
        assert report.control is not None
        assert report.control.texts == report.aimed.texts > 0
        assert report.difference is not None
    with serving(lambda question: completion("")) as server:
        report = synthesize(
            scope, index, ["1/0"], tmp_path / "c", replace(REMOTE, control=True), endpoint=endpoint(server)
        )
    assert report.control is not None
    assert (report.control.texts, report.difference) == (0, None)


def test_an_endpoint_is_asked_for_no_more_than_the_money_is_enough_for(
    scope: Scope, index: FeatureIndex, tmp_path: Path
):
    names = [f"1/{n}" for n in range(len(WORDS))]
    # An answer costs 12, and at most 20 and what its question may have: so the last that is asked leaves less than that.
    most = max(len(question(Explanation.of(index, (1, n), 2), REMOTE).encode()) + 64 + 20 for n in range(len(WORDS)))
    config = replace(REMOTE, price_in=1e6, price_out=1e6, budget=float(most + 4 * 12))
    with serving(writer()) as server:
        report = synthesize(scope, index, names, tmp_path, config, endpoint=endpoint(server, concurrency=1))
        assert report.cost == 12 * len(server.asked)
        assert len(server.asked) >= 5
        assert report.cost <= config.budget
        assert report.ended == "the budget was spent"
        asked = len(server.asked)
        assert synthesize(scope, index, names, tmp_path, config, endpoint=endpoint(server)) == report
        assert len(server.asked) == asked


def test_what_was_paid_for_nothing_is_paid_for(scope: Scope, index: FeatureIndex, tmp_path: Path):
    """Answers that are only thoughts cost money, also when the same command goes on."""
    config = replace(REMOTE, price_in=1e6, price_out=1e6, budget=2000.0)
    with serving(lambda _: completion("<think>hm", finish_reason="length")) as server:
        report = synthesize(scope, index, ["1/0", "1/1"], tmp_path, config, endpoint=endpoint(server))
        assert report.cost == 12 * len(server.asked) == 48
        assert set(report.failed) == {"1/0", "1/1"}
        again = synthesize(scope, index, ["1/0", "1/1"], tmp_path, config, endpoint=endpoint(server))
        assert again.cost == 12 * len(server.asked) == 96


# Going on


def test_an_endpoint_that_fails_midway_loses_nothing(scope: Scope, index: FeatureIndex, tmp_path: Path):
    names = [f"1/{n}" for n in range(len(WORDS))]
    config = replace(REMOTE, control=True)
    with serving(writer()) as server:
        whole = synthesize(scope, index, names, tmp_path / "whole", config, endpoint=endpoint(server, concurrency=1))
        asked = len(server.asked)
    answer, given = writer(), count(1)

    def leaves(question: str) -> Reply:
        return answer(question) if next(given) <= 5 else Reply(401, '{"error": {"message": "no"}}')

    out = tmp_path / "out"
    with (
        serving(leaves) as server,
        pytest.raises(EndpointError, match="what was written is kept, and the same command goes on"),
    ):
        synthesize(scope, index, names, out, config, endpoint=endpoint(server, concurrency=1))
    assert len(texts_of(out)) == 5
    # Those that fire are in the data already.
    assert 0 < len(lines(out, "data.jsonl")) <= 5
    with serving(answer) as server:
        report = synthesize(scope, index, names, out, config, endpoint=endpoint(server, concurrency=1))
        assert len(server.asked) == asked - 5
    assert report == whole
    assert texts_of(out) == texts_of(tmp_path / "whole")
    assert (out / "data.jsonl").read_text() == (tmp_path / "whole" / "data.jsonl").read_text()


def test_a_file_that_a_crash_cut_short_is_gone_on_with(scope: Scope, index: FeatureIndex, tmp_path: Path):
    names = [f"1/{n}" for n in range(4)]
    config = replace(QUICK, control=True)
    whole = synthesize(scope, index, names, tmp_path / "whole", config)
    kept = (tmp_path / "whole" / "attempts.jsonl").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    # In the middle of the third line of texts.
    end = [at.start() for at in re.finditer(rb'\n\{"row": "text"', kept)][2] + 40
    (out / "attempts.jsonl").write_bytes(kept[:end])
    assert synthesize(scope, index, names, out, config).targets == whole.targets
    without_numbers = [{k: v for k, v in row.items() if k != "value"} for row in lines(out, "data.jsonl")]
    expected = lines(tmp_path / "whole", "data.jsonl")
    assert without_numbers == [{k: v for k, v in row.items() if k != "value"} for row in expected]
    assert len(texts_of(out)) == len(texts_of(tmp_path / "whole"))


def test_ctrl_c_keeps_what_was_written(scope: Scope, index: FeatureIndex, tmp_path: Path):
    config = replace(REMOTE, attempts=1)
    numbers = count(1)

    def interrupts(question: str) -> Reply:
        if next(numbers) == 3:
            signal.raise_signal(signal.SIGINT)
        return writer()(question)

    names = [f"1/{n}" for n in range(len(WORDS))]
    with serving(interrupts) as server, pytest.raises(Stopped, match="the same command goes on"):
        synthesize(scope, index, names, tmp_path, config, endpoint=endpoint(server, concurrency=1))
    assert 3 <= len(texts_of(tmp_path)) < len(WORDS)
    assert (tmp_path / "report.json").exists()


def test_ctrl_c_is_heard_while_the_loaded_model_writes_all_that_is_left(
    scope: Scope, index: FeatureIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = sys.modules["qwen_scope.data.synthesis.writers"]
    generate = module.generate

    def interrupted(*given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return generate(*given, **options)

    monkeypatch.setattr(module, "generate", interrupted)
    for rows in (1, 2):
        with pytest.raises(Stopped, match="the same command goes on"):
            synthesize(scope, index, [f"1/{DEAF}"], tmp_path, QUICK)
        assert len(texts_of(tmp_path)) == rows
    assert synthesize(scope, index, [f"1/{DEAF}"], tmp_path, QUICK).aimed.texts == 2


def test_an_answer_that_cannot_be_kept_is_a_sentence(scope: Scope, index: FeatureIndex, tmp_path: Path):
    path = tmp_path / "out" / "attempts.jsonl"

    def answer(question: str) -> Reply:
        path.unlink()
        path.mkdir()
        return completion("a text")

    with serving(answer) as server, pytest.raises(QwenScopeError, match="found that it cannot be done"):
        synthesize(scope, index, ["1/0"], tmp_path / "out", REMOTE, endpoint=endpoint(server))


def test_an_answer_with_half_a_character_is_kept(scope: Scope, index: FeatureIndex, tmp_path: Path):
    with serving(lambda _: completion("the capital \ud83d of Italy")) as server:
        report = synthesize(scope, index, ["1/0"], tmp_path, REMOTE, endpoint=endpoint(server))
    assert report.aimed.texts > 0
    assert report.failed == {}
    assert texts_of(tmp_path)[0]["text"] == "the capital ? of Italy"


def test_rewrites_are_not_counted_as_texts_that_were_wanted(scope: Scope, index: FeatureIndex, tmp_path: Path):
    numbers = count(1)
    config = replace(REMOTE, attempts=1, per_target=2, styles=("in verse",))
    with serving(
        lambda _: completion(f"the capital {next(numbers)} of {next(numbers)} Italy {next(numbers)}")
    ) as server:
        target = next(n for n in fires(scope, "the capital of Italy") if n < len(WORDS) and n != DEAF)
        first = synthesize(scope, index, [f"1/{target}"], tmp_path, config, endpoint=endpoint(server))
        assert first.kept == 2
        more = replace(config, attempts=2)
        synthesize(scope, index, [f"1/{target}"], tmp_path, more, endpoint=endpoint(server))
    assert [row["attempt"] for row in texts_of(tmp_path) if not row["style"]] == [0, 1]


def test_rows_of_an_unknown_kind_are_passed_over(tmp_path: Path):
    kept = Kept(tmp_path / "a.jsonl", {"of": 1})
    key = Key("aimed", "1/0", 0)
    kept.add({key: Text("t", "p", "e", "hand", "", 3, 4, 5)})
    kept.lose(Spent(2, 1))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n{"row": "text", "arm": "aimed"}\n[]\nnonsense\n{"row": "later", "x": 1}')
    again = Kept(tmp_path / "a.jsonl", {"of": 1})
    assert again.texts == kept.texts
    assert again.lost == Spent(2, 1)
    assert again.spent("aimed") == Spent(4, 5)
    with pytest.raises(QwenScopeError, match="other of; choose another folder"):
        Kept(tmp_path / "a.jsonl", {"of": 2})


# Endpoints


def test_each_attempt_is_asked_with_its_own_seed(scope: Scope, index: FeatureIndex, tmp_path: Path):
    config = replace(REMOTE, attempts=3, seed=5, temperature=0.9)
    with serving(lambda _: completion("the same")) as server:
        asked = endpoint(server, temperature=0.9)
        synthesize(scope, index, [f"1/{DEAF}"], tmp_path, config, endpoint=asked)
    assert [body["seed"] for body in server.bodies] == [5, 6, 7]
    assert {body["temperature"] for body in server.bodies} == {0.9}


def test_an_endpoint_that_knows_no_seeds_is_asked_without():
    def picky(_: str) -> Reply:
        if "seed" in server.bodies[-1]:
            return Reply(400, '{"error": {"message": "Unsupported parameter: seed"}}')
        return completion("fine")

    with serving(picky) as server:
        asked = endpoint(server, concurrency=1, temperature=0.5)
        found: list[str] = []
        failed = asked.ask_all(
            [(n, ("hello",)) for n in range(3)], lambda _, answer: found.append(answer), total=3, seeds=lambda n: n
        )
    assert (failed, found) == ({}, ["fine"] * 3)
    assert ["seed" in body for body in server.bodies] == [True, False, False, False]
    assert all(body["temperature"] == 0.5 for body in server.bodies)


# The judge


def judging(question: str) -> Reply:
    """Finds the first three words relevant."""
    (word, *_) = re.findall(r"<<(\w+)>>", question)
    return completion("no idea" if word == WORDS[5] else f"{9 - WORDS.index(word)}/10")


def test_a_judge_chooses_the_targets(index: FeatureIndex, tmp_path: Path):
    names = candidates(index, 1, "anything", None)
    assert names == [(1, n) for n in range(len(WORDS))]
    path = tmp_path / "judged.jsonl"
    with serving(judging) as server:
        found = judge(index, names, "sport", endpoint(server), path, Purse())
        assert found.relevant(7.0) == [(1, 0), (1, 1), (1, 2)]
        assert found.relevant(6.5) == found.relevant(7.0)
        assert (found.unreadable, found.failed, found.spent.tokens) == (1, {}, 120)
        assert all("this topic: sport?" in asked for asked in server.asked)
        # Nothing is asked twice, and what it took counts again.
        again = judge(index, names, "sport", endpoint(server), path, Purse())
        assert again == found
        assert len(server.asked) == len(WORDS)
        with pytest.raises(QwenScopeError, match="found one with other topic"):
            judge(index, names, "law", endpoint(server), path, Purse())
    with pytest.raises(QwenScopeError, match="found 9 as the highest of 9"):
        found.relevant(9.5)


def test_a_judge_stays_within_the_budget(index: FeatureIndex, tmp_path: Path):
    names = [(1, n) for n in range(len(WORDS))]
    with (
        serving(judging) as server,
        pytest.raises(
            QwenScopeError, match=r"expected a judge to read 10 features within the budget, found .* reaches 0"
        ),
    ):
        judge(index, names, "sport", endpoint(server), tmp_path / "judged.jsonl", Purse(tokens=100))
    assert server.asked == []


def test_a_search_finds_what_to_judge(index: FeatureIndex):
    assert candidates(index, 1, "violin", 5)[0] == (1, WORDS.index("violin"))
    with pytest.raises(QwenScopeError, match="say it in other words"):
        candidates(index, 1, "zebra", 5)


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "magic"}, "expected method to be one of prompt, steer, endpoint"),
        ({"asking": "song"}, "expected asking to be one of"),
        ({"attempts": 0}, "expected attempts of at least 1"),
        ({"per_target": 0}, "expected per_target of at least 1"),
        ({"alike": 0.0}, "expected a share above 0"),
        ({"strength": -1.0}, "expected a strength above 0"),
        ({"strength": float("inf")}, "expected a strength above 0"),
        ({"kind": " "}, "expected a kind of text"),
        ({"styles": ("a", "a")}, "expected different styles"),
        ({"styles": ("a",), "asking": "list"}, "expected no styles and answers"),
        ({"asking": "list", "method": "endpoint"}, "expected to ask an endpoint in a chat"),
        ({"tokens": -1}, "expected tokens of 0 or more"),
        ({"budget": 1.0}, "expected both prices"),
        ({"price_in": 1.0}, "found no price_out"),
        ({"seed": -1}, "expected a seed from 0"),
        ({"temperature": -0.1}, "expected a temperature from 0"),
        ({"temperature": float("nan")}, "expected a temperature from 0"),
        ({"top_p": 0.0}, "expected top_p above 0"),
    ],
)
def test_options_that_cannot_be_are_a_sentence(unchecked, options: dict[str, Any], said: str):
    with pytest.raises(QwenScopeError, match=said):
        SynthesisConfig(**options)


def test_targets_that_cannot_be_are_a_sentence(scope: Scope, index: FeatureIndex, tmp_path: Path):
    with pytest.raises(QwenScopeError, match="expected features that texts are wanted for, found none"):
        targets_of(index, [])
    with pytest.raises(QwenScopeError, match="expected a feature of layers 1"):
        targets_of(index, ["2/0"])
    assert targets_of(index, ["1/3", (1, 3), "1/2"]) == [(1, 3), (1, 2)]
    with pytest.raises(QwenScopeError, match="expected a label or examples of 1/20"):
        synthesize(scope, index, ["1/20"], tmp_path / "a", QUICK)
    index.label("1/20", "something")
    assert synthesize(scope, index, ["1/20"], tmp_path / "a", QUICK).aimed.texts > 0
    with pytest.raises(QwenScopeError, match="1/20 never does"):
        synthesize(scope, index, ["1/20"], tmp_path / "b", replace(QUICK, method="steer"))


def test_what_does_not_go_together_is_a_sentence(scope: Scope, index: FeatureIndex, tmp_path: Path):
    with pytest.raises(QwenScopeError, match="expected an endpoint exactly if it is to write"):
        synthesize(scope, index, ["1/0"], tmp_path / "a", REMOTE)
    synthesize(scope, index, ["1/0"], tmp_path / "b", QUICK)
    with pytest.raises(QwenScopeError, match="found one with other targets"):
        synthesize(scope, index, ["1/1"], tmp_path / "b", QUICK)
    with pytest.raises(QwenScopeError, match="found one with other seed"):
        synthesize(scope, index, ["1/0"], tmp_path / "b", replace(QUICK, seed=1))
    other = labelled_index(tmp_path / "other", width=WIDTH)
    with pytest.raises(QwenScopeError, match="with other weights"):
        synthesize(scope, other, ["1/0"], tmp_path / "c", QUICK)


def test_seeds_that_cannot_be_used_are_counted(scope: Scope, index: FeatureIndex, tmp_path: Path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"text": "Rome"}\n{"text": " "}\nnonsense\n{"text": "Paris is the capital"}\n')
    report = synthesize(scope, index, ["1/0", "1/1"], tmp_path / "out", QUICK, seeds=seeds)
    assert (report.seeds.items, report.seeds.left_out) == (2, 2)
    assert set(report.seeds.fires) == (fires(scope, "Rome") | fires(scope, "Paris is the capital")) & {0, 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected --targets or --topic, found neither"),
        (["--targets", "15/1", "--topic", "x"], "found both"),
        (["--targets", "15/1", "--method", "endpoint"], "expected --endpoint exactly with --method endpoint"),
        (["--targets", "15/1", "--endpoint", "http://127.0.0.1:1/v1"], "expected --endpoint exactly"),
        (["--topic", "football"], "expected an endpoint that judges"),
        (["--topic", "football", "--judge-endpoint", "http://127.0.0.1:1/v1"], "expected a model with an endpoint"),
        (["--topic", "football", "--tau", "11"], "expected tau from 0 to 10"),
        (["--targets", "15/1", "7/1"], "expected features of one layer, found some of 7, 15"),
        (["--targets", "15/99999"], "expected a feature from 15/0"),
        (["--targets", "15/1", "--budget", "1"], "expected both prices"),
    ],
)
def test_the_command_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
):
    with pytest.raises((SystemExit, QwenScopeError)) as stopped:
        main(["synthesize", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err or str(stopped.value)
    assert said in " ".join(error.split())
    assert "Traceback" not in error


@pytest.mark.real
def test_the_command_on_the_bundled_model(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("It rained all day.\n")
    command = ["synthesize", str(tmp_path / "out"), "--targets", "15/1037", "--seed-set", str(seeds)]
    main([*command, "--max-new-tokens", "12", "--attempts", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["seeds"]["items"] == 1
    assert report["aimed"]["texts"] == 1
    aimed, control = (sum(report[arm][f"tokens_{how}"] for how in ("read", "written")) for arm in ("aimed", "control"))
    assert control >= aimed > 0
    main([*command, "--max-new-tokens", "12", "--attempts", "1"])
    out = capsys.readouterr().out
    assert out.startswith("1 targets, ")
    assert "coverage before" in out


@pytest.mark.real
def test_the_command_judges_and_asks_an_endpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def answer(question: str) -> Reply:
        return completion("9" if "this topic: football match?" in question else "The match ended with a late goal.")

    with serving(answer) as server:
        main(
            [
                *("synthesize", str(tmp_path / "out"), "--topic", "football match", "--candidates", "2"),
                *("--method", "endpoint", "--endpoint", server.address, "--model", "a model", "--attempts", "1"),
                *("--no-control", "--answers"),
            ]
        )
    out, error = capsys.readouterr()
    assert "2 of 2 features are relevant" in error
    assert out.startswith("2 targets, 2 of which no seed fires; 2 texts by a model (endpoint)")
    assert len(lines(tmp_path / "out", "judged.jsonl")) == 3


# The evidence


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthesis_evidence", EVIDENCE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthesis_evidence"] = module
    spec.loader.exec_module(module)
    return module


def test_the_document_says_what_the_results_say():
    page = ROOT / "docs" / "synthesis.md"
    assert "asked and steered" in script().table()
    assert script().with_table(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8")
