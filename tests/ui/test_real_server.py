"""The page on Hadal's own server: its gate, its errors, its drain; then with the model on board."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import hadal.ui
from tests.helpers.live_server import LiveServer, live_server
from tests.serve.fake_engine import FakeAsyncEngine
from tests.ui.conftest import build
from tests.ui.visits import ANSWERS, FIGURES, Visit, expect, wait_until

pytestmark = pytest.mark.chromium

KEY = "correct-horse-battery"
HTML = {"accept": "text/html"}


def with_page(app: Any, url: str) -> None:
    hadal.ui.mount(app, base_url=url)


@pytest.fixture(scope="module")
def scripted() -> FakeAsyncEngine:
    return FakeAsyncEngine()


@pytest.fixture(scope="module")
def server(scripted: FakeAsyncEngine) -> Iterator[LiveServer]:
    """A scripted engine behind the real server, with a key and the page."""
    with live_server(scripted, prepare=with_page, api_keys=(KEY,)) as running:
        build(running.url, KEY)
        yield running


@pytest.fixture
def visit(browser: Any, server: LiveServer, scripted: FakeAsyncEngine) -> Iterator[Visit]:
    """A visitor whose browser was given the key when it asked for a password."""
    scripted.script = lambda prompt, params: "I greet.</think>Hello, world"
    scripted.delay, scripted.alive = 0.0, True
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, http_credentials={"username": "me", "password": KEY}
    )
    visit = Visit(context, server.url)
    yield visit
    context.close()
    assert visit.foreign == []
    assert visit.complaints == []


def test_the_page_stands_behind_the_gate(server: LiveServer) -> None:
    page = httpx.get(server.url, headers=HTML, auth=("me", KEY), timeout=60)
    refused = httpx.get(server.url, headers=HTML)
    assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
    for path in ("/_hadal/page.js", "/config", "/gradio_api/queue/data?session_hash=x"):
        assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(server.url, headers={**HTML, "host": "evil.example"}).status_code == 403
    foreign = {"origin": "https://evil.example", "authorization": f"Bearer {KEY}"}
    assert httpx.post(server.url + "/gradio_api/queue/join", headers=foreign, json={}).status_code == 403
    assert page.status_code == 200 and KEY not in page.text
    policy = page.headers.get_list("content-security-policy")
    assert len(policy) == 1 and "'unsafe-inline'" not in policy[0].split("style-src")[0]


def test_the_visitors_key_reaches_the_engine(visit: Visit, scripted: FakeAsyncEngine) -> None:
    visit.ask("Hi there")
    answer = visit.page.locator(ANSWERS)
    expect(answer).to_contain_text("Hello, world")
    expect(answer.locator(".title")).to_contain_text("Thought for")
    expect(visit.page.locator(FIGURES)).to_contain_text(
        re.compile(r"\d+ tokens, \d+ of them thought · \d+ read")
    )
    _, params, salt = scripted.seen[-1]
    assert salt == hashlib.sha256(KEY.encode()).hexdigest()
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 1.0, None)  # nothing was set


def test_stop_aborts_in_the_engine(visit: Visit, scripted: FakeAsyncEngine) -> None:
    scripted.script = lambda prompt, params: "tick " * 1500  # more than a minute
    scripted.delay = 0.05
    aborted = scripted.aborted
    visit.ask("count", answered=False)
    expect(visit.page.locator("#hadal-chat .content")).to_contain_text("tick tick")
    visit.page.locator("#hadal-box .stop-button").click()
    expect(visit.page.locator(FIGURES)).to_contain_text("Stopped")
    wait_until(visit, lambda: scripted.aborted == aborted + 1 and scripted.active == 0)


def test_errors_of_the_real_server_in_plain_words(visit: Visit, scripted: FakeAsyncEngine) -> None:
    error = visit.page.locator(".hadal-error")
    visit.ask("word " * 3000)
    expect(error).to_contain_text("longer than the model can read")
    expect(error).to_contain_text("2048")
    scripted.alive = False
    visit.ask("hello")
    expect(error.last).to_contain_text("The server cannot answer now.")
    scripted.alive = True
    visit.ask("hello again")
    expect(visit.page.locator(ANSWERS).last).to_contain_text("Hello, world")


def test_a_drain_does_not_wait_for_open_pages(browser: Any) -> None:
    engine = FakeAsyncEngine()
    engine.script = lambda prompt, params: "tick " * 1000
    engine.delay = 0.05
    with live_server(engine, prepare=with_page, drain_timeout=250) as running:
        context = browser.new_context()
        visit = Visit(context, running.url)
        visit.ask("count", answered=False)
        wait_until(visit, lambda: engine.active == 1)
        running.drain()
        engine.delay = 0.0
        running.thread.join(120)
        assert not running.thread.is_alive()
        assert engine.finished == 1 and engine.aborted == 0  # what ran was let to its end
        context.close()


def test_the_model_on_board_answers(browser: Any) -> None:
    from hadal.engine import AsyncEngine, Engine

    engine = AsyncEngine(Engine.load("hadal-mini", device="cpu"))
    with live_server(engine, prepare=with_page) as running:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        visit = Visit(context, running.url)
        expect(visit.page.locator("#hadal-note")).to_contain_text("number puzzles only")
        expect(visit.page.locator("#hadal-thinking input")).to_have_count(0)  # it always thinks
        visit.page.get_by_text("What is 347 + 586?").click()
        visit.idle()
        answer = visit.page.locator(ANSWERS)
        expect(answer.locator(".title")).to_contain_text("Thought for", timeout=60_000)
        expect(answer.locator(".hadal-figures")).to_contain_text("tokens/s", timeout=60_000)
        turn = visit.stored()["What is 347 + 586?"]["turns"][0]
        assert turn["status"] == "done" and "347" in turn["reasoning"] and "933" in turn["answer"]
        visit.ask("Coloque em ordem crescente: 41, 7, 93, 28, 65.")
        expect(answer.last).to_contain_text("7, 28, 41, 65, 93")
        answer.last.locator(".title").click()
        visit.page.mouse.move(640, 20)
        visit.page.wait_for_timeout(500)
        visit.picture("chat")
        assert visit.foreign == [] and visit.complaints == []
        context.close()
    engine.shutdown()
