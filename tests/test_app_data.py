"""The tab Data, driven by a browser on the bundled model and held against the library's own answers."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from app_browser import HOSTILE, serious, tab
from playwright.sync_api import Page, expect

from qwen_scope import QwenScopeError, Scope
from qwen_scope.app import classified, data
from qwen_scope.app.config import AppConfig
from qwen_scope.app.link import Link
from qwen_scope.app.shared import Shared
from qwen_scope.data import Footprint
from qwen_scope.data.classification import Evaluation, Rule, evaluate, fit_rule
from qwen_scope.data.classification.evaluate import Outcome
from qwen_scope.data.classification.plot import picture
from qwen_scope.data.classification.scores import Scores
from qwen_scope.data.fired import Fired
from qwen_scope.data.footprint import About
from qwen_scope.data.items import Items
from qwen_scope.data.study import study

SPORT = [
    "The striker scored a late goal.",
    "Our goalkeeper saved a penalty.",
    "The match ended in a draw.",
    "She won the final set.",
    "The team lost three matches.",
    "He ran the race in an hour.",
]
COOKING = [
    "Chop the onions and fry them.",
    "Bake the bread for an hour.",
    "Add salt and pepper to the soup.",
    "Boil the pasta until it is soft.",
    "Whisk the eggs with some sugar.",
    "Grate the cheese over the dish.",
]


def labelled(sport: list[str], cooking: list[str]) -> Items:
    texts = [*sport, *cooking]
    labels = ["sport"] * len(sport) + ["cooking"] * len(cooking)
    return Items(list(texts), labels, [f"line {n}" for n in range(1, len(texts) + 1)])


@pytest.fixture(scope="module")
def rule(app) -> Rule:
    return fit_rule(app.scope, labelled(SPORT, COOKING), "sport", kind="or", most=3)


def downloaded(page: Page, button: str) -> bytes:
    with page.expect_download() as download:
        page.locator(button).click()
    return Path(download.value.path()).read_bytes()


def cells(page: Page, caption: str) -> list[list[str]]:
    table = page.get_by_role("region", name=caption, exact=True)
    return table.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )


def test_two_sets_as_the_library_studies_them(app, visit, tmp_path: Path):
    (tmp_path / "sport.txt").write_text("\n".join(SPORT))
    (tmp_path / "cooking.csv").write_text("text\n" + "\n".join(COOKING))
    page = visit(color_scheme="dark")
    tab(page, "Data")
    page.locator("#data-files input[type=file]").set_input_files([tmp_path / "sport.txt", tmp_path / "cooking.csv"])
    expect(page.locator("#data-files")).to_contain_text("cooking")
    page.get_by_label("at any token of an item").check()
    page.locator("#run-data").click()
    expect(page.locator("#data-plots img")).to_have_count(2)
    footprints = [
        Footprint.of(app.scope, texts, layer=15, position="any", name=name)
        for name, texts in (("sport", SPORT), ("cooking", COOKING))
    ]
    expected = study(footprints)
    head = cells(page, "Sets")
    assert [row[:3] for row in head] == [[of.name, "6", str(len(of.features))] for of in footprints]
    overlaps = cells(page, "Overlaps")
    assert overlaps[0][:3] == ["sport", "cooking", f"{expected.overlaps.asymmetric[0, 1]:.3f}"]
    assert cells(page, "What each next set adds")[0][:2] == [
        expected.additions[0].name,
        str(expected.additions[0].adds),
    ]
    differ = cells(page, "More or less frequent in sport than in cooking")
    assert [row[0] for row in differ] == [of.feature for of in expected.differences or []]
    assert serious(page) == []
    told = json.loads(downloaded(page, "#data-json"))
    assert told["additions"] == expected.to_dict()["additions"]
    assert downloaded(page, "#data-csv").decode().startswith("set,items,features,")
    assert b"Content-Security-Policy" in downloaded(page, "#data-html")
    assert downloaded(page, "#data-png").startswith(b"\x89PNG")
    assert "'cooking.csv', name='cooking'" in downloaded(page, "#data-py").decode()


def test_the_python_lines_run(app, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "sport.txt").write_text("\n".join(SPORT))
    (tmp_path / "cooking.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in COOKING))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Scope, "from_pretrained", lambda: app.scope)
    shared = Shared(app.scope, app.index, AppConfig(), Link())
    names = {"sport": "/somewhere/sport.txt", "cooking": "/somewhere/cooking.jsonl"}
    code = data.python_lines(shared, names, 15, "last", {"column": "q", "template": None, "count": 4})
    exec(code, {})
    assert "sport" in capsys.readouterr().out
    assert "/somewhere" not in code
    sets = json.loads((tmp_path / "study" / "study.json").read_text())["sets"]
    assert [of["about"]["items"] for of in sets] == [4, 4]


def test_stop_ends_a_long_comparison(visit, tmp_path: Path):
    files = [tmp_path / f"set{n}.txt" for n in range(8)]
    for file in files:
        file.write_text("\n".join(f"{text} {n}" for n in range(20) for text in SPORT))
    page = visit()
    tab(page, "Data")
    page.locator("#data-files input[type=file]").set_input_files(files)
    expect(page.locator("#data-files")).to_contain_text("set7")
    page.locator("#run-data").click()
    expect(page.locator("#data-said")).to_contain_text("of 8")
    page.locator("#data-stop").click()
    expect(page.locator("#data-said")).to_contain_text("Stopped.")
    page.get_by_label("Items of each set at most").first.fill("2")
    page.get_by_label("Items of each set at most").first.press("Tab")
    # The set that was being read is read to its end, until when Gradio takes no other click.
    while "Stopped." in (page.locator("#data-said").text_content() or ""):
        page.locator("#run-data").click()
        page.wait_for_timeout(200)
    expect(page.locator("#data-plots img")).to_have_count(2)
    assert [row[1] for row in cells(page, "Sets")] == ["2"] * 8


def test_what_cannot_be_studied_is_said(visit, tmp_path: Path):
    page = visit()
    tab(page, "Data")
    page.locator("#run-data").click()
    expect(page.get_by_text("expected 1 to 8 files, found 0")).to_be_visible()
    (tmp_path / "one.csv").write_text("a,b\nx,y\n")
    page.locator("#data-files input[type=file]").set_input_files([tmp_path / "one.csv"])
    expect(page.locator("#data-files")).to_contain_text("one")
    page.locator("#run-data").click()
    error = page.get_by_text("expected a column text or messages")
    expect(error).to_be_visible()
    assert not re.search(r"/tmp|gradio", error.text_content() or "")


def test_a_set_full_of_html_shows_as_text(visit, tmp_path: Path):
    (tmp_path / "<b>bold<b>.jsonl").write_text(json.dumps({"text": HOSTILE}) + "\n" + json.dumps({"text": 3}) + "\n")
    page = visit()
    tab(page, "Data")
    page.locator("#data-files input[type=file]").set_input_files([tmp_path / "<b>bold<b>.jsonl"])
    expect(page.locator("#data-files")).to_contain_text("bold")
    page.locator("#run-data").click()
    expect(page.locator("#data-plots img")).to_have_count(2)
    expect(page.locator("#data-said")).to_contain_text("Left out 1 rows")
    assert page.locator("#data-tables b, #data-said b").count() == 0


def test_a_rule_is_shown_and_tried(app, visit, rule: Rule, tmp_path: Path):
    rule.save(tmp_path / "rule.json")
    page = visit()
    tab(page, "Data")
    page.locator("#data-classification button").first.click()
    page.locator("#data-rule-file input[type=file]").set_input_files(tmp_path / "rule.json")
    expect(page.locator("#data-rule-file")).to_contain_text("rule")
    text = f"{SPORT[0]} {HOSTILE}"
    page.locator("#data-rule-text textarea").fill(text)
    page.locator("#data-rule-show").click()
    expect(page.locator("#data-rule")).to_contain_text("“sport” rather than cooking")
    assert [row[1] for row in cells(page, "Features of the rule")] == [term.feature for term in rule.terms]
    explained = rule.explain(app.scope, text)
    assert [row[:2] for row in cells(page, "Why")] == [[f"{of.adds:+.3f}", of.feature] for of in explained.reasons]
    assert json.loads(downloaded(page, "#data-rule-json")) == json.loads(json.dumps(rule.to_dict()))
    assert downloaded(page, "#data-rule-csv").decode().splitlines()[1].startswith(rule.terms[0].feature)
    assert "rule.explain(scope, " in downloaded(page, "#data-rule-py").decode()


def test_an_evaluation_is_shown(app, visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["qwen_scope.data.classification.evaluate"]
    monkeypatch.setattr(module, "DRAWS", 1)
    monkeypatch.setattr(module, "FRACTIONS", (1.0,))
    found = evaluate(
        app.scope,
        labelled(SPORT, COOKING),
        labelled([f"{text} Again." for text in SPORT], [f"{text} Again." for text in COOKING]),
        "sport",
        layers=[15],
        most=3,
    )
    found.save(tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    content["outcomes"][0]["method"] = "<i>$\\frac{</i>"
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    page = visit()
    tab(page, "Data")
    page.locator("#data-classification button").first.click()
    page.locator("#data-rule-file input[type=file]").set_input_files(tmp_path / "evaluation.json")
    expect(page.locator("#data-rule-file")).to_contain_text("evaluation")
    page.locator("#data-rule-show").click()
    expect(page.locator("#data-rule img")).to_have_count(1)
    rows = cells(page, "Methods")
    assert rows[0][0] == "<i>$\\frac{</i>"
    assert [row[1] for row in rows] == [f"{of.scores.f1:.3f}" for of in found.outcomes]
    assert len(downloaded(page, "#data-rule-csv").decode().splitlines()) == len(rows) + 1


# Without a browser


def test_without_its_packages_the_tab_says_what_to_install(app, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with gr.Blocks() as page:
        data.build(Shared(app.scope, app.index, AppConfig(), Link()))
    (note,) = [block for block in page.blocks.values() if isinstance(block, gr.HTML)]
    assert note.elem_id == "data-none"
    assert "pip install &#x27;qwen-scope[data]&#x27;" in str(note.value)


def test_names_that_latex_would_read_are_drawn_in_many_threads():
    fired = Fired(np.array([0, 1, 3]), np.array([1, 0, 1], np.int32), np.ones(3, np.float32), 4)
    footprints = [
        Footprint(About(name, "a list", None, 2, 0, None, 1, "last", "m", "s", "0"), fired, ["item 1", "item 2"])
        for name in ("$\\frac{", "$a$")
    ]
    found = study(footprints)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: found.pictures(), range(6)))
    assert all(pictures == drawn[0] for pictures in drawn)


def test_sets_have_names_of_their_own():
    assert data.names_of(["/a/x.csv", "/b/x.jsonl", "/c/y.txt"]) == {
        "x": "/a/x.csv",
        "x 2": "/b/x.jsonl",
        "y": "/c/y.txt",
    }
    with pytest.raises(QwenScopeError, match="expected 1 to 8 files, found 9"):
        data.names_of([f"{n}.txt" for n in range(9)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON in x.json"),
        ("[]", "an evaluation of `qwen-scope classify evaluate` in x.json"),
        ('{"a": 1}', "expected a rule at x.json"),
        ('{"outcomes": 1}', "an evaluation of `qwen-scope classify evaluate` in x.json"),
    ],
)
def test_another_file_is_a_sentence_without_a_folder(tmp_path: Path, content: str, message: str):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(QwenScopeError, match=re.escape(message)) as error:
        classified.load(str(path), AppConfig())
    assert str(tmp_path) not in str(error.value)


def test_a_rule_of_too_many_features_is_not_shown(rule: Rule, tmp_path: Path):
    content = json.loads(json.dumps(rule.to_dict()))
    term = content["terms"][0]
    content["terms"] = [{**term, "feature": f"{rule.layers[0]}/{n}"} for n in range(101)]
    content["fingerprints"] = {str(rule.layers[0]): "0"}
    (tmp_path / "x.json").write_text(json.dumps({"format": "qwen-scope rule 1", **content}))
    with pytest.raises(QwenScopeError, match=r"at most 100 rows in x\.json, found 101"):
        classified.load(str(tmp_path / "x.json"), AppConfig())


def test_an_evaluation_whose_plots_would_take_minutes_is_not_shown(tmp_path: Path):
    scores = Scores(**{field.name: 0.5 for field in fields(Scores)})
    whole = Evaluation(
        positive="x" * 100_000,
        train={"x": 1},
        test={"x": 1},
        layer=15,
        largest_difference={15: 0.5},
        outcomes=[Outcome("m" * 100_000, [15], scores, [(0.0, 1.0), (1.0, 0.5)])],
        f1_by_k={1: 0.5},
        f1_by_fraction={"n" * 100_000: {1.0: 0.5}},
    )
    path = tmp_path / "x.json"
    path.write_text(json.dumps(whole.to_dict()))
    found = classified.load(str(path), AppConfig())
    assert isinstance(found, Evaluation)
    # Names as long as that leave room for the plot all the same.
    assert picture(found).startswith(b"\x89PNG")
    for part in (
        {"f1_by_k": {str(n): 0.5 for n in range(1, 102)}},
        {"f1_by_fraction": {str(n): {} for n in range(101)}},
    ):
        path.write_text(json.dumps({**whole.to_dict(), **part}))
        with pytest.raises(QwenScopeError, match=r"at most 100 rows in x\.json, found 101"):
            classified.load(str(path), AppConfig())
