"""Puts the pages at `/` of a server: which requests are theirs, what rules their HTML obeys.

- Only paths that the page needs are its own. Everything else, `/` for clients that do not ask for HTML
  included, goes on to the server's routes. Gradio's other doors (upload, file, proxy, component server …)
  are never opened.
- HTML carries a Content-Security-Policy: scripts from this server or by hash only, so neither an injected
  tag nor an `onerror=` can run; images, fonts and connections from this server only. ('unsafe-eval' is there
  because Gradio's event listeners compile their own `js=` strings; it lets running scripts evaluate, not
  foreign ones start.)
- Gradio takes seconds and over 100 MB to import: that happens in a thread beside the running server.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.util
import ipaddress
import logging
import os
import re
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import fastapi
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hadal.ui.api import Client
from hadal.ui.look import STATIC, theme
from hadal.ui.pages import PAGES, Page, build_site

log = logging.getLogger("hadal.ui")

OWN = "/_hadal/"
PREFIXES = (OWN, "/assets/", "/static/", "/gradio_api/heartbeat/")
PATHS = frozenset(
    "/config /theme.css /manifest.json /favicon.ico /gradio_api/theme.css /gradio_api/info "
    "/gradio_api/app_id /gradio_api/startup-events /gradio_api/queue/join /gradio_api/queue/data "
    "/gradio_api/reset /gradio_api/cancel".split()
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval' {hashes}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'"
)
MAX_REQUEST_BYTES = 8 << 20
GRADIO_TICK_S = 0.2
"""The background loops of Gradio's queue look more often than this whether they are closed."""

_INLINE_SCRIPT = re.compile(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
_CARD = re.compile(r'\s*<meta\s+(?:property="og:|name="twitter:)[^>]*>')


class UiError(RuntimeError):
    """The page cannot be shown; the message says what to install or change."""


def mount(app: fastapi.FastAPI, *, base_url: str, pages: Sequence[Page] = PAGES) -> fastapi.FastAPI:
    """Add the pages to `app` and return it. They talk to `base_url` ("http://127.0.0.1:11435") as any client
    would.

    The pages know no key. Where the server wants one, the visitor's own is used: the one the browser sent to
    open the page (Basic or Bearer), or the one typed into the settings panel.

    `app.state.on_drain` gains a function that ends the page's open streams; call it when the server stops
    taking requests, since an open stream keeps its connection. Raises UiError if Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UiError("the page needs Gradio; install it with: pip install 'hadal[ui]'")
    site = Site(Client(base_url), pages)
    app.router.routes.insert(0, SiteRoute(site))
    before = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(parent: Any) -> AsyncIterator[Any]:
        async with before(parent) as state:
            warming = asyncio.create_task(site.warm())
            try:
                yield state
            finally:
                warming.cancel()
                await asyncio.gather(warming, return_exceptions=True)
                await site.close()

    app.router.lifespan_context = lifespan
    hooks: list[Callable[[], None]] = getattr(app.state, "on_drain", [])
    app.state.on_drain = [*hooks, site.end_streams]
    return app


class SiteRoute(BaseRoute):
    """Matches the page's requests and nothing else."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if self.site.owns(scope) else Match.NONE), {}

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = scope.get("state", {}).get("notes")
        if isinstance(notes, dict) and not self.site.is_page(scope["path"]):
            notes["quiet"] = True  # the server's log need not name what a page loads
        await self.site(scope, receive, send)


class Site:
    """The pages as an ASGI application, built at the first need."""

    def __init__(self, client: Client, pages: Sequence[Page] = PAGES) -> None:
        self.client = client
        self.pages = pages
        self._routes = frozenset(f"/{page.path}" for page in pages)
        self._static = StaticFiles(directory=STATIC)
        self._inner: ASGIApp | None = None
        self._gradio: Any = None
        self._building = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()

    def owns(self, scope: Scope) -> bool:
        """True for a page asked for as HTML, and for what the page loads and sends."""
        if scope["type"] != "http":
            return False
        path = scope["path"]
        if path in self._routes:
            return scope["method"] in ("GET", "HEAD") and "text/html" in _header(scope, b"accept")
        return path in PATHS or path.startswith(PREFIXES)

    def is_page(self, path: str) -> bool:
        """True for the address of a page, false for what it loads."""
        return path in self._routes

    async def warm(self) -> None:
        """Build now, so that the first visitor does not wait. A failure is logged and seen by visitors."""
        try:
            await self._app()
        except Exception:
            log.exception("the chat page could not be built")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path.startswith(OWN):
            own = {**scope, "path": path[len(OWN) - 1 :], "root_path": ""}
            await self._static(own, receive, _with_headers(send, {"cache-control": "no-cache"}))
            return
        app = await self._app()
        if path in self._routes:
            await _html(app, scope, receive, send)
        elif path.startswith("/assets/"):  # their names carry a hash of what is in them
            kept = {"cache-control": "public, max-age=31536000, immutable"}
            await app(_uncompressed_at_home(scope), receive, _with_headers(send, kept))
        else:
            await app(scope, _bounded(receive), send)

    async def _app(self) -> ASGIApp:
        async with self._building:
            if self._inner is None:
                inner, self._gradio = await asyncio.to_thread(_build, self.client, self.pages)
                await self._stack.enter_async_context(inner.router.lifespan_context(inner))
                self._inner = inner
            return self._inner

    def end_streams(self) -> None:
        """End the browsers' open event streams (they hold a connection each)."""
        if self._gradio is not None:
            self._gradio.stop_event.set()

    async def close(self) -> None:
        """Undo what building began."""
        self.end_streams()
        if self._gradio is not None:
            self._gradio.get_blocks().close(verbose=False)
            await asyncio.sleep(GRADIO_TICK_S)
        await self._stack.aclose()


def _build(client: Client, pages: Sequence[Page]) -> tuple[fastapi.FastAPI, Any]:
    """The Gradio application inside a FastAPI of its own, and Gradio's part of it. Slow: imports Gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio says so of any site with several pages, even where ssr_mode is False.
    warnings.filterwarnings("ignore", message="SSR mode is not supported with multi-page")
    import gradio as gr

    inner = fastapi.FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        inner,
        build_site(client, pages),
        path="/",
        theme=theme(),
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=1,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
    )
    apps = (getattr(route, "app", None) for route in inner.router.routes)
    return inner, next(app for app in apps if hasattr(app, "get_blocks"))


def _header(scope: Scope, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def _uncompressed(scope: Scope) -> Scope:
    """The request as if its client took no compressed answer."""
    return {**scope, "headers": [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]}


def _uncompressed_at_home(scope: Scope) -> Scope:
    """Where no network is crossed, compression only takes time from the cores that the model runs on."""
    client = scope.get("client")
    return _uncompressed(scope) if client and is_loopback_address(client[0]) else scope


def is_loopback_address(address: str) -> bool:
    """True for 127.0.0.0/8 and ::1."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _with_headers(send: Send, extra: dict[str, str]) -> Send:
    """`send` that adds or replaces headers of a 200 answer."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            kept = [(k, v) for k, v in message["headers"] if k.decode().lower() not in extra]
            message["headers"] = kept + [(k.encode(), v.encode()) for k, v in extra.items()]
        await send(message)

    return wrapped


def _bounded(receive: Receive) -> Receive:
    """`receive` that hangs up on a request body beyond MAX_REQUEST_BYTES."""
    taken = 0

    async def wrapped() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_REQUEST_BYTES:
            return {"type": "http.disconnect"}
        return message

    return wrapped


async def _html(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Pass a page through `dress`: Gradio's HTML with our head and its policy."""
    start: Message = {}
    body = bytearray()

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            body.extend(message.get("body", b""))

    await app(_uncompressed(scope), receive, collect)
    content, policy = dress(body.decode("utf-8"))
    data = content.encode("utf-8")
    drop = (b"content-length", b"content-security-policy")
    kept = [(k, v) for k, v in start["headers"] if k.lower() not in drop]
    kept += [
        (b"content-length", str(len(data)).encode()),
        (b"content-security-policy", policy.encode("ascii")),
        (b"cache-control", b"no-cache"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]
    await send({**start, "headers": kept})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else data})


def dress(page: str) -> tuple[str, str]:
    """Gradio's HTML → (the page with our title, script and style in front, its Content-Security-Policy)."""
    page = _CARD.sub("", page)
    head = (
        "<title>Hadal</title>"
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="{OWN}favicon.svg" type="image/svg+xml">'
        f'<link rel="stylesheet" href="{OWN}page.css"><script src="{OWN}page.js"></script>'
    )
    page = page.replace("<head>", "<head>" + head, 1)
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in _INLINE_SCRIPT.findall(page))
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return page, POLICY.format(hashes=hashes)
