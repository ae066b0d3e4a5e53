"""The server on a socket: in a thread for notebooks and tests, or until it is asked to stop."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from qwen_scope.errors import QwenScopeError
from qwen_scope.server.app import create_app
from qwen_scope.server.config import ServerConfig

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope


@contextmanager
def running(
    scope: Scope, index: FeatureIndex | None = None, config: ServerConfig = ServerConfig(port=0)
) -> Iterator[str]:
    """While the block runs, a thread serves; gives the address that OpenAI's clients take as `base_url`.

    Args:
        scope: the model and its SAEs.
        index: a feature index of the same suite, to look features up in.
        config: who may ask, and how much; a free port is taken unless told.

    Raises:
        QwenScopeError: the address cannot be listened on.
    """
    with listening(config) as listener:
        app, started = create_app(scope, index, config), threading.Event()
        server = _Server(app, config, started.set)
        thread = threading.Thread(target=server.run, args=([listener],), name="qwen-scope server", daemon=True)
        thread.start()
        try:
            while not started.wait(0.1):
                if not thread.is_alive():
                    raise QwenScopeError("expected a server that starts, found that it ended; see the log")
            yield f"{address(listener)}/v1"
        finally:
            server.should_exit = True
            thread.join()


def serve(
    scope: Scope,
    index: FeatureIndex | None,
    config: ServerConfig,
    listener: socket.socket,
    started: Callable[[], None],
) -> None:
    """Serves on a socket until Ctrl-C or a request to terminate; what runs then gets a moment to end.

    Args:
        started: called when clients can ask.

    Raises:
        QwenScopeError: a key is asked for that is not set.
    """
    _Server(create_app(scope, index, config), config, started).run([listener])


@contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """The socket to listen on, before anything large is loaded; clients cannot connect yet.

    Raises:
        QwenScopeError: somebody else has the port, or there is no such address.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _no_address(config, error) from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
        except OSError as error:
            raise _no_address(config, error) from error
        yield listener


def address(listener: socket.socket) -> str:
    """Where a socket listens, as a browser writes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _no_address(config: ServerConfig, error: OSError) -> QwenScopeError:
    return QwenScopeError(
        f"expected to listen on {config.host} port {config.port}, found that it cannot be done ({error.strerror or error}); "
        "choose another --port"
    )


class _Server(uvicorn.Server):
    """uvicorn, which tells when it has started, and the engine when it is about to stop."""

    def __init__(self, app: FastAPI, config: ServerConfig, started: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                # The engine ends what is too slow before this does.
                timeout_graceful_shutdown=int(config.shutdown_seconds) + 5,
            )
        )
        self._engine, self._seconds, self._tell = app.state.engine, config.shutdown_seconds, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if self.started:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes in no more requests, and gives those that run a moment."""
        self._engine.drain(self._seconds)
        await super().shutdown(sockets)
