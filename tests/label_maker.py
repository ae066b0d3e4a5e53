"""What tests of labelling share: an index with enough examples to hold some out, and servers that answer as they are told."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from index_maker import write_index

from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.layout import EXAMPLES, FEATURES, write_examples, write_features

WORDS = ["goal", "bonjour", "comment", "court", "violin", "harbour", "saffron", "glacier", "ledger", "tiger"]
"""What each feature fires at; the features after them are dead."""
PLACES = ["In the morning", "Nobody knew", "They wrote about", "Last year", "She asked for", "We came upon"]
ENDS = ["again", "at last", "with care", "in the north", "for two hours", "without a word"]
EACH = len(PLACES)


def labelled_index(folder: Path, layer: int = 1, width: int = 64, **about: Any) -> FeatureIndex:
    """An index in which feature n fires at WORDS[n] and nothing else, with six top examples and six across the range."""
    write_index(folder, {layer: width}, **about)
    columns = {"dead": [n >= len(WORDS) for n in range(width)], "together": [[] for _ in range(width)]}
    rows = pq.read_table(folder / f"layer{layer}" / "features.parquet").to_pylist()
    for n, row in enumerate(rows):
        row.update({name: column[n] for name, column in columns.items()})
        row.update(fired=0 if row["dead"] else 20 + n, density=0.0 if row["dead"] else (20 + n) / 10000)
    write_features(folder, layer, pa.Table.from_pylist(rows, FEATURES))
    examples = [row for n, word in enumerate(WORDS) for row in _examples(n, word)]
    write_examples(folder, layer, pa.Table.from_pylist(examples, EXAMPLES))
    return FeatureIndex.open(folder)


def _examples(n: int, word: str) -> Iterator[dict[str, Any]]:
    for kind, base in (("top", 0), ("range", EACH)):
        for rank in range(EACH):
            end = ENDS[rank] if kind == "top" else ENDS[rank - 1]
            tokens = [f"{PLACES[rank]} the", f" {word}", f" {end}"]
            text = "".join(tokens)
            yield {
                "feature": n,
                "kind": kind,
                "rank": rank,
                "value": 12.0 - base - rank,
                "document": 100 * n + base + rank,
                "position": 1,
                "start": text.index(word) - 1,
                "end": text.index(word) + len(word),
                "window_start": 0,
                "window_end": len(text),
                "peak": 1,
                "tokens": tokens,
                "values": [0.0, 12.0 - base - rank, 0.0],
            }


class Reply(NamedTuple):
    """What a server says to a request."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = {"Content-Type": "application/json"}  # noqa: RUF012


def completion(text: Any, **more: Any) -> Reply:
    """A chat completion as OpenAI's."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return Reply(
        body=json.dumps({"id": "1", "object": "chat.completion", "choices": [{**choice, **more}], "usage": usage})
    )


def reader(question: str) -> Reply:
    """Answers as a perfect model of the index above would: it names what is marked, and picks texts that contain a label."""
    if marks := re.findall(r"<<(\w+)>>", question.partition("Texts:")[2]):
        return completion(max(set(marks), key=marks.count))
    label = question.partition("Asked for: ")[2].partition("\n")[0]
    texts = re.findall(r"^(\d+)\. (.*)$", question, re.MULTILINE)
    return completion(", ".join(number for number, text in texts if label in text) or "none")


class Server(ThreadingHTTPServer):
    """A server of chat completions, and what it was asked."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str], Reply | None]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append(question)
            self.server.bodies.append(body)
            self.server.times.append(time.monotonic())
            self.server.keys.append(self.headers.get("Authorization"))
        reply = self.server.answer(question)
        if reply is None:  # hangs up without a word
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        data = reply.body.encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serving(answer: Callable[[str], Reply | None]) -> Iterator[Server]:
    """A server on this machine while the block runs."""
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
