"""How features, hits and tables look in a terminal, and the commands that print them."""

import io
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_maker import write_index

from qwen_scope.cli import main
from qwen_scope.index import Example, Feature, FeatureIndex
from qwen_scope.index.feature import Label, Neighbour, Token
from qwen_scope.index.search import Hit
from qwen_scope.index.show import bins, cells, clip, example_line, feature_text, hits_text, table_text, visible

NASTY = "\x1b[31mred\x1b[0m\r\a\u202edrawkcab\x00\u2028end"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureIndex:
    monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path / "cache"))
    return write_index(tmp_path / "index")


def example(*tokens: str, peak: int, value: float = 3.5) -> Example:
    values = [value if n == peak else 0.0 for n in range(len(tokens))]
    return Example("top", 0, value, 0, 5, 0, 1, 0, 9, peak, list(tokens), values)


def nasty(feature: Feature) -> Feature:
    """The feature with characters in every text that would do something to a terminal."""
    token, bad = Token(NASTY, 1, 0.5), example("before\n", NASTY, "\tafter\n", peak=1)
    return replace(
        feature,
        label=Label(NASTY, by=NASTY, score=0.75, control=0.5),
        top_tokens=[token] * 12,
        promoted=[token],
        suppressed=[token],
        similar=[Neighbour(7, 0.5, NASTY)],
        examples=[bad, replace(bad, kind="range")],
    )


# A feature


def test_what_is_said_of_a_feature(index: FeatureIndex):
    index.label("1/3", "courts")
    index.label("1/4", "markup in pages")
    text = feature_text(index["1/3"], width=100)
    lines = text.splitlines()
    assert lines[0] == "1/3  courts  (by hand)"
    assert lines[1] == "fires at 2.02 % of the tokens (20)  mean 2.5  max 5  first after 30 tokens"
    assert lines[2] == "activations 2 ████ 8"
    assert "peaks at    'court' 100 %" in lines
    assert "promotes    ' up3-0' +3.00  ' up3-1' +2.00  ' up3-2' +1.00" in lines
    assert "suppresses  ' down3-0' -3.00  ' down3-1' -2.00  ' down3-2' -1.00" in lines
    assert "similar     1/4 0.50 markup in pages" in lines
    assert "fires with  1/4 0.25 markup in pages" in lines
    at = lines.index("strongest examples")
    assert lines[at + 1] == "       5 the «court» held that the contract was void"
    assert lines[at + 2] == "       4 the «court» held that the contract was void"
    at = lines.index("across its range")
    assert lines[at + 2] == "       1 the «court» held that the contract was void"
    assert text == feature_text(index["1/3"])  # nothing here is as wide as a terminal
    assert repr(index["1/3"]) == text


def test_how_many_examples(index: FeatureIndex):
    assert feature_text(index["1/3"], examples=1).count("«court»") == 2
    assert feature_text(index["1/3"], examples=0).count("«court»") == 0
    assert "examples" not in feature_text(index["1/3"], examples=0)


def test_a_scored_label(index: FeatureIndex):
    index.labels.add(1, 3, Label("courts", by="some-model", score=0.9, control=0.55))
    assert feature_text(index["1/3"], width=120).startswith(
        "1/3  courts  (by some-model, score 0.90, 0.55 with labels of other features)\n"
    )


def test_features_to_be_careful_with(index: FeatureIndex):
    dead = feature_text(index["1/50"])
    assert dead.startswith("1/50  (no label)\nnever fires in this corpus\n")
    assert "activations" not in dead
    assert "promotes" in dead
    assert "always on" in feature_text(replace(index["1/3"], always_on=True))


@pytest.mark.parametrize("width", [40, 61, 100, 160])
def test_no_line_is_wider_than_the_terminal(index: FeatureIndex, width: int):
    for feature in (index["1/4"], nasty(index["1/3"])):
        for line in feature_text(feature, width=width).splitlines()[1:]:  # the label is shown whole
            assert cells(line) <= width, line


def test_the_terminal_is_asked(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch):
    feature = nasty(index["1/3"])
    for columns, width in (("60", 60), ("7", 40), ("900", 160)):
        monkeypatch.setenv("COLUMNS", columns)
        assert feature_text(feature) == feature_text(feature, width=width)


def test_nothing_moves_the_cursor(index: FeatureIndex):
    for text in (
        feature_text(nasty(index["1/3"])),
        hits_text([Hit(1, 2, 0.5, None, [NASTY], "examples", NASTY, [(0, 3)])]),
        table_text(pa.table({NASTY: [NASTY], "n": [[NASTY]]})),
    ):
        assert all(character.isprintable() or character == "\n" for character in text)
        assert "\\x1b[31mred" in text


def test_the_histogram_without_its_empty_ends(index: FeatureIndex):
    counted = bins(index["1/3"])
    assert [each.tokens for each in counted] == [5] * 4
    assert counted[0].low == 2.0
    assert counted[-1].high == 8.0
    assert all(a.high == b.low for a, b in pairwise(counted))
    histogram = [0] * 60
    histogram[0], histogram[2], histogram[59] = 1, 80, 40
    feature = replace(index["1/3"], histogram=histogram)
    assert len(bins(feature)) == 60
    line = next(line for line in feature_text(feature).splitlines() if line.startswith("activations"))
    assert "▁ █ " in line
    assert line.endswith("▄ 1.049e+06")


# An example


def test_the_peak_is_marked_and_stays_in_sight():
    long = example("before " * 50, "peak", " after" * 50, peak=1)
    line = example_line(long, 60)
    assert cells(line) == 60
    assert line.startswith("     3.5 …")
    assert "before «peak» after" in line
    assert line.endswith("…")
    assert example_line(example("a", "peak", " b" * 100, peak=1), 60).startswith("     3.5 a«peak» b b")
    assert example_line(example("a " * 100, "peak", peak=1), 60).endswith("a «peak»")
    assert cells(example_line(example("", "peak" * 100, "", peak=1), 60)) <= 60


def test_an_example_is_one_line():
    assert example_line(example("one\n\n", "\t", "two\r\n", peak=1), 80) == "     3.5 one↵↵«⇥»two\\r↵"


def test_wide_characters_take_two_columns():
    line = example_line(example("法" * 60, "律", "語" * 60, peak=1), 50)
    assert cells(line) <= 50
    assert "«律»" in line


# Texts


@given(st.text(), st.integers(1, 40), st.booleans())
def test_clipped_texts_fit(text: str, width: int, from_start: bool):
    text = visible(text)
    short = clip(text, width, from_start=from_start)
    assert cells(short) <= width
    if short != text:
        kept = short[1:] if from_start else short[:-1]
        assert text.endswith(kept) if from_start else text.startswith(kept)


@given(st.text())
def test_texts_become_visible(text: str):
    assert visible(text).isprintable()
    if text.isprintable():
        assert visible(text) == text


def test_combining_marks_take_no_column():
    assert cells("cafe\u0301") == 4
    assert cells("法") == 2


# Hits and tables


def test_hits():
    label = Label("courts and judges", by="hand")
    hits = [
        Hit(15, 123, 3.0, label, [" court"], "label", "courts and judges", [(0, 6)]),
        Hit(7, 8, 2.0, label, [" court"], "examples", "the court held", [(4, 9)]),
        Hit(7, 9, 1.0, None, [" court", "law"], "top tokens", "court · law", [(0, 5)]),
        Hit(7, 10, 1.0, None, [" oath"], "promoted", "court", [(0, 5)]),
    ]
    assert hits_text(hits, 80).splitlines() == [
        "15/123  courts and judges",
        "7/8     courts and judges",
        "        examples: the «court» held",
        "7/9     ' court' 'law'",
        "7/10    ' oath'",
        "        promoted: «court»",
    ]
    assert all(cells(line) <= 40 for line in hits_text([replace(hits[1], snippet="word " * 50)], 40).splitlines())


def test_tables():
    table = pa.table({"name": ["a", "längere"], "value": [0.123456, None], "many": [[1, 2], []]})
    assert table_text(table, 80).splitlines() == [
        "name     value   many",
        "a        0.1235  [1, 2]",
        "längere          []",
    ]
    assert table_text(pa.table({"n": list(range(100))}), 80, rows=2).splitlines() == ["n", "0", "1", "… 98 more rows"]
    assert table_text(pa.table({"n": []}), 80) == "n\nno rows"


# The commands


def call(capsys: pytest.CaptureFixture[str], index: FeatureIndex, *arguments: str) -> str:
    main([*arguments, "--index", str(index.folder)])
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_show(capsys: pytest.CaptureFixture[str], index: FeatureIndex):
    out = call(capsys, index, "show", "1/3", "2/0", "--examples", "1")
    assert out == f"{feature_text(index['1/3'], 1)}\n\n{feature_text(index['2/0'], 1)}\n"
    plain = json.loads(call(capsys, index, "show", "1/3", "--json"))
    assert plain == json.loads(json.dumps([index["1/3"].to_dict()]))
    assert len(plain[0]["examples"]) == 4
    assert plain[0]["similar"] == [{"feature": 4, "value": 0.5, "label": None}]


def test_a_terminal_without_some_characters(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    main(["show", "1/3", "--index", str(index.folder)])
    assert rb"the \xabcourt\xbb held" in written.getvalue()


def test_search(capsys: pytest.CaptureFixture[str], index: FeatureIndex):
    assert call(capsys, index, "search", "contract", "void", "--layer", "2", "--count", "1").startswith(
        "2/3  'court'\n"
    )
    found = json.loads(call(capsys, index, "search", "contract", "--json"))
    assert [hit["name"] for hit in found] == ["1/3", "2/3"]
    assert "nothing found" in call(capsys, index, "search", "zebra")
    assert call(capsys, index, "search", "zebra", "--json") == "[]\n"


def test_pages(capsys: pytest.CaptureFixture[str], index: FeatureIndex, tmp_path: Path):
    out = call(capsys, index, "pages", str(tmp_path / "pages"), "1/3", "2/0")
    assert out == f"open in a browser: {tmp_path / 'pages' / 'index.html'}\n"
    assert sorted(page.name for page in (tmp_path / "pages" / "features").iterdir()) == ["1-3.html", "2-0.html"]
    call(capsys, index, "pages", str(tmp_path / "some"), "--count", "2")
    assert len(list((tmp_path / "some" / "features").iterdir())) == 4


def test_sql(capsys: pytest.CaptureFixture[str], index: FeatureIndex):
    query = "SELECT layer, sum(fired) AS fired, DATE '2026-01-02' AS day FROM features GROUP BY layer ORDER BY layer"
    assert call(capsys, index, "sql", query).splitlines()[:2] == ["layer  fired  day", "1      100    2026-01-02"]
    assert json.loads(call(capsys, index, "sql", query, "--json")) == [
        {"layer": layer, "fired": 100, "day": "2026-01-02"} for layer in (1, 2)
    ]


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], index: FeatureIndex, tmp_path: Path):
    at = ("--index", str(index.folder))
    assert "1/63" in fail(capsys, "show", "1/64", *at)
    assert "layer/feature" in fail(capsys, "show", "football", *at)
    assert "a feature to show" in fail(capsys, "show", *at)
    assert "--examples" in fail(capsys, "show", "1/3", "--examples", "-1", *at)
    assert "qwen-scope harvest" in fail(capsys, "show", "1/3", "--index", str(tmp_path))
    assert "words to search for" in fail(capsys, "search", " ", *at)
    assert "layers 1, 2" in fail(capsys, "search", "goal", "--layer", "9", *at)
    assert "labelled" in fail(capsys, "pages", str(tmp_path / "pages"), *at)
    assert "both" in fail(capsys, "pages", str(tmp_path / "pages"), "1/3", "--count", "3", *at)
    assert "refuses" in fail(capsys, "sql", "SELECT nothing", *at)


def test_without_pyarrow(capsys: pytest.CaptureFixture[str], index: FeatureIndex, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("qwen_scope.index.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for command in (
        ["show", "1/3"],
        ["label", "--feature", "1/3", "--text", "courts"],
        ["find", "--positive", "a text"],
    ):
        assert "pip install 'qwen-scope[index]'" in fail(capsys, *command, "--index", str(index.folder))
