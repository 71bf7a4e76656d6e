"""Running one answer: read the stream beside the page, show it at a steady pace, stop when asked.

One task reads chunks and folds them into the turn as they come; the page is redrawn at most every `frame()`
seconds, so that a fast model does not drown the browser. Stopping, leaving the page and errors all end in a
finished turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from hadal.ui.api import Client, ServerError
from hadal.ui.conversation import Conversation, Fold, Status
from hadal.ui.settings import Settings, request_body

SAVE_S = 1.0
"""The browser stores a running conversation this often, so that a reload loses at most a second."""
HALT_S = 5.0

Step = Literal["draw", "save", "end"]


def frame(chars: int) -> float:
    """Seconds between two drawings of a turn of so many characters: 0.05 to 0.5 for very long ones."""
    return min(0.5, 0.05 + chars / 100_000)


@dataclass
class Run:
    """An answer under way in one browser tab."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class Runs:
    """The answers under way, by the page's session. A session has one at a time."""

    def __init__(self) -> None:
        self._by_session: dict[str, Run] = {}

    def __len__(self) -> int:
        return len(self._by_session)

    async def halt(self, session: str) -> None:
        """Ask the session's answer to stop, and wait until it has drawn its end."""
        run = self._by_session.get(session)
        if run is not None:
            run.stop.set()
            await asyncio.wait([asyncio.create_task(run.finished.wait())], timeout=HALT_S)

    async def answer(
        self, client: Client, conversation: Conversation, settings: Settings, session: str
    ) -> AsyncIterator[Step]:
        """Answer the conversation's last turn in place. Yields what the page should do next; never raises
        ServerError: failures are written into the turn."""
        await self.halt(session)
        run = self._by_session[session] = Run()
        fold = Fold(conversation.turns[-1], time.perf_counter())
        reader = asyncio.create_task(_read(client, conversation, settings, fold))
        stopper = asyncio.create_task(run.stop.wait())
        try:
            async for step in _watch(reader, stopper, conversation):
                yield step
            status, error = _outcome(reader)
            fold.finish(status, time.perf_counter(), error)
            conversation.updated = time.time()
            yield "end"
        finally:
            reader.cancel()
            stopper.cancel()
            await asyncio.gather(reader, stopper, return_exceptions=True)
            if self._by_session.get(session) is run:
                del self._by_session[session]
            run.finished.set()


async def _read(client: Client, conversation: Conversation, settings: Settings, fold: Fold) -> None:
    async for chunk in client.chat(request_body(conversation, settings), settings.key):
        fold.feed(chunk, time.perf_counter())


async def _watch(
    reader: asyncio.Task[None], stopper: asyncio.Task[bool], conversation: Conversation
) -> AsyncIterator[Step]:
    """Yield "draw" when there is something new ("save" when it is time for that), until the end or a stop."""
    turn = conversation.turns[-1]
    yield "save"
    drawn, saved = 0, time.perf_counter()
    while not reader.done() and not stopper.done():
        await asyncio.wait({reader, stopper}, timeout=frame(drawn), return_when=asyncio.FIRST_COMPLETED)
        size = len(turn.reasoning) + len(turn.answer)
        if size == drawn:
            continue
        drawn, now = size, time.perf_counter()
        if now - saved >= SAVE_S:
            saved = now
            yield "save"
        else:
            yield "draw"


def _outcome(reader: asyncio.Task[None]) -> tuple[Status, str]:
    if not reader.done():
        return "stopped", ""
    error = reader.exception()
    if error is None:
        return "done", ""
    if isinstance(error, ServerError):
        return "failed", str(error)
    raise error
