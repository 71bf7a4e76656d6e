"""Worker processes that judge, each job under a limit of time; who hangs or dies is replaced.

One loop waits for all workers; nothing here blocks on one of them, neither reading nor writing. A worker that
is late is killed with all that it has started, its job scores 0, and another worker takes its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hadal.post.rewards.processes import end
from hadal.post.rewards.protocol import Completion, RewardError, Score, failure

START_SECONDS = 180.0  # for a worker's imports, on a busy machine
MAX_REPLY = 1 << 20
MAX_FAILED_STARTS = 3  # one after another
_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "VIRTUAL_ENV")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Job:
    """One completion for reward number `reward` of the pool, within `timeout` seconds. check: what is right
    by its record is looked at, not the completion."""

    reward: int
    completion: Completion
    timeout: float
    check: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What the workers of a pool are told: kinds and options of their rewards, whether to lock, memory."""

    rewards: tuple[tuple[str, Mapping[str, Any]], ...]
    locked: bool
    memory_mib: int
    environment: tuple[str, ...] = ()  # variables handed on, beside a few harmless ones


class _Worker:
    """One process and the talk with it."""

    def __init__(self, plan: Plan) -> None:
        kept = {name: os.environ[name] for name in (*_KEPT, *plan.environment) if name in os.environ}
        environment = {**kept, **dict.fromkeys(_THREADS, "1"), "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg",
                       "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # fmt: skip
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from hadal.post.rewards.worker import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.reading, self.writing = self.process.stdout.fileno(), self.process.stdin.fileno()
        os.set_blocking(self.reading, False)
        os.set_blocking(self.writing, False)
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.inbox, self.outbox = bytearray(), bytearray()
        self.send({"rewards": plan.rewards, "locked": plan.locked, "memory_mib": plan.memory_mib})

    def send(self, message: Mapping[str, Any]) -> None:
        self.outbox += json.dumps(message).encode() + b"\n"

    def write(self) -> None:
        """As much of the outbox as the pipe takes."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            del self.outbox[: os.write(self.writing, self.outbox[:65536])]

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have come, and whether the worker still talks sense."""
        try:
            piece = os.read(self.reading, 65536)
        except BlockingIOError:
            return [], True
        self.inbox += piece
        *lines, rest = self.inbox.split(b"\n")
        self.inbox = bytearray(rest)
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return [], False
        return messages, bool(piece) and len(rest) <= MAX_REPLY

    def end(self) -> str:
        """Kill it; how it had ended by itself, if it had."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.05)  # its exit status comes a moment after the end of its output
        code = self.process.returncode
        end(self.process)
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if code is None:
            return "was stopped"
        return f"died ({signal.Signals(-code).name})" if code < 0 else f"ended (status {code})"

    def last_words(self) -> str:
        """The last line that it wrote to stderr while it started."""
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""


class Pool:
    """So many workers of one plan. `close` it, or use it as a context; it closes with the interpreter too."""

    def __init__(self, plan: Plan, workers: int) -> None:
        self.plan, self.restarts, self.failed_starts = plan, 0, 0
        self.error = ""  # why the last worker could not start
        self.workers: list[_Worker] = []
        self._closer = weakref.finalize(self, _end_all, self.workers)
        try:
            self.workers += [_Worker(plan) for _ in range(workers)]
            self._wait_for_one()
        except BaseException:
            self.close()
            raise

    def _wait_for_one(self) -> None:
        """Return when a worker is ready. Raises RewardError, with the cause, if none gets so far."""
        while not any(worker.ready for worker in self.workers):
            self._turn({})
            if self.error:
                raise RewardError(f"a reward's worker cannot start: {self.error}")

    def run(self, jobs: Sequence[Job]) -> list[Score]:
        """The scores of all jobs, in order. A failed job scores 0 and says why."""
        if not self.workers:
            raise RewardError("the pool is closed; make another")
        done: dict[int, Score] = {}
        waiting = deque(range(len(jobs)))
        self.failed_starts = 0
        try:
            while len(done) < len(jobs):
                for worker in self.workers:
                    if waiting and worker.ready and worker.job is None:
                        self._give(worker, waiting.popleft(), jobs)
                self._turn(done)
                if self.failed_starts >= MAX_FAILED_STARTS and not any(w.ready for w in self.workers):
                    cause = failure(f"no worker could start: {self.error}")
                    return [done.get(i, cause) for i in range(len(jobs))]
        except BaseException:  # Ctrl-C, mostly
            self.close()
            raise
        return [done[i] for i in range(len(jobs))]

    @staticmethod
    def _give(worker: _Worker, number: int, jobs: Sequence[Job]) -> None:
        job = jobs[number]
        c = job.completion
        plain = {"record": dict(c.record), "text": c.text, "tokens": c.tokens,
                 "finish_reason": c.finish_reason, "opened": c.opened, "meta": dict(c.meta)}  # fmt: skip
        worker.send({"id": number, "reward": job.reward, "timeout": job.timeout, "completion": plain,
                     "check": job.check})  # fmt: skip
        worker.job, worker.deadline = number, time.monotonic() + job.timeout

    def _turn(self, done: dict[int, Score]) -> None:
        """Wait for something to happen, and act on it."""
        now = time.monotonic()
        pending = [w.deadline for w in self.workers if w.job is not None or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.reading, selectors.EVENT_READ, worker)
                if worker.outbox:
                    selector.register(worker.writing, selectors.EVENT_WRITE, worker)
            events = selector.select(max(0.0, min(pending) - now) if pending else None)
        for key, mask in events:
            worker = key.data
            if worker not in self.workers:  # replaced a moment ago: its descriptors are another's now
                continue
            if mask & selectors.EVENT_WRITE:
                worker.write()
                continue
            messages, sound = worker.read()
            for message in messages:
                self._take(worker, message, done)
            if not sound:
                self._replace(worker, done, "")
        for worker in list(self.workers):
            if (worker.job is not None or not worker.ready) and time.monotonic() >= worker.deadline:
                self._replace(worker, done, "took too long")

    def _take(self, worker: _Worker, message: dict[str, Any], done: dict[int, Score]) -> None:
        if "ready" in message:
            worker.ready, self.failed_starts, self.error = True, 0, ""
        elif "error" in message:
            self.error = str(message["error"])
        elif worker.job is not None and message["id"] == worker.job:
            done[worker.job] = Score(message["value"], message["verdict"])
            worker.job = None

    def _replace(self, worker: _Worker, done: dict[int, Score], cause: str) -> None:
        """End a worker, fail the job that it had, start another in its place."""
        ended = worker.end() if cause else ""
        if not cause:
            words = "" if worker.ready else worker.last_words()
            ended = worker.end()
            cause = ended
            if not worker.ready and not self.error:
                self.error = f"{ended}{': ' * bool(words)}{words}"
        if not worker.ready:
            self.failed_starts += 1
            self.error = self.error or f"{cause} to start"
        if worker.job is not None:
            done[worker.job] = failure(cause)
        self.restarts += 1
        self.workers[self.workers.index(worker)] = _Worker(self.plan)

    def close(self) -> None:
        """End all workers and what they have started."""
        self._closer()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
