"""A real server on 127.0.0.1 for tests: uvicorn in a thread, on a free port, with every limit of its
settings."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from hadal.serve import Settings, create_app
from hadal.serve.run import DrainingServer, base_url, listen, server_for


@dataclass
class LiveServer:
    """url: "http://127.0.0.1:PORT"; port; app; server (uvicorn's, with `begin_drain`); loop of its thread."""

    url: str
    port: int
    app: FastAPI
    server: DrainingServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def state(self) -> Any:
        """The server's own objects (registry, metrics)."""
        return self.app.state.hadal

    def drain(self) -> None:
        """What SIGTERM does."""
        self.loop.call_soon_threadsafe(self.server.begin_drain)


@contextmanager
def live_server(
    engine: Any,
    *,
    prepare: Callable[[FastAPI, str], None] | None = None,
    loaders: Mapping[str, Callable[[], Any]] | None = None,
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serve `engine` (an AsyncEngine, or several by name) for the length of the context.

    `settings`: fields of hadal.serve.Settings (port: 0 by default). `prepare(app, base_url)` may mount pages.
    """
    chosen = Settings(**{"port": 0, **settings})
    sock = listen(chosen.host, chosen.port)
    app = create_app(engine, chosen, loaders)
    url = base_url(chosen, sock)
    if prepare is not None:
        prepare(app, url)
    server = server_for(app)
    loop = asyncio.new_event_loop()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(server.serve(sockets=[sock]))
        loop.close()

    thread = threading.Thread(target=serve, name="live-server", daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the server did not start")
        time.sleep(0.005)
    try:
        yield LiveServer(url, sock.getsockname()[1], app, server, loop, thread)
    finally:
        server.config.timeout_graceful_shutdown = 1
        server.should_exit = True
        thread.join(20)
        sock.close()
