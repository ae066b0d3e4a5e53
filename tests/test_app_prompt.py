"""The tab Prompt in a browser, against what the library says."""

import csv
import json

import pytest
from app_browser import HOSTILE, tab
from playwright.sync_api import Page, expect

from qwen_scope.app.tokens import shown

TEXT = "The old bridge was repaired.\nThen came the winter."


def read(page: Page, text: str) -> None:
    tab(page, "Prompt")
    page.get_by_label("Text", exact=True).fill(text)
    page.locator("#run-prompt").click()
    expect(page.locator("#prompt-maps .qs-map").first).to_have_text("".join(map(shown, text)))


def downloaded(page: Page, button: str) -> bytes:
    with page.expect_download() as waiting:
        page.locator(f"#{button}").click()
    return waiting.value.path().read_bytes()


def test_a_text_is_read_layer_by_layer(visit, app):
    page = visit()
    read(page, TEXT)
    found = app.scope.features(TEXT, errors=True)
    maps = page.locator("#prompt-maps .qs-map")
    expect(maps).to_have_count(3)
    for at in range(3):
        assert maps.nth(at).locator(".qs-token").all_text_contents() == [shown(token) for token in found.tokens]

    maps.nth(1).locator(".qs-token").nth(4).click()
    details = page.locator("#prompt-details")
    expect(details).to_contain_text("Token 4")
    for at, layer in enumerate(found):
        table = details.locator("table").nth(at)
        expect(table.locator("caption")).to_have_text(
            f"Layer {layer.layer}, reconstruction error {found.errors[layer.layer][4]:.1%}"
        )
        names = table.locator("tbody td:first-child").all_text_contents()
        assert names == [f"{layer.layer}/{number}" for number in layer.indices[4, :8].tolist()]
        values = table.locator("tbody td:nth-child(2)").all_text_contents()
        assert values == [f"{value:.3g}" for value in layer.values[4, :8].tolist()]
    strongest = page.locator("#prompt-strongest table").nth(2).locator("tbody td:first-child").all_text_contents()
    assert strongest == [name for name, _, _ in found[23].strongest(10)]


def test_names_are_labels_else_tokens(visit, app):
    number = int(app.scope.features(TEXT)[15].indices[3, 0])
    app.index.label((15, number), f"about {HOSTILE}")
    page = visit()
    read(page, TEXT)
    page.locator("#prompt-maps .qs-map").nth(1).locator(".qs-token").nth(3).click()
    cell = page.locator("#prompt-details table").nth(1).locator("tbody tr").first.locator("td").nth(2)
    expect(cell).to_have_text(" ".join(f"about {HOSTILE}".split()))
    other = int(app.scope.features(TEXT)[15].indices[3, 1])
    if app.index.labels.get(15, other) is None and app.index[15, other].top_tokens:
        expect(page.locator("#prompt-details table").nth(1).locator("tbody tr").nth(1)).to_contain_text("peaks at")


def test_colours_follow_one_feature_or_the_error(visit, app):
    page = visit()
    read(page, TEXT)
    found = app.scope.features(TEXT, errors=True)
    name, value, at = found[15].strongest(1)[0]
    page.get_by_label(f"colour the text by {name}", exact=True).first.click()
    expect(page.locator("#prompt-maps .qs-map")).to_have_count(1)
    expect(page.locator("#prompt-feature input, #prompt-feature textarea").first).to_have_value(name)
    token = page.locator("#prompt-maps .qs-token").nth(at)
    expect(token).to_have_attribute("title", f"value of {name} {value:.3g}")
    expect(token).to_have_attribute("style", "--shade:1.000")

    page.get_by_role("radio", name="Reconstruction error").check()
    expect(page.locator("#prompt-maps .qs-map")).to_have_count(3)
    error = float(found.errors[7][2])
    expect(page.locator("#prompt-maps .qs-map").first.locator(".qs-token").nth(2)).to_have_attribute(
        "title", f"reconstruction error {error:.3g}"
    )


def test_what_is_shown_can_be_taken_away(visit, app):
    page = visit()
    page.locator("#prompt-json").click()
    expect(page.get_by_text("press Read first")).to_be_visible()
    read(page, TEXT)
    found = app.scope.features(TEXT, errors=True)
    assert json.loads(downloaded(page, "prompt-json")) == json.loads(json.dumps(found.to_dict(8)))
    rows = list(csv.DictReader(downloaded(page, "prompt-csv").decode().splitlines()))
    assert len(rows) == 3 * len(found) * 8
    assert (rows[0]["token"], rows[0]["layer"], rows[0]["rank"]) == (found.tokens[0], "7", "0")
    assert downloaded(page, "prompt-png").startswith(b"\x89PNG")
    code = downloaded(page, "prompt-py").decode()
    names = {"print": lambda *_: None}
    exec(code, names)
    assert names["found"].to_dict() == found.to_dict()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_message_is_read_through_the_template(visit, app):
    page = visit()
    page.get_by_label("Text", exact=True).fill("Hello")
    page.get_by_label("A user's message").check()
    page.locator("#run-prompt").click()
    found = app.scope.features([{"role": "user", "content": "Hello"}])
    expect(page.locator("#prompt-maps .qs-map").first.locator(".qs-token")).to_have_count(len(found))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected a text of at least one character"),
        ("word " * 1100, "expected texts of at most 1024 tokens"),
    ],
)
def test_what_cannot_be_read_is_told_in_words(visit, text, told):
    page = visit()
    page.get_by_label("Text", exact=True).fill(text)
    page.locator("#run-prompt").click()
    expect(page.get_by_text(told)).to_be_visible()
