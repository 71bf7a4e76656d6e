"""A visitor of the page: a Chromium tab that notes every request to elsewhere and every complaint."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

__all__ = ["ANSWERS", "ARGS", "BOX", "CHATS", "FIGURES", "PATIENT", "Visit", "expect", "wait_until"]

ARGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
BOX = "#hadal-box textarea"
ANSWERS = "#hadal-chat .bot-row"
FIGURES = "#hadal-chat .hadal-figures"
CHATS = "#hadal-list label"
PATIENT = 90_000  # ms that anything may take: the machine may be busy


class Visit:
    """One visitor: a fresh browser profile, watched."""

    def __init__(self, context: Any, url: str, *, ready: bool = True) -> None:
        self.context = context
        self.url = url
        self.foreign: list[str] = []
        self.complaints: list[str] = []
        self.page = self.open(ready=ready)

    def open(self, *, ready: bool = True) -> Any:
        page = self.context.new_page()
        page.set_default_timeout(PATIENT)
        page.on("request", lambda request: self._request(request.url))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        page.goto(self.url)
        if ready:
            self.ready(page)
        return page

    def renew(self) -> None:
        """Forget everything: stored conversations, settings, further tabs, complaints."""
        for page in self.context.pages:
            if page is not self.page:
                page.close()
        self.idle()
        right = self.page.locator("#hadal-right")
        if "open" in str(right.get_attribute("class")).split():
            self.page.get_by_role("button", name="Back to defaults").click()
            right.locator(".toggle-button").click()
        self.page.fill(BOX, "")
        self.page.evaluate("localStorage.clear(); sessionStorage.clear()")
        self.page.click("#hadal-new")
        self.settled()
        expect(self.page.locator(".hadal-welcome")).to_be_visible()
        self.foreign.clear()
        self.complaints.clear()

    @staticmethod
    def ready(page: Any) -> None:
        """Loaded, memory read, models listed."""
        expect(page.locator("#hadal-model input")).to_have_value(re.compile("."))
        page.wait_for_function("document.body.classList.contains('hadal-ready')")

    def _request(self, url: str) -> None:
        if not url.startswith((self.url + "/", "data:", "blob:")):
            self.foreign.append(url)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def ask(self, question: str, *, answered: bool = True) -> None:
        """Send a question; wait for the small print under its answer."""
        self.settled()
        before = self.page.locator(ANSWERS).count()
        self.page.fill(BOX, question)
        self.page.press(BOX, "Enter")
        if answered:
            expect(self.page.locator(ANSWERS)).to_have_count(before + 1)
            ended = self.page.locator(ANSWERS).last.locator(".hadal-figures, .hadal-error")
            expect(ended).not_to_have_count(0)
            self.idle()

    def settled(self) -> None:
        """The conversation that was chosen stands."""
        self.page.wait_for_function("!document.body.classList.contains('hadal-switching')")

    def idle(self) -> None:
        """The message box takes a question again."""
        expect(self.page.locator("#hadal-box .submit-button")).to_be_visible()

    def stored(self) -> dict[str, Any]:
        """The conversations in the browser, by title."""
        text = self.page.evaluate(
            "JSON.stringify(Object.keys(localStorage).filter(k => k.startsWith('hadal.chat.'))"
            ".map(k => JSON.parse(localStorage[k])))"
        )
        return {chat["title"]: chat for chat in json.loads(text)}

    def picture(self, name: str) -> None:
        folder = os.environ.get("HADAL_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


def wait_until(visit: Visit, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENT / 1000
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        visit.page.wait_for_timeout(50)
