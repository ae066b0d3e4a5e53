"""`Headers`: what every answer of the web app says to browsers, and whom it answers at all."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers as Given
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_scope.server.config import is_local

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio makes functions of its events' scripts
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "frame-ancestors 'self'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
"""The page may ask this server alone, whatever a text or a library would make it do."""


class Headers:
    """Adds headers that keep the page to itself; refuses foreign names for this machine, and what the pages of other sites ask.

    Args:
        app: what answers.
        local: whether only this machine is served. A web page can have its own name point here, and would then be let in by the
            browser.
    """

    def __init__(self, app: ASGIApp, local: bool):
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or refuses."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Given(scope=scope)
        # Links lead here from anywhere; but Gradio lets any site's scripts read from a host that is not called localhost.
        link = scope["method"] == "GET" and given.get("sec-fetch-mode") == "navigate"
        if given.get("sec-fetch-site") == "cross-site" and not link:
            refusal = PlainTextResponse(
                "expected a request of this page, found one of another site; open this one\n", 403
            )
            await refusal(scope, receive, send)
            return
        if self.local and not _known(given.get("host", "")):
            refusal = PlainTextResponse(
                "expected a Host of this machine, found another; open 127.0.0.1 or localhost\n", 400
            )
            await refusal(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, with_headers)


def _known(host: str) -> bool:
    try:
        return is_local(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
