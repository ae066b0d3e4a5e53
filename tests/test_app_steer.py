"""The tab Steer in a browser, against what the library says."""

import json
import threading
import time
from math import exp

import pytest
from app_browser import HOSTILE, closed, opened, tab
from index_maker import write_index
from playwright.sync_api import Page, expect

from qwen_scope import QwenScopeError, Sampling, Scope, Steering
from qwen_scope.app import steer, steer_sweep, uploads
from qwen_scope.app.config import AppConfig
from qwen_scope.app.link import Link, href
from qwen_scope.app.shared import Shared
from qwen_scope.app.steer_html import positions_html
from qwen_scope.app.tokens import shown
from qwen_scope.evidence import SweepConfig, sweep

PROMPT, STEERING = "The old house at the end", "7/905:0.8x@generated\n15/1037:-2"
SHORT = {"prompt": PROMPT, "steering": STEERING, "tokens": 6, "temperature": 0.7, "seed": 3}
SAMPLING = Sampling(6, 0.7, seed=3, candidates=10)


def texts(page: Page, side: str) -> list[str]:
    return page.locator(f"#steer-{side} .qs-token").all_text_contents()


def generated(page: Page) -> None:
    expect(page.locator("#steer-trace")).to_contain_text("What the steering did")


def test_both_texts_are_the_librarys(visit, app):
    page = visit(href("steer", **SHORT))
    generated(page)
    both = app.scope.side_by_side(PROMPT, STEERING, SAMPLING)
    assert texts(page, "original") == [shown(token.text) for token in both.original.tokens]
    assert texts(page, "steered") == [shown(token.text) for token in both.steered.tokens]
    for line in str(both.steered.trace).splitlines():
        expect(page.locator("#steer-trace")).to_contain_text(line)

    page.locator("#steer-steered .qs-token").nth(2).click()
    pinned = page.locator("#steer-pinned table")
    expect(pinned).to_have_count(2)
    for at, text in enumerate((both.original, both.steered)):
        chances = pinned.nth(at).locator("tbody td:nth-child(2)").all_text_contents()
        assert chances[:10] == [f"{exp(each.logprob):.2%}" for each in text.tokens[2].candidates]
        drawn = pinned.nth(at).locator("tbody tr", has_text="(drawn)")
        expect(drawn).to_have_count(1)
        expect(drawn.locator("code")).to_have_text(shown(text.tokens[2].text))
    expect(page.locator("#steer-steered .qs-token").nth(2)).to_have_attribute("aria-pressed", "true")


def test_the_preview_says_what_is_steered(visit, app):
    page = visit()
    tab(page, "Steer")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Steering: edits, one a line").fill("7/905:0.5x@1-2 15/1037:3@-1,generated")
    preview = page.locator("#steer-preview")
    expect(preview).to_contain_text(
        "3 of 6 tokens of the prompt are steered; what is generated is steered by 15/1037:3"
    )
    marked = preview.locator(".qs-marked").all_text_contents()
    assert marked == [" old", " house", " end"]
    expect(preview.locator("tbody tr").first).to_contain_text(f"{0.5 * app.scope.maxima(7, 905):.4g}")
    page.get_by_label("Steering: edits, one a line").fill("7/905:2x@9")
    expect(preview).to_contain_text("expected positions from 0 to 5")


def test_edits_are_added_by_presets(visit):
    page = visit()
    tab(page, "Steer")
    steering = page.get_by_label("Steering: edits, one a line")
    steering.fill("")
    for feature, preset, written in (
        ("15/1037", "Suppress (-0.8x)", "15/1037:-0.8x"),
        ("23/4411", "Take away (ablate)", "23/4411:ablate"),
    ):
        page.get_by_label("Feature", exact=True).fill(feature)
        page.get_by_label("Amount", exact=True).click()
        page.get_by_role("option", name=preset).click()
        page.locator("#steer-add").click()
        expect(steering).to_have_value(written if "15" in feature else f"15/1037:-0.8x\n{written}")
    page.get_by_label("Feature", exact=True).fill("15/99999")
    page.locator("#steer-add").click()
    expect(page.get_by_text("expected a feature from 15/0 to 15/9215")).to_be_visible()


def test_chats_are_answered(visit, app):
    page = visit(href("steer", **{**SHORT, "as": "chat"}))
    generated(page)
    both = app.scope.side_by_side([{"role": "user", "content": PROMPT}], STEERING, SAMPLING)
    assert texts(page, "steered") == [shown(token.text) for token in both.steered.tokens]


def test_hostile_prompts_show_as_text(visit):
    page = visit(href("steer", prompt=HOSTILE, steering="7/905:1", tokens=2))
    generated(page)
    expect(page.locator("#steer-preview .qs-map")).to_have_text(HOSTILE)
    assert page.locator("#steer-preview img").count() == 0


def test_recipes_are_files_and_kept_in_the_browser(visit, app, tmp_path):
    page = visit(href("steer", run=False, **SHORT))
    tab(page, "Steer")
    expect(page.get_by_label("Steering: edits, one a line")).to_have_value(STEERING)
    page.get_by_role("button", name="Recipes").click()
    page.get_by_label("Name", exact=True).fill("old houses")
    with page.expect_download() as waiting:
        page.locator("#steer-recipe-save").click()
    content = json.loads(waiting.value.path().read_text())
    assert content["given"] == str(Steering.of(STEERING))
    assert content["note"] == "old houses"
    waiting.value.save_as(tmp_path / "recipe.json")

    page.locator("#steer-recipe-keep").click()
    page.get_by_label("Steering: edits, one a line").fill("")
    page.get_by_label("Kept recipes").click()
    page.get_by_role("option", name="old houses").click()
    expect(page.get_by_label("Steering: edits, one a line")).to_have_value(str(Steering.of(STEERING)))
    page.reload()
    tab(page, "Steer")
    page.get_by_role("button", name="Recipes").click()
    page.get_by_label("Kept recipes").click()
    expect(page.get_by_role("option", name="old houses")).to_be_visible()

    page.keyboard.press("Escape")
    page.locator("#steer-recipe-open input[type=file], input[type=file]").first.set_input_files(
        tmp_path / "recipe.json"
    )
    expect(page.get_by_label("Steering: edits, one a line")).to_have_value(content["steering"].replace(" ", "\n"))


def test_it_can_be_stopped(visit):
    page = visit(href("steer", **{**SHORT, "tokens": 256}))
    expect(page.locator("#steer-steered .qs-token").nth(5)).to_be_visible()
    page.locator("#steer-stop").click()
    page.wait_for_timeout(1500)
    count = page.locator("#steer-steered .qs-token").count()
    page.wait_for_timeout(1500)
    assert page.locator("#steer-steered .qs-token").count() == count < 256
    expect(page.locator("#steer-trace")).not_to_contain_text("What the steering did")


def test_a_sweep_is_the_librarys(visit, app):
    prompts = ["My neighbour said", "The old house", "Yesterday we", "When I was young,"]
    page = visit(href("steer", run=False, steering="7/905:1x@generated"))
    tab(page, "Steer")
    page.get_by_role("button", name="Sweep over strengths").click()
    page.locator("#run-sweep").click()
    expect(page.get_by_text("expected what should become more")).to_be_visible()
    page.get_by_label("Prompts, one a line (four or more)").fill("\n".join(prompts))
    page.get_by_label("Namely").fill("the, a")
    page.get_by_label("Strengths: multiples of the steering").fill("1")
    page.locator("#run-sweep").click()
    expect(page.locator("#sweep-verdict")).to_contain_text("Verdict")
    config = SweepConfig(strengths=(1.0,), random_features=2, max_new_tokens=16)
    report = sweep(app.scope, "7/905:1x@generated", prompts, "words:the, a", config)
    expect(page.locator("#sweep-verdict")).to_have_text(f"Verdict: {report.verdict}")
    effects = page.locator("#sweep-report table").first.locator("tbody td:nth-child(3)").all_text_contents()
    assert effects == [f"{point.effect.mean:.3g}" for point in report.points]
    assert page.locator("#sweep-report img").get_attribute("alt")


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_a_sweep_ends_when_nobody_waits_for_it(app, chromium, how):
    page = opened(chromium, f"{app.address}/{href('steer', run=False, steering='7/905:1x')}")
    tab(page, "Steer")
    page.get_by_role("button", name="Sweep over strengths").click()
    page.get_by_label("Namely").fill("the")
    page.get_by_label("number input for Tokens of each text").fill("4")
    page.locator("#run-sweep").click()
    expect(page.locator("#sweep-report")).to_contain_text("0 of 78 texts generated")
    if how == "stop":
        page.locator("#sweep-stop").click()
    else:
        closed(page)
    deadline = time.monotonic() + 300
    while any(thread.name == "qwen-scope sweep" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    if how == "stop":
        expect(page.locator("#sweep-verdict")).to_have_count(0)
        closed(page)


@pytest.mark.parametrize(
    ("box", "asked", "told"),
    [
        ("Prompts, one a line (four or more)", "word " * 1100 + "\na\nb\nc", "expected texts of at most 1024 tokens"),
        ("What one would ask for instead (may be left out)", "word " * 1100, "expected texts of at most 1024 tokens"),
        ("Namely", "word, " * 1100, "expected texts of at most 1024 tokens"),
    ],
)
def test_a_sweep_keeps_to_the_limits(visit, box, asked, told):
    page = visit(href("steer", run=False, steering="7/905:1x"))
    tab(page, "Steer")
    page.get_by_role("button", name="Sweep over strengths").click()
    page.get_by_label("Namely").fill("the")
    page.get_by_label(box, exact=True).fill(asked)
    page.locator("#run-sweep").click()
    expect(page.get_by_text(told)).to_be_visible()


def test_no_edits_are_restored_as_none_and_an_empty_seed_is_0(visit, app):
    page = visit(href("steer", run=False, **SHORT))
    expect(page.get_by_label("Steering: edits, one a line")).to_have_value(STEERING)
    page.get_by_label("Steering: edits, one a line").fill("")
    page.get_by_role("button", name="How tokens are drawn").click()
    page.get_by_label("Seed", exact=True).fill("")
    page.locator("#run-steer").click()
    generated(page)
    expected = [shown(t.text) for t in app.scope.generate(PROMPT, None, Sampling(6, 0.7)).tokens]
    assert texts(page, "original") == texts(page, "steered") == expected
    page.reload()
    generated(page)
    expect(page.get_by_label("Steering: edits, one a line")).to_have_value("")
    assert texts(page, "steered") == expected


def test_the_python_lines_give_the_same(visit, app):
    page = visit(href("steer", **SHORT))
    generated(page)
    with page.expect_download() as waiting:
        page.locator("#steer-py").click()
    names = {"print": lambda *_: None}
    exec(waiting.value.path().read_text(), names)
    both = app.scope.side_by_side(PROMPT, STEERING, SAMPLING)
    assert names["both"].to_dict() == both.to_dict()  # pyright: ignore[reportAttributeAccessIssue]


# Without a browser


def test_a_long_list_of_positions_is_not_repeated_at_each_of_them(app):
    positions = ",".join(["0-199"] * 3000)
    read = app.scope.features("word " * 200, layers=7).tokenized
    html = positions_html(read, uploads.steering_of(" ".join([f"7/905:1@{positions}", *["7/905:1"] * 9])))
    assert len(html) < 200_000
    assert "7/905:1, 7/905:1, 7/905:1, 7/905:1 and 6 more" in html
    with pytest.raises(QwenScopeError, match="at most 20,000 characters"):
        uploads.steering_of(f"7/905:1@{positions},{positions}")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.json", "{", "found no JSON"),
        ("x.json", "{}", "expected a steering recipe at x.json"),
        ("x.txt", "{}", "expected a file of .json, found x.txt"),
    ],
)
def test_a_file_that_is_no_recipe_is_a_sentence_without_a_folder(app, tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(QwenScopeError, match=told) as error:
        steer.recipe_in(tmp_path / name, Shared(app.scope, app.index, AppConfig(), Link()))
    assert str(tmp_path) not in str(error.value)


def test_the_python_lines_name_an_index_that_strengths_count_in(llama, suite, tokenizer, tmp_path, app):
    index = write_index(tmp_path / "words")
    scope = Scope(llama, suite, tokenizer)
    shared = Shared(scope, index, AppConfig(), Link())
    scope.maxima = index.maxima
    assert "scope.maxima = FeatureIndex.open('words').maxima\n" in steer.python(
        shared, "a", None, Steering.of("1/4:1x"), SAMPLING
    )
    assert Shared(app.scope, app.index, AppConfig(), Link()).units == ""


def test_a_sweep_reads_prompts_as_chosen_or_says_that_it_cannot():
    assert steer_sweep.as_prompts(["a"], "text") == ["a"]
    assert steer_sweep.as_prompts(["a"], "chat") == [[{"role": "user", "content": "a"}]]
    with pytest.raises(QwenScopeError, match="which a sweep cannot do"):
        steer_sweep.as_prompts(["a"], "thinking")
