"""Labels asked of an endpoint: which examples, what is kept, how it is scored, and what happens when the endpoint fails.

The endpoints are real servers on this machine: one reads the marks and texts of its questions as a perfect model would, the
others misbehave on purpose, and the last one runs the bundled model.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_maker import EACH, WORDS, Reply, Server, completion, labelled_index, reader, serving

from qwen_scope.cli import main
from qwen_scope.errors import QwenScopeError
from qwen_scope.index.endpoint import GIVE_UP, Endpoint, EndpointError
from qwen_scope.index.feature import Label
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.label_config import LabelConfig
from qwen_scope.index.label_examples import Others, held_out, marked, plain, shown
from qwen_scope.index.labelling import PROMPT, features_to_label, label, make_plan, question, read_label
from qwen_scope.index.layout import FEATURES, PAIRS, write_features, write_table
from qwen_scope.index.scoring import balanced_accuracy, circle, mean, mixtures_of, read_answer, score

ROOT = Path(__file__).parent.parent
ALL = [(1, n) for n in range(len(WORDS))]
NO_SCORE = LabelConfig(score=False)


@pytest.fixture
def index(tmp_path: Path) -> FeatureIndex:
    return labelled_index(tmp_path / "index")


def ask(server: Server, **options) -> Endpoint:
    return Endpoint(server.address, "a model", **{"retries": 0, "timeout": 10.0, **options})


# Which examples


def test_every_second_example_is_shown_and_none_of_them_is_held_out(index: FeatureIndex):
    feature = index["1/0"]
    assert [(e.kind, e.rank) for e in shown(feature, 4)] == [("top", 0), ("top", 2), ("top", 4), ("range", 0)]
    assert [(e.kind, e.rank) for e in shown(feature, 100)] == [(k, r) for k in ("top", "range") for r in (0, 2, 4)]
    held = held_out(feature, 5)
    assert [(e.kind, e.rank) for e in held] == [(k, r) for r in (1, 3) for k in ("top", "range")] + [("top", 5)]
    assert not {plain(e) for e in shown(feature, 100)} & {plain(e) for e in held_out(feature, 100)}


def test_a_text_that_was_shown_is_not_held_out_under_another_rank(tmp_path: Path):
    feature = labelled_index(tmp_path)["1/0"]
    top = feature.top
    # The second is the first again from elsewhere; the fourth overlaps the third in their document.
    top[1] = replace(top[1], tokens=top[0].tokens)
    top[3] = replace(top[3], document=top[2].document, window_start=5, window_end=500)
    changed = replace(feature, examples=top)
    assert [e.rank for e in held_out(changed, 100)] == [5]
    assert [e.rank for e in shown(changed, 100)] == [0, 2, 4]


def test_tokens_are_marked_where_the_feature_fires(index: FeatureIndex):
    example = replace(
        index["1/0"].top[0],
        tokens=["a", " b", " c\n", "d", " e", "\n"],
        values=[0.0, 4.0, 2.0, 0.0, 1.0, 0.0],
    )
    # 1.0 is less than 30 % of the peak.
    assert marked(example) == "a <<b c⏎>>d e⏎"
    assert plain(example) == "a b c⏎d e⏎"


def test_texts_where_a_feature_is_silent_are_of_others(index: FeatureIndex):
    others = Others(index, 1, range(len(WORDS)), seed=0)
    feature = index["1/3"]
    found = others.silent(feature, 6, besides=[5])
    sources = [WORDS.index(example.tokens[1].strip()) for example in found]
    assert len(set(sources)) == 6
    assert not {3, 5} & set(sources)
    assert found == Others(index, 1, range(len(WORDS)), seed=0).silent(feature, 6, besides=[5])
    # Nine others, eight of them allowed.
    assert len(others.silent(feature, 100, besides=[5])) == 8


def test_pairs_say_for_certain_where_a_feature_is_silent(index: FeatureIndex):
    # Feature 3 fires at the last token of every example of feature 4, and feature 7 at those of feature 5.
    rows = [
        {"document": 100 * of + at, "position": 2, "token": 0, "kept": True, "feature": fires, "value": 1.0}
        for of, fires in ((4, 3), (5, 7))
        for at in range(2 * EACH)
    ]
    write_table(index.folder / "layer1" / "pairs" / "000000.parquet", pa.Table.from_pylist(rows, PAIRS), 8)
    others = Others(index, 1, [3, 7], seed=0)
    for number, barred in ((3, 4), (7, 5)):
        sources = {WORDS.index(e.tokens[1].strip()) for e in others.silent(index[1, number], 100)}
        assert sources == set(range(len(WORDS))) - {number, barred}


def test_features_to_begin_with_are_alive_and_frequent_but_not_too_frequent(tmp_path: Path):
    index = labelled_index(tmp_path)
    found = features_to_label(index)
    # Density grows with the number, and all are below one in a hundred.
    assert found == [(1, n) for n in reversed(range(len(WORDS)))]
    assert features_to_label(index, [1], 3) == found[:3]
    rows = index.table(1).to_pylist()
    for number, density in ((2, 0.3), (3, 0.02), (4, 0.95)):
        rows[number].update(density=density, always_on=density > 0.9)
    write_features(tmp_path, 1, pa.Table.from_pylist(rows, FEATURES))
    assert features_to_label(FeatureIndex.open(tmp_path)) == [(1, n) for n in (9, 8, 7, 6, 5, 1, 0, 3, 2)]
    with pytest.raises(QwenScopeError, match="expected a count of at least 1"):
        features_to_label(index, count=0)


# The score


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.lists(st.booleans(), min_size=1, max_size=8))
def test_balanced_accuracy_is_half_of_one_and_the_difference_of_the_shares_said_to_match(firing, silent):
    true = [True] * len(firing) + [False] * len(silent)
    p, q = sum(firing) / len(firing), sum(silent) / len(silent)
    assert balanced_accuracy(firing + silent, true) == pytest.approx((1 + p - q) / 2)
    assert balanced_accuracy(None, true) == 0


@given(st.integers(0, 60), st.integers(0, 2**31))
def test_the_control_is_always_another_feature_and_each_lends_its_label_once(count, seed):
    features = [(1, n) for n in range(count)]
    control_of = circle(features, seed)
    assert control_of == circle(features, seed)
    assert set(control_of) == set(control_of.values()) == (set(features) if count > 1 else set())
    assert all(feature != other for feature, other in control_of.items())


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("1, 3", {1, 3}),
        ("none", set()),
        ("None.", set()),
        ("[1, 2]", {1, 2}),
        ("1, 2, and 4.", {1, 2, 4}),
        ("2 and 3", {2, 3}),
        ("Let me see.\n\nAnswer: 4\n", {4}),
        ("**2, 2**", {2}),
        ("5", None),
        ("0", None),
        ("I think that 2 of them match: 1, 3", {1, 3}),
        ("1, 3 match", None),
        ("All of them.", None),
        ("1-3", None),
        ("9" * 5000, None),
        ("1.\n2.\nand so on", None),
        ("", None),
    ],
)
def test_answers_are_numbers_or_nothing(answer: str, numbers: set[int] | None):
    said = read_answer(answer, 4)
    assert said == (None if numbers is None else [n in numbers for n in range(1, 5)])


def test_intervals_hold_the_mean_and_follow_from_the_seed():
    values = np.random.default_rng(0).uniform(size=400).tolist()
    found = mean(values, seed=1)
    assert found == mean(values, seed=1) != mean(values, seed=2)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    # A uniform's deviation is 1 / sqrt(12).
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / np.sqrt(12 * 400), rel=0.1)
    assert mean([0.25], seed=0) == type(found)(0.25, None, None)
    assert mean([], seed=0) is None


def test_mixtures_are_half_and_half_and_never_hold_examples_of_the_control(index: FeatureIndex):
    control_of = circle(ALL, seed=0)
    found = dict(mixtures_of(index, ALL, control_of, LabelConfig()))
    assert list(found) == ALL
    orders = set()
    for (layer, number), mixture in found.items():
        assert [WORDS[number] in text for text in mixture.texts] == mixture.fires
        assert sum(mixture.fires) == 5
        assert len(mixture.texts) == 10
        assert not any(WORDS[control_of[layer, number][1]] in text for text in mixture.texts)
        orders.add(tuple(mixture.fires))
    assert len(orders) > 1
    assert found == dict(mixtures_of(index, ALL, control_of, LabelConfig()))


def test_a_perfect_model_scores_one_and_its_control_a_half(index: FeatureIndex):
    with serving(reader) as server:
        report = label(index, ALL, ask(server))
        assert report.labelled == len(ALL)
        assert len(server.asked) == 3 * len(ALL)
        assert report.failed == {}
        assert (report.tokens_read, report.tokens_written) == (10 * len(server.asked), 2 * len(server.asked))
    scores = report.scores
    assert scores is not None
    assert scores.score is not None
    assert scores.control is not None
    assert scores.difference is not None
    assert (scores.score.mean, scores.score.low, scores.score.high) == (1, 1, 1)
    # Another feature's word is in none of the texts: nothing is picked, and half of the texts are judged right.
    assert (scores.control.mean, scores.difference.mean) == (0.5, 0.5)
    assert (scores.features, scores.answers, scores.unreadable, scores.untested) == (len(ALL), 2 * len(ALL), 0, 0)
    for n, word in enumerate(WORDS):
        (found,) = index.labels.all(1, n)
        assert (found.text, found.by, found.prompt) == (word, "a model", PROMPT)
        assert (found.score, found.control) == (1, 0.5)
        assert found.time


@pytest.mark.parametrize(
    ("answer", "each", "unreadable"),
    [(", ".join(map(str, range(1, 11))), 0.5, 0), ("none", 0.5, 0), ("All of them, I think!", 0.0, 2 * len(ALL))],
)
def test_a_model_that_does_not_look_scores_a_half_and_one_that_talks_nothing(
    index: FeatureIndex, answer: str, each: float, unreadable: int
):
    with serving(lambda asked: reader(asked) if "<<" in asked else completion(answer)) as server:
        scores = label(index, ALL, ask(server)).scores
    assert scores is not None
    assert scores.score is not None
    assert scores.difference is not None
    assert (scores.score.mean, scores.difference.mean, scores.unreadable) == (each, 0, unreadable)


def test_a_label_that_fits_some_texts_scores_the_share(index: FeatureIndex):
    # Feature 0 is labelled by a word that is in some of its texts and in some of the others.
    index.labels.add(1, 0, Label("Nobody", "a model", prompt=PROMPT))
    index.labels.add(1, 1, Label("zebra", "a model", prompt=PROMPT))
    with serving(reader) as server:
        score(index, [(1, 0), (1, 1)], ask(server))
    ((_, mixture),) = mixtures_of(index, [(1, 0)], {(1, 0): (1, 1), (1, 1): (1, 0)}, LabelConfig())
    said = ["Nobody" in text for text in mixture.texts]
    p = sum(s for s, fires in zip(said, mixture.fires, strict=True) if fires) / 5
    q = sum(s for s, fires in zip(said, mixture.fires, strict=True) if not fires) / 5
    assert p > 0
    found = index.labels.of(1, 0, "a model")
    assert found is not None
    assert (found.score, found.control) == (pytest.approx((1 + p - q) / 2), 0.5)


def test_one_feature_alone_has_no_control(index: FeatureIndex):
    with serving(reader) as server:
        report = label(index, ["1/4"], ask(server))
        assert len(server.asked) == 2
    assert report.scores is not None
    assert report.scores.control is None
    assert "1.000" in str(report)
    found = index.labels.of(1, 4, "a model")
    assert found is not None
    assert (found.score, found.control) == (1, None)


# What is asked, and what is kept


def test_the_question_holds_the_marked_examples_and_the_promoted_tokens(index: FeatureIndex):
    feature = index["1/2"]
    asked = question(feature, LabelConfig(examples=4))
    assert [line for line in asked.splitlines() if line.startswith("- ")] == [
        f"- {marked(example)}" for example in shown(feature, 4)
    ]
    assert "' up2-0', ' up2-1', ' up2-2'" in asked
    assert not any(plain(example) in asked.replace("<<", "").replace(">>", "") for example in held_out(feature, 100))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("football matches", "football matches"),
        ('"Football matches."', "Football matches"),
        ("\n**Label:** football matches\nBecause they…", "football matches"),
        ("Here is a phrase:\n\nfootball matches", "football matches"),
        ('the word "goal"', 'the word "goal"'),
        ("`#` in code", "#` in code"),
        ("C++ code", "C++ code"),
        ("x\x1b[31m\ty", "x [31m y"),
        ("long " * 100, ("long " * 100)[:199].rstrip() + "…"),
    ],
)
def test_a_label_is_the_first_line_that_says_something(answer: str, text: str):
    assert read_label(answer) == text


@pytest.mark.parametrize("answer", ["…", "Answer:", "***\n---"])
def test_an_answer_without_words_is_no_label(answer: str):
    with pytest.raises(EndpointError, match="expected a label"):
        read_label(answer)


def test_asked_again_it_goes_on_with_what_is_left(index: FeatureIndex):
    with serving(reader) as server:
        first = label(index, ALL[:4], ask(server), NO_SCORE)
        assert (first.labelled, len(server.asked)) == (4, 4)
        index.label("1/5", "by hand")
        plan = make_plan(index, [*ALL, (1, 60)], ask(server))
        assert (plan.ask, plan.labelled, plan.by_hand, plan.silent) == ([ALL[4], *ALL[6:]], 4, 1, 1)
        # One question for each label, two for each score.
        assert plan.requests == 5 + 2 * 9
        second = label(index, [*ALL, (1, 60)], ask(server))
        assert (second.labelled, len(server.asked)) == (5, 4 + plan.requests)
        assert second.scores is not None
        assert second.scores.features == 9
        third = label(index, ALL, ask(server))
        assert (third.labelled, len(server.asked)) == (0, 4 + plan.requests)
        # Told to, it asks again, even about what a hand has labelled; and so it does with another prompt.
        assert len(make_plan(index, ALL, ask(server), LabelConfig(again=True)).ask) == len(ALL)
        index.labels.add(1, 0, Label("old", "a model", prompt="label-0"))
        assert make_plan(index, ALL, ask(server)).ask == [(1, 0)]
        assert len(make_plan(index, ALL, Endpoint(server.address, "another model")).ask) == len(ALL) - 1
    hand = index["1/5"].label
    assert hand is not None
    assert hand.text == "by hand"


def test_the_plan_says_what_it_takes_before_anything_is_asked(index: FeatureIndex):
    told = []
    with serving(reader) as server:
        config = LabelConfig(price_in=2.0, price_out=8.0)
        label(
            index, ALL, ask(server, answer_tokens=50), config, told=lambda plan: told.append((plan, len(server.asked)))
        )
        (plan, asked_before) = told[0]
        assert asked_before == 0
        assert plan.requests == len(server.asked)
        # Labels are shorter or longer than those that the estimate assumes.
        sent = sum(len(turn["content"].encode()) for body in server.bodies for turn in body["messages"])
        assert plan.prompt_tokens == pytest.approx(sent / 4, rel=0.1)
        assert {body["max_tokens"] for body in server.bodies} == {50}
    assert plan.answer_tokens == 50 * plan.requests
    assert plan.cost == pytest.approx((2 * plan.prompt_tokens + 8 * plan.answer_tokens) / 1e6)


def test_it_does_not_start_over_the_budget(index: FeatureIndex):
    with serving(reader) as server:
        cost = make_plan(index, ALL, ask(server), LabelConfig(price_in=2.0, price_out=8.0)).cost
        assert cost is not None
        with pytest.raises(QwenScopeError, match="expected to spend"):
            label(index, ALL, ask(server), LabelConfig(price_in=2.0, price_out=8.0, budget=cost * 0.99))
        assert server.asked == []
        label(index, ALL[:1], ask(server), LabelConfig(price_in=2.0, price_out=8.0, budget=cost))
    with pytest.raises(QwenScopeError, match="found no price_out"):
        LabelConfig(price_in=1.0)
    with pytest.raises(QwenScopeError, match="found no price_in and no price_out"):
        LabelConfig(budget=1.0)


# Endpoints that misbehave


def after(failures: list[Reply | None], then: Callable[[str], Reply] = reader) -> Callable[[str], Reply | None]:
    """A server that first fails in some ways."""
    left = list(failures)
    return lambda asked: left.pop(0) if left else then(asked)


def test_overload_and_errors_are_tried_again_as_the_server_asks(index: FeatureIndex):
    # The client's own first pauses are half a second and a second.
    failures = [
        None,
        Reply(429, "{}", {"Retry-After": "2.5"}),
        Reply(503, "busy", {"Retry-After": "0.01"}),
        Reply(500, "{}", {"Retry-After": "0.01"}),
    ]
    with serving(after(failures)) as server:
        report = label(index, ["1/0"], ask(server, retries=4, concurrency=1), NO_SCORE)
        assert len(server.asked) == 5
        assert server.times[2] - server.times[1] >= 2.5
    assert report.failed == {}
    assert [found.text for _, found in index.labels.items()] == [WORDS[0]]


@pytest.mark.parametrize(
    ("reply", "said", "final"),
    [
        (Reply(401, '{"error": {"message": "Incorrect key sk-12345"}}'), "refuses the key that was sent", True),
        (Reply(403, "no"), "refuses the key that was sent", True),
        (Reply(404, '{"error": {"message": "no model of that name"}}'), "expected the model a model at", True),
        (Reply(400, '{"detail": "pinned to another model"}'), "pinned to another model", False),
        (Reply(400, '{"error": {"message": "no such key: sk-12345"}}'), "no such key: …", False),
        (Reply(200, "who is sk-12345?", {"Content-Type": "text/plain"}), "who is …?", False),
        (Reply(429, '{"error": {"message": "slow down"}}'), "limits the rate still at once", False),
        (Reply(500, "<html>" + "x" * 5000), "found that it cannot", False),
        (Reply(200, "{not JSON"), "found JSON that does not parse", False),
        (Reply(200, "<!doctype html>", {"Content-Type": "text/html"}), "doctype html", False),
        (Reply(200, "null"), "found None", False),
        (Reply(200, "[1, 2]"), "found [1, 2]", False),
        (Reply(200, "[" * 100_000), "found JSON that does not parse", False),
        (Reply(200, '{"choices": []}'), "expected an answer in text", False),
        (Reply(200, '{"choices": {"0": 1}}'), "expected an answer in text", False),
        (Reply(200, '{"choices": [{"message": "hello"}]}'), "expected an answer in text", False),
        (completion(None), "found an empty one", False),
        (completion(" \n "), "found an empty one", False),
        (completion(["a", "list"]), "found ['a', 'list']", False),
        (completion("<think>hm, so", finish_reason="length"), "found only thoughts", False),
        (None, "cannot be reached", True),
    ],
)
def test_whatever_an_endpoint_does_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, reply: Reply | None, said: str, final: bool
):
    monkeypatch.setenv("A_KEY", "sk-12345")
    with serving(lambda _: reply) as server, pytest.raises(EndpointError) as raised:
        ask(server, key_variable="A_KEY").ask("hello")
    assert said in str(raised.value)
    assert raised.value.final == final
    assert re.fullmatch(r"expected [^\n]*, found [^\n]*; [^\n]*", str(raised.value))
    assert "sk-12345" not in str(raised.value)
    assert len(str(raised.value)) < 450
    assert set(server.keys) == {"Bearer sk-12345"}


# Some templates put the opening mark into the question.
@pytest.mark.parametrize(
    "thoughts", ["<think>\nhm, 1, 2\n</think>", "hm, 1, 2\n</think>", "<think>1</think><think>2</think>"]
)
def test_thoughts_are_no_part_of_an_answer(thoughts: str):
    with serving(lambda _: completion(f"{thoughts}\n\n3")) as server:
        assert ask(server).ask("hello") == "3"


def test_a_line_break_after_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", "sk-12345\r\n")
    with serving(reader) as server:
        ask(server, key_variable="A_KEY").ask("Asked for: x")
        assert server.keys == ["Bearer sk-12345"]
    monkeypatch.setenv("A_KEY", "sk-1\n2345–")
    with pytest.raises(QwenScopeError, match="expected a key of ASCII characters") as raised:
        Endpoint("http://127.0.0.1:1/v1", "m", key_variable="A_KEY")
    assert "2345" not in str(raised.value)


def test_counts_of_tokens_that_are_no_numbers_count_nothing():
    reply = completion("fine")
    with serving(lambda _: reply._replace(body=reply.body.replace("10", '"ten"'))) as server:
        endpoint = ask(server)
        assert endpoint.ask("hello") == "fine"
    assert (endpoint.tokens_read, endpoint.tokens_written) == (0, 2)


def test_nobody_there_is_said_at_once():
    with serving(reader) as server:
        address = server.address
    with pytest.raises(EndpointError, match=r"expected an endpoint at .* cannot be reached") as raised:
        Endpoint(address, "a model", retries=1).ask("hello")
    assert raised.value.final


def test_an_endpoint_that_hangs_is_given_up():
    release = threading.Event()

    def hang(_: str) -> Reply:
        release.wait(20)
        return completion("too late")

    with serving(hang) as server:
        with pytest.raises(EndpointError, match=r"within 0\.3 s, found none after 2 attempts"):
            ask(server, timeout=0.3, retries=1).ask("hello")
        assert len(server.asked) == 2
        release.set()


def test_an_endpoint_that_dribbles_is_given_up():
    """Some proxies send a blank now and then, so that no read ever takes long."""
    release = threading.Event()

    class Dribble(StreamRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            while not release.wait(0.05):
                self.wfile.write(b" ")

    class Quiet(ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, request, client_address) -> None:
            """The client hangs up."""

    with Quiet(("127.0.0.1", 0), Dribble) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            with pytest.raises(EndpointError, match=r"within 0\.5 s"):
                Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "m", timeout=0.5, retries=0).ask("hello")
        finally:
            release.set()
            server.shutdown()
            thread.join()


def test_options_that_newer_models_refuse_are_left_out():
    def strict(question: str) -> Reply:
        body = server.bodies[-1]
        for name, better in (("max_tokens", "max_completion_tokens"), ("temperature", "the default")):
            if name in body:
                said = f"Unsupported: '{name}' is not supported with this model. Use '{better}' instead."
                return Reply(400, json.dumps({"error": {"message": said, "param": name}}))
        return completion("fine")

    with serving(strict) as server:
        endpoint = ask(server, answer_tokens=7)
        assert endpoint.ask("one") == "fine"
        assert len(server.bodies) == 3
        assert server.bodies[-1]["max_completion_tokens"] == 7
        assert endpoint.ask("two") == "fine"
        assert len(server.bodies) == 4


def test_a_few_failures_are_told_of_and_asked_about_again(index: FeatureIndex):
    with serving(lambda asked: completion("?!") if WORDS[3] in asked else reader(asked)) as server:
        report = label(index, ALL, ask(server), NO_SCORE)
    assert report.labelled == len(ALL) - 1
    assert list(report.failed) == [(1, 3)]
    assert "no usable answer about 1 features, the first 1/3: expected a label, found '?!'" in str(report)
    with serving(reader) as server:
        report = label(index, ALL, ask(server), NO_SCORE)
        assert len(server.asked) == 1
    assert len(index.labels) == len(ALL)


def test_many_failures_in_a_row_end_it(index: FeatureIndex):
    with serving(lambda _: Reply(500, "out of order")) as server:
        with pytest.raises(EndpointError, match=f"{GIVE_UP} questions in a row failed"):
            label(index, ALL, ask(server, concurrency=1), NO_SCORE)
        assert len(server.asked) == GIVE_UP


def test_a_server_that_goes_away_takes_nothing_along(index: FeatureIndex):
    def leave(question: str) -> Reply | None:
        return reader(question) if len(server.asked) <= 6 else None

    with serving(leave) as server, pytest.raises(EndpointError, match="cannot be reached"):
        label(index, ALL, ask(server, concurrency=2), NO_SCORE)
    assert len(index.labels) == 6
    with serving(reader) as server:
        report = label(index, ALL, ask(server))
        assert report.labelled == len(ALL) - 6
        assert sum("<<" in asked for asked in server.asked) == len(ALL) - 6
    assert {found.text for _, found in index.labels.items()} == set(WORDS)


def test_a_score_is_kept_only_once_its_control_is_there(index: FeatureIndex):
    # Fails at the seventh question of the scoring: three features have both answers by then.
    def leave(question: str) -> Reply | None:
        return reader(question) if len(server.asked) <= len(ALL) + 6 else None

    with serving(leave) as server, pytest.raises(EndpointError):
        label(index, ALL, ask(server, concurrency=1))
    assert sum(found.score is not None for _, found in index.labels.items()) == 3
    with serving(reader) as server:
        label(index, ALL, ask(server))
        assert len(server.asked) == 2 * (len(ALL) - 3)
    assert {(found.score, found.control) for _, found in index.labels.items()} == {(1, 0.5)}


def test_as_many_questions_as_told_are_on_their_way_at_once(index: FeatureIndex):
    together = threading.Barrier(3, timeout=20)
    now, most = 0, 0
    lock = threading.Lock()

    def slow(question: str) -> Reply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait()  # passes only if three are here
        with lock:
            now -= 1
        return reader(question)

    with serving(slow) as server:
        report = label(index, ALL[:9], ask(server, concurrency=3, timeout=30.0), NO_SCORE)
    assert (report.labelled, most) == (9, 3)


def test_it_runs_where_an_event_loop_is_running_as_in_a_notebook(index: FeatureIndex):
    async def cell(server: Server) -> str:
        return ask(server).ask("Texts: <<word>>")

    with serving(reader) as server:
        assert asyncio.run(cell(server)) == "word"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"address": "127.0.0.1:8000"}, "expected the address of an endpoint"),
        ({"model": " "}, "expected the name of a model"),
        ({"model": "hand"}, "expected the name of a model"),
        ({"timeout": 0.0}, "expected timeout"),
        ({"timeout": float("nan")}, "expected timeout"),
        ({"retries": -1}, "expected retries"),
        ({"concurrency": 0}, "expected concurrency"),
        ({"address": "http://[::1/v1"}, "expected the address of an endpoint"),
        ({"model": "hand "}, "expected the name of a model"),
        ({"model": "two  blanks"}, "expected the name of a model"),
        ({"key_variable": "NO_SUCH_VARIABLE"}, "expected a key in the environment variable NO_SUCH_VARIABLE"),
    ],
)
def test_an_endpoint_that_cannot_be_is_a_sentence(options: dict, said: str):
    with pytest.raises(QwenScopeError, match=said):
        Endpoint(**{"address": "http://127.0.0.1:1/v1", "model": "m", **options})


# The command


def test_the_command_plans_asks_scores_and_says_so(index: FeatureIndex, capsys: pytest.CaptureFixture[str]):
    folder = str(index.folder)
    with serving(reader) as server:
        command = ["label", "--index", folder, "--endpoint", server.address, "--model", "a model"]
        prices = ["--price-in", "1", "--price-out", "4"]
        with pytest.raises(SystemExit) as stopped:
            main([*command, *prices, "--budget", "0"])
        assert stopped.value.code == 1
        assert "expected to spend 0 at most" in capsys.readouterr().err
        assert server.asked == []
        main([*command, *prices, "--layer", "1", "--count", "4"])
        out = capsys.readouterr().out
        assert out.startswith("12 requests with about ")
        assert "4 features labelled" in out
        assert "balanced accuracy 1.000 [1.000, 1.000]" in out
        main([*command, "--features", "1/0", "1/9", "--no-score"])
        out = capsys.readouterr().out
        assert "1 requests" in out
        assert "passed over: 1 features labelled before" in out
    assert [key for key, _ in FeatureIndex.open(folder).labels.items()] == [(1, 0), *ALL[6:]]


def test_the_command_fails_if_features_are_left(index: FeatureIndex, capsys: pytest.CaptureFixture[str]):
    with serving(lambda _: completion("?!")) as server, pytest.raises(SystemExit) as stopped:
        main(["label", "--index", str(index.folder), "--feature", "1/0", "--endpoint", server.address, "--model", "m"])
    assert stopped.value.code == 1
    assert "no usable answer about 1 features" in capsys.readouterr().out


@pytest.mark.parametrize("patient", [True, False])
def test_ctrl_c_loses_nothing(index: FeatureIndex, patient: bool):
    """The first one waits for the two questions that are on their way; a second one does not."""
    started, go_on = threading.Event(), threading.Event()

    def slow(question: str) -> Reply:
        if len(server.asked) >= 5:
            started.set()
            go_on.wait(60)
        return reader(question)

    with serving(slow) as server:
        command = [
            "label",
            "--index",
            str(index.folder),
            "--endpoint",
            server.address,
            "--model",
            "a model",
            "--concurrency",
            "2",
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "qwen_scope.cli", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert started.wait(60)
            process.send_signal(signal.SIGINT)
            time.sleep(1)
            if patient:
                go_on.set()
            else:
                process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
            go_on.set()
        assert process.returncode == 130
        assert "Traceback" not in error
        assert ("what was answered is kept" in error) == patient
        asked = len(server.asked)
        assert 5 <= asked < len(ALL)
        kept = len(index.labels)
        assert kept == (asked if patient else 4)
        assert label(index, ALL, ask(server)).labelled == len(ALL) - kept


# The bundled model


@pytest.mark.real
def test_the_bundled_model_served_here_labels_and_is_scored(tmp_path: Path):
    index = labelled_index(tmp_path / "index")
    script = [sys.executable, str(ROOT / "scripts" / "label_quality.py"), str(index.folder), "--layer", "1"]
    # On a busy machine, torch's threads mostly wait for each other.
    done = subprocess.run(
        [*script, "--count", "2", "--answer-tokens", "12"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["labelled"] + len(figures["failed"]) == 2
    assert figures["labels"]
    scores = figures["scores"]
    assert scores["features"] == figures["labelled"]
    # A small model's labels are poor: that they are scored, and between 0 and 1, is all that is known beforehand.
    for found in figures["labels"]:
        assert found["text"]
        assert (found["by"], found["prompt"]) == ("SmolLM2-135M-Instruct", PROMPT)
        assert 0 <= found["score"] <= 1
        assert 0 <= found["control"] <= 1
    assert scores["answers"] == 2 * scores["features"]
    assert not (index.folder / "labels.jsonl").exists()


@pytest.mark.parametrize("address", ["http://me:secret@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=secret"])
def test_an_address_with_secrets_is_refused_without_showing_them(address):
    with pytest.raises(QwenScopeError, match="without user, password or query") as refused:
        Endpoint(address, "some-model")
    assert "secret" not in str(refused.value)
