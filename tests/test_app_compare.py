"""The tab Compare, driven by a browser on the bundled model and held against the library's own answers."""

import json
import re
from pathlib import Path

import pytest
from app_browser import HOSTILE, serious, tab
from playwright.sync_api import Page, expect

from qwen_scope import QwenScopeError, Scope
from qwen_scope.app import compare as compare_tab
from qwen_scope.app import uploads
from qwen_scope.app.config import AppConfig
from qwen_scope.app.link import Link
from qwen_scope.app.shared import Shared

ENGLISH, FRENCH = "The old bridge is closed until winter.", "Le vieux pont est fermé jusqu'à l'hiver."


def compare(page: Page, first: str = ENGLISH, second: str = FRENCH) -> None:
    tab(page, "Compare")
    page.locator("#compare-first textarea").fill(first)
    page.locator("#compare-second textarea").fill(second)
    page.locator("#run-compare").click()


def names(page: Page) -> list[str]:
    return page.locator("#compare-table [data-choose]").evaluate_all("all => all.map(each => each.dataset.choose)")


def downloaded(page: Page, button: str) -> bytes:
    with page.expect_download() as download:
        page.locator(button).click()
    return Path(download.value.path()).read_bytes()


def test_two_texts_as_the_library_compares_them(app, visit):
    page = visit()
    compare(page)
    expect(page.locator("#compare-said")).to_contain_text("Compared:")
    found = app.scope.compare(ENGLISH, FRENCH)
    assert names(page) == [of.name for of in found.features]
    assert {of.layer for of in found.features} == set(app.scope.layers)
    first = found.features[0]
    row = page.locator("#compare-table tbody tr").first
    for figure in (f"{first.first_rate:.1%}", f"{first.second_rate:.1%}", f"{first.z:+.2f}"):
        expect(row).to_contain_text(figure)
    # The first row is shown at once: its values at every token of both texts.
    maps = page.locator("#compare-heat .qs-map")
    expect(maps).to_have_count(2)
    assert_heat(page, found, first.name)
    # Another one when it is pressed, by the keyboard too.
    last = found.features[-1].name
    page.locator(f'#compare-table [data-choose="{last}"]').press("Enter")
    expect(page.locator("#compare-heat")).to_contain_text(last)
    assert_heat(page, found, last)


def assert_heat(page: Page, found, name: str) -> None:
    for group, values in enumerate(found.activations(name)):
        tokens = page.locator("#compare-heat .qs-map").nth(group).locator("button")
        titles = tokens.evaluate_all("all => all.map(each => each.title)")
        kept = (found.first_counted, found.second_counted)[group][0].tolist()
        expected = [f"{v:.4g}" + ("" if k else ", not counted") for v, k in zip(values[0].tolist(), kept, strict=True)]
        assert titles == expected


def test_options_rank_by_something_else_and_leave_out_more(app, visit):
    page = visit()
    tab(page, "Compare")
    page.locator("#compare-options button").first.click()
    page.get_by_label("|mean 1 − mean 2|").check()
    page.get_by_label("Leave out common tokens").check()
    page.get_by_label("Leave out the first token").uncheck()
    page.locator("#compare-top input[type=number]").fill("4")
    page.locator("#compare-top input[type=number]").press("Tab")
    choose_layer(page, "#compare-from", 15)
    compare(page)
    expect(page.locator("#compare-said")).to_contain_text("Compared:")
    options = {"by": "mean", "top": 4, "skip_first": False, "skip_common_tokens": True, "layers": [15, 23]}
    assert names(page) == [of.name for of in app.scope.compare(ENGLISH, FRENCH, **options).features]
    # The lines in Python say the same.
    code = downloaded(page, "#compare-py").decode()
    for name, value in options.items():
        assert f"{name}={value!r}" in code
    choose_layer(page, "#compare-to", 7)
    page.locator("#run-compare").click()
    expect(page.get_by_text("turn them round")).to_be_visible()


def choose_layer(page: Page, dropdown: str, layer: int) -> None:
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=str(layer), exact=True).click()


def test_sets_one_text_a_line_and_from_a_file(app, visit, tmp_path: Path):
    page = visit()
    first = ["The bridge is old.", "It rained all day.", "She reads the paper."]
    second = ["Le pont est vieux.", "Il a plu toute la journée.", "Elle lit le journal."]
    tab(page, "Compare")
    page.get_by_label("Each line is a text of its own").check()
    (tmp_path / "french.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in second))
    page.locator("#compare-second-upload button").first.click()
    page.locator("#compare-second-file input[type=file]").set_input_files(tmp_path / "french.jsonl")
    expect(page.locator("#compare-second-file")).to_contain_text("french")
    compare(page, "\n".join(first) + "\n\n")
    expect(page.locator("#compare-said")).to_contain_text("of 3 texts")
    found = app.scope.compare(first, second)
    assert names(page) == [of.name for of in found.features]
    told = json.loads(downloaded(page, "#compare-json"))
    assert [of["name"] for of in told["features"]] == [of.name for of in found.features]
    assert told["features"][0]["z"] == pytest.approx(found.features[0].z)
    rows = downloaded(page, "#compare-csv").decode().splitlines()
    assert rows[0] == "feature,about,first_rate,second_rate,first_mean,second_mean,z"
    assert len(rows) == len(found.features) + 1
    assert rows[1].startswith(found.features[0].name)
    assert downloaded(page, "#compare-png").startswith(b"\x89PNG")


def test_texts_full_of_html_show_as_text(app, visit):
    page = visit()
    compare(page, HOSTILE, "A quiet text without any of that.")
    expect(page.locator("#compare-heat .qs-map")).to_have_count(2)
    shown = page.locator("#compare-heat .qs-map").first.locator("button").all_text_contents()
    assert "".join(shown) == "".join(app.scope.features(HOSTILE).tokens)
    assert page.locator("#compare-heat img, #compare-heat script").count() == 0


@pytest.mark.parametrize(
    "look", [{"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 844}}], ids=["dark", "phone"]
)
def test_a_comparison_keeps_nobody_out(visit, look):
    page = visit("#tab=compare&run=1", **look)
    expect(page.locator("#compare-heat .qs-map")).to_have_count(2)
    assert serious(page) == []
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] == width[1], "nobody has to scroll sideways"


def test_what_cannot_be_compared_is_said(visit):
    page = visit()
    compare(page, "", FRENCH)
    expect(page.get_by_text("expected a first text to compare, found none")).to_be_visible()
    page = visit()
    compare(page, "Same words here.", "Same words here.")
    expect(page.locator("#compare-said")).to_contain_text("No feature differs")


def test_a_reload_restores_the_comparison(app, visit):
    page = visit()
    compare(page)
    expect(page.locator("#compare-said")).to_contain_text("Compared:")
    chosen = names(page)[3]
    page.locator(f'#compare-table [data-choose="{chosen}"]').click()
    expect(page.locator("#compare-heat")).to_contain_text(chosen)
    page.wait_for_function("name => decodeURIComponent(location.hash).includes('feature=' + name)", arg=chosen)
    page.reload()
    expect(page.locator("#compare-heat")).to_contain_text(chosen)
    expect(page.locator("#compare-first textarea")).to_have_value(ENGLISH)
    assert names(page) == [of.name for of in app.scope.compare(ENGLISH, FRENCH).features]


# Texts that are typed or uploaded, without a browser


def test_a_chat_alone_stays_one_text_in_the_python_lines(app, monkeypatch, capsys):
    chat = [{"role": "user", "content": "Hello there, old friend"}]
    shared = Shared(app.scope, app.index, AppConfig(), Link())
    code = compare_tab.python_lines(shared, [[chat], ["Hello there"]], {"top": 2})
    monkeypatch.setattr(Scope, "from_pretrained", lambda: app.scope)
    exec(code, {})
    assert capsys.readouterr().out == f"{app.scope.compare([chat], 'Hello there', top=2)}\n"


def test_lines_are_texts():
    found = uploads.lines("one\r\n\n two \x0c three\n", "the box")
    assert found.texts == ["one", " two \x0c three"]
    assert found.places == ["line 1 of the box", "line 3 of the box"]


def test_uploaded_files_are_read_within_limits_and_name_no_folder(tmp_path: Path):
    config = AppConfig(max_file_bytes=100)
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\nthree\n", encoding="utf-8")
    assert uploads.read_file(str(tmp_path / "a.txt"), config, count=2).items.texts == ["one", "two"]
    (tmp_path / "b.csv").write_text("label,words\nx,one\ny,\nz,three\n")
    found = uploads.read_file(str(tmp_path / "b.csv"), config, column="words")
    assert found.items.texts == ["one", "three"]
    assert found.items.places == ["line 2 of b.csv", "line 4 of b.csv"]
    assert len(found.left_out) == 1
    assert str(tmp_path) not in found.left_out[0]
    found = uploads.read_file(str(tmp_path / "b.csv"), config, template="{label}: {words}")
    assert found.items.texts == ["x: one", "z: three"]
    for name, content, message in (
        ("c.exe", b"x", "expected a file of .txt"),
        ("c.txt", b"x" * 101, "at most 100 bytes"),
        ("d.txt", b"\xff\xfe", "found none at byte 0"),
        ("e.txt", b"\n \n", "found none; write one text a line"),
        ("f.jsonl", b"{", "f.jsonl"),
        ("g.csv", b"a,b\n1,2\n", "a column text"),
        ("h.parquet", b"no", "h.parquet"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(QwenScopeError, match=re.escape(message)) as error:
            uploads.read_file(str(path), config)
        assert str(tmp_path) not in str(error.value)
    with pytest.raises(QwenScopeError, match="is gone"):
        uploads.read_file(str(tmp_path / "nowhere.txt"), config)


def test_too_many_and_too_long_texts(app):
    config = AppConfig(max_texts=3, max_tokens=8)
    short = uploads.lines("a b\nc d\ne f\n", "the box")
    assert uploads.within_limits(app.scope, short, config, most_tokens=100) == short
    with pytest.raises(QwenScopeError, match="at most 3 texts"):
        uploads.within_limits(app.scope, uploads.lines("a\n" * 4, "the box"), config, most_tokens=100)
    with pytest.raises(QwenScopeError, match=r"at most 2 tokens .* by line 2 of the box"):
        uploads.within_limits(app.scope, short, config, most_tokens=2)
    long = uploads.lines("a b\n" + "word " * 20 + "\n" + "x" * 2000, "the box")
    with pytest.raises(QwenScopeError, match="found a longer one, line 2 of the box"):
        uploads.within_limits(app.scope, long, config, most_tokens=100)
    told: list[str] = []
    assert uploads.within_limits(app.scope, long, config, most_tokens=100, too_long=told.append).texts == ["a b"]
    assert len(told) == 2
    with pytest.raises(QwenScopeError, match="found none; shorten"):
        uploads.within_limits(
            app.scope, uploads.lines("word " * 20, "it"), config, most_tokens=100, too_long=told.append
        )
