"""Every Python example of the README and the documents runs as written."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.real
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, code in enumerate(examples(page)):
        exec(compile(code, f"{page.name} example {number}", "exec"), names)


def test_every_document_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in menu


def test_nothing_names_a_machine():
    # A path of somebody's machine in a document works on that machine only.
    for page in [*PAGES, *ROOT.glob("scripts/**/*.py"), *ROOT.glob("benchmarks/**/*")]:
        if page.suffix in (".py", ".md", ".json"):
            assert not re.search(r"/(home|root|work|tmp|Users)/", page.read_text()), page
