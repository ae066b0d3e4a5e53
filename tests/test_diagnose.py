"""Which features fire on a span of a text: against counting by hand on a tiny model, and on a real text."""

import json

import pytest
import torch
from index_maker import write_index

from qwen_scope import QwenScopeError, Scope
from qwen_scope.cli import main
from qwen_scope.contrast import Firing, contrast, false_discovery
from qwen_scope.index import FeatureIndex

TEXT = "the capital of France is Paris, and the capital of Italy is Rome; def f(x): return 2 * x"


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer, layers=[1, 2])


@pytest.fixture
def index(tmp_path, scope) -> FeatureIndex:
    index = write_index(tmp_path / "index", {1: 128, 2: 128})
    index.scope = scope
    return index


def by_hand(scope: Scope, here: list[bool], layer: int):
    """Both groups of TEXT's tokens but the first, their scores, and q of features that fire at all, by number."""
    found = scope.features(TEXT)[layer]
    groups = [
        Firing.of(found[[at for at in range(1, len(here)) if here[at] is side]], torch.zeros(number).long())
        for side in (True, False)
        for number in [sum(each is side for each in here[1:])]
    ]
    density = torch.zeros(128, dtype=torch.float64)
    density[:5] = 20 / 992
    scores = contrast(groups[0], groups[1], density)
    fires = groups[0].fired + groups[1].fired > 0
    q = torch.ones(128, dtype=torch.float64)
    q[fires] = false_discovery(scores.p[fires])
    return groups, scores, q, int(fires.sum())


def overlapping(scope: Scope, *spans: tuple[int, int]) -> list[bool]:
    return [any(start < b and a < end for a, b in spans) for start, end in scope.features(TEXT).spans]


def test_findings_are_what_counting_by_hand_gives(index, scope):
    start = TEXT.index("def")
    here = overlapping(scope, (start, len(TEXT)))
    found = index.diagnose(TEXT, TEXT[start:], layers=1, count=1000)
    (inside, beside), scores, q, compared = by_hand(scope, here, 1)
    assert found.compared == compared
    assert {each.number for each in found} == set(((inside.fired > 0) & (scores.z > 0)).nonzero()[:, 0].tolist())
    for each in found:
        assert each.z == pytest.approx(float(scores.z[each.number]))
        assert each.q == pytest.approx(float(q[each.number]))
        assert each.positive_rate == pytest.approx(float(inside.fired[each.number]) / sum(here))
        assert each.negative_rate == pytest.approx(float(beside.fired[each.number]) / (len(here) - 1 - sum(here)))
    # One text on both sides: nothing tells how its tokens depend on each other.
    assert set(scores.design_effect.tolist()) == {1.0}
    assert [each.z for each in found] == sorted((each.z for each in found), reverse=True)
    assert found.span == [token for token, chosen in zip(scope.features(TEXT).tokens, here, strict=True) if chosen]
    assert (found.positive.texts, found.positive.tokens, found.positive.first_tokens) == (1, sum(here), 0)
    assert (found.negative.tokens, found.negative.first_tokens) == (len(here) - sum(here), 1)


def test_every_place_where_a_piece_occurs_counts(index):
    twice = index.diagnose(TEXT, "capital")
    places = [at for at in range(len(TEXT)) if TEXT.startswith("capital", at)]
    assert len(places) == 2
    assert twice == index.diagnose(TEXT, [(at, at + 7) for at in places])
    first = index.diagnose(TEXT, (places[0], places[0] + 7))
    assert first.positive.tokens * 2 == twice.positive.tokens
    # Those that overlap each other too: of "aaa", "aa" is all.
    assert index.diagnose("b aaa b", "aa").positive == index.diagnose("b aaa b", (2, 5)).positive


def test_several_spans_are_one_group(index, scope):
    found = index.diagnose(TEXT, ["Rome", (0, 3)])
    here = overlapping(scope, (0, 3), (TEXT.index("Rome"), TEXT.index("Rome") + 4))
    assert found.positive.tokens == sum(here)
    assert here[0]
    # The first token is in the span, and never counts.
    assert (found.positive.first_tokens, found.negative.first_tokens) == (1, 0)


def test_a_token_that_a_span_touches_belongs_to_it(index, scope):
    features = scope.features(TEXT)
    before, token = features.tokens[4:6]
    start, end = features.spans[5]
    assert end - start > 1
    assert before != token
    assert index.diagnose(TEXT, (end - 1, end)).span == [token]
    assert index.diagnose(TEXT, (start, start + 1)).span == [token]
    assert index.diagnose(TEXT, (start - 1, start)).span == [before]
    assert index.diagnose(TEXT, (start - 1, start + 1)).span == [before, token]


def test_only_what_fires_nowhere_else(index):
    every, only = (index.diagnose(TEXT, TEXT[40:], count=1000, only=only) for only in (False, True))
    assert [each.name for each in only] == [each.name for each in every if each.negative_rate == 0]
    assert 0 < len(only) < len(every)


def test_messages_and_token_ids(index, tokenizer):
    chat = index.diagnose([{"role": "user", "content": "what?"}, {"role": "assistant", "content": TEXT}], "Paris")
    assert chat.span == index.diagnose(TEXT, "Paris").span
    assert chat.negative.tokens > index.diagnose(TEXT, "Paris").negative.tokens
    ids = tokenizer(TEXT)["input_ids"]
    assert index.diagnose(ids, "Paris") == index.diagnose(torch.tensor(ids), "Paris") == index.diagnose(TEXT, "Paris")


def test_norm_outliers_are_left_out(index, monkeypatch):
    everything = index.diagnose(TEXT, TEXT[40:], layers=1)
    monkeypatch.setattr("qwen_scope.outliers.NORM_OUTLIER", 1.1)
    found = index.diagnose(TEXT, TEXT[40:], layers=1, count=1000)
    assert everything.positive.norm_outliers == {1: 0}
    assert found.positive.norm_outliers[1] > 0
    kept = found.positive.tokens - found.positive.norm_outliers[1]
    for each in found:
        assert each.positive_rate * kept == pytest.approx(round(each.positive_rate * kept), abs=1e-6)
    monkeypatch.setattr("qwen_scope.outliers.NORM_OUTLIER", 0.0)
    with pytest.raises(QwenScopeError, match="tokens in the span that count, found at layer 1 only norm outliers"):
        index.diagnose(TEXT, "Paris", layers=[1])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("Berlin", "a span that is in the text, found 'Berlin', not in .the capital"),
        ("", "pieces of the text or .start, end. of its 88 characters, found ''"),
        ((3, 3), r"found \(3, 3\)"),
        ((5, 3), r"found \(5, 3\)"),
        ((-3, 3), r"found \(-3, 3\)"),
        ((0, 89), r"found \(0, 89\)"),
        ([3, 7], "found 3"),
        ((True, 7), "found True"),
        ([], "expected a span of the text to diagnose, found none"),
        (TEXT, "expected tokens beside the span"),
        ((1, len(TEXT)), "expected tokens beside the span"),
        ((0, 1), "expected tokens in the span"),
    ],
)
def test_spans_that_are_refused(unchecked, index, spans, message):
    with pytest.raises(QwenScopeError, match=message):
        index.diagnose(TEXT, spans)


def test_other_input_that_is_refused(index):
    with pytest.raises(QwenScopeError, match="expected one text to diagnose, found 2"):
        index.diagnose([TEXT, TEXT], "Paris")
    with pytest.raises(QwenScopeError, match="at least 1 feature"):
        index.diagnose(TEXT, "Paris", count=0)
    with pytest.raises(QwenScopeError, match="layers 1, 2, which this index has"):
        index.diagnose(TEXT, "Paris", layers=0)


def test_a_diagnosis_as_text(index):
    found = index.diagnose(TEXT, "def f(x)", count=3)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [each.name for each in found]
    assert f'steer against it: qwen-scope steer … --steering "{found[0].name}:-1x"' in lines
    tokens = " ".join(map(repr, found.span))
    assert f"here: {len(found.span)} tokens in the span (left out: 0 at position 0): {tokens}" in lines
    assert f"there: {found.negative.tokens} tokens beside it (left out: 1 at position 0)" in lines
    assert lines[-1].startswith("tokens of one text are no independent witnesses")
    assert "a span of more tokens" in str(found)
    assert "steer against" not in str(index.find(TEXT, "x = 1  # a comment"))


@pytest.fixture
def command(index, scope, monkeypatch, capsys):
    monkeypatch.setattr(FeatureIndex, "scope", scope)

    def call(*arguments: str) -> str:
        main(["find", *arguments, "--index", str(index.folder)])
        return capsys.readouterr().out

    return call


def test_the_command(command, index):
    assert command("--text", TEXT, "--span", "Paris", "Rome", "--count", "4") == (
        f"{index.diagnose(TEXT, ['Paris', 'Rome'], count=4)}\n"
    )
    value = json.loads(command("--text", TEXT, "--span", "Rome", "--layer", "2", "--only", "--json"))
    expected = json.loads(json.dumps(index.diagnose(TEXT, "Rome", layers=2, only=True).to_dict()))
    assert {name: value[name] for name in expected} == expected
    assert value["suite"] == "tiny suite"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a b", "--span", "a", "--positive", "x"], "either --text with --span, or texts to compare"),
        (["--span", "a", "--negative", "x"], "either --text with --span, or texts to compare"),
        (["--text", "a b"], "expected --span"),
        (["--span", "a b"], "expected --text"),
    ],
)
def test_mixtures_that_the_command_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["find", *arguments])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.real
def test_features_of_a_french_part_are_those_of_french(bundled):
    index = FeatureIndex.open()
    index.scope = Scope(bundled, Scope.from_pretrained(layers=[15]).suite, layers=[15])
    french = "Je voudrais deux billets pour le train de demain matin, puis un café."
    answer = f"The train leaves at nine in the morning from the old station. {french} Please be there on time."
    found = index.diagnose(answer, french, layers=15, count=5)
    other = "Nous avons mangé du pain et du fromage hier soir."
    english = "We ate some bread and cheese yesterday evening."
    rates = [
        sum(float((index.scope.features(text)[15].activation(each.number)[1:] > 0).double().mean()) for each in found)
        for text in (other, english)
    ]
    assert rates[0] > 5 * rates[1]
    assert found[0].q < 0.2
