"""Pictures of every tab of the web app, light and dark, for docs/app.md.

`python scripts/app_screenshots.py` needs Chromium and the extras [app] and [dev]; it writes docs/images/app-TAB-SCHEME.png.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

from qwen_scope import Scope
from qwen_scope.app.config import AppConfig
from qwen_scope.app.link import href
from qwen_scope.app.serve import running
from qwen_scope.index import FeatureIndex

PICTURES = Path(__file__).parent.parent / "docs" / "images"
SIZE = ViewportSize(width=1200, height=900)
COLOURS = 128
"""Of each picture, so that they stay small."""
PATIENCE = 120_000
STEERED = {"prompt": "My neighbour told me that", "steering": "7/905:0.8x\n15/1037:-0.5x@generated", "tokens": 24}
SETS = {
    "weather": ["It rained all night.", "The sun came out at noon.", "Snow fell on the hills.", "A cold wind blew."],
    "music": ["She plays the violin.", "The band recorded an album.", "He sings in a choir.", "The concert was loud."],
}


def main() -> None:
    """Takes all pictures."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("expected Chromium to take pictures with, found none; install it")
    PICTURES.mkdir(exist_ok=True)
    with (
        running(Scope.from_pretrained(), FeatureIndex.open(), AppConfig(port=0)) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark"):
            for name, show in SHOWN.items():
                page = browser.new_page(color_scheme=scheme, viewport=SIZE)
                page.set_default_timeout(PATIENCE)
                show(page, address)
                page.mouse.move(0, 0)
                page.wait_for_timeout(1000)  # what moves has come to rest
                keep(page.screenshot(), PICTURES / f"app-{name}-{scheme}.png")
                page.close()
        browser.close()


def keep(png: bytes, path: Path) -> None:
    """Writes a picture with few colours."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1000} kB")


def prompt(page: Page, address: str) -> None:
    """A text that was read."""
    page.goto(f"{address}/{href('prompt', text='The council met on Tuesday to repair the old bridge.', at=8)}")
    page.locator("#prompt-details table").first.wait_for()


def compare(page: Page, address: str) -> None:
    """The two texts that stand there."""
    page.goto(f"{address}/#tab=compare")
    page.locator("#run-compare").click()
    page.locator("#compare-heat .qs-map").first.wait_for()


def steer(page: Page, address: str) -> None:
    """Both texts, and what else was likely."""
    page.goto(f"{address}/{href('steer', **STEERED)}")
    page.locator("#steer-trace h2").wait_for()
    page.locator("#steer-steered .qs-token").nth(5).click()
    page.locator("#steer-pinned table").first.wait_for()
    page.locator("#steer-preview").scroll_into_view_if_needed()
    page.evaluate("document.getElementById('steer-preview').scrollIntoView()")


def features(page: Page, address: str) -> None:
    """A feature's page."""
    page.goto(f"{address}/{href('features', feature='15/1037')}")
    page.locator("#features-page h1").wait_for()


def data(page: Page, address: str) -> None:
    """Two small sets."""
    page.goto(f"{address}/#tab=data")
    page.locator("#run-data").wait_for()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, texts in SETS.items():
            files.append(Path(folder) / f"{name}.jsonl")
            files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        page.locator("#data-files input[type=file]").set_input_files(files)
        page.locator("#run-data").click()
        page.locator("#data-tables table").first.wait_for()


SHOWN = {"prompt": prompt, "compare": compare, "steer": steer, "features": features, "data": data}

if __name__ == "__main__":
    main()
