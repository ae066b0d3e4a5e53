"""The web app on a socket, for as long as a block runs: the command's, a notebook's or a test's."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware

from qwen_scope.app import look
from qwen_scope.app.build import create, in_event_loop
from qwen_scope.app.config import AppConfig
from qwen_scope.app.headers import Headers
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope


@contextmanager
def running(
    scope: Scope, index: FeatureIndex | None = None, config: AppConfig = AppConfig(port=0), **named: Any
) -> Iterator[str]:
    """While the block runs, threads serve the page; gives its address.

    Args:
        scope: the model and its SAEs.
        index: a feature index of the same suite.
        config: where it listens, who may use it, and how much; a free port is taken unless told.
        named: `model`, `suite` and `opening` as for `create`.

    Raises:
        QwenScopeError: the address cannot be listened on, or a password is asked for that is not set.
    """
    page = create(scope, index, config, **named)
    password = config.password()

    def known(name: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    try:
        port = config.port or free_port(config.host)
        check_free(config.host, port)
        _, address, _ = in_event_loop(
            lambda: page.launch(
                # In an address, colons of IPv6 stand in brackets.
                server_name=f"[{config.host}]" if ":" in config.host else config.host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                auth=known if password else None,
                auth_message="Any name, and the password of this server." if password else None,
                max_file_size=config.max_file_bytes,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                app_kwargs={
                    "docs_url": None,
                    "redoc_url": None,
                    "openapi_url": None,
                    "middleware": [Middleware(Headers, local=config.local)],
                },
                theme=look.theme(),
                css=look.css(),
                head=look.head(),
            )
        )
    except OSError as error:
        raise QwenScopeError(
            f"expected to listen on {config.host} port {config.port}, found that it cannot be done ({error}); choose another "
            "--port"
        ) from error
    try:
        yield address.rstrip("/")
    finally:
        page.close(verbose=False)


def free_port(host: str) -> int:
    """A port that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


def check_free(host: str, port: int) -> None:
    """Raises an OSError unless the port can be listened on: Gradio would leave its own attempt's socket open."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, port))
