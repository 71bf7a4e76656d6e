"""The plan and probe pages in headless Chromium, on Hadal's own server with a scripted engine behind a key.

$HADAL_SCREENSHOTS names a folder for pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.live_server import LiveServer, live_server
from tests.serve.fake_engine import FakeAsyncEngine
from tests.ui.conftest import build
from tests.ui.test_real_server import KEY, with_page
from tests.ui.visits import PATIENT, Visit, expect

pytestmark = [pytest.mark.chromium, pytest.mark.flaky(reruns=2)]


class Look(Visit):
    """A visit that opens no page by itself."""

    def open(self, *, ready: bool = True) -> Any:
        page = self.context.new_page()
        page.set_default_timeout(PATIENT)
        page.on("request", lambda request: self._request(request.url))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        return page


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(FakeAsyncEngine(), prepare=with_page, api_keys=(KEY,)) as running:
        build(running.url, KEY)
        yield running


@pytest.fixture
def visit(browser: Any, server: LiveServer) -> Iterator[Look]:
    """A visitor whose browser was given the key. Afterwards: nothing went elsewhere, nothing complained."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 1000}, http_credentials={"username": "me", "password": KEY}
    )
    visit = Look(context, server.url)
    yield visit
    foreign, complaints = visit.foreign[:], visit.complaints[:]
    context.close()
    assert foreign == [] and complaints == []


def to(visit: Look, name: str) -> Any:
    """Open a page of the navigation bar."""
    visit.page.goto(f"{visit.url}/{name}")
    return visit.page


def test_plan_page(visit: Look) -> None:
    page = to(visit, "plan")
    run = page.locator("#hadal-plan-run")
    expect(run).to_contain_text("deepseek-v3 in FP8 fits 8 × H200")
    expect(run.locator("svg")).to_have_count(2)
    assert "parameters ×" in str(run.locator("svg g title").first.text_content())
    visit.picture("plan")
    count = page.locator("#hadal-plan-count input[type=number]")
    count.fill("2")
    count.press("Tab")
    expect(run).to_contain_text("does not fit 2 × H200")
    expect(run).to_contain_text("What would help")
    other = page.locator("#hadal-plan-other").get_by_role("textbox")
    other.fill("8xh2000")
    expect(run.get_by_role("alert")).to_contain_text("unknown device 'h2000'. Did you mean")
    other.fill("")
    expect(run).to_contain_text("does not fit 2 × H200")
    page.get_by_text("Another model: paste its config.json").click()
    pasted = page.locator("#hadal-plan-config").get_by_role("textbox")
    pasted.fill('{"model_type": "nonsense"}')
    expect(run.get_by_role("alert")).to_contain_text("nonsense")
    pasted.fill("{nonsense")
    expect(run.get_by_role("alert")).to_contain_text("is not JSON")
    expect(run).not_to_contain_text("Traceback")
    pasted.fill("")
    expect(run).to_contain_text("does not fit")
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#hadal-plan-training")).to_contain_text("What such a figure leaves out")


def test_probe_page(visit: Look) -> None:
    page = to(visit, "probe")
    expect(page.locator("#hadal-probe-model input")).to_have_value("fake")
    figure = page.locator("#hadal-probe-projection")
    page.click("#hadal-probe-look")
    expect(figure.locator("svg circle")).to_have_count(36)
    expect(figure).to_contain_text(re.compile(r"fake @ .* · float32 · layer 2 of 2 \(after the final norm\)"))
    layer = page.locator("#hadal-probe-layer input[type=number]")
    layer.fill("1")
    layer.press("Tab")
    expect(figure).to_contain_text("layer 1 of 2 (after block 0)")
    layer.fill("2")
    layer.press("Tab")
    page.get_by_role("tab", name="Neighbours").click()
    expect(page.locator("#hadal-probe-neighbours tr")).to_have_count(37)
    page.get_by_role("tab", name="Routers").click()
    expect(page.locator("#hadal-probe-routers")).to_contain_text("2 of 4 experts")
    expect(page.locator("#hadal-probe-routers svg rect").first).to_be_visible()
    lines = page.locator("#hadal-probe-lines").get_by_role("textbox")
    page.get_by_role("tab", name="Projection").click()
    for text, said in (
        ("one\ntwo", "There are 2 texts"),
        ("a\nb\n" + "x" * 100_000, "maximum context length"),
    ):
        lines.fill(text)
        page.click("#hadal-probe-look")
        expect(figure.get_by_role("alert")).to_contain_text(said)
    expect(figure).not_to_contain_text("Traceback")
