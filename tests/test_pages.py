"""Pages of features: what is on them, that nothing of a corpus runs on them, and that they need nothing else."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from index_maker import write_index

from qwen_scope import QwenScopeError
from qwen_scope.index import FeatureIndex
from qwen_scope.index.feature import Label
from qwen_scope.index.pages import export, feature_html

VOID = {"meta", "link", "br", "input", "rect"}


class Page(HTMLParser):
    """What a browser would see; what is opened must be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, heading: str) -> str:
        """The HTML of the table under a heading."""
        (found,) = [part for part in self.html.split("<table>") if f"<h2>{heading}</h2>" in part]
        return found.partition("</table>")[0]


@pytest.fixture
def index(tmp_path: Path) -> FeatureIndex:
    return write_index(tmp_path / "index")


@pytest.fixture
def pages(index: FeatureIndex, tmp_path: Path) -> Path:
    """Pages of four features, two of them labelled."""
    index.label("1/3", "courts & judges")
    index.labels.add(1, 4, Label("<script>alert(1)</script>", by="<img src=x>", score=0.9, control=0.5))
    export(index, tmp_path / "pages", ["1/3", "1/4", (2, 0), "1/50"])
    return tmp_path / "pages"


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_what_is_on_a_page(pages: Path):
    page = read(pages / "features" / "1-3.html")
    for said in (
        "1/3",
        "courts & judges",
        "by hand",
        "2.02 % of tokens",
        "2.5",
        "30 tokens",
        "qwen-scope show 1/3 --index index",
    ):
        assert said in page.text
    assert re.search(r"<code>court</code></td><td[^>]*>100 %", page.table("Peaks at"))
    assert re.search(r"<code> up3-0</code></td><td[^>]*>\+3\.00", page.table("Promotes"))
    assert re.search(r"<code> down3-0</code></td><td[^>]*>-3\.00", page.table("Suppresses"))
    assert page.table("Strongest examples").count("<tr>") == 3
    assert page.table("Examples across its range").count("<tr>") == 3
    assert page.all("title")
    assert "<title>1/3 courts &amp; judges</title>" in page.html


def test_the_shade_is_the_share_of_the_highest(index: FeatureIndex):
    feature = index["1/3"]
    first, second = feature.top
    assert (first.value, second.value, feature.max) == (5.0, 4.0, 5.0)
    rows = Page(feature_html(feature)).table("Strongest examples").split("<tr>")[2:]
    for row, title, alpha in zip(rows, ("5", "4"), ("0.60", "0.48"), strict=True):
        assert f'the <span title="{title}" style="background:rgba(99,102,241,{alpha})' in row
        assert row.count("<span") == 1  # tokens at which it does not fire have no shade
    exact = replace(first, values=[0.0, 1.23456, 0.0])
    assert 'title="1.23456"' in feature_html(replace(feature, examples=[exact]))


def test_nothing_of_a_corpus_or_a_label_is_markup(pages: Path):
    page = read(pages / "features" / "1-4.html")
    assert "<script>alert('x')</script> & <b>bold</b> text" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "by <img src=x>, score 0.90, 0.50 with labels of other features" in page.text
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("b")
    overview = read(pages / "index.html")
    assert "<script>alert(1)</script>" in overview.text
    assert len(overview.all("script")) == 1


def test_characters_without_a_look_are_spelled_out(index: FeatureIndex):
    feature = index["1/3"]
    odd = replace(feature.top[0], tokens=["a\n", "\x00\x1b", "\u202e"], values=[0.0, 3.0, 1.0])
    html = feature_html(replace(feature, label=Label("\x1b[1m", by="hand"), examples=[odd]))
    assert all(character.isprintable() or character == "\n" for character in html)
    assert "a↵" in html
    assert "\\x00\\x1b" in html


def test_pages_need_nothing_but_each_other(pages: Path):
    files = sorted(pages.rglob("*"))
    assert [str(path.relative_to(pages)) for path in files] == [
        "features", *(f"features/{name}.html" for name in ("1-3", "1-4", "1-50", "2-0")), "index.html",
    ]  # fmt: skip
    for path in pages.rglob("*.html"):
        page = read(path)
        assert "url(" not in page.html
        assert "@import" not in page.html
        for tag, attributes in page.elements:
            for name in ("src", "href", "srcset", "action"):
                if name in attributes and attributes[name] != "data:,":
                    assert tag == "a"
                    assert (path.parent / attributes[name]).is_file()


def test_only_the_filter_may_run(pages: Path):
    def allowed(page: Page) -> str:
        return next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")

    overview = read(pages / "index.html")
    script = overview.html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert allowed(overview).startswith("default-src 'none'")
    assert allowed(overview).endswith(f"script-src 'sha256-{digest}'")
    assert "script-src" not in allowed(read(pages / "features" / "1-3.html"))


def test_pages_can_be_read_with_a_keyboard_and_by_ear(pages: Path):
    for path in pages.rglob("*.html"):
        page = read(path)
        assert page.all("html") == [{"lang": "en"}]
        assert len(page.all("h1")) == 1
        assert len(page.all("main")) == 1
        assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
        assert all(row.get("aria-label") for row in page.all("svg"))
        assert not any("onclick" in attributes or "tabindex" in attributes for _, attributes in page.elements)
        labelled = {attributes.get("for") for attributes in page.all("label")}
        assert all(attributes["id"] in labelled for attributes in page.all("input"))
        assert "prefers-color-scheme:dark" in page.html
        assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))


def test_the_histogram_in_words(pages: Path):
    (svg,) = read(pages / "features" / "1-3.html").all("svg")
    assert svg["aria-label"].startswith("Activations from 2 to 8, most often from 2 to 2.828 (5 tokens)")
    assert svg["role"] == "img"
    assert len(read(pages / "features" / "1-3.html").all("rect")) == 4


def test_neighbours_are_linked_if_they_have_a_page(pages: Path):
    linked = read(pages / "features" / "1-3.html").table("Similar directions")
    assert '<a href="1-4.html">1/4</a> &lt;script&gt;' in linked
    alone = read(pages / "features" / "1-4.html").table("Similar directions")
    assert "1/5" in alone
    assert "<a " not in alone


def test_a_feature_that_never_fires(pages: Path):
    page = read(pages / "features" / "1-50.html")
    assert "Never fires in this corpus." in page.text
    assert not page.all("svg")
    assert "Strongest examples" not in page.text


def test_the_overview(pages: Path):
    page = read(pages / "index.html")
    assert [a["href"] for a in page.all("a")] == [f"features/{name}.html" for name in ("1-3", "1-4", "1-50", "2-0")]
    assert "courts & judges" in page.text
    assert [p for p in page.all("p") if p.get("class") == "filter"] == [{"class": "filter", "hidden": ""}]


def test_labelled_features_unless_told(index: FeatureIndex, tmp_path: Path):
    with pytest.raises(QwenScopeError, match="labelled"):
        export(index, tmp_path / "pages")
    assert not (tmp_path / "pages").exists()
    index.label("2/100", "something")
    index.label("1/0", "football")
    assert export(index, tmp_path / "pages") == tmp_path / "pages" / "index.html"
    assert sorted(path.stem for path in (tmp_path / "pages" / "features").iterdir()) == ["1-0", "2-100"]


def test_pages_that_cannot_be_written(index: FeatureIndex, tmp_path: Path):
    with pytest.raises(QwenScopeError, match="1/63"):
        export(index, tmp_path / "pages", ["1/3", "1/64"])
    assert not (tmp_path / "pages").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(QwenScopeError, match="choose another place"):
        export(index, tmp_path / "file", ["1/3"])


def test_a_fragment_for_notebooks(index: FeatureIndex):
    fragment = index["1/4"]._repr_html_()
    page = Page(fragment)
    assert not page.all("html")
    assert not page.all("script")
    assert "<script>alert('x')</script>" in page.text
    # It must not style the notebook around it.
    css = fragment.partition("<style>")[2].partition("</style>")[0]
    assert all(rule.strip().startswith(".qs") for rule in re.findall(r"(?:^|\})([^{}]+)\{", css))
