"""Running a request's sequences on an engine: one or many, whole or as a stream, with errors as HTTP knows
them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from hadal.engine.request import RequestError, SamplingParams, Update, merge_updates
from hadal.serve.errors import ApiError, overloaded
from hadal.serve.metrics import Metrics
from hadal.serve.models import Backend, Served
from hadal.serve.sampling import for_choice, refused

logger = logging.getLogger("hadal.serve")


@dataclass(frozen=True)
class Job:
    """One sequence to run: the choice's index in the answer, its prompt and its parameters."""

    index: int
    prompt_ids: list[int]
    params: SamplingParams


@dataclass
class Call:
    """One request at work: its engine, its salt and deadline, and where its counts go."""

    served: Served
    backend: Backend
    metrics: Metrics
    cache_salt: str = ""
    deadline: float | None = None

    async def updates(self, job: Job) -> AsyncGenerator[Update, None]:
        """The updates of one sequence; the last has a finish_reason of stop or length. Closing the generator
        aborts the sequence. Raises ApiError."""
        finished = False
        stream = self.backend.stream(
            job.prompt_ids, job.params, cache_salt=self.cache_salt, deadline=self.deadline
        )
        try:
            with self.answered():
                async for update in stream:
                    if update.finish_reason is not None:
                        finished = True
                        self.metrics.finished(self.served.name, update)
                        self._check(update)
                    yield update
        finally:
            await stream.aclose()
            if not finished:
                self.metrics.finished(self.served.name, Update(finish_reason="abort"))

    @contextmanager
    def answered(self) -> Iterator[None]:
        """What the engine raises inside becomes an ApiError: its refusal a 400 or 503, its failure a 500 or
        503."""
        try:
            yield
        except RequestError as error:
            raise refused(error, self.served.settings.retry_after) from None
        except RuntimeError as error:
            raise self._broken(error) from error

    def _broken(self, error: RuntimeError) -> ApiError:
        """The engine itself failed: 503 when it is down, else 500."""
        logger.error("the engine of %s failed on a request", self.served.name, exc_info=error)
        status, code = (500, "engine_error") if self.backend.healthy() else (503, "engine_dead")
        return ApiError(status, str(error), code=code)

    def _check(self, update: Update) -> None:
        """Raise what a failed sequence means for its client."""
        if update.finish_reason == "error":
            message = update.error or "the engine failed on this request"
            raise ApiError(500, message, code="engine_error")
        if update.finish_reason == "abort":
            retry = self.served.settings.retry_after
            raise overloaded(update.error or "the server gave the request up; try again", retry)

    async def whole(self, job: Job) -> Update:
        """One sequence to its end, as one update."""
        async with aclosing(self.updates(job)) as updates:
            return merge_updates([update async for update in updates])

    async def all(self, jobs: Sequence[Job]) -> list[Update]:
        """All sequences to their ends; the first failure cancels the others."""
        if len(jobs) == 1:
            return [await self.whole(jobs[0])]
        tasks = [asyncio.ensure_future(self.whole(job)) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def merged(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[Job, Update], None]:
        """The updates of all sequences as they come. Bounded: a slow reader holds the sequences' buffers
        back."""
        if len(jobs) == 1:
            async with aclosing(self.updates(jobs[0])) as updates:
                async for update in updates:
                    yield jobs[0], update
            return
        queue: asyncio.Queue[tuple[Job, Update | BaseException | None]] = asyncio.Queue(2 * len(jobs))
        tasks = [asyncio.ensure_future(self._feed(job, queue)) for job in jobs]
        try:
            running = len(jobs)
            while running:
                job, item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield job, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self, job: Job, queue: asyncio.Queue[tuple[Job, Update | BaseException | None]]) -> None:
        try:
            async with aclosing(self.updates(job)) as updates:
                async for update in updates:
                    await queue.put((job, update))
            await queue.put((job, None))
        except Exception as error:
            await queue.put((job, error))


def make_jobs(prompts: Sequence[list[int]], params: SamplingParams, n: int) -> list[Job]:
    """n choices of each prompt, numbered as OpenAI does: prompt by prompt."""
    return [
        Job(place * n + choice, prompt, for_choice(params, choice))
        for place, prompt in enumerate(prompts)
        for choice in range(n)
    ]
