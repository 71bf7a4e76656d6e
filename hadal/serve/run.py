"""`run_server`: an engine behind uvicorn until a signal.

The first SIGTERM or SIGINT drains: what runs ends (up to `drain_timeout`), what comes gets 503, then the
process exits with status 0. A second one exits at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from hadal.serve.app import create_app
from hadal.serve.models import Backend
from hadal.serve.protocol import protocol_with
from hadal.serve.settings import Settings
from hadal.serve.state import App

logger = logging.getLogger("hadal.serve")


class ServerError(RuntimeError):
    """The server cannot listen; one line with cause and remedy."""


class DrainingServer(uvicorn.Server):
    """uvicorn's server, with drain on the first signal and exit on the second."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self.hadal = app
        self.on_drain: Sequence[Callable[[], None]] = ()
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Replaces uvicorn's: a signal must not close the listener while requests run, nor end in status
        143."""
        if self._drain is not None or self.should_exit:
            self.should_exit = self.force_exit = True
            return
        logger.info(
            "%s: finishing %d running; once more to exit now",
            signal.Signals(sig).name,
            self.hadal.in_flight(),
        )
        self.begin_drain()

    def begin_drain(self) -> None:
        """Refuse new work, and leave when the old is done. Also called from signal handlers."""
        self.hadal.drain()
        for end_streams in self.on_drain:
            end_streams()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.should_exit = True
            return
        self._drain = loop.create_task(self._drained())

    async def _drained(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.hadal.settings.drain_timeout
        while self.hadal.in_flight() and loop.time() < deadline:
            await asyncio.sleep(0.05)
        if self.hadal.in_flight():
            logger.warning("%d sequences were still running at the end of the drain", self.hadal.in_flight())
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ServerError naming cause and remedy."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what it accepts; without, each answer waits 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise ServerError(_why_not(error, host, port)) from None
    sock.set_inheritable(False)
    return sock


def _why_not(error: Exception, host: str, port: int) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another program; stop it, or choose another with --port"
    if code == errno.EACCES:
        return f"port {port} needs privileges on this machine; choose one of 1024 or more with --port"
    if code == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"{host} is not an address of this machine; use --host 127.0.0.1, or 0.0.0.0 with --api-key"
    return f"cannot listen on {host}:{port}: {error}"


def server_for(app: FastAPI) -> DrainingServer:
    """A uvicorn server of an app made by `create_app`, with every limit of its settings."""
    state: App = app.state.hadal
    settings = state.settings
    config = uvicorn.Config(
        app,
        http=protocol_with(settings.header_timeout),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=max(1, round(settings.keep_alive_timeout)),
        timeout_graceful_shutdown=5,
        backlog=2048,
    )
    server = DrainingServer(config, state)
    # What mounted pages want to do then: an open stream of theirs would hold its connection.
    server.on_drain = getattr(app.state, "on_drain", ())
    return server


def base_url(settings: Settings, sock: socket.socket) -> str:
    """The address to give to people and clients."""
    port = sock.getsockname()[1]
    host = settings.host.strip("[]")
    shown = (
        "127.0.0.1"
        if host in ("0.0.0.0", "")
        else "[::1]"
        if host == "::"
        else f"[{host}]"
        if ":" in host
        else host
    )
    return f"http://{shown}:{port}"


def run_server(
    model: str | Path | Backend | Mapping[str, Backend],
    settings: Settings | None = None,
    *,
    engine_options: Mapping[str, Any] | None = None,
    prepare: Callable[[FastAPI, str], None] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve `model` until a signal: a name or folder (loaded with `engine_options`, an `Engine.load` keyword
    each), or engines already running. `prepare(app, base_url)` may mount pages. Raises ServerError when it
    cannot listen."""
    settings = settings or Settings()
    sock = listen(settings.host, settings.port)  # before the weights: a taken port costs no minute of loading
    try:
        engines, loaders = _engines(model, dict(engine_options or {}), settings)
        app = create_app(engines, settings, loaders)
        url = base_url(settings, sock)
        if prepare is not None:
            prepare(app, url)
        for line in greeting(app, url):
            say(line)
        try:
            server_for(app).run(sockets=[sock])
        finally:
            for served in app.state.hadal.registry.models:
                if served.backend is not None:
                    served.backend.shutdown(drain=False)
    finally:
        sock.close()


def greeting(app: FastAPI, url: str) -> list[str]:
    """What is served, and where."""
    state: App = app.state.hadal
    lines = []
    for served in state.registry.models:
        info = served.info
        lines.append(
            f"{' = '.join((served.name, *served.aliases))}: {info.device}, "
            f"{str(info.dtype).rpartition('.')[2]}, "
            f"context {info.max_model_len}, up to {info.max_num_seqs} at once"
        )
    key = " (API key needed)" if state.settings.api_keys else ""
    lines.append(f"OpenAI and DeepSeek clients: {url}/v1{key}")
    lines.append(f"Ollama clients:              {url}{key}")
    return lines


def _engines(
    model: str | Path | Backend | Mapping[str, Backend], options: dict[str, Any], settings: Settings
) -> tuple[Mapping[str, Backend] | Backend, dict[str, Callable[[], Backend]]]:
    if not isinstance(model, str | Path):
        return model, {}
    from hadal.engine import AsyncEngine, Engine

    def load() -> Backend:
        engine = Engine.load(model, **options)
        options.pop("progress", None)  # a bar is for the start only
        return AsyncEngine(engine, max_queue=4 * settings.max_queue, watchdog_seconds=settings.stall_timeout)

    backend = load()
    return backend, {str(backend.engine.name): load}
