"""`create_app`: the routes, the two surfaces' names for them, and what stands before them.

    AccessLog → Gate (Host, Origin, key) → Failsafe → OllamaGreeting → router

Bodies are read by hand in the routes (body.py), so FastAPI has no models, no /docs and no /openapi.json here.
Pages may be mounted on the app afterwards; they come after these routes and behind the same gate.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hadal.engine.request import RequestError
from hadal.serve import chat, completions, embeddings, meta, ollama, ollama_models, planning, probing
from hadal.serve.body import ClientGone
from hadal.serve.errors import ApiError, error_response
from hadal.serve.logs import AccessLog, escaped
from hadal.serve.metrics import Metrics
from hadal.serve.models import Backend, make_registry
from hadal.serve.sampling import refused
from hadal.serve.security import Gate
from hadal.serve.settings import Settings
from hadal.serve.state import App

Endpoint = Callable[[Request], Awaitable[Response]]
logger = logging.getLogger("hadal.serve")

# OpenAI's and DeepSeek's surface: served at the root, under /v1 and under /beta.
PREFIXES = ("", "/v1", "/beta")
OPENAI: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/chat/completions", chat.chat_completions),
    ("POST", "/completions", completions.completions),
    ("POST", "/embeddings", embeddings.embeddings),
    ("GET", "/models", meta.models),
    ("GET", "/models/{model_id:path}", meta.model),
    ("POST", "/tokenize", meta.tokenize),
    ("POST", "/detokenize", meta.detokenize),
    ("POST", "/plan", planning.plan),
    ("POST", "/probe", probing.probe),
)
SERVER: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/health", meta.health),
    ("GET", "/ready", meta.ready),
    ("GET", "/metrics", meta.metrics),
    ("GET", "/version", meta.version),
    ("GET", "/tokenizer_info", meta.tokenizer_info),
)
OLLAMA: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/api/version", ollama_models.version),
    ("GET", "/api/tags", ollama_models.tags),
    ("GET", "/api/ps", ollama_models.ps),
    ("POST", "/api/show", ollama_models.show),
    ("POST", "/api/chat", ollama.chat),
    ("POST", "/api/generate", ollama.generate),
    ("POST", "/api/embed", ollama_models.embed_route),
    ("POST", "/api/embeddings", ollama_models.embeddings_route),
    ("POST", "/api/pull", ollama_models.pull),
    ("DELETE", "/api/delete", ollama_models.delete),
)
ABSENT = (
    "/responses",
    "/images/generations",
    "/audio/speech",
    "/audio/transcriptions",
    "/moderations",
    "/files",
    "/batches",
    "/fine_tuning/jobs",
)
ABSENT_OLLAMA = ("/api/create", "/api/copy", "/api/push")


def create_app(
    engines: Mapping[str, Backend] | Backend,
    settings: Settings | None = None,
    loaders: Mapping[str, Callable[[], Backend]] | None = None,
) -> FastAPI:
    """The server for one engine (under its own name) or several by name.

    `loaders`: by model name, how to load it again after Ollama's `keep_alive: 0` unloaded it; without one a
    model stays. Raises SettingsError or ValueError on settings that are unsafe or contradict each other.
    """
    settings = settings or Settings()
    registry = make_registry(engines, settings, loaders)
    state = App(registry, settings, Metrics(registry.stats))
    app = FastAPI(
        title="Hadal",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(AccessLog),
            Middleware(Gate, settings=settings),
            Middleware(Failsafe),
            Middleware(OllamaGreeting),
        ],
        exception_handlers=_HANDLERS,
    )
    app.router.redirect_slashes = False
    app.state.hadal = state
    for method, path, endpoint in _all_routes():
        app.router.routes.append(Route(path, endpoint, methods=[method]))
    return app


def _all_routes() -> list[tuple[str, str, Endpoint]]:
    routes = [(method, prefix + path, endpoint) for prefix in PREFIXES for method, path, endpoint in OPENAI]
    routes += [
        (method, prefix + path, endpoint) for prefix in ("", "/v1") for method, path, endpoint in SERVER
    ]
    routes += OLLAMA
    routes += [("POST", prefix + path, meta.not_here) for prefix in PREFIXES for path in ABSENT]
    routes += [("POST", path, meta.not_here) for path in ABSENT_OLLAMA]
    return routes


class OllamaGreeting:
    """GET or HEAD / from anything but a browser: "Ollama is running", by which clients recognise a server. A
    browser, which asks for HTML, goes on to the chat page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            accepts = b",".join(value for name, value in scope["headers"] if name == b"accept")
            if b"text/html" not in accepts:
                await PlainTextResponse("Ollama is running")(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    App.of(request).metrics.refused.labels(str(error.status)).inc()
    return error_response(error, request.url.path)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return await _api_error(request, refused(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the dialect of the path."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if path == "/" and error.status_code == 404:
        return PlainTextResponse(
            "Hadal is running. The API is described in docs/api.md; GET /v1/models to begin."
        )
    if error.status_code == 405:
        message = f"{request.method} is not allowed on {escaped(path)}"
    else:
        message = f"there is nothing at {escaped(path)}; see docs/api.md for the routes"
    headers = dict(error.headers or {})
    return await _api_error(request, ApiError(error.status_code, message, headers=headers))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log line shows it


class Failsafe:
    """A bug of ours: logged whole, answered 500 without details; in the middle of a stream the connection
    breaks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            logger.error("%s failed", escaped(scope["path"]), exc_info=error)
            abort = scope.get("extensions", {}).get("hadal.abort")
            if not started:
                answer = ApiError(
                    500, "the server failed on this request; its log says why", code="internal_error"
                )
                await error_response(answer, scope["path"])(scope, receive, send)
            elif abort is not None:
                abort()


_HANDLERS: dict[Any, Any] = {
    ApiError: _api_error,
    RequestError: _request_error,
    HTTPException: _http_error,
    ClientGone: _client_gone,
}
