"""A live fake server with the pages on it, shared by this room's tests (building takes seconds)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

import hadal.ui
from tests.ui.fake_server import Fake
from tests.ui.live import listener, serving


class Sockets:
    """Every address that this process connects to or looks up while `on` (audit hooks stay) and a test of
    this room runs: another room's tests may share the process."""

    def __init__(self) -> None:
        self.on = False
        self.seen: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or "tests/ui/" not in os.environ.get("PYTEST_CURRENT_TEST", "tests/ui/"):
            return
        if event == "socket.connect" and isinstance(args[1], tuple):
            self.seen.add(str(args[1][0]))
        if event == "socket.getaddrinfo" and args[0] is not None:
            self.seen.add(args[0].decode() if isinstance(args[0], bytes) else str(args[0]))

    def foreign(self) -> set[str]:
        """Addresses that are not this machine."""
        return {
            address for address in self.seen if address not in ("127.0.0.1", "::1", "localhost", "0.0.0.0")
        }


@dataclass
class Live:
    """A running fake server with the pages."""

    url: str
    fake: Fake
    sockets: Sockets = field(repr=False)


@pytest.fixture(scope="session")
def sockets() -> Sockets:
    return Sockets()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Not for the session: Playwright keeps an event loop running meanwhile."""
    from playwright.sync_api import expect, sync_playwright

    from tests.conftest import find_chromium
    from tests.ui.visits import ARGS, PATIENT

    expect.set_options(timeout=PATIENT)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=ARGS)
        yield chromium
        chromium.close()


def build(url: str, key: str = "") -> None:
    """Ask for the page: at the first request it is built, which takes seconds, on a busy machine many."""
    auth = ("me", key) if key else None
    assert httpx.get(url, headers={"accept": "text/html"}, auth=auth, timeout=180).status_code == 200


@pytest.fixture(scope="package")
def live(sockets: Sockets) -> Iterator[Live]:
    """The fake with pages, without a key. Its whole life is watched for foreign connections."""
    sockets.on = True
    fake = Fake()
    sock = listener()
    app = hadal.ui.mount(fake.app, base_url=f"http://127.0.0.1:{sock.getsockname()[1]}")
    with serving(app, sock) as url:
        build(url)
        yield Live(url, fake, sockets)
    sockets.on = False
    assert sockets.foreign() == set(), "the page or Gradio spoke to the outside"


@pytest.fixture(scope="package")
def live_with_key(sockets: Sockets) -> Iterator[Live]:
    """The same behind an API key; the page itself is open, as on a server that lists its paths as public."""
    fake = Fake(key="correct-horse")
    sock = listener()
    app = hadal.ui.mount(fake.app, base_url=f"http://127.0.0.1:{sock.getsockname()[1]}")
    with serving(app, sock) as url:
        build(url)
        yield Live(url, fake, sockets)
