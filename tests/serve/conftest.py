"""Fixtures of the server's tests: a scripted engine behind a live server, and a client for it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.helpers.live_server import LiveServer, live_server
from tests.serve.fake_engine import FakeAsyncEngine, FakeEngine


@pytest.fixture(scope="module")
def fake() -> FakeAsyncEngine:
    """A scripted engine; its fields may be changed by a test, and are put back by `reset`."""
    return FakeAsyncEngine()


@pytest.fixture(autouse=True)
def _reset(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "fake" in request.fixturenames:
        engine: FakeAsyncEngine = request.getfixturevalue("fake")
        fresh = FakeAsyncEngine(engine=engine.engine)
        for name in ("script", "delay", "alive", "error", "frozen"):
            setattr(engine, name, getattr(fresh, name))
        engine.seen.clear()
        engine.embedded.clear()


@pytest.fixture(scope="module")
def served(fake: FakeAsyncEngine) -> Iterator[LiveServer]:
    """The scripted engine behind a live server."""
    with live_server(fake) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: LiveServer) -> Iterator[httpx.Client]:
    """A client that believes in no proxy."""
    with httpx.Client(base_url=served.url, trust_env=False, timeout=20) as http:
        yield http


@pytest.fixture
def make_fake() -> type[FakeAsyncEngine]:
    """For tests that need an engine of their own."""
    return FakeAsyncEngine


def fake_with(**options: object) -> FakeAsyncEngine:
    """A scripted engine with a FakeEngine of these options."""
    return FakeAsyncEngine(engine=FakeEngine(**options))  # type: ignore[arg-type]
