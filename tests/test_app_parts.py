"""The web app's parts that need no browser: links, heat maps, files, headers, settings."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import gradio as gr
import pytest

from qwen_scope import QwenScopeError
from qwen_scope.app import export, tokens
from qwen_scope.app.build import in_event_loop
from qwen_scope.app.config import AppConfig
from qwen_scope.app.headers import Headers
from qwen_scope.app.link import Link, href
from qwen_scope.app.shared import in_words

HOSTILE = "<script>alert('&amp;')</script> \"onerror='x' ${1} {{2}}\n"


class Texts(HTMLParser):
    """What a browser shows, and the elements it makes."""

    def __init__(self, html: str):
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


def test_a_link_sets_what_it_names_and_nothing_else():
    def built() -> Link:
        with gr.Blocks():
            text, count, ticked = gr.Textbox(), gr.Slider(1, 5, value=2, step=1), gr.Checkbox()
            free = gr.Number(precision=0)
            layers = gr.CheckboxGroup([("7", 7), ("15", 15)])
            kind, button, other = gr.Radio(["a", "b"]), gr.Button(), gr.Textbox()
            link = Link()
            link.keep("one", button, {"text": text, "n": count, "ticked": ticked, "layers": layers, "kind": kind})
            link.keep("two", button, {"text": other, "free": free})
            return link

    link = in_event_loop(built)

    def values(address: str) -> list:
        skipped = gr.skip()
        tab, *rest = link.restored(address)
        return [getattr(tab, "selected", None), *(None if each == skipped else each["value"] for each in rest)]

    nothing = [None] * 8
    assert values("") == values("#") == values("#tab=nowhere&text=x") == nothing
    assert values(href("one", text=HOSTILE, n=3, ticked=True, layers=[15], kind="b")) == [
        "one", HOSTILE, 3, True, [15], "b", None, None,
    ]  # fmt: skip
    assert values(href("two", text="5")) == ["two", *[None] * 5, "5", None]
    # What cannot be is passed over.
    assert values("#tab=one&n=9&ticked=2&layers=[8]&kind=c") == ["one", *[None] * 7]
    assert values("#tab=one&n=x&ticked=&layers=[[&n=true") == ["one", *[None] * 7]
    for endless in ("NaN", "Infinity", "-1e999", "9" * 400):
        assert values(f"#tab=one&n={endless}") == ["one", *[None] * 7]
        assert values(f"#tab=two&free={endless}") == ["two", *[None] * 7]
    # An emptied box is not one that was left as it was.
    assert values("#tab=one&text=") == ["one", "", *[None] * 6]
    assert values("#" + "&".join(["a=1"] * 1000)) == nothing


def test_a_heat_map_shows_every_token_as_text():
    given = [HOSTILE, "", "a\tb", "plain"]
    html = tokens.heat_map(
        given, [0.5, -3.0, float("nan"), 0.0], label='x"y', name="n'", titles=["<b>", "", "", ""], pressed=2, marked=[3]
    )
    read = Texts(html)
    assert read.text == "".join(map(tokens.shown, given))
    assert set(read.names) == {"div", "button", "br"}
    buttons = [each for each, name in zip(read.attributes, read.names, strict=True) if name == "button"]
    assert [each["data-at"] for each in buttons] == ["0", "1", "2", "3"]
    assert [each["aria-pressed"] for each in buttons] == ["false", "false", "true", "false"]
    assert [each["tabindex"] for each in buttons] == ["-1", "-1", "0", "-1"]
    assert [each["style"] for each in buttons] == [f"--shade:{n}" for n in ("0.500", "1.000", "0.000", "0.000")]
    assert buttons[0]["title"] == "<b>"
    assert "qs-against" in (buttons[1]["class"] or "")
    assert "qs-marked" in (buttons[3]["class"] or "")
    assert read.attributes[0]["aria-label"] == 'x"y'


def test_tables_and_notes_escape():
    assert Texts(tokens.note(HOSTILE)).text == HOSTILE
    read = Texts(tokens.table(HOSTILE, [HOSTILE], [["<b>1</b>"]], numbers=[0]))
    assert read.text == HOSTILE * 2 + "1"
    assert Texts(tokens.choose(HOSTILE, HOSTILE, HOSTILE)).attributes[0]["data-choose"] == HOSTILE


def test_csv_is_no_formula_and_keeps_white_space():
    rows = [["=1+1", " a\n", -2.5, None], ["plain", "x,y", 3, ""]]
    read = list(csv.reader(io.StringIO(export.to_csv(["a", "b", "c", "d"], rows))))
    assert read[0] == ["a", "b", "c", "d"]
    assert read[1] == ['"=1+1"', '" a\\n"', "-2.5", ""]
    assert json.loads(read[1][1]) == " a\n"
    assert read[2] == ["plain", "x,y", "3", ""]


def test_json_has_no_numbers_that_are_none():
    assert json.loads(export.to_json({"a": [float("nan"), 1.5], "b": (float("inf"),)})) == {
        "a": [None, 1.5],
        "b": [None],
    }


def test_errors_are_told_as_text():
    @in_words
    def fails():
        raise QwenScopeError(HOSTILE)

    @in_words
    def yields():
        yield 1
        raise QwenScopeError(HOSTILE)

    with pytest.raises(gr.Error) as error:
        fails()
    assert Texts(error.value.message).text == HOSTILE
    steps = yields()
    assert next(steps) == 1
    with pytest.raises(gr.Error, match="&lt;script"):
        next(steps)


def test_settings_are_checked(monkeypatch):
    assert AppConfig().local
    assert not AppConfig(host="0.0.0.0").local
    for wrong in ({"max_tokens": 0}, {"at_once": 0}, {"port": 70000}):
        with pytest.raises(QwenScopeError, match=f"expected .*{next(iter(wrong))}"):
            AppConfig(**wrong)
    monkeypatch.delenv("NO_SUCH_PASSWORD", raising=False)
    with pytest.raises(QwenScopeError, match="expected a password in the environment variable NO_SUCH_PASSWORD"):
        AppConfig(password_variable="NO_SUCH_PASSWORD").password()
    monkeypatch.setenv("NO_SUCH_PASSWORD", "secret")
    assert AppConfig(password_variable="NO_SUCH_PASSWORD").password() == "secret"


def test_foreign_names_of_this_machine_are_refused():
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    inner = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))])
    for local, host, status in (
        (True, "127.0.0.1:9", 200),
        (True, "127.0.0.2", 200),
        (True, "[::1]:9", 200),
        (True, "evil.example", 400),
        (True, "[", 400),
        (False, "evil.example", 200),
    ):
        answer = TestClient(Headers(inner, local)).get("/", headers={"Host": host})
        assert answer.status_code == status
        if status == 200:
            assert re.match("default-src 'self'", answer.headers["content-security-policy"])


def test_pages_of_other_sites_may_link_here_but_ask_nothing():
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    inner = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"), methods=["GET", "POST"])])
    client = TestClient(Headers(inner, local=False))
    for method, site, mode, status in (
        ("GET", "cross-site", "navigate", 200),
        ("GET", "cross-site", "cors", 403),
        ("POST", "cross-site", "no-cors", 403),
        ("POST", "cross-site", "navigate", 403),
        ("POST", "same-origin", "cors", 200),
        ("GET", "none", "navigate", 200),
    ):
        given = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        assert client.request(method, "/", headers=given).status_code == status


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_other_addresses_of_this_machine_are_listened_on(host, llama, suite, tokenizer):
    from urllib.request import urlopen

    from qwen_scope import Scope
    from qwen_scope.app.serve import free_port, running

    try:
        free_port(host)
    except OSError:
        pytest.skip(f"this machine has no address {host}")
    with running(Scope(llama, suite, tokenizer), None, AppConfig(host=host, port=0)) as address:
        assert (f"[{host}]" if ":" in host else host) in address
        assert b"Qwen-Scope" in urlopen(address).read()
