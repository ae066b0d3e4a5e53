"""The tab Features, driven by a browser on the bundled model and held against the index's own answers."""

import json
from pathlib import Path

import gradio as gr
import pytest
from app_browser import HOSTILE, serious, tab
from index_maker import write_index
from playwright.sync_api import Page, expect

from qwen_scope import Scope
from qwen_scope.app import features
from qwen_scope.app.config import AppConfig
from qwen_scope.app.link import Link
from qwen_scope.app.shared import Shared
from qwen_scope.index import FeatureIndex, Label

NAME = "15/905"


def ask(page: Page, asked: str) -> None:
    tab(page, "Features")
    page.locator("#features-asked textarea").fill(asked)
    page.locator("#features-asked textarea").press("Enter")


def found(page: Page) -> list[str]:
    return page.locator("#features-hits tbody tr a").all_text_contents()


def downloaded(page: Page, button: str) -> bytes:
    with page.expect_download() as download:
        page.locator(button).click()
    return Path(download.value.path()).read_bytes()


def test_a_search_by_words_finds_what_the_index_finds_and_opens_pages(app, visit):
    page = visit()
    ask(page, "football match")
    expect(page.locator("#features-hits table")).to_be_visible()
    hits = app.index.search("football match", count=20)
    assert found(page) == [hit.name for hit in hits]
    page.locator("#features-hits tbody tr a").nth(1).click()
    expect(page.locator("#features-page h1")).to_contain_text(hits[1].name)
    # The search is still there, and Back leads to it.
    assert found(page) == [hit.name for hit in hits]
    told = json.loads(downloaded(page, "#features-json"))
    assert [hit["name"] for hit in told["found"]] == [hit.name for hit in hits]
    assert told["feature"]["name"] == hits[1].name
    assert downloaded(page, "#features-csv").decode().splitlines()[1].startswith(hits[0].name)
    assert downloaded(page, "#features-png").startswith(b"\x89PNG")


def test_a_search_by_an_example_finds_what_the_index_finds(app, visit):
    text = "Bonjour, je voudrais deux billets pour le train de demain matin."
    page = visit()
    tab(page, "Features")
    page.get_by_role("radio", name="an example text").check()
    page.locator("#features-options button").first.click()
    page.locator("#features-layers").get_by_label("23", exact=True).uncheck()
    ask(page, text)
    expect(page.locator("#features-hits")).to_contain_text("surest first")
    assert found(page) == [of.name for of in app.index.find(text, count=20, layers=[7, 15])]
    # The app's own model has read it; none was loaded besides.
    assert app.index.scope is app.scope


def test_the_page_of_a_feature(app, visit):
    page = visit(f"#tab=features&feature={NAME}&run=1")
    feature = app.index[NAME]
    shown = page.locator("#features-page")
    expect(shown.locator("h1")).to_contain_text(NAME)
    expect(shown).to_contain_text(f"{feature.fired:,}")
    assert shown.locator("svg rect").count() > 0
    example = feature.top[0]
    row = shown.get_by_role("row").filter(has_text=f"{example.value:.3g}").first
    assert row.count() == 1
    for token in feature.promoted[:3]:
        expect(shown).to_contain_text(f"{token.value:+.2f}")
    neighbour = f"15/{feature.similar[0].feature}"
    shown.get_by_role("link", name=neighbour, exact=True).first.click()
    expect(shown.locator("h1")).to_contain_text(neighbour)
    expect(page.locator("#features-asked textarea")).to_have_value(neighbour)


@pytest.mark.parametrize(
    "look", [{"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 844}}], ids=["dark", "phone"]
)
def test_a_search_and_a_page_keep_nobody_out(visit, look):
    page = visit("#tab=features&feature=football&run=1", **look)
    page.locator("#features-hits tbody tr a").first.click()
    expect(page.locator("#features-page h1")).to_be_visible()
    assert serious(page) == []
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] == width[1], "nobody has to scroll sideways"


def test_a_label_is_kept_and_another_visitor_sees_it(app, visit):
    page = visit(f"#tab=features&feature={NAME}&run=1")
    expect(page.locator("#features-page h1")).to_contain_text(NAME)
    expect(page.locator("#features-labelling")).to_contain_text("Labels are shared")
    page.locator("#features-label textarea").fill(HOSTILE)
    page.locator("#features-save").click()
    expect(page.locator("#features-page h1")).to_contain_text("<img src=x")
    assert page.locator("#features-page img").count() == 0
    assert app.index.labels.of(15, 905, "hand").text == HOSTILE
    other = visit(f"#tab=features&feature={NAME}&run=1")
    expect(other.locator("#features-page h1")).to_contain_text("<img src=x")
    expect(other.locator("#features-label textarea")).to_have_value(HOSTILE)
    other.locator("#features-label textarea").fill("")
    other.locator("#features-save").click()
    expect(other.locator("#features-page h1")).not_to_contain_text("<img")
    assert app.index.labels.of(15, 905, "hand") is None


def test_steer_with_this_carries_the_feature_to_the_other_tab(visit):
    page = visit(f"#tab=features&feature={NAME}&run=1")
    page.get_by_role("link", name=f"Steer with {NAME}").click()
    expect(page.get_by_role("tab", name="Steer", exact=True)).to_have_attribute("aria-selected", "true")
    box = page.locator("#steer-steering textarea, #steer-steering input").first
    expect(box).to_have_value(f"{NAME}:0.8x")
    # Once more, though the address says so already.
    box.fill("")
    tab(page, "Features")
    page.get_by_role("link", name=f"Steer with {NAME}").click()
    expect(box).to_have_value(f"{NAME}:0.8x")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("15/99999", "expected a feature from 15/0 to 15/9215"),
        ("3/1", "harvest that layer too"),
        ("", "expected words"),
    ],
)
def test_what_cannot_be_found_is_said(visit, asked: str, said: str):
    page = visit()
    ask(page, asked)
    expect(page.get_by_text(said)).to_be_visible()


def test_an_example_that_is_too_long_is_refused(app, visit):
    page = visit()
    tab(page, "Features")
    page.get_by_role("radio", name="an example text").check()
    ask(page, "word " * 1100)
    expect(page.get_by_text("expected texts of at most 1024 tokens")).to_be_visible()


def test_nothing_found_and_a_search_full_of_html(visit):
    page = visit()
    ask(page, "zzxqy")
    expect(page.locator("#features-hits")).to_contain_text("Nothing is known of a feature about “zzxqy”")
    ask(page, HOSTILE)
    expect(page.locator("#features-hits table")).to_be_visible()


# Without a browser


def test_text_of_an_index_is_escaped(tmp_path: Path):
    index = write_index(tmp_path)
    index.labels.add(1, 4, Label("<b>bold</b>", "hand"))
    shared = Shared(None, index, AppConfig(), Link())  # pyright: ignore
    page = features.page_html(shared, index["1/4"])
    assert "<b>" not in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(" in page
    hits = features.hits_html(index.search("bold"), "bold")
    assert "<b>" not in hits
    assert "&lt;b&gt;" in hits
    assert "#tab=features&amp;feature=1%2F4" in hits


def test_exports_say_when_there_is_nothing_and_name_the_index(tmp_path: Path):
    index = write_index(tmp_path / "words")
    with pytest.raises(ValueError, match="found nothing yet"):
        features.csv_of(index, None, None)
    with pytest.raises(ValueError, match="found nothing yet"):
        features.json_of(index, None, [])
    rows = features.csv_of(index, "1/0", None).splitlines()
    assert len(rows) == 1 + len(index["1/0"].examples)
    assert features._opening(index).endswith("FeatureIndex.open('words')\n")
    assert features._opening(FeatureIndex.open()).endswith("FeatureIndex.open()\n")


def test_without_an_index_the_tab_says_so(llama, suite, tokenizer):
    with gr.Blocks() as page:
        features.build(Shared(Scope(llama, suite, tokenizer), None, AppConfig(), Link()))
    (note,) = [block for block in page.blocks.values() if isinstance(block, gr.HTML)]
    assert note.elem_id == "features-none"
    assert "qwen-scope harvest" in str(note.value)


def test_a_name_is_told_from_words():
    assert features.number_of(" 15 / 905") == "15/905"
    assert features.number_of("15/905 and more") is None
    assert features.number_of("goal") is None
