"""The web app's page as a whole: links, visitors beside each other, what is asked of the network, looks, and who is let in."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from app_browser import HOSTILE, closed, opened, serious, served, tab
from playwright.sync_api import Page, expect

from qwen_scope.app.link import href
from qwen_scope.app.look import CAUTION
from qwen_scope.app.tokens import shown

ROOT = Path(__file__).parent.parent
TABS = ["Prompt", "Compare", "Steer", "Features", "Data"]
STEERED = {"prompt": "The old house", "steering": "7/905:1x", "tokens": 4, "temperature": 0, "seed": 1}


def test_the_page_opens_with_every_tab_and_the_caution(visit, app):
    page = visit()
    assert [each.strip() for each in page.get_by_role("tab").all_text_contents()] == TABS
    expect(page.locator("#caution")).to_be_visible()
    expect(page.locator("#caution")).to_have_text(CAUTION)
    expect(page.locator("h1")).to_have_text("Qwen-Scope")
    expect(page.get_by_text(app.scope.suite.name).first).to_be_visible()


def test_a_reload_restores_what_was_shown(visit, app):
    page = visit()
    page.get_by_label("Text", exact=True).fill(HOSTILE)
    page.get_by_label("7", exact=True).uncheck()
    page.locator("#run-prompt").click()
    maps = page.locator("#prompt-maps .qs-map")
    expect(maps).to_have_count(2)
    maps.first.locator(".qs-token").nth(3).click()
    expect(page.locator("#prompt-details")).to_contain_text("Token 3")
    expect(page).to_have_url(re.compile("at=3"))
    page.reload()
    expect(maps).to_have_count(2)
    expect(maps.first).to_have_text(shown(HOSTILE))
    expect(page.get_by_label("Text", exact=True)).to_have_value(HOSTILE)
    expect(page.get_by_label("7", exact=True)).not_to_be_checked()
    expect(page.locator("#prompt-details")).to_contain_text("Token 3")
    assert page.title() == "Qwen-Scope"


def test_links_within_the_page_lead_to_other_tabs(visit):
    page = visit(href("steer", **STEERED))
    expect(page.locator("#steer-trace")).to_contain_text("What the steering did")
    page.locator("#steer-preview a").first.click()
    expect(page.get_by_role("tab", name="Features")).to_have_attribute("aria-selected", "true")
    page.go_back()
    expect(page.get_by_role("tab", name="Steer")).to_have_attribute("aria-selected", "true")


def test_visitors_do_not_meet(chromium, app):
    """Two steer at the same time, differently, and a third reads meanwhile: each sees what the library gives alone."""
    wanted = ["7/905:1x", "15/1037:-1x"]
    pages = [
        opened(chromium, f"{app.address}/{href('steer', **{**STEERED, 'steering': text, 'tokens': 24})}")
        for text in wanted
    ]
    reader = opened(chromium, f"{app.address}/{href('prompt', text='While others steer.')}")
    found = app.scope.features("While others steer.", layers=7)
    expect(reader.locator("#prompt-maps .qs-map").first).to_have_text("While others steer.")
    from qwen_scope import Sampling

    for page, steering in zip(pages, wanted, strict=True):
        expect(page.locator("#steer-trace")).to_contain_text("What the steering did")
        both = app.scope.side_by_side("The old house", steering, Sampling(24, seed=1))
        for side, text in (("original", both.original), ("steered", both.steered)):
            assert page.locator(f"#steer-{side} .qs-token").all_text_contents() == [shown(t.text) for t in text.tokens]
    at = len(found) - 1
    first = reader.locator("#prompt-details table").first.locator("tbody td:first-child").first
    expect(first).to_have_text(f"7/{int(found[7].indices[at, 0])}")
    # What one has read or made is not there for another.
    stranger = opened(chromium, app.address)
    expect(stranger.get_by_text("Press Read to see")).to_be_visible()
    for page in (*pages, reader, stranger):
        closed(page)


def test_nothing_is_asked_of_the_network(chromium, app):
    page = chromium.new_context().new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{app.address}/{href('prompt', text='Hello there')}")
    expect(page.locator("#prompt-maps .qs-map").first).to_have_text("Hello there")
    for title in TABS:
        tab(page, title)
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(app.address).netloc}
    assert not any("Hello" in url for url in asked), "what is typed stays out of addresses"
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("title", TABS)
def test_axe_finds_nothing_serious(visit, scheme, title):
    page = visit(href("steer", **STEERED) if title == "Steer" else "", color_scheme=scheme)
    tab(page, title)
    if title == "Prompt":
        page.locator("#run-prompt").click()
        expect(page.locator("#prompt-details table").first).to_be_visible()
    if title == "Steer":
        expect(page.locator("#steer-trace")).to_contain_text("What the steering did")
        page.locator("#steer-steered .qs-token").nth(2).click()
        expect(page.locator("#steer-pinned table")).to_have_count(2)
        for part in ("How tokens are drawn", "Recipes", "Sweep over strengths"):
            page.get_by_role("button", name=part).click()
    if title in ("Prompt", "Steer"):
        page.get_by_role("button", name="The Python lines that give this").first.click()
        expect(page.locator(".cm-content").first).to_contain_text("Scope.from_pretrained")
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    assert serious(page) == []


def test_it_fits_a_phone(visit):
    page = visit(href("prompt", text="The old house at the end of the road"), viewport={"width": 390, "height": 800})
    expect(page.locator("#prompt-details table").first).to_be_visible()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390


def test_the_keyboard_moves_through_a_heat_map(visit):
    page = visit(href("prompt", text="one two three", layers=[7]))
    tokens = page.locator("#prompt-maps .qs-token")
    expect(tokens).to_have_count(3)
    assert page.locator("#prompt-maps .qs-token[tabindex='0']").count() == 1
    tokens.nth(2).focus()
    page.keyboard.press("ArrowLeft")
    expect(tokens.nth(1)).to_be_focused()
    page.keyboard.press("Home")
    expect(tokens.nth(0)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt-details")).to_contain_text("Token 0")


def test_a_password_keeps_strangers_out(chromium, bundled, tmp_path, monkeypatch):
    monkeypatch.setenv("APP_PASSWORD", "open sesame")
    with served(bundled, tmp_path, password_variable="APP_PASSWORD") as app:
        page = chromium.new_context().new_page()
        page.goto(app.address)
        expect(page.locator("#tabs")).to_have_count(0)
        for password in ("wrong", "open sesame"):
            expect(page.locator("#tabs")).to_have_count(0)
            page.get_by_label("username").fill("anybody")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "wrong":
                expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
        expect(page.locator("#tabs")).to_be_visible()
        page.context.close()


# The card's flags


def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model, tokenizer, make_sae) -> tuple[Path, Path]:
    """A tiny model, and SAEs as they are published, of its three layers."""
    import torch

    place = tmp_path_factory.mktemp("card")
    make_model("qwen3").save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    saes = place / "SAE-Res-Tiny-W1K-L0_8"
    saes.mkdir()
    for layer in range(3):
        sae = make_sae(d_sae=1024, seed=layer)
        torch.save(
            {name: getattr(sae, name).data for name in ("W_enc", "W_dec", "b_enc", "b_dec")},
            saes / f"layer{layer}.sae.pt",
        )
    return place / "model", saes


def start(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def card(folders: tuple[Path, Path], **other: str) -> list[str]:
    model, saes = folders
    flags = {
        "model": str(model),
        "model-name-sae-trained-from": "qwen3.5-2b-base",
        "model-name-analyzing-now": "qwen3.5-2b",
        "sae-path": str(saes),
        "top-k": "8",
        "num-layers": "3",
        "sae-width": "1024",
        "d-model": "32",
        "sae-cache-max": "1",
        "server-port": str(port()),
    } | other
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def test_the_cards_flags_start_it(chromium, folders):
    flags = card(folders)
    process = start(*flags)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = f"http://127.0.0.1:{flags[-1]}"
        assert address in line
        page: Page = opened(chromium, f"{address}/{href('prompt', text='the capital of France')}")
        expect(page.get_by_text("qwen3.5-2b through SAEs trained on qwen3.5-2b-base")).to_be_visible()
        expect(page.locator("#prompt-maps .qs-map")).to_have_count(3)
        page.goto(f"{address}/{href('steer', prompt='the capital', steering='1/7:3', tokens=3)}")
        page.reload()
        expect(page.locator("#steer-trace")).to_contain_text("What the steering did")
        labels = page.locator("#steer-as label").all_text_contents()
        assert [label.strip() for label in labels] == ["Plain text", "Chat", "Chat, thinking", "Chat, no thinking"]
        for title in ("Compare", "Features", "Data"):
            tab(page, title)
        closed(page)
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"num-layers": "4"}, "expected --num-layers from 1 to 3"),
        ({"d-model": "33"}, "expected --d-model 32"),
        ({"sae-width": "1000"}, "expected --sae-width 1024"),
        ({"sae-cache-max": "0"}, "expected --sae-cache-max of at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_told_in_words(folders, other, told, capsys):
    from qwen_scope.cli.card_app import main

    with pytest.raises(SystemExit) as stopped:
        main(card(folders, **other))
    assert stopped.value.code == 1
    assert told in capsys.readouterr().err


@pytest.mark.real
def test_without_flags_it_opens_on_the_bundled_model(chromium):
    free = str(port())
    process = start("--server-port", free)
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{free}" in process.stdout.readline()
        page = opened(chromium, f"http://127.0.0.1:{free}/{href('prompt', text='Hello')}")
        expect(page.locator("#prompt-maps .qs-map")).to_have_count(3)
        closed(page)
    finally:
        process.terminate()
        process.communicate()


def test_a_port_that_is_taken_is_told_in_words(folders, capsys):
    from qwen_scope.cli.card_app import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stopped:
            main(card(folders, **{"server-port": str(taken.getsockname()[1])}))
    assert stopped.value.code == 1
    assert "choose another --port" in capsys.readouterr().err


def test_settings_of_the_page_are_as_private_as_they_should_be(app):
    import urllib.request

    config = json.loads(urllib.request.urlopen(f"{app.address}/config").read())
    assert config["analytics_enabled"] is False
    assert not config.get("space_id")
    for path in ("docs", "openapi.json", "monitoring/summary"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{app.address}/{path}")
