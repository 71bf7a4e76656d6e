"""How a run is asked to stop: by a signal after the step at hand, by a second Ctrl-C at once, by its time."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether and why a run is to stop. `reason`: "", "signal" or "time".

    minutes: that the run may take, counted from `since` (of time.perf_counter); 0 is no limit.
    """

    def __init__(self, minutes: float, since: float) -> None:
        self.reason = ""
        self._end = since + 60 * minutes if minutes else float("inf")

    def asked(self) -> bool:
        """Whether the run is to stop after the step at hand."""
        if not self.reason and time.perf_counter() >= self._end:
            self.reason = "time"
        return bool(self.reason)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end the run after the step at hand; the second Ctrl-C ends it at
        once. Outside the main thread signals are left to whoever called."""
        try:
            before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.reason == "signal" and number == signal.SIGINT:
            print("\nstopped at once; --resume goes on from the last checkpoint", file=sys.stderr)
            raise KeyboardInterrupt
        self.reason = "signal"
