"""`create_app`: the server's addresses, each a call or two of the library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from qwen_scope.bundled import GGUF_SHA256
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import is_folder
from qwen_scope.server.answers import Answer, ChatAnswer
from qwen_scope.server.config import ServerConfig
from qwen_scope.server.engine import Engine
from qwen_scope.server.generating import Json, answer, tokenized
from qwen_scope.server.guard import Guard, body_of, refusal
from qwen_scope.server.metrics import Metrics
from qwen_scope.server.refused import Refused
from qwen_scope.server.requests import ChatRequest, CompletionRequest, FeaturesRequest, read, shown

if TYPE_CHECKING:
    from qwen_scope.index.feature_index import FeatureIndex
    from qwen_scope.scope import Scope

TOP = 8
"""Features of each token and layer where nobody says how many."""
MOST_TOLD = 500_000
"""Features of all tokens and layers that one answer tells: some 25 MB as text, and ten times that while it is made."""
MOST_HITS = 100
"""Features that a search gives at most."""


def create_app(scope: Scope, index: FeatureIndex | None = None, config: ServerConfig = ServerConfig()) -> FastAPI:
    """The server as an ASGI application.

    Its `state.engine` generates, in a thread that runs as long as the application does.

    Args:
        scope: the model and its SAEs.
        index: a feature index of the same suite, to look features up in.
        config: who may ask, and how much.

    Raises:
        QwenScopeError: a key is asked for that is not set.
    """
    metrics = Metrics()
    engine = Engine(scope, config, metrics)
    for name, about, figure in (
        ("tokens_per_second", "Tokens generated a second, over the last ten.", engine.tokens_per_second),
        ("queued", "Texts that wait for their turn.", lambda: engine.queued),
        ("running", "Texts that are being generated.", lambda: engine.running),
        ("cache_bytes", "Bytes of keys, values and states held.", lambda: engine.cache_bytes),
    ):
        metrics.watch(name, about, figure)
    name = config.model_name or served_name(scope)
    started = int(time.time())
    reading = asyncio.Semaphore(1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    async def asked(request: Request, kind: Any) -> Any:
        found = read(await body_of(request, config.max_body_bytes), kind)
        check_model(found.model)
        return found

    def check_model(given: str | None) -> None:
        if given not in (None, name):
            raise Refused(
                404,
                f"expected the model {name!r}, found {shown(given)}; /v1/models lists it",
                "model",
                "model_not_found",
            )

    async def chat(request: Request) -> Response:
        found = await asked(request, ChatRequest)
        return await answer(request, found, engine, ChatAnswer(found, name), reading)

    async def completion(request: Request) -> Response:
        found = await asked(request, CompletionRequest)
        return await answer(request, found, engine, Answer(found, name), reading)

    async def features(request: Request) -> Response:
        found: FeaturesRequest = await asked(request, FeaturesRequest)
        async with reading:
            return await asyncio.to_thread(read_features, scope, config, found, name)

    async def search(request: Request) -> Response:
        return await asyncio.to_thread(find_features, known_index(index), request)

    async def feature(request: Request) -> Response:
        layer, number = request.path_params["layer"], request.path_params["number"]
        try:
            found = await asyncio.to_thread(known_index(index).__getitem__, f"{layer}/{number}")
        except QwenScopeError as error:
            raise Refused.of(error, status=404) from error
        return Json(found.to_dict())

    def model() -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": started, "owned_by": "qwen-scope"}
        suite = {"suite": scope.suite.name, "layers": scope.suite.layers, "k": scope.suite.k}
        return {**about, **suite, "context_length": scope.backbone.context_length}

    async def models(request: Request) -> Response:
        return Json({"object": "list", "data": [model()]})

    async def one_model(request: Request) -> Response:
        check_model(request.path_params["name"])
        return Json(model())

    async def health(request: Request) -> Response:
        return Json({"status": "ok", "model": name})

    async def figures(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    # The pages that would show the interface load their parts from elsewhere.
    app = FastAPI(title="qwen-scope", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    for path, method, route in (
        ("/v1/chat/completions", "POST", chat),
        ("/v1/completions", "POST", completion),
        ("/v1/features", "POST", features),
        ("/v1/features/search", "GET", search),
        ("/v1/features/{layer}/{number}", "GET", feature),
        ("/v1/models", "GET", models),
        ("/v1/models/{name:path}", "GET", one_model),
        ("/health", "GET", health),
        ("/metrics", "GET", figures),
    ):
        app.add_route(path, route, methods=[method])
    app.add_middleware(Guard, config=config, metrics=metrics)

    async def refused(request: Request, error: Any) -> Response:
        return refusal(error)

    async def no_such(request: Request, error: Any) -> Response:
        found = f"{request.method} {request.url.path[:200]}"
        why = f"expected an address and method of this server, found {found}; see its documents"
        return refusal(Refused(error.status_code, why, code="not_found"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, no_such)
    config.api_key()  # a missing one is told now, not to the first client
    return app


def served_name(scope: Scope) -> str:
    """What clients call a model: `bundled`, its hub id, or the name of its folder."""
    if scope.suite.provenance.get("model_file_sha256") == GGUF_SHA256:
        return "bundled"
    name = scope.backbone.name
    return Path(name).expanduser().resolve().name if is_folder(name) else name


def known_index(index: FeatureIndex | None) -> FeatureIndex:
    """The index, if there is one.

    Raises:
        Refused: there is none.
    """
    if index is None:
        raise Refused(404, "expected a feature index, found that this server has none; start it with --index FOLDER")
    return index


def read_features(scope: Scope, config: ServerConfig, asked: FeaturesRequest, name: str) -> Response:
    """The features of texts.

    Raises:
        Refused: too many texts, too long ones, or layers that are not there.
    """
    inputs = asked.inputs()
    if isinstance(inputs, list) and not asked.messages and isinstance(next(iter(inputs), None), str | list):
        count = len(inputs)
        if count > config.max_texts:
            raise Refused(
                400, f"expected at most {config.max_texts} texts, found {count}; send fewer at a time", "input"
            )
    where = "input" if asked.messages is None else "messages"
    texts = tokenized(scope, inputs, config, where, thinking=asked.thinking, reply=False)
    if (total := sum(map(len, texts))) > config.max_feature_tokens:
        raise Refused(
            400,
            f"expected at most {config.max_feature_tokens} tokens of all texts, found {total}; send fewer at a time",
            where,
        )
    layers = scope.layers if asked.layers is None else set(asked.layers)
    if (told := total * len(layers) * min(asked.top or TOP, scope.suite.k)) > MOST_TOLD:
        raise Refused(
            400,
            f"expected at most {MOST_TOLD} features to tell, found {told} of all tokens and layers; ask for fewer layers, a "
            "smaller top, or less text",
            "top" if asked.top else where,
        )
    try:
        found = scope.features(inputs, layers=asked.layers, thinking=asked.thinking)
    except QwenScopeError as error:
        raise Refused.of(error, where if asked.layers is None else "layers") from error
    data = [text.to_dict(asked.top or TOP) for text in (found if isinstance(found, list) else [found])]
    return Json({"object": "list", "model": name, "suite": scope.suite.name, "data": data})


def find_features(index: FeatureIndex, request: Request) -> Response:
    """Features that are about the words of a query.

    Raises:
        Refused: no query, or a number that is none.
    """
    given = request.query_params
    if unknown := sorted(set(given) - {"q", "count", "layer"}):
        raise Refused(400, f"expected q, count and layer, found {shown(unknown[0])}; leave it out", unknown[0][:100])
    numbers = [given.get("count", "10"), *given.getlist("layer")]
    if not all(number.isdecimal() and len(number) < 7 for number in numbers) or not 1 <= int(numbers[0]) <= MOST_HITS:
        raise Refused(
            400, f"expected count from 1 to {MOST_HITS} and layers as integers, found {shown(numbers)}; correct them"
        )
    layers = [int(number) for number in numbers[1:]]
    try:
        hits = index.search(given.get("q", ""), count=int(numbers[0]), layers=layers or None)
    except QwenScopeError as error:
        raise Refused.of(error, "q") from error
    return Json({"object": "list", "data": [hit.to_dict() for hit in hits]})
