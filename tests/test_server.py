"""The server: OpenAI's own client against a real socket, what it refuses, and that requests do not touch each other."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from index_maker import write_index
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from server_maker import MODEL, Served, served, slowed

from qwen_scope.backbone import Backbone
from qwen_scope.cli import main
from qwen_scope.cli.serve import Serve
from qwen_scope.errors import QwenScopeError
from qwen_scope.fingerprint import fingerprint
from qwen_scope.generation import Generation, Sampling
from qwen_scope.scope import Scope
from qwen_scope.server import ServerConfig, create_app, running
from qwen_scope.suite import Suite

# What clients send should meet what users meet, not the check of shapes that only tests have.
pytestmark = pytest.mark.usefixtures("unchecked")
MESSAGES: Any = [{"role": "user", "content": "the capital of France"}]
STEERING = "1/3:9 2/5:=4@generated"
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
MIB = 2**20


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


@pytest.fixture(scope="module")
def server(scope, tmp_path_factory) -> Iterator[Served]:
    index = write_index(tmp_path_factory.mktemp("index"), {1: 128})
    with served(scope, index, max_edits=4, max_prompt_tokens=200, max_new_tokens=100, max_texts=3) as found:
        yield found


@pytest.fixture
def slow_scope(make_model, suite, tokenizer) -> Scope:
    scope = Scope(make_model("llama"), suite, tokenizer)
    slowed(scope, 0.015)
    return scope


def generated(scope: Scope, steering: Any = None, prompt: Any = None, **sampling: Any) -> Generation:
    given = {"max_new_tokens": 12, "ignore_eos": True, **sampling}
    return scope.generate(MESSAGES if prompt is None else prompt, steering, Sampling(**given))


def asked(client: OpenAI, steering: Any = None, extra: dict[str, Any] | None = None, **more: Any) -> Any:
    options = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **more}
    body = {"ignore_eos": True, **(extra or {})} | ({} if steering is None else {"steering": steering})
    return client.chat.completions.create(**options, extra_body=body)


# What it answers


@pytest.mark.parametrize(
    "steering",
    [
        None,
        STEERING,
        {"edits": [{"feature": "1/3", "strength": 9, "where": "prompt"}]},
        ["1/3:9", {"feature": "2/5", "how": "ablate"}],
    ],
)
def test_a_chat_is_what_generate_gives(scope: Scope, server: Served, steering: Any):
    answer, expected = asked(server.client, steering), generated(scope, steering)
    choice = answer.choices[0]
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason, answer.model, answer.object) == (
        "assistant",
        "length",
        MODEL,
        "chat.completion",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(expected.prompt_ids), 12)
    if steering is None:
        assert "steering" not in choice.model_extra
    else:
        assert " ".join(choice.steering["edits"]) == expected.steering
        assert choice.steering["tokens_steered"] == expected.steered_tokens


def test_steering_changes_the_answer(server: Served):
    assert asked(server.client).choices[0].message.content != asked(server.client, STEERING).choices[0].message.content


@pytest.mark.parametrize("prompt", ["the capital", ["the capital", "of Italy"], [5, 6, 7], [[5, 6], [7, 8, 9]]])
def test_completions_continue_text_and_token_ids(scope: Scope, server: Served, prompt: Any):
    answer = server.client.completions.create(model=MODEL, prompt=prompt, **GREEDY, n=2)
    expected = generated(scope, prompt=prompt)
    texts = [expected] if isinstance(expected, Generation) else expected
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (2 * n + i, text.text) for n, text in enumerate(texts) for i in range(2)
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(text.prompt_ids) for text in texts)


def test_a_completion_has_16_tokens_unless_told(server: Served):
    body = {"prompt": "the capital", "ignore_eos": True}
    assert server.post("completions", body).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("steering", [None, STEERING])
def test_a_streamed_chat_is_the_same(server: Served, steering: Any):
    whole = asked(server.client, steering)
    chunks = list(asked(server.client, steering, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    if steering:
        assert chunks[-2].choices[0].steering == whole.choices[0].steering


def test_a_streamed_completion_is_the_same(server: Served):
    options = {"model": MODEL, "prompt": ["the capital", "of Italy"], **GREEDY}
    whole = server.client.completions.create(**options)
    texts = ["", ""]
    for chunk in server.client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_a_stream_is_events_as_openai_sends_them(server: Served):
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3, "stream": True}
    with server.web.stream("POST", f"{server.url}/chat/completions", json=body) as answer:
        text = answer.read().decode()
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_text_held_back_for_a_stop_text_comes_after_all(scope: Scope, server: Served):
    text = generated(scope).text
    # It begins with the last character, and never ends.
    stop = text[-1] + "never"
    pieces = [c.choices[0].delta.content or "" for c in asked(server.client, stop=stop, stream=True)]
    assert "".join(pieces) == text


@pytest.mark.parametrize("many", [False, True])
def test_stop_texts_end_the_answer(scope: Scope, server: Served, many: bool):
    text = generated(scope).text
    stop = next(character for character in text[3:] if character not in text[:3])
    choice = asked(server.client, stop=["neverthere", stop] if many else stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_probabilities_of_a_chat(scope: Scope, server: Served):
    expected = generated(scope, STEERING, candidates=3).tokens
    content = asked(server.client, STEERING, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [(token.token, token.logprob) for token in content] == [
        (token.text, pytest.approx(token.logprob, abs=1e-4)) for token in expected
    ]
    assert [[other.token for other in token.top_logprobs] for token in content] == [
        [other.text for other in token.candidates] for token in expected
    ]
    assert all(token.bytes in (None, list(token.token.encode())) for token in content)
    chunks = asked(server.client, STEERING, logprobs=True, top_logprobs=3, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.text for token in expected]


def test_probabilities_of_a_completion(scope: Scope, server: Served):
    expected = generated(scope, prompt="the capital", candidates=2)
    choice = server.client.completions.create(model=MODEL, prompt="the capital", logprobs=2, **GREEDY).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [token.text for token in expected.tokens]
    assert choice.logprobs.token_logprobs == pytest.approx([token.logprob for token in expected.tokens], abs=1e-4)
    assert choice.logprobs.top_logprobs is not None
    assert [set(top) for top in choice.logprobs.top_logprobs] == [
        {other.text for other in token.candidates} for token in expected.tokens
    ]


def test_choices_differ_by_their_seeds_and_a_seed_repeats(scope: Scope, server: Served):
    def drawn(**more: Any) -> list[str]:
        return [c.message.content for c in asked(server.client, temperature=1, **more).choices]

    three = drawn(n=3, seed=5)
    assert three == drawn(n=3, seed=5)
    assert three == [text for i in range(3) for text in drawn(seed=5 + i)]
    assert len(set(three)) == 3
    assert three[1] == generated(scope, temperature=1.0, seed=6).text
    # Without a seed every answer is another.
    assert len({text for _ in range(3) for text in drawn()}) == 3


def test_the_temperature_is_one_unless_told(server: Served):
    body = {"seed": 7, "max_tokens": 10, "ignore_eos": True}
    texts = [
        server.chat(**body, **more).json()["choices"][0]["message"]["content"] for more in ({}, {"temperature": 1})
    ]
    assert texts[0] == texts[1]


def test_top_k_of_one_is_greedy(server: Served):
    drawn = asked(server.client, temperature=1, extra={"top_k": 1}).choices[0].message.content
    assert drawn == asked(server.client).choices[0].message.content


def test_a_trace_says_what_the_steering_did(scope: Scope, server: Served):
    steering = asked(server.client, STEERING, {"trace": True}).choices[0].steering
    expected = scope.generate(MESSAGES, STEERING, Sampling(max_new_tokens=12, ignore_eos=True), trace=True)
    assert steering["trace"] == json.loads(json.dumps(expected.trace.to_dict()))
    assert steering["trace"]["effective"]


def test_thinking_and_parts_of_text_and_developers_reach_the_template(scope: Scope, server: Served):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "capital"}]
    messages: Any = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the capital"}]
    for thinking in (False, True):
        extra = {"chat_template_kwargs": {"enable_thinking": thinking}}
        answer = asked(server.client, None, extra, messages=messages)
        sampling = Sampling(max_new_tokens=12, ignore_eos=True)
        expected = scope.generate(plain, None, sampling, thinking=thinking)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == len(expected.prompt_ids)


def test_an_answer_can_be_sent_back(server: Served):
    message = asked(server.client).choices[0].message
    asked(server.client, messages=[*MESSAGES, message, {"role": "user", "content": "and Italy"}])


def test_fields_that_make_no_difference_are_taken(server: Served):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "tools": [], "presence_penalty": 0.0}
    more = {"response_format": {"type": "text"}, "logit_bias": {}, "max_tokens": 3, "stop": None}
    assert server.chat(**harmless, **more).status_code == 200


def test_the_models(server: Served):
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="expected the model"):
        asked(server.client, model="gpt-4")


def test_a_model_can_be_given_a_name(scope: Scope):
    with served(scope, model_name="org/mine") as server:
        assert server.client.models.retrieve("org/mine").id == "org/mine"
        assert asked(server.client, model="org/mine").model == "org/mine"


# Features and the index


def test_features_of_texts(scope: Scope, server: Served):
    texts = ["the capital", "of France"]
    answer = server.post("features", {"input": texts, "top": 3, "layers": [1, 2]})
    assert answer.json()["data"] == [
        json.loads(json.dumps(text.to_dict(3))) for text in scope.features(texts, layers=[1, 2])
    ]
    one = server.post("features", {"input": "the capital"}).json()["data"]
    assert one == [json.loads(json.dumps(scope.features("the capital").to_dict(8)))]
    chat = server.post("features", {"messages": MESSAGES}).json()["data"][0]
    assert chat["text"] == scope.features(MESSAGES).text


def test_features_of_the_index(server: Served):
    found = server.web.get(f"{server.url}/features/1/0").json()
    assert (found["name"], found["top_tokens"][0]["token"]) == ("1/0", "goal")
    hits = server.web.get(f"{server.url}/features/search", params={"q": "goal", "count": 3, "layer": 1}).json()["data"]
    assert hits[0]["name"] == "1/0"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("features/9/0", 404),
        ("features/1/9999", 404),
        ("features/x/y", 404),
        ("features/search", 400),
        ("features/search?q=goal&count=0", 400),
        ("features/search?q=goal&count=many", 400),
        ("features/search?q=goal&layer=9", 400),
        ("features/search?query=goal", 400),
        ("nowhere", 404),
        ("chat/completions", 405),
    ],
)
def test_what_the_index_does_not_have(server: Served, path: str, status: int):
    refused(server.web.get(f"{server.url}/{path}"), status)


def test_a_server_without_an_index_says_so(scope: Scope):
    with served(scope) as server:
        for path in ("features/1/0", "features/search?q=goal"):
            assert "--index" in refused(server.web.get(f"{server.url}/{path}"), 404)


# What it refuses


def refused(answer: httpx.Response, status: int, param: str | None = None) -> str:
    """Checks that an answer is OpenAI's error object with a sentence of ours."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message.startswith("expected ")
    assert ", found " in message
    assert ";" in message
    assert "pydantic" not in message
    assert "\n" not in message
    if param is not None:
        assert error["param"] == param
    return message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"steering": "9/1:2"}, "steering"),
        ({"steering": "1/9999:2"}, "steering"),
        ({"steering": "1/3:nan"}, "steering"),
        ({"steering": {"feature": "1/3", "strength": 10**400}}, "steering"),
        ({"steering": {"feature": "1/3", "strength": "2"}}, "steering"),
        ({"steering": {"feature": "1/3", "amount": 2}}, "steering"),
        ({"steering": 7}, "steering"),
        ({"steering": "1/3:=1 1/3:*2"}, "steering"),
        ({"steering": "1/1:1 1/2:1 1/3:1 1/4:1 1/5:1"}, "steering"),
        ({"steering": "1/1:1 " * 20000}, "steering"),
        ({"steering": "/etc/passwd"}, "steering"),
        ({"steering": "1/3:1@5000"}, None),
        ({"stearing": "1/3:1"}, "stearing"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"temperature": -1}, None),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, None),
        ({"seed": 2**64}, None),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"n": 10**12}, "n"),
        ({"stop": ""}, None),
        ({"stop": ["a"] * 17}, None),
        ({"stop": [5]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"trace": True}, "trace"),
        ({"trace": True, "steering": "1/3:1", "stream": True}, "trace"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 10**400}, "frequency_penalty"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_cannot_be_asked_is_a_sentence(server: Served, body: dict, param: str | None):
    sent = json.dumps({"messages": MESSAGES, "max_tokens": 3, **body})
    answer = server.web.post(
        f"{server.url}/chat/completions", content=sent, headers={"Content-Type": "application/json"}
    )
    refused(answer, 400, param)
    server.idle()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [99999]}, "prompt"),
        ("completions", {"prompt": [[1], "x"]}, "prompt"),
        ("completions", {"prompt": ["x"] * 40}, "prompt"),
        ("completions", {"prompt": [5] * 201}, "prompt"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "x", "logprobs": True}, "logprobs"),
        ("features", {}, "input"),
        ("features", {"input": "x", "messages": MESSAGES}, "input"),
        ("features", {"input": ["x"] * 4}, "input"),
        ("features", {"input": "x", "layers": [9]}, "layers"),
        ("features", {"input": "x", "top": 0}, "top"),
        ("features", {"input": [5] * 201}, "input"),
        ("features", {"input": "x", "unknown": 1}, "unknown"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_what_other_addresses_refuse(server: Served, path: str, body: dict, param: str):
    refused(server.post(path, body), 400, param)


def test_more_features_than_an_answer_can_tell_are_refused(scope: Scope):
    with served(scope, max_texts=100, max_feature_tokens=30_000) as server:
        texts = [[5] * 250] * 100
        assert "found 600000 of all tokens and layers" in refused(server.post("features", {"input": texts}), 400)
        assert server.post("features", {"input": texts, "layers": [1], "top": 1}).status_code == 200


def test_a_prompt_beyond_the_context_is_refused(scope: Scope):
    with served(scope, max_new_tokens=10) as server:
        refused(server.post("completions", {"prompt": [5] * 256}), 400)
        answer = server.post("completions", {"prompt": [5] * 250, "max_tokens": 10, "ignore_eos": True}).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"temperature": Infinity}',
        b"[" * 100_000,
        b'{"steering": ' + b"[" * 400 + b"]" * 400 + b', "messages": [{"role": "user", "content": "x"}]}',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_body_that_is_no_such_object_is_refused(server: Served, content: bytes):
    answer = server.web.post(
        f"{server.url}/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    refused(answer, 400)


def test_a_body_of_another_kind_is_refused(server: Served):
    # Web pages may send these anywhere without being asked first.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = server.web.post(f"{server.url}/chat/completions", content=b"{}", headers={"Content-Type": kind})
        assert "Content-Type" in refused(answer, 400)


def spoken(server: Served, head: str, *parts: bytes) -> bytes:
    """What the server says to bytes on a socket."""
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n".encode())
        for part in parts:
            connection.sendall(part)
        return connection.recv(65536)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: Served):
    head = "Content-Type: application/json\r\n"
    # Nothing but the announcement has been sent.
    assert spoken(server, f"{head}Content-Length: {100 * MIB}").startswith(b"HTTP/1.1 413")
    assert spoken(server, f"{head}Content-Length: {'9' * 30}")[9:12] in (b"413", b"400")
    # In chunks, a little more than allowed and never the end.
    chunk = b"%x\r\n" % MIB + b" " * MIB + b"\r\n"
    assert spoken(server, f"{head}Transfer-Encoding: chunked", chunk, chunk, chunk).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_refused_and_others_go_on(server: Served, chunked: bool):
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * MIB

    content = parts() if chunked else b" " * (100 * MIB)
    answer = server.web.post(
        f"{server.url}/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    refused(answer, 413)
    assert server.chat(max_tokens=2).status_code == 200


def test_only_who_has_the_key_is_let_in(scope: Scope, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", "sésame")
    with served(scope, key="x", api_key_variable="A_KEY") as server:
        refused(server.chat(), 401)
        with pytest.raises(openai.AuthenticationError):
            asked(server.client)
        url = f"{server.url}/models"
        refused(httpx.get(url), 401)
        assert httpx.get(url, headers={b"Authorization": "Bearer sésame".encode()}).status_code == 200
        assert httpx.get(f"{server.url.removesuffix('/v1')}/health").status_code == 200


def test_a_key_that_is_not_set_is_told_at_once(scope: Scope, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(QwenScopeError, match="A_KEY"):
        create_app(scope, None, ServerConfig(api_key_variable="A_KEY"))


def test_a_web_page_whose_name_points_here_is_refused(server: Served):
    health = f"{server.url.removesuffix('/v1')}/health"
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1"):
        refused(server.web.get(health, headers={"Host": host}), 400)
    for host in ("localhost:1234", "127.0.0.1", "[::1]:80"):
        assert server.web.get(health, headers={"Host": host}).status_code == 200
    assert (
        "access-control-allow-origin" not in server.web.get(health, headers={"Origin": "http://evil.example"}).headers
    )


# Requests beside each other


def test_each_of_32_clients_gets_what_it_gets_alone(scope: Scope, server: Served):
    def steering(n: int) -> str:
        how = (f":{n - 16}", f":={n}", ":ablate", ":*3", f":{n}@prompt", f":{n}@generated", f":{n}@-1")[n % 7]
        return f"{n % 3}/{4 * n}{how} {(n + 1) % 3}/{3 * n}:{n / 4}"

    def one(n: int) -> tuple[str, list[int]]:
        prompt = "the capital of France is Paris"[: 3 + n % 20]
        answer = server.client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=5 + n % 8, extra_body={"steering": steering(n)}
        )
        return answer.choices[0].text, answer.choices[0].steering["tokens_steered"]  # pyright: ignore

    alone = [
        scope.generate("the capital of France is Paris"[: 3 + n % 20], steering(n), Sampling(max_new_tokens=5 + n % 8))
        for n in range(32)
    ]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(one, range(32)))
    assert together == [(text.text, text.steered_tokens) for text in alone]
    assert len({text for text, _ in together}) > 25


def test_a_client_that_hangs_up_is_forgotten_and_others_go_on(scope: Scope, slow_scope: Scope):
    with served(slow_scope) as server, ThreadPoolExecutor(1) as pool:
        other = pool.submit(asked, server.client, STEERING, max_tokens=60)
        server.until("running", 1)
        with asked(server.client, max_tokens=200, stream=True) as chunks:
            for _ in zip(range(3), chunks, strict=False):
                pass
            server.until("running", 2)
        server.until("running", 1)
        assert server.figures()["generated_tokens_total"] < 150
        assert other.result().choices[0].message.content == generated(scope, STEERING, max_new_tokens=60).text
        server.idle()


def test_a_client_that_hangs_up_before_any_answer_is_forgotten(slow_scope: Scope):
    with served(slow_scope) as server:
        head = "Content-Type: application/json\r\n"
        body = json.dumps({"messages": MESSAGES, "max_tokens": 200, "ignore_eos": True, "n": 3}).encode()
        host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
        with socket.create_connection((host, int(port))) as connection:
            request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n{head}Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(request.encode() + body)
            server.until("running", 3)
        assert server.until("running", 0)["cancelled_total"] == 3
        server.idle()


def test_too_many_at_once_are_asked_to_come_again(slow_scope: Scope):
    with served(slow_scope, max_rows=1, max_queued=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.chat, max_tokens=40, ignore_eos=True)
        server.until("running", 1)
        second = pool.submit(server.chat, max_tokens=2)
        server.until("queued", 1)
        answer = server.chat()
        assert "waiting" in refused(answer, 429)
        assert answer.headers["retry-after"] == "1"
        assert [each.result().status_code for each in (first, second)] == [200, 200]
        server.idle()


def test_memory_bounds_what_runs_together(slow_scope: Scope):
    # Each text can come to some 60 tokens: two of them fit, the third waits.
    with served(slow_scope, max_batch_tokens=130, max_new_tokens=50) as server, ThreadPoolExecutor(3) as pool:
        prompt = {"prompt": [5] * 10, "max_tokens": 50, "ignore_eos": True}
        answers = [pool.submit(server.post, "completions", prompt) for _ in range(3)]
        server.until("running", 2)
        server.until("queued", 1)
        assert {answer.result().status_code for answer in answers} == {200}


def test_what_takes_too_long_ends(slow_scope: Scope):
    with served(slow_scope, max_seconds=1) as server:
        answer = server.chat(max_tokens=200, ignore_eos=True)
        assert "1 seconds" in refused(answer, 408)
        with pytest.raises(openai.APIError, match="within 1 seconds"):
            list(asked(server.client, max_tokens=200, stream=True))
        server.idle()
        assert server.chat(max_tokens=2).status_code == 200


def test_traces_end_when_nobody_waits_for_them(slow_scope: Scope):
    with served(slow_scope, max_seconds=1) as server:
        answer = server.chat(max_tokens=2, ignore_eos=True, n=32, steering="1/3:1", trace=True)
        assert "1 seconds" in refused(answer, 408)


def test_numbers_that_break_fail_alone(scope: Scope, slow_scope: Scope):
    with served(slow_scope) as server, ThreadPoolExecutor(2) as pool:
        other = pool.submit(asked, server.client, STEERING, max_tokens=40)
        server.until("running", 1)
        assert "smaller strength" in refused(server.chat(steering="1/3:1e38"), 400)
        # At a generated token, once the row runs beside the other; its sibling of the same request goes with it.
        later = server.chat(steering="1/3:1e38@generated", n=2)
        assert "smaller strength" in refused(later, 400)
        assert other.result().choices[0].message.content == generated(scope, STEERING, max_new_tokens=40).text
        server.idle()


def test_a_model_that_fails_takes_down_what_runs_and_nothing_else(make_model, suite, tokenizer):
    scope = Scope(make_model("llama"), suite, tokenizer)
    slowed(scope, 0.015)
    broken = {"prompt": False, "step": False}

    def failing(module: Any, args: Any) -> None:
        if broken["prompt" if args[0].shape[1] > 1 else "step"]:
            raise RuntimeError("out of memory")

    scope.backbone.layers[1].register_forward_pre_hook(failing)
    with served(scope) as server, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.chat, max_tokens=30, ignore_eos=True)
        server.until("running", 1)
        broken["prompt"] = True
        refused(server.chat(max_tokens=2), 500)
        broken["prompt"] = False
        assert running.result().status_code == 200  # a prompt that fails hurts nobody else
        both = [pool.submit(server.chat, max_tokens=100, ignore_eos=True) for _ in range(2)]
        server.until("running", 2)
        broken["step"] = True
        for each in both:
            refused(each.result(), 500)
        broken["step"] = False
        server.idle()
        assert asked(server.client).choices[0].message.content == generated(scope).text


def test_features_are_read_while_texts_are_generated(slow_scope: Scope):
    with served(slow_scope) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.chat, max_tokens=100, ignore_eos=True)
        server.until("running", 1)
        assert server.post("features", {"input": "the capital"}).status_code == 200
        assert not running.done()
        assert running.result().status_code == 200


@contextmanager
def stopped_while_running(scope: Scope, seconds: float, tokens: int) -> Iterator[Future[str]]:
    """A streamed answer, begun before the server was asked to stop."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        web = stack.enter_context(httpx.Client(timeout=60))
        with running(scope, None, ServerConfig(port=0, shutdown_seconds=seconds)) as url:
            body = {"messages": MESSAGES, "max_tokens": tokens, "ignore_eos": True, "stream": True}
            answer = pool.submit(lambda: web.post(f"{url}/chat/completions", json=body).text)
            client = stack.enter_context(OpenAI(base_url=url, api_key="none", max_retries=0))
            Served(url, client, stack.enter_context(httpx.Client())).until("running", 1)
        with pytest.raises(openai.APIConnectionError):
            asked(client)
        yield answer


def test_what_runs_when_the_server_is_asked_to_stop_may_end(slow_scope: Scope):
    with stopped_while_running(slow_scope, 60, 30) as answer:
        assert '"finish_reason": "length"' in answer.result()
        assert answer.result().endswith("data: [DONE]\n\n")


def test_what_takes_longer_is_told_that_the_server_stops(slow_scope: Scope):
    with stopped_while_running(slow_scope, 0, 230) as answer:
        assert "found that it is stopping" in answer.result()
        assert "DONE" not in answer.result()


def test_metrics_are_prometheus_and_count(scope: Scope):
    with served(scope) as server:
        asked(server.client, n=2)
        server.chat(steering="9/9:1")
        server.web.get(f"{server.url}/no/such/place")
        server.web.get(f"{server.url}/models/any")
        text = server.web.get(f"{server.url.removesuffix('/v1')}/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        counted = {
            (sample.labels["endpoint"], sample.labels["status"]): sample.value
            for sample in families["qwen_scope_requests"].samples
            if sample.name.endswith("_total")
        }
        assert counted == {
            ("/v1/chat/completions", "200"): 1,
            ("/v1/chat/completions", "400"): 1,
            ("other", "404"): 1,
            ("/v1/models/…", "404"): 1,
        }
        figures = server.figures()
        assert figures["generated_tokens_total"] == 24
        assert figures["time_to_first_token_seconds_count"] == 2
        assert figures["tokens_per_second"] > 0
        assert (figures["running"], figures["queued"], figures["cache_bytes"]) == (0, 0, 0)
        assert figures["process_resident_memory_bytes"] > 0 if sys.platform == "linux" else True


def test_after_a_mixed_load_nothing_is_left(scope: Scope, server: Served):
    kinds = ("chat", "stream", "completion", "features", "bad", "hang up")
    expected = {kind: set() for kind in kinds}

    def ask(chance: random.Random) -> tuple[str, int]:
        kind = chance.choice(kinds)
        steering = f"{chance.randrange(3)}/{chance.randrange(128)}:{chance.uniform(-20, 20)}"
        body: dict[str, Any] = {"max_tokens": chance.randint(1, 30), "seed": chance.randrange(99), "steering": steering}
        if kind == "bad":
            bad = chance.choice([{"steering": "9/9:1"}, {"max_tokens": 0}, {"n": 99}, {"steering": "1/3:1e38"}])
            return kind, server.chat(**body | bad).status_code
        if kind == "features":
            return kind, server.post("features", {"input": "the capital", "top": 1}).status_code
        if kind == "completion":
            return kind, server.post("completions", {**body, "prompt": "the capital", "n": 2}).status_code
        if kind == "chat":
            return kind, server.chat(**body).status_code
        sent = {**body, "messages": MESSAGES, "stream": True}
        with server.web.stream("POST", f"{server.url}/chat/completions", json=sent) as answer:
            lines = answer.iter_lines()
            if kind == "hang up":
                next(lines)
            else:
                assert list(lines)[-2:] == ["data: [DONE]", ""]
        return kind, answer.status_code

    def load(seed: int) -> list[tuple[str, int]]:
        chance = random.Random(seed)
        return [ask(chance) for _ in range(12)]

    with ThreadPoolExecutor(8) as pool:
        found = [each for many in pool.map(load, range(8)) for each in many]
    for kind, status in found:
        expected[kind].add(status)
    assert expected == {kind: {400 if kind == "bad" else 200} for kind in kinds}
    server.idle()
    assert asked(server.client).choices[0].message.content == generated(scope).text


# Its place


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["serve", "--port", str(taken.getsockname()[1]), "--model", "nowhere", "--suite", "nowhere"])
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"port": 70000}, {"max_rows": 0}, {"max_seconds": float("nan")}, {"host": "no host"}]
)
def test_a_place_or_limit_that_cannot_be_is_a_sentence(scope: Scope, wrong: dict):
    with pytest.raises(QwenScopeError), running(scope, None, ServerConfig(**{"port": 0, **wrong})):
        pass


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.example", False)],
)
def test_what_only_this_machine_can_reach(host: str, local: bool):
    assert ServerConfig(host=host).local == local


def test_an_index_must_be_of_the_suite_that_is_served(llama, suite: Suite, tokenizer, tmp_path: Path):
    scope = Scope(llama, suite, tokenizer, layers=[1])
    other = write_index(tmp_path / "other", {1: 128}).folder
    with pytest.raises(QwenScopeError, match="other weights"):
        Serve(index=other)._index(scope)
    own = write_index(tmp_path / "own", {1: 128}, fingerprint=fingerprint(suite, [1])).folder
    index = Serve(index=own)._index(scope)
    assert index is not None
    assert index.folder == own
    # What strengths are counted in is the highest activation that the index knows.
    assert scope.changes("1/0:2x")[0].strength == 16
    assert Serve()._index(scope) is None


# The bundled model


@pytest.mark.real
def test_the_command_serves_until_it_is_interrupted(tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qwen_scope.cli", "serve", "--port", "0", "--layers", "15"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line, caution = process.stdout.readline(), process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        assert "caution" in caution
        with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(
                model="bundled",
                messages=[{"role": "user", "content": "Tell me a story."}],
                max_tokens=8,
                temperature=0,
                extra_body={"steering": "15/1037:0.5x"},
            )
            feature = client.get("/features/15/1037", cast_to=dict)
        assert answer.choices[0].message.content
        assert feature["name"] == "15/1037"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@pytest.mark.real
def test_32_clients_of_the_bundled_model_get_what_they_get_alone(bundled: Backbone):
    scope = Scope(bundled, Suite.from_pretrained(), layers=[15])
    prompts = ["Once upon a time", "The weather today", "My favourite food is", "In the year 1900,"]

    def steering(n: int) -> str:
        return f"15/{1037 + 31 * n}:{0.3 + 0.02 * n:.2f}x"

    alone = [scope.generate(prompts[n % 4], steering(n), Sampling(max_new_tokens=5)).text for n in range(32)]
    with served(scope) as server:

        def one(n: int) -> str:
            answer = server.client.completions.create(
                model="bundled",
                prompt=prompts[n % 4],
                max_tokens=5,
                temperature=0,
                extra_body={"steering": steering(n)},
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(one, range(32))) == alone
