"""Which features separate these texts: against counting by hand on a tiny model, and French on the bundled one."""

import json
from dataclasses import replace

import pytest
import torch
from index_maker import write_index

from qwen_scope import QwenScopeError, Scope, Suite
from qwen_scope.cli import main
from qwen_scope.contrast import Firing, contrast, false_discovery
from qwen_scope.index.feature import Label
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.find import Findings, find
from qwen_scope.index.find_text import findings_text

HERE = ["the capital of France is Paris", "Paris is the capital", "of France", "the capital of Italy"]
THERE = ["x = 1  # a comment", "def f(x): return 2 * x"]


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer, layers=[1, 2])


@pytest.fixture
def index(tmp_path, scope) -> FeatureIndex:
    """Of the tiny model and its SAEs; the numbers of an index are of no corpus in particular."""
    index = write_index(tmp_path / "index", {1: 128, 2: 128})
    index.scope = scope
    return index


def counted(scope: Scope, texts: list[str], layer: int) -> Firing:
    """Firing at all positions but the first, text by text."""
    groups = [
        Firing.of(found[layer][1:], torch.full((len(found) - 1,), number))
        for number, found in enumerate(scope.features(texts))
    ]
    return sum(groups[1:], groups[0])


# What is found


def test_findings_are_what_counting_by_hand_gives(index, scope):
    found = find(index, HERE, THERE, count=1000)
    by_hand = {}
    for layer in (1, 2):
        here, there = counted(scope, HERE, layer), counted(scope, THERE, layer)
        density = torch.zeros(128, dtype=torch.float64)
        density[:5] = 20 / 992
        scores = contrast(here, there, density)
        for number in range(128):
            if here.fired[number] and scores.z[number] > 0:
                by_hand[f"{layer}/{number}"] = (
                    float(scores.z[number]),
                    float(here.rate[number]),
                    float(there.rate[number]),
                    float(here.mean[number]),
                    float(there.mean[number]) if there.fired[number] else None,
                    float(density[number]),
                )
    assert len(found) == len(by_hand) > 20
    for each in found:
        expected = by_hand[each.name]
        assert (each.z, each.positive_rate, each.negative_rate, each.positive_mean) == pytest.approx(expected[:4])
        assert each.negative_mean == (None if expected[4] is None else pytest.approx(expected[4]))
        assert each.density == pytest.approx(expected[5])
    assert [each.z for each in found] == sorted((each.z for each in found), reverse=True)
    tokens = sum(map(len, scope.features(HERE)))
    assert (found.positive.texts, found.positive.tokens) == (4, tokens)
    assert found.positive.norm_outliers == {1: 0, 2: 0}
    assert found.negative.texts == 2


def test_q_is_over_the_features_that_fire_in_any_of_the_texts(index, scope):
    found = find(index, HERE, THERE, layers=1, count=1000)
    here, there = counted(scope, HERE, 1), counted(scope, THERE, 1)
    density = torch.zeros(128, dtype=torch.float64)
    density[:5] = 20 / 992
    fires = here.fired + there.fired > 0
    assert found.compared == int(fires.sum()) < 128
    q = torch.ones(128, dtype=torch.float64)
    q[fires] = false_discovery(contrast(here, there, density).p[fires])
    for each in found:
        assert each.q == pytest.approx(float(q[each.number]))


def test_swapped_groups_find_other_features(index):
    there, back = find(index, HERE, THERE, count=1000), find(index, THERE, HERE, count=1000)
    names = {each.name for each in there}
    assert names.isdisjoint(each.name for each in back)
    assert len(back) > 20
    assert back.positive == there.negative


def test_only_what_fires_here_but_not_there(index):
    every, only = find(index, HERE, THERE, count=1000), find(index, HERE, THERE, count=1000, only=True)
    assert [each.name for each in only] == [each.name for each in every if each.negative_rate == 0]
    assert 0 < len(only) < len(every)


def test_layers_and_count(index):
    one = find(index, HERE, THERE, layers=2, count=3)
    assert [each.layer for each in one] == [2, 2, 2]
    every = find(index, HERE, THERE, count=1000)
    assert one.compared < every.compared
    assert [each.name for each in one] == [each.name for each in every if each.layer == 2][:3]
    assert [each.name for each in find(index, HERE, THERE, layers=[2, 1, 2], count=4)] == [
        each.name for each in every[:4]
    ]


def test_texts_alone_are_compared_with_the_corpus(index, scope):
    found = find(index, HERE, layers=[1], count=1000)
    assert found.negative is None
    here = counted(scope, HERE, 1)
    fired, density = (torch.zeros(128, dtype=torch.float64) for _ in range(2))
    fired[:5], density[:5] = 20, 20 / 992
    scores = contrast(here, Firing(fired, 2.5 * fired, 992), density)
    for each in found:
        assert each.z == pytest.approx(float(scores.z[each.number]))
        assert each.negative_rate == pytest.approx(float(density[each.number]))
        assert each.negative_mean == (2.5 if each.number < 5 else None)


def test_other_inputs_than_lists_of_texts(index, tokenizer):
    single = find(index, HERE[0], THERE)
    ids = find(index, [tokenizer(HERE[0])["input_ids"]], [tokenizer(text)["input_ids"] for text in THERE])
    assert single.features == ids.features
    assert single.positive.texts == 1
    chat = find(index, [{"role": "user", "content": HERE[0]}], THERE)
    assert chat.positive.tokens > single.positive.tokens


def test_norm_outliers_are_left_out_and_counted(index, scope, monkeypatch):
    monkeypatch.setattr("qwen_scope.outliers.NORM_OUTLIER", 1.1)
    found = find(index, HERE, THERE, layers=1, count=1000)
    texts = [*HERE, *THERE]
    rows = [scope.backbone.residuals(torch.tensor([scope.features(text).ids]), layers=[1])[1][0, 1:] for text in texts]
    median = torch.cat(rows).norm(dim=1).median()
    extreme = [row.norm(dim=1) > 1.1 * median for row in rows]
    assert found.positive.norm_outliers == {1: sum(int(each.sum()) for each in extreme[:4])}
    assert found.negative.norm_outliers == {1: sum(int(each.sum()) for each in extreme[4:])}
    assert found.positive.norm_outliers[1] > 0
    kept = sum(int((~each).sum()) for each in extreme[:4])
    for each in found:
        assert each.positive_rate * kept == pytest.approx(round(each.positive_rate * kept), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positive": HERE, "count": 0}, r"at least 1 feature, found count = 0"),
        ({"positive": HERE, "layers": []}, r"at least one layer to search"),
        ({"positive": HERE, "layers": [0]}, r"layers 1, 2, which this index has, found 0/0"),
        ({"positive": HERE, "negative": ["x"]}, r"tokens in both groups of texts, found \d+ and 0"),
        ({"positive": []}, r"a list of texts, .* found list \[\]"),
        ({"positive": [""]}, r"at least one character"),
    ],
)
def test_what_is_refused(index, arguments, message):
    with pytest.raises(QwenScopeError, match=message):
        find(index, **arguments)


# How it looks


def test_findings_as_text(index):
    found = find(index, HERE, THERE, count=30)
    found.features[1] = replace(found[1], label=Label("capitals \x1b[31m and\ncountries", "somebody"))
    lines = findings_text(found, width=90).splitlines()
    assert lines[0].split()[:6] == ["feature", "z", "q", "here", "there", "corpus"]
    assert [line.split()[0] for line in lines[1:31]] == [each.name for each in found]
    assert all(len(line) <= 90 for line in lines[:31])
    # What a label says stays on its line and moves no cursor.
    assert "capitals \\x1b[31m and↵countries" in lines[2]
    assert min(each.q for each in found) > 0.2
    assert lines[31:33] == [
        "",
        "none of these is surer than chance (q below 0.2): give more texts, about five a side or more",
    ]
    assert lines[33:35] == ["", f"here: {found.positive.tokens} tokens of 4 texts (left out: 4 at position 0)"]
    assert lines[-1].startswith(f"{found.compared} features compared")
    found.features[0] = replace(found[0], q=0.01)
    assert "surer than chance" not in findings_text(found)
    assert repr(found) == str(found)


def test_findings_as_text_without_other_texts(index):
    found = find(index, HERE * 2, count=2)
    alone = findings_text(found)
    assert "compared with the corpus of the index" in alone
    assert "there" not in alone
    assert "a single text" not in alone
    assert "a single text does not tell" in findings_text(find(index, HERE[0], count=2))
    nothing = findings_text(Findings([], found.positive, None, 7))
    assert nothing.startswith("no feature of 7 fires more often in these texts")


def test_tokens_stand_where_there_is_no_label(index):
    found = find(index, HERE, count=1000)
    known = next(each for each in found if each.number < 5)
    [line] = [line for line in findings_text(found).splitlines() if line.startswith(f"{known.name} ")]
    assert line.endswith(repr(known.top_tokens[0].token))


@pytest.fixture
def command(index, scope, monkeypatch, capsys):
    """The command on the tiny index: its standard output."""
    monkeypatch.setattr(FeatureIndex, "scope", scope)

    def call(*arguments: str) -> str:
        main(["find", *arguments, "--index", str(index.folder)])
        return capsys.readouterr().out

    return call


def test_the_command(command, index, tmp_path):
    found = find(index, HERE, THERE, count=4)
    out = command("--positive", *HERE, "--negative", *THERE, "--count", "4")
    assert out == f"{found}\n"
    (tmp_path / "here.txt").write_text("\n".join(HERE[1:]))
    (tmp_path / "there.txt").write_text("\n".join(THERE))
    files = ("--positive-file", str(tmp_path / "here.txt"), "--negative-file", str(tmp_path / "there.txt"))
    assert command("--positive", HERE[0], *files, "--count", "4") == out
    value = json.loads(command("--positive", *HERE, "--layer", "2", "--only", "--json"))
    assert value["suite"] == "tiny suite"
    assert value["negative"] is None
    assert value["features"] == json.loads(json.dumps(find(index, HERE, layers=2, only=True).to_dict()))["features"]


def test_the_command_without_texts(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["find", "--negative", "x"])
    assert stopped.value.code == 1
    assert "expected texts to find features of, found none" in capsys.readouterr().err


# On a real model

FRENCH = [
    "Le chat dort sur la chaise près de la fenêtre.",
    "Nous avons mangé du pain et du fromage hier soir.",
    "Je voudrais deux billets pour le train de demain matin.",
    "Elle travaille dans une petite école à la campagne.",
    "Il fait froid en hiver, mais la neige est belle.",
    "Mon frère a acheté une vieille voiture rouge.",
    "Les enfants jouent dans le jardin après l'école.",
    "Pouvez-vous me dire où se trouve la gare ?",
]
ENGLISH = [
    "The cat is sleeping on the chair near the window.",
    "We ate some bread and cheese yesterday evening.",
    "I would like two tickets for the train tomorrow morning.",
    "She works in a small school in the countryside.",
    "It is cold in winter, but the snow is beautiful.",
    "My brother has bought an old red car.",
    "The children play in the garden after school.",
    "Could you tell me where the station is?",
]


@pytest.fixture(scope="module")
def french_index(tmp_path_factory, bundled) -> FeatureIndex:
    """An index of the bundled suite's layer 15 whose densities are nearly all 0."""
    index = write_index(tmp_path_factory.mktemp("index"), {15: 9216})
    index.scope = Scope(bundled, Suite.from_pretrained(layers=[15]))
    return index


@pytest.mark.real
def test_features_of_french_fire_in_other_french_texts_and_not_in_english_ones(french_index):
    found = find(french_index, FRENCH[:5], ENGLISH[:5], count=5)
    new = [french_index.scope.features(texts, layers=15) for texts in (FRENCH[5:], ENGLISH[5:])]
    for each in found:
        french, english = (
            torch.cat([text[15].activation(each.number)[1:] > 0 for text in texts]).double().mean() for texts in new
        )
        assert french > 0.25
        assert english < 0.1
    assert max(each.q for each in found) < 0.01


@pytest.mark.real
def test_little_is_found_between_texts_of_one_language(french_index):
    for start in (0, 1):
        half, other = ENGLISH[start::2], ENGLISH[1 - start :: 2]
        found = find(french_index, half, other)
        assert found[0].q > 0.2
    assert find(french_index, FRENCH, ENGLISH)[0].z > 1.5 * found[0].z
