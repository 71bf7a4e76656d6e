"""What every route needs: the app's own objects, and one visit (request) with its body, key and deadline."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from hadal.serve.body import read_json
from hadal.serve.fields import Fields
from hadal.serve.generation import Call
from hadal.serve.metrics import Metrics
from hadal.serve.models import Registry, Served
from hadal.serve.settings import Settings


@dataclass
class App:
    """The server's long-lived objects, in `app.state.hadal`."""

    registry: Registry
    settings: Settings
    metrics: Metrics
    started: float = field(default_factory=time.time)

    @classmethod
    def of(cls, request: Request) -> App:
        app: App = request.app.state.hadal
        return app

    async def visit(self, request: Request) -> Visit:
        """Read a POST's body. Raises ApiError."""
        arrival = time.monotonic()
        fields = await read_json(request, self.settings)
        return Visit(self, request.scope.get("state", {}), fields, arrival)

    def drain(self) -> None:
        """No new work from now on."""
        for served in self.registry.models:
            served.draining = True

    def in_flight(self) -> int:
        """Sequences that are being worked on."""
        return sum(served.in_flight for served in self.registry.models)


@dataclass
class Visit:
    """One request: its fields, what the gate and the log attached to it, and when it came."""

    app: App
    state: dict[str, Any]
    fields: Fields
    arrival: float

    def note(self, **notes: object) -> None:
        """Words for this request's log line."""
        self.state.get("notes", {}).update(notes)

    @asynccontextmanager
    async def call(self, served: Served, sequences: int) -> AsyncIterator[Call]:
        """Admission of so many sequences; the Call runs them. Raises ApiError 400 or 503."""
        timeout = self.app.settings.queue_timeout
        async with served.use(sequences) as backend:
            yield Call(
                served,
                backend,
                self.app.metrics,
                cache_salt=self.state.get("cache_salt", ""),
                deadline=None if timeout is None else self.arrival + timeout,
            )
