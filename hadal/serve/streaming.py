"""Answers that last: streams with keep-alive comments, and the watch for clients that leave.

A stream is one task that pulls from the generator and sends; a second that waits for the client's disconnect;
a third that ticks: it sends a comment when nothing was sent for a while, and ends a stream whose client takes
nothing. Whatever ends first closes the generator, which aborts the sequences behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hadal.serve.body import ClientGone
from hadal.serve.errors import ApiError, error_response
from hadal.serve.jsontext import dumps
from hadal.serve.settings import Settings

T = TypeVar("T")
SSE = "text/event-stream; charset=utf-8"
NDJSON = "application/x-ndjson"
SSE_COMMENT = b": keep-alive\n\n"


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client leaves first, `work` is cancelled and ClientGone raised."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for job in (task, watcher):
            await _cancelled(job)


async def _cancelled(job: asyncio.Future[Any]) -> None:
    if not job.done():
        job.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await job


class LiveStream(Response):
    """A streamed answer. `chunks` yields whole events (or lines). An ApiError before anything was sent
    becomes an ordinary error answer, so that a refusal keeps its status code; later, `on_error` writes it
    into the stream. `comment`: what keeps a silent stream open, or None where the format has no comments
    (NDJSON).
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        settings: Settings,
        media_type: str,
        on_error: Callable[[ApiError], bytes],
        comment: bytes | None = None,
    ) -> None:
        self.chunks = chunks
        self.on_error = on_error
        self.settings = settings
        self.comment = comment
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.started = False
        self.last_sent = time.monotonic()
        self.sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(scope, receive, send))
        watcher = asyncio.ensure_future(_gone(receive))
        ticker = asyncio.ensure_future(self._tick(scope, send))
        try:
            await asyncio.wait({pump, watcher, ticker}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
            elif ticker.done():
                ticker.result()
        finally:
            for job in (pump, watcher, ticker):
                await _cancelled(job)
            with contextlib.suppress(Exception):
                await self.chunks.aclose()

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for chunk in self.chunks:
                await self._send(send, chunk)
        except ApiError as error:
            if not self.started:
                await error_response(error, scope["path"])(scope, receive, send)
                return
            await self._send(send, self.on_error(error))
        await self._send(send, b"", more=False)

    async def _start(self, send: Send) -> None:
        self.started = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send(self, send: Send, chunk: bytes, more: bool = True) -> None:
        if not self.started:
            await self._start(send)
        self.sending_since = self.last_sent = time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self.sending_since = None

    async def _tick(self, scope: Scope, send: Send) -> None:
        """Returns only when the client has taken nothing for `write_timeout`."""
        interval = self.settings.sse_comment_interval
        while True:
            await asyncio.sleep(min(interval, self.settings.write_timeout) / 2)
            now = time.monotonic()
            if self.sending_since is not None:
                if now - self.sending_since > self.settings.write_timeout:
                    break
            elif self.comment is not None and now - self.last_sent >= interval:
                try:
                    async with asyncio.timeout(self.settings.write_timeout):
                        await self._send(send, self.comment)
                except TimeoutError:
                    break
        abort = scope.get("extensions", {}).get("hadal.abort")
        if abort is not None:
            abort()


def sse(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"


def sse_error(error: ApiError) -> bytes:
    """A failure in the middle of an OpenAI stream, and its end."""
    return sse(dumps(error.openai_body())) + SSE_DONE
