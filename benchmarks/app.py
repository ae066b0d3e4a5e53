"""How long a visitor of the web app waits, in a real browser.

`python benchmarks/app.py` takes some minutes and writes benchmarks/results/app.json; it needs Chromium. `qwen-scope app` runs in
a process of its own with the bundled model; a headless Chromium opens it as a new visitor, reads a text in the tab Prompt and
compares two in the tab Compare, at all layers. Times run from the click until the result stands on the page; each round has
another visitor and other texts.
"""

import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import commandline
import machine
from playwright.sync_api import Browser, Page, expect, sync_playwright
from timing import quartiles, short

from qwen_scope.backbone import Backbone

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WORDS = re.findall(
    r"\w+",
    "the river runs past seven old villages before it meets a grey sea and people who live there build boats sell fish and "
    "walk along the water every evening while children read letters from their friends in distant cities about winter trains "
    "music bread numbers and small green islands",
)
SECONDS = 120
"""Of patience, on a busy machine."""


@dataclass(frozen=True)
class Settings:
    tokens: int = 50
    """Of the text in the tab Prompt, and of each of the two in Compare."""
    rounds: int = 9


QUICK = Settings(tokens=12, rounds=2)


def run(settings: Settings) -> dict[str, Any]:
    if CHROMIUM is None:
        raise SystemExit(
            "expected Chromium to be installed, found none; install it, such as by apt-get install chromium"
        )
    tokenizer: Any = Backbone.from_pretrained().tokenizer
    draw = random.Random(0)

    def text() -> str:
        """Exactly as many tokens as asked for."""
        ids = tokenizer(" ".join(draw.choices(WORDS, k=settings.tokens))).input_ids[: settings.tokens]
        return str(tokenizer.decode(ids))

    with tempfile.TemporaryFile() as log, sync_playwright() as playwright:
        address, process = start(log)
        try:
            until_up(address, process)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            waits = measure(browser, address, text, settings)
            browser.close()
        finally:
            process.terminate()
            process.wait(60)
    return {
        "benchmark": "app",
        "machine": machine.describe(),
        "parameters": asdict(settings) | {"model": "the bundled one, float32"},
        "seconds": {name: short(median(all_of)) for name, all_of in waits.items()},
        "quartiles": {name: quartiles(all_of) for name, all_of in waits.items()},
    }


def start(log: Any) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qwen_scope.cli", "app", "--port", str(port)]
    return f"http://127.0.0.1:{port}", subprocess.Popen(command, stdout=log, stderr=log)


def until_up(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(SECONDS * 5):
        if process.poll() is not None:
            raise SystemExit(f"expected an app that starts, found that it ended with {process.returncode}")
        try:
            urlopen(address).close()
            return
        except URLError:
            time.sleep(0.2)
    raise SystemExit(f"expected the app within {SECONDS} seconds, found none")


def measure(browser: Browser, address: str, text: Callable[[], str], settings: Settings) -> dict[str, list[float]]:
    """Seconds of every round but the first, in which things are loaded."""
    waits: dict[str, list[float]] = {}
    for number in range(settings.rounds + 1):
        for name, seconds in visit(browser, address, text, settings).items():
            if number:
                waits.setdefault(name, []).append(seconds)
    return waits


def visit(browser: Browser, address: str, text: Callable[[], str], settings: Settings) -> dict[str, float]:
    """One new visitor's waits, in seconds."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    begun = time.perf_counter()
    page.goto(address)
    expect(page.locator("#run-prompt")).to_be_enabled()
    waits = {"page can be used": time.perf_counter() - begun}
    painted = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    waits = {"first paint": page.evaluate(painted) / 1000} | waits
    page.get_by_label("Text", exact=True).fill(text())
    waits["Prompt"] = until_shown(page, "#run-prompt", "#prompt-maps .qs-map")
    page.get_by_role("tab", name="Compare", exact=True).click()
    for box in ("first", "second"):
        page.locator(f"#compare-{box} textarea").fill(text())
    waits["Compare"] = until_shown(page, "#run-compare", "#compare-heat .qs-map")
    context.close()
    return waits


def until_shown(page: Page, button: str, result: str) -> float:
    begun = time.perf_counter()
    page.locator(button).click()
    page.locator(result).last.wait_for()
    return time.perf_counter() - begun


def main() -> None:
    args = commandline.parsed(commandline.parser(__doc__))
    commandline.write(run(QUICK if args.quick else Settings()), args, "app")


if __name__ == "__main__":
    main()
