"""The engine beside an event loop: a thread of its own runs `step()`, coroutines get their updates.

    async with AsyncEngine(Engine.load("hadal-mini")) as engine:
        async for update in engine.stream(prompt_ids, SamplingParams(max_tokens=100)):
            print(update.text, end="")

Commands (add, abort) reach the thread through a queue; updates leave it through one box a request. A box
holds one update at most: what a slow reader has not fetched yet is folded into it, so that no queue grows.
The loop is woken once a step, not once a token. A watchdog notices a thread that has work and makes no
step, and writes all stacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch

from hadal.engine.engine import Engine
from hadal.engine.pooling import Pooling
from hadal.engine.request import (
    Completion,
    EngineError,
    PoolingParams,
    Request,
    RequestError,
    SamplingParams,
    Update,
)
from hadal.engine.watching import Watched, Wish, streams, watch

T = TypeVar("T")
logger = logging.getLogger(__name__)

_CHECK_AFTER_IDLE = 1.0  # seconds
_CHECK_PAGES = 200_000  # the integrity check of more pages would delay the next request noticeably


class QueueFullError(RequestError):
    """Too many requests run or wait; try again soon."""


class _Box:
    """What one reader has not fetched yet, as one update. `push` in the engine's thread, the rest in the
    reader's."""

    def __init__(self, owner: AsyncEngine, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.owner, self.request, self.loop = owner, request, loop
        self.ready = asyncio.Event()
        self.ended = False  # the last update has been pushed
        self._texts: list[str] = []
        self._update: Update | None = None
        self._lock = threading.Lock()

    def push(self, update: Update) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended = update.finish_reason is not None
            self._texts.append(update.text)
            self._update = update if self._update is None else _fold(self._update, update)
        self.owner._pushed(self)

    def take(self) -> Update | None:
        with self._lock:
            update, self._update = self._update, None
            if update is not None:
                update.text = "".join(self._texts)
                self._texts = []
            return update

    async def get(self) -> Update:
        """The next update; waits for one."""
        while True:
            self.ready.clear()  # before looking: `ready` is set in this loop's thread only
            update = self.take()
            if update is not None:
                return update
            await self.ready.wait()


def _fold(first: Update, then: Update) -> Update:
    """`first`, extended in place by what `then` says (text aside): linear however many are folded."""
    first.token_ids += then.token_ids
    if then.logprobs is not None:
        if first.logprobs is None:
            first.logprobs = []
        first.logprobs += then.logprobs
    first.finish_reason, first.stop_reason, first.error = then.finish_reason, then.stop_reason, then.error
    first.prompt_tokens, first.cached_tokens = then.prompt_tokens, then.cached_tokens
    first.completion_tokens, first.embedding, first.metrics = (
        then.completion_tokens,
        then.embedding,
        then.metrics,
    )
    return first


@dataclass(eq=False)
class _Job(Generic[T]):
    """Work between two steps for a coroutine. `run` and `tell` in the engine's thread."""

    work: Callable[[], T]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]

    def run(self) -> None:
        try:
            self.tell(self.work())
        except Exception as error:
            self.tell(None, error)

    def tell(self, result: T | None, error: Exception | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: its reader is gone
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: T | None, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(cast("T", result))


class AsyncEngine:
    """Owns `engine` from construction to `shutdown`; use the engine's own methods only after that.

    max_queue: requests beyond the seats that may wait; more raise QueueFullError. watchdog_seconds: time
    without a step, with work at hand, after which the engine counts as unhealthy.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 4096, watchdog_seconds: float = 120.0) -> None:
        if engine._owner is not None:
            raise EngineError(f"the engine is run by {engine._owner} already")
        engine._owner = "an AsyncEngine"
        self.engine = engine
        self.max_queue = max_queue
        self.watchdog_seconds = watchdog_seconds
        self.last_progress = time.monotonic()
        self._failure: str | None = None
        self._closing = False
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._boxes: dict[str, _Box] = {}  # requests not yet ended; touched under the lock
        self._awake: dict[asyncio.AbstractEventLoop, list[_Box]] = {}  # boxes filled since the last wake-up
        self._jobs: set[_Job[Any]] = set()  # work between steps, not yet begun; touched under the lock
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hadal-engine", daemon=True)
        self._stopped = threading.Event()
        self._thread.start()
        threading.Thread(target=self._watch, name="hadal-watchdog", daemon=True).start()

    # --- for coroutines ---

    async def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Update, None]:
        """Updates of one request; the last has a finish_reason. Closing the generator, or cancelling the
        task that reads it, aborts the request. Raises RequestError, QueueFullError, or EngineError when the
        engine is down."""
        box = await self._submit(
            prompt_ids,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            deadline=deadline,
        )
        try:
            while True:
                update = await box.get()
                yield update
                if update.finish_reason is not None:
                    return
        finally:
            self._leave(box)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> Completion:
        """One whole completion; options as for `stream`."""
        return Completion.from_updates(
            [update async for update in self.stream(prompt_ids, params, **options)]
        )

    async def embed(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pooling: Pooling = "mean",
        layer: int = -1,
        normalize: bool = True,
        special: bool = False,
        cache_salt: str = "",
        priority: int = 0,
    ) -> list[list[float]]:
        """One vector for each prompt; see PoolingParams. They are computed in the same steps as everything
        else."""
        options = PoolingParams(pooling, layer, normalize, special)
        boxes: list[_Box] = []
        vectors = []
        try:
            for prompt in prompts:
                boxes.append(
                    await self._submit(
                        prompt, None, pooling=options, cache_salt=cache_salt, priority=priority
                    )
                )
            for box in boxes:
                update = await box.get()
                if update.embedding is None:
                    raise EngineError(f"an embedding failed: {update.error}")
                vectors.append(update.embedding)
        finally:
            for box in boxes:
                self._leave(box)
        return vectors

    async def watch(self, prompts: Sequence[Sequence[int]], wish: Wish) -> list[Watched]:
        """What happens inside the model on these texts (hadal/engine/watching.py), in passes between which
        the engine's steps go on. Raises ProbeError, or EngineError when the engine is down."""
        found: dict[int, Watched] = {}
        for members in streams(self.engine, prompts, wish):
            chosen = [prompts[i] for i in members]
            done = await self._between_steps(partial(_watch_all, self.engine, chosen, wish))
            found |= {members[i]: taken for i, taken in done.items()}
        return [found[i] for i in range(len(prompts))]

    async def _between_steps(self, work: Callable[[], T]) -> T:
        """Run `work` in the engine's thread and wait for what it returns or raises."""
        self._check_open()
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        with self._lock:
            self._jobs.add(job)
        self._commands.put(lambda: self._do(job))
        if self._stopped.is_set():
            self._end_all()
        return await job.future

    async def abort(self, request_id: str) -> None:
        """End a request, if it still runs, with finish_reason "abort"."""
        self._commands.put(lambda: self._abort(request_id))

    async def _submit(self, prompt_ids: Sequence[int], params: SamplingParams | None, **options: Any) -> _Box:
        self._check_open()
        if params is not None and params.grammar is not None:  # compiling may take seconds
            request = await asyncio.to_thread(self.engine.prepare, prompt_ids, params, **options)
        else:
            request = self.engine.prepare(prompt_ids, params, **options)
        box = _Box(self, request, asyncio.get_running_loop())
        request.on_update = box.push
        with self._lock:
            if len(self._boxes) >= self.engine.max_num_seqs + self.max_queue:
                message = f"the queue is full: {len(self._boxes)} requests run or wait; try again soon"
                raise QueueFullError(message, code="queue_full")
            if request.request_id in self._boxes:
                raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
            if not self._boxes:
                self.last_progress = time.monotonic()  # the watchdog counts from when work came
            self._boxes[request.request_id] = box
        self._commands.put(lambda: self._enqueue(box))
        if self._stopped.is_set():  # the thread ended in between: nobody will read the command
            self._end_all()
        return box

    def _leave(self, box: _Box) -> None:
        """The reader goes; its request goes with it."""
        if not box.ended:
            self._commands.put(lambda: self._abort(box.request.request_id))

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine is down: {self._failure}")
        if self._closing or self._stopped.is_set():
            raise EngineError("the engine is shutting down")

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            if self.engine.device.type == "cuda":
                torch.cuda.set_device(self.engine.device)  # the current device belongs to the thread
            while self._serve_commands():
                if self.engine.has_work():
                    self.engine.step()
                    self.last_progress = time.monotonic()
                self._wake()
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            logger.critical("the engine's thread died", exc_info=error)
        finally:
            self._stopped.set()
            self._end_all()

    def _serve_commands(self) -> bool:
        """Run what was asked for; wait for something when there is no work. False: stop."""
        checked = False
        while True:
            try:
                if self.engine.has_work():
                    command = self._commands.get_nowait()
                else:
                    self._wake()
                    command = self._commands.get(timeout=None if checked else _CHECK_AFTER_IDLE)
            except queue.Empty:
                if self.engine.has_work():
                    return True
                self._check_when_idle()
                checked = True
                continue
            if command is None:
                return False
            command()

    def _check_when_idle(self) -> None:
        if self.engine.scheduler.pages.num_pages <= _CHECK_PAGES:
            try:
                self.engine.check_integrity()
            except Exception:
                logger.exception("the idle engine's books do not add up; please report this")

    def _do(self, job: _Job[Any]) -> None:
        with self._lock:
            if job not in self._jobs:
                return
            self._jobs.discard(job)
        if not job.future.cancelled():
            job.run()
            self.last_progress = time.monotonic()

    def _enqueue(self, box: _Box) -> None:
        if box.ended:
            return
        try:
            self.engine.enqueue(box.request)
        except Exception as error:
            box.push(Update(finish_reason="error", error=str(error), metrics=box.request.metrics))

    def _abort(self, request_id: str) -> None:
        if not self.engine.abort(request_id):
            with self._lock:
                box = self._boxes.get(request_id)
            if box is not None:
                box.push(Update(finish_reason="abort", metrics=box.request.metrics))

    def _pushed(self, box: _Box) -> None:
        """A box was filled: note its loop for the next wake-up."""
        with self._lock:
            if box.ended:
                self._boxes.pop(box.request.request_id, None)
            self._awake.setdefault(box.loop, []).append(box)

    def _wake(self) -> None:
        """Tell the loops, once each, which boxes were filled."""
        with self._lock:
            awake, self._awake = self._awake, {}
        for loop, boxes in awake.items():
            try:
                loop.call_soon_threadsafe(_set_ready, boxes)
            except RuntimeError:  # the loop is closed: its readers are gone
                for box in boxes:
                    self.engine.abort(box.request.request_id)

    def _end_all(self) -> None:
        """After the last step: no reader may wait for ever."""
        with self._lock:
            boxes, jobs, self._jobs = list(self._boxes.values()), self._jobs, set()
        message = f"the engine stopped: {self._failure}" if self._failure else "the engine was shut down"
        for box in boxes:
            reason: Any = "error" if self._failure else "abort"
            box.push(Update(finish_reason=reason, error=message, metrics=box.request.metrics))
        for job in jobs:
            job.tell(None, EngineError(message))
        self._wake()

    # --- health ---

    @property
    def failure(self) -> str | None:
        """Why the engine cannot go on, or None."""
        return self._failure or self.engine.failure

    def stalled(self) -> bool:
        """There is work, and no step ended for watchdog_seconds."""
        return bool(self._boxes) and time.monotonic() - self.last_progress > self.watchdog_seconds

    def healthy(self) -> bool:
        """The thread lives, the device works, and steps are made while there is work."""
        return self._thread.is_alive() and self.failure is None and not self.stalled()

    def _watch(self) -> None:
        dumped = False
        while not self._stopped.wait(min(1.0, self.watchdog_seconds / 4)):
            if not self.stalled():
                dumped = False
            elif not dumped:
                dumped = True
                logger.error("no step for %.0f s with work at hand; all stacks follow", self.watchdog_seconds)
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

    # --- the end ---

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Stop: with `drain` after all requests have ended, else (or after `timeout` seconds of draining)
        at once.

        Blocks: from a coroutine, call it with asyncio.to_thread. Idempotent. Returns whether the thread has
        ended.
        """
        self._closing = True
        end = None if timeout is None else time.monotonic() + timeout
        while drain and self._boxes and self._thread.is_alive() and (end is None or time.monotonic() < end):
            time.sleep(0.01)
        self._commands.put(None)
        self._thread.join(timeout=5.0 if timeout is None else max(1.0, timeout))
        if not self._thread.is_alive():
            for request_id in list(self.engine._requests):
                self.engine.abort(request_id)
            self.engine._owner = None
        return not self._thread.is_alive()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown, drain=error is None)


def _watch_all(engine: Engine, prompts: Sequence[Sequence[int]], wish: Wish) -> dict[int, Watched]:
    return dict(watch(engine, prompts, wish))


def _set_ready(boxes: list[_Box]) -> None:
    for box in boxes:
        box.ready.set()
