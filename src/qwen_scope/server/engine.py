"""`Engine`: one thread that owns a `Batch` and generates the texts of all requests together, for as long as they come."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_scope.errors import QwenScopeError
from qwen_scope.generation.batch import Batch
from qwen_scope.generation.continuation import Continuation
from qwen_scope.generation.result import GeneratedToken
from qwen_scope.server.config import ServerConfig
from qwen_scope.server.metrics import Metrics
from qwen_scope.server.refused import Refused

if TYPE_CHECKING:
    from qwen_scope.scope import Scope

PROMPTS = 4
"""Prompts read between two steps at most, so that the texts that are running go on."""
RECENT = 10.0
"""Seconds that the speed is measured over."""

_log = logging.getLogger("qwen_scope.server")


@dataclass(frozen=True)
class News:
    """What became of one text of a request since the last time."""

    choice: int
    """Which of the request's texts."""
    tokens: Sequence[GeneratedToken] = ()
    """Tokens generated."""
    rest: str = ""
    """Text that belongs after the last of them, once the text has ended."""
    done: bool = False
    """Whether the text has ended."""
    refused: Refused | None = None
    """Why the whole request ends without an answer, if it does."""


class Ticket:
    """A request's texts. Made in the event loop that waits for them.

    Args:
        texts: what is to be generated.
        asked: when the request came, by `time.monotonic`.
        deadline: when it must have ended, by the same clock.
        streaming: whether every token is news, or only the end.
    """

    def __init__(self, texts: Sequence[Continuation], asked: float, deadline: float, streaming: bool):
        self.texts, self.asked, self.deadline, self.streaming = texts, asked, deadline, streaming
        self.news: asyncio.Queue[News] = asyncio.Queue()
        """What the engine tells, in order."""
        self.ended = False
        """Whether it was refused, or nobody waits for it any more: its texts are taken out as soon as may be."""
        self._loop = asyncio.get_running_loop()

    def tell(self, news: News) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop has been closed, and nobody waits
            self._loop.call_soon_threadsafe(self.news.put_nowait, news)

    def refuse(self, why: Refused) -> None:
        """Ends it without an answer. Called in the engine's thread."""
        if not self.ended:
            self.ended = True
            self.tell(News(0, refused=why))


class _Row:
    """One text of a ticket, and how many of its tokens have been told."""

    def __init__(self, ticket: Ticket, choice: int):
        self.ticket, self.choice, self.text = ticket, choice, ticket.texts[choice]
        self.told = 0

    @property
    def longest(self) -> int:
        """Tokens that it can come to."""
        return len(self.text.prompt) + self.text.sampling.max_new_tokens


class Engine:
    """Generates the texts of all requests together.

    Args:
        scope: the model and its SAEs.
        config: the limits.
        metrics: what is counted.
    """

    def __init__(self, scope: Scope, config: ServerConfig, metrics: Metrics):
        self.scope, self.config, self.metrics = scope, config, metrics
        self.running = 0
        """Texts that are being generated."""
        self.cache_bytes = 0
        """Bytes of keys, values and states held."""
        self._batch = self._fresh()
        self._rows: dict[int, _Row] = {}  # by id of the text
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._accepting = self._open = True
        self._last_moment = float("inf")
        self._recent: deque[tuple[float, int]] = deque()
        self._thread: threading.Thread | None = None

    @property
    def queued(self) -> int:
        """Texts that wait for their turn."""
        return len(self._waiting)

    def tokens_per_second(self) -> float:
        """Tokens generated lately, a second."""
        since = time.monotonic() - RECENT
        return sum(count for when, count in self._recent.copy() if when >= since) / RECENT

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="qwen-scope engine", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Takes in a request.

        Raises:
            Refused: too many are waiting, or the server is about to stop.
        """
        rows = [_Row(ticket, choice) for choice in range(len(ticket.texts))]
        with self._changed:
            if not self._accepting:
                raise stopping()
            if len(self._waiting) + len(rows) > self.config.max_queued:
                raise Refused(
                    429,
                    f"expected at most {self.config.max_queued} texts waiting, found {len(self._waiting)} before this request; "
                    "ask again later",
                    code="queue_full",
                )
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Gives up a request that nobody waits for; does nothing if it has ended."""
        with self._changed:
            ticket.ended = True
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Takes in nothing more, and gives what runs so many seconds to end."""
        with self._changed:
            self._accepting = False
            self._last_moment = time.monotonic() + seconds
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread, and all that runs."""
        with self._changed:
            self._accepting = self._open = False
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _fresh(self) -> Batch:
        return Batch(self.scope.backbone, self.scope.suite)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._waiting and not self._rows:
                    self._changed.wait()
                if not self._open:
                    break
            try:
                self._sweep()
                self._admit()
                self._step()
            except Exception:  # whatever a model, or the memory it needs, can raise
                _log.exception("generating failed; the texts that were running are given up")
                self._abandon(failed())
            self.running, self.cache_bytes = len(self._batch.rows), self._batch.nbytes
        self._abandon(stopping())
        with self._changed:
            for row in self._waiting:
                row.ticket.refuse(stopping())
            self._waiting.clear()

    def _sweep(self) -> None:
        """Takes out what nobody waits for, and what has run out of time."""
        now = time.monotonic()
        with self._changed:
            rows = [*self._rows.values(), *self._waiting]
        for row in rows:
            if row.ticket.deadline <= now:
                row.ticket.refuse(late(self.config.max_seconds))
            elif self._last_moment <= now:
                row.ticket.refuse(stopping())
        with self._changed:
            gone = [row for row in self._waiting if row.ticket.ended]
            if gone:
                self._waiting = deque(row for row in self._waiting if not row.ticket.ended)
        for row in [row for row in self._rows.values() if row.ticket.ended]:
            self._batch.remove(row.text)
            del self._rows[id(row.text)]
            gone.append(row)
        self.metrics.cancelled.inc(len(gone))

    def _admit(self) -> None:
        for _ in range(PROMPTS):
            with self._changed:
                if not self._waiting or not self._fits(self._waiting[0]):
                    return
                row = self._waiting.popleft()
            self._rows[id(row.text)] = row
            try:
                self._batch.add(row.text)
            except QwenScopeError as error:
                self._end(row, Refused.of(error))
            except Exception:
                if row.text.tokens:
                    raise  # it was joining the others, whose memory may be torn
                _log.exception("reading a prompt failed")
                self._end(row, failed())
            else:
                self.metrics.prompt_tokens.inc(len(row.text.prompt))
                self._tell([row])

    def _fits(self, row: _Row) -> bool:
        longest = max((other.longest for other in self._rows.values()), default=0)
        many = len(self._rows) + 1
        return many == 1 or (
            many <= self.config.max_rows and many * max(longest, row.longest) <= self.config.max_batch_tokens
        )

    def _step(self) -> None:
        for text, error in self._batch.step():
            self._end(self._rows[id(text)], Refused.of(error))
        self._tell(list(self._rows.values()))

    def _tell(self, rows: list[_Row]) -> None:
        """Tells what has been generated of some rows, and lets those go that have ended."""
        new = 0
        for row in rows:
            text, done = row.text, row.text.finish is not None
            tokens, told = text.tokens[row.told :], row.told
            row.told = len(text.tokens)
            new += len(tokens)
            if told == 0 and (tokens or done):
                self.metrics.first_token.observe(time.monotonic() - row.ticket.asked)
            if done:
                del self._rows[id(text)]
            if row.ticket.streaming and (tokens or done):
                row.ticket.tell(News(row.choice, tokens, text.rest() if done else "", done))
            elif done:
                row.ticket.tell(News(row.choice, done=True))
        self.metrics.generated_tokens.inc(new)
        now = time.monotonic()
        self._recent.append((now, new))
        while self._recent[0][0] < now - RECENT:
            self._recent.popleft()

    def _end(self, row: _Row, why: Refused) -> None:
        """Ends a request of which one text cannot go on; its other texts are swept out before the next step."""
        del self._rows[id(row.text)]
        row.ticket.refuse(why)

    def _abandon(self, why: Refused) -> None:
        """Gives up all that runs."""
        for row in self._rows.values():
            row.ticket.refuse(why)
        self._rows.clear()
        self._batch = self._fresh()
        self.running = self.cache_bytes = 0


def failed() -> Refused:
    """What a client is told when something broke that is not its fault."""
    return Refused(
        500, "expected the model to run, found that it failed; ask again, and look into the server's log if it goes on"
    )


def late(seconds: float) -> Refused:
    """What a client is told whose time has run out."""
    return Refused(408, f"expected an answer within {seconds:g} seconds, found it unfinished; ask for fewer tokens")


def stopping() -> Refused:
    """What a client is told when the server is about to stop."""
    return Refused(503, "expected a running server, found that it is stopping; ask again later", code="stopping")
