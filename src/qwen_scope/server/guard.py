"""`Guard`: what every request passes before anything reads it, and is counted by when it is over."""

from __future__ import annotations

import asyncio
import hmac
import logging
from contextlib import aclosing
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from qwen_scope.server.config import ServerConfig
from qwen_scope.server.engine import failed, late
from qwen_scope.server.generating import GONE, Json
from qwen_scope.server.metrics import Metrics
from qwen_scope.server.refused import Refused

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/features/search", "/v1/features")
"""Paths that requests are counted by."""
BESIDE = 32
"""Requests held at once beside those whose texts run or wait, such as those that read features."""

_log = logging.getLogger("qwen_scope.server")


class Guard:
    """Refuses strangers and more requests than can be held, before their bodies are read.

    Args:
        app: what is guarded.
        config: who may ask, and how much.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics
        self.held = 0
        """Requests that are being answered."""
        self._key = config.api_key()

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Lets a request through, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun = 500, False

        async def noting(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
            await send(message)

        self.held += 1
        try:
            self._check(scope)
            # The engine ends what takes too long; this is for clients that send or read slowly.
            async with asyncio.timeout(self.config.max_seconds + self.config.shutdown_seconds):
                await self.app(scope, receive, noting)
        except Refused as error:
            await refusal(error)(scope, receive, noting)
        except Exception as error:
            if begun:
                raise
            slow = isinstance(error, TimeoutError)
            if not slow:
                _log.exception("a request failed")
            await refusal(late(self.config.max_seconds) if slow else failed())(scope, receive, noting)
        finally:
            self.held -= 1
            self.metrics.answered(endpoint(scope["path"]), status)

    def _check(self, scope: Connection) -> None:
        headers = Headers(scope=scope)
        if self.config.local and not self._known(headers.get("host", "")):
            # A web page can have its own name point here, and would then be let in by the browser.
            raise Refused(
                400,
                "expected a Host of this machine, found another; ask for 127.0.0.1 or localhost",
                code="foreign_host",
            )
        if scope["path"] == "/health":
            return
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self._key is not None and not hmac.compare_digest(given.encode("latin-1"), self._key.encode()):
            raise Refused(
                401,
                f"expected the key of this server as Authorization: Bearer …, found {'another' if given else 'none'}; send it",
                code="invalid_api_key",
            )
        if self.held > self.config.max_queued + self.config.max_rows + BESIDE:
            raise Refused(
                429, f"expected fewer than {self.held} requests at once, found more; ask again later", code="queue_full"
            )

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name in {"127.0.0.1", "localhost", "::1", self.config.host.lower()}


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request of JSON.

    Raises:
        Refused: it is larger than allowed, of which no more is held, or no JSON by its own account.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page may send other kinds anywhere without being asked first.
        raise Refused(400, f"expected Content-Type: application/json, found {kind[:80] or 'none'}; send that header")
    too_large = Refused(
        413, f"expected a body of at most {most} bytes, found a larger one; send less", code="too_large"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with aclosing(request.stream()) as stream:
            async for part in stream:
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except ClientDisconnect as error:
        raise GONE from error
    return b"".join(parts)


def refusal(error: Refused) -> Json:
    """A refusal as an answer."""
    return Json(error.to_dict(), error.status, headers=error.headers)


def endpoint(path: str) -> str:
    """What a request is counted by: of the paths that exist, so that strangers cannot make up names without end."""
    if path in ENDPOINTS or path in ("/health", "/metrics"):
        return path
    for known in ("/v1/models", "/v1/features"):
        if path.startswith(known + "/"):
            return known + "/…"
    return "other"
