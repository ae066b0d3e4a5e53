"""What the tests of the web app share: the app on the bundled model, and a headless Chromium that visits it.

The fixtures are in conftest.py: `app` is the address, `scope` and index of one app for all tests; `visit` opens pages of it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from qwen_scope import Backbone, Scope, Suite
from qwen_scope.app.config import AppConfig
from qwen_scope.app.serve import running
from qwen_scope.index import FeatureIndex

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=\"document.title='taken over'\"><script>document.title='taken over'</script> & \"{{1+1}}\" ${1+1}"
"""A text that must show as text."""
PATIENCE = 60_000
"""Milliseconds that a result may take on a busy machine."""

expect.set_options(timeout=PATIENCE)


@dataclass(frozen=True)
class App:
    """An app that is served."""

    address: str
    scope: Scope
    index: FeatureIndex


@contextmanager
def served(backbone: Backbone, labels: Path, **config: Any) -> Iterator[App]:
    """The app on the bundled model, with labels of its own; limits as given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_SCOPE_DATA", str(labels))
        scope, index = Scope(backbone, Suite.from_pretrained()), FeatureIndex.open()
        with running(scope, index, AppConfig(port=0, **config)) as address:
            yield App(address, scope, index)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium that asks nobody but the app."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Browser, address: str, **context: Any) -> Page:
    """The page of a new visitor, once it can be used. What its scripts raise fails the test that closes it, see `closed`."""
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.raised = errors  # pyright: ignore[reportAttributeAccessIssue]
    page.goto(address)
    expect(page.locator("#tabs")).to_be_visible()
    return page


def closed(page: Page) -> None:
    """Closes a visitor's page, unless something that was shown ran as a script, or a script raised."""
    title, errors = page.title(), page.raised  # pyright: ignore[reportAttributeAccessIssue]
    page.context.close()
    assert title == "Qwen-Scope"
    assert errors == []


def tab(page: Page, title: str) -> None:
    """Goes to a tab."""
    page.get_by_role("tab", name=title, exact=True).click()


def serious(page: Page) -> list[tuple[str, list[str]]]:
    """What axe finds on the page that keeps people out, with a few of the elements."""
    from axe_playwright_python.sync_playwright import Axe

    page.wait_for_timeout(400)  # colours that change have changed
    found = [each for each in Axe().run(page).response["violations"] if each["impact"] in ("serious", "critical")]
    return [(each["id"], [node["html"][:200] for node in each["nodes"][:5]]) for each in found]
