"""What other processes take of the processor during a measurement: a busy machine spoils it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")

LIMIT = 0.4  # cores that others may use; more spoils a measurement on all cores


class Neighbours:
    """Counts the cores that were busy, less the share of our own processes (`pids`, which must live on)."""

    def __init__(self, pids: list[int]) -> None:
        self.own = [psutil.Process(pid) for pid in pids]
        self.mark()

    def _times(self) -> tuple[float, float]:
        """(now, seconds of processor time of others since the machine started)."""
        t = psutil.cpu_times()
        kinds = ("user", "nice", "system", "irq", "softirq", "steal")
        busy = sum(getattr(t, kind, 0.0) for kind in kinds)  # some systems lack some kinds
        for process in self.own:
            with contextlib.suppress(psutil.NoSuchProcess):
                mine = process.cpu_times()
                busy -= mine.user + mine.system
        return time.perf_counter(), busy

    def mark(self) -> None:
        """Begin to count."""
        self.since, self.before = self._times()

    def cores(self) -> float:
        """Cores that others kept busy since the mark, on average."""
        now, busy = self._times()
        return max(0.0, (busy - self.before) / max(now - self.since, 1e-9))

    def undisturbed(self, work: Callable[[], T], patience_s: float) -> tuple[T, float]:
        """The result of `work` and the cores that others used meanwhile. While that is too much, it waits for
        half a quiet second and tries again, for `patience_s` at most; then the quietest try counts."""
        until = time.monotonic() + patience_s
        best: tuple[T, float] | None = None
        while True:
            self.mark()
            result = work()
            cores = self.cores()
            if best is None or cores < best[1]:
                best = result, cores
            if cores <= LIMIT or time.monotonic() >= until:
                return best
            while time.monotonic() < until:
                self.mark()
                time.sleep(0.5)
                if self.cores() <= LIMIT:
                    break
