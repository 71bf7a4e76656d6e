"""uvicorn's HTTP/1.1 protocol with the two limits it lacks: a time for the headers, and a way to drop a dead
reader.

A client that dribbles its headers ("slowloris") would hold a connection for ever: uvicorn starts a clock only
after a first answer. And `transport.close()` waits for a peer that never reads; a stream that gave up on such
a peer needs `abort()`, which it finds in scope["extensions"]["hadal.abort"].
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol


class HadalProtocol(H11Protocol):
    """`header_timeout` (seconds) is set on a subclass by run.py."""

    header_timeout: float = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_clock: asyncio.TimerHandle | None = None
        inner = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            scope.setdefault("extensions", {})["hadal.abort"] = self._abort
            await inner(scope, receive, send)

        self.app = with_abort

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self._header_clock is None and (before is None or before.response_complete):
            self._start_clock()  # the first bytes of a further request
        super().data_received(data)
        if self.cycle is not before:  # its headers are complete
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def _start_clock(self) -> None:
        self._header_clock = self.loop.call_later(self.header_timeout, self._too_slow)

    def _stop_clock(self) -> None:
        if self._header_clock is not None:
            self._header_clock.cancel()
            self._header_clock = None

    def _too_slow(self) -> None:
        self._header_clock = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def protocol_with(header_timeout: float) -> type[HadalProtocol]:
    """The protocol class for `uvicorn.Config(http=…)`."""
    return type("HadalProtocol", (HadalProtocol,), {"header_timeout": header_timeout})
