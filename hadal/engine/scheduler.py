"""Who computes what in the next step: continuous batching under a token budget, over a paged cache.

One step is one flat stream. Sequences that decode come first (one token each, or one and its drafts), then
chunks of prompts, as far as the budget goes. The order is total: (priority, order of arrival); it never
changes, so the first request always gets what it needs, and everyone finishes:

    decode     A sequence needs a page now and then. With none free, the *last* request in the order is
               preempted: its pages are freed, its tokens kept, and it waits at its old place to be computed
               again (the output does not change: sampling depends on seed and position alone).
    admission  A request starts when the pages of all its known tokens are free, so that a prompt never stalls
               half-way. A request that could never fit is refused by `add`.
    prefix     Pages found by hash are shared and skipped, but the last token is always computed. A request
               whose next page is just being computed by another waits for it rather than compute it again.

`schedule` makes the plan and counts it as computed; `commit` follows the step and publishes its full pages.
The two are apart so that a plan can be made while the step before is still running, or be sent elsewhere.
No tensors here.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field

from hadal.engine.blocks import IntegrityError, PageAllocator
from hadal.engine.request import Request, RequestError, Status


@dataclass(slots=True)
class ScheduledSequence:
    """Query tokens `start … start + num_tokens − 1` of one request. `num_drafts` of them, the last, are
    guesses. `samples`: the last known token is among them, so the next one can be drawn."""

    request: Request
    start: int
    num_tokens: int
    pages: list[int]  # of the whole sequence, in order; the request's own list
    is_decode: bool  # one known token was missing in the cache, not a chunk of many
    samples: bool
    num_drafts: int = 0


@dataclass(slots=True)
class Schedule:
    """One step: single-token decodes first (`num_decodes` of them), then decodes with drafts (`num_drafted`),
    then prompt chunks."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    num_decodes: int = 0
    num_drafted: int = 0
    num_tokens: int = 0
    preempted: list[Request] = field(default_factory=list)
    expired: list[Request] = field(
        default_factory=list
    )  # deadline passed in the queue; finished, never computed


@dataclass(slots=True)
class SchedulerStats:
    """Totals since the start, in requests and tokens."""

    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of these, found


def _key(request: Request) -> tuple[int, int]:
    return (request.priority, request.order)


class Scheduler:
    """See the module's docstring. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        pages: PageAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        hash_ahead: int = 0,
    ) -> None:
        """hash_ahead: 1 where the entry of a page's last token depends on the token after it (MTP's does).
        Raises ValueError when the budget does not give each running sequence a token."""
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs "
                f"({max_num_seqs}), and both at least 1: each running sequence needs one token a step"
            )
        self.pages = pages
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.hash_ahead = hash_ahead
        self.stats = SchedulerStats()
        self.running: list[Request] = []  # sorted by _key, as is waiting
        self.waiting: list[Request] = []
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self._deadlines: list[tuple[float, int, Request]] = []
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self.running or self.waiting)

    # --- requests come and go ----------------------------------------------------------------------
    def check_fits(self, prompt_len: int, max_len: int) -> None:
        """Raises RequestError for a request that the empty cache could not hold."""
        if self.pages.pages_for(max_len) > self.pages.capacity:
            room = self.pages.capacity * self.pages.page_size
            raise RequestError(
                f"{prompt_len} prompt tokens and {max_len - prompt_len + 1} new ones do not fit the cache of "
                f"{room} tokens; lower max_tokens, shorten the prompt, or give the engine a larger cache",
                "max_tokens",
                "context_length_exceeded",
            )

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError when it could never fit."""
        self.check_fits(request.prompt_len, request.max_len)
        request.order = self._arrivals
        self._arrivals += 1
        insort(self.waiting, request, key=_key)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.order, request))

    def finish(self, request: Request, *, poisoned: bool = False) -> None:
        """Take a request out, whatever it is doing; its full pages stay known unless `poisoned`.
        Idempotent."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            if poisoned:
                self.pages.unregister(request.pages)
            self._free(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def _free(self, request: Request) -> None:
        self.pages.release(request.pages)
        self._slots.append(request.slot)
        request.pages = []
        request.slot = -1
        request.num_computed = request.num_committed = 0
        request.draft_ids.clear()

    # --- the plan ----------------------------------------------------------------------------------
    def schedule(self, now: float | None = None) -> Schedule:
        """The next step. It may be empty, with nothing but expired requests to report."""
        now = time.monotonic() if now is None else now
        plan = Schedule()
        if self._deadlines:
            self._expire(plan, now)
        singles, drafted = self._decodes(plan)
        chunks: list[ScheduledSequence] = []
        budget = self.max_num_batched_tokens - len(singles) - sum(s.num_tokens for s in drafted)
        budget = self._continue_prefills(chunks, budget)
        if self.waiting and not plan.preempted:
            self._admit(chunks, budget, now)
        plan.sequences = singles + drafted + chunks
        plan.num_decodes, plan.num_drafted = len(singles), len(drafted)
        for sequence in plan.sequences:
            plan.num_tokens += sequence.num_tokens
            sequence.request.num_computed = sequence.start + sequence.num_tokens
        return plan

    def _expire(self, plan: Schedule, now: float) -> None:
        """Drop requests that nobody started by their deadline; started ones (preempted too) run on."""
        if len(self._deadlines) > 2 * len(self.waiting) + 64:  # most have started or gone: let go of them
            self._deadlines = [entry for entry in self._deadlines if entry[2].status is Status.WAITING]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request.status is Status.WAITING and request.metrics.first_scheduled is None:
                self.finish(request)
                plan.expired.append(request)

    def _decodes(self, plan: Schedule) -> tuple[list[ScheduledSequence], list[ScheduledSequence]]:
        """Sequences with one known token to compute: those with that token alone, those with drafts."""
        singles: list[ScheduledSequence] = []
        drafted: list[ScheduledSequence] = []
        spare = self.max_num_batched_tokens - len(self.running)  # one token for each sequence stays reserved
        page_size = self.pages.page_size
        index = 0
        while index < len(self.running):
            request = self.running[index]
            index += 1
            start = request.num_computed
            if len(request.token_ids) - start != 1:
                continue
            drafts = 0
            if request.draft_ids:
                drafts = min(len(request.draft_ids), spare, request.max_len - start - 1)
                drafts = self._affordable_drafts(request, drafts)
                spare -= drafts
            if start + 1 + drafts > len(request.pages) * page_size and not self._grow(
                request, 1 + drafts, plan
            ):
                break  # the request was the last in the order, and is preempted itself
            out = drafted if drafts else singles
            out.append(
                ScheduledSequence(
                    request, start, 1 + drafts, request.pages, True, samples=True, num_drafts=drafts
                )
            )
        return singles, drafted

    def _affordable_drafts(self, request: Request, drafts: int) -> int:
        """As many drafts as need no more pages than are free: nobody is preempted for a guess."""
        pages = len(request.pages) + self.pages.num_free
        return max(0, min(drafts, pages * self.pages.page_size - request.num_computed - 1))

    def _grow(self, request: Request, num_tokens: int, plan: Schedule) -> bool:
        """Pages for the next `num_tokens`, taken from the last in the order if need be; False: that was
        itself."""
        missing = self.pages.pages_for(request.num_computed + num_tokens) - len(request.pages)
        while (pages := self.pages.allocate(missing)) is None:
            victim = self.running.pop()
            self._preempt(victim, plan)
            if victim is request:
                return False
        request.pages.extend(pages)
        return True

    def _preempt(self, victim: Request, plan: Schedule) -> None:
        self._free(victim)
        victim.status = Status.WAITING
        victim.metrics.preemptions += 1
        self.stats.preemptions += 1
        insort(self.waiting, victim, key=_key)
        plan.preempted.append(victim)

    def _continue_prefills(self, chunks: list[ScheduledSequence], budget: int) -> int:
        """The next chunk of prompts under way, first come first; returns the budget that is left."""
        for request in self.running:
            if budget <= 0:
                break
            if len(request.token_ids) - request.num_computed > 1:
                budget -= self._chunk(chunks, request, budget)
        return budget

    def _chunk(self, chunks: list[ScheduledSequence], request: Request, budget: int) -> int:
        start = request.num_computed
        missing = len(request.token_ids) - start
        number = min(missing, budget)
        chunks.append(
            ScheduledSequence(
                request, start, number, request.pages, is_decode=False, samples=number == missing
            )
        )
        return number

    def _admit(self, chunks: list[ScheduledSequence], budget: int, now: float) -> None:
        """Start waiting requests in order, as long as budget, seats and pages last."""
        if budget <= 0 or len(self.running) >= self.max_num_seqs:
            return
        being_computed = self._pages_being_computed()
        for request in self.waiting[: self.max_num_seqs + 64]:
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                break
            hashes = self._hashes(request)
            found = self.pages.match(hashes)
            if len(found) < len(hashes) and hashes[len(found)] in being_computed:
                continue  # its turn comes when those pages can be shared
            if not self._seat(request, found):
                break  # strictly in order: nobody overtakes for want of pages
            if request.metrics.first_scheduled is None:
                self._first_time(request, found, now)
            budget -= self._chunk(chunks, request, budget)
            being_computed.update(hashes[len(found) :])

    def _hashes(self, request: Request) -> list[bytes]:
        """Hashes of the pages that may be shared: full, and not holding the last token, which must be
        computed."""
        if not self.pages.prefix_caching or request.needs_every_prompt_row:
            return []
        size = self.pages.page_size
        return request.hashes(size, self.hash_ahead)[: (len(request.token_ids) - 1) // size]

    def _pages_being_computed(self) -> set[bytes]:
        return {
            digest
            for request in self.running
            if len(request.token_ids) - request.num_computed > 1
            for digest in self._hashes(request)[request.num_committed :]
        }

    def _seat(self, request: Request, found: list[int]) -> bool:
        """Move a waiting request to the running ones with pages for all its tokens; False when too few are
        free."""
        missing = self.pages.pages_for(len(request.token_ids)) - len(found)
        reserve = min(len(self.running), self.pages.capacity // 50)  # room for the others to grow
        if missing + self.pages.num_unused(found) + reserve > self.pages.num_free:
            return False
        self.pages.share(found)
        fresh = self.pages.allocate(missing)
        if fresh is None:
            raise IntegrityError(f"{missing} pages were free, and then were not")
        self.waiting.remove(request)
        request.pages = found + fresh
        request.num_committed = len(found)
        request.num_computed = len(found) * self.pages.page_size
        request.slot = self._slots.pop()
        request.status = Status.RUNNING
        insort(self.running, request, key=_key)
        return True

    def _first_time(self, request: Request, found: list[int], now: float) -> None:
        request.metrics.first_scheduled = now
        request.cached_tokens = len(found) * self.pages.page_size
        if self.pages.prefix_caching and not request.needs_every_prompt_row:
            self.stats.prefix_queries += request.prompt_len
            self.stats.prefix_hits += request.cached_tokens

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Pages for `num_tokens` of a running request from those that are free; False (and nothing taken) if
        too few.

        For a step that is started before it is planned: nobody is preempted for it.
        """
        missing = self.pages.pages_for(num_tokens) - len(request.pages)
        pages = self.pages.allocate(missing) if missing > 0 else []
        if pages is None:
            return False
        request.pages.extend(pages)
        return True

    # --- after the step ----------------------------------------------------------------------------
    def commit(self, plan: Schedule, rejected: Mapping[str, int] | None = None) -> None:
        """The step is done: its keys are in the cache, so that its full pages can be shared.

        Call it after the sampled tokens were appended to `token_ids`. `rejected`: request id -> number of its
        drafts that were not accepted; their entries in the cache count for nothing and will be overwritten.
        """
        size = self.pages.page_size
        for sequence in plan.sequences:
            request = sequence.request
            if request.status is not Status.RUNNING or request.pages is not sequence.pages:
                continue  # finished or preempted meanwhile
            if sequence.num_drafts:
                request.num_computed -= (rejected or {}).get(request.request_id, 0)
            request.draft_ids.clear()
            full = request.num_computed // size
            if full > request.num_committed and self.pages.prefix_caching:
                hashes = request.hashes(size, self.hash_ahead)
                full = min(full, len(hashes))  # a pooling request has no token after its last page
                for index in range(request.num_committed, full):
                    self.pages.register(request.pages[index], hashes[index])
                request.num_committed = full

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages, seats and queues add up."""
        self.pages.check_integrity([request.pages for request in self.running])
        slots = [request.slot for request in self.running] + self._slots
        if sorted(slots) != list(range(self.max_num_seqs)):
            raise IntegrityError(f"some seat is lost or taken twice: {sorted(slots)}")
        for queue, status in ((self.running, Status.RUNNING), (self.waiting, Status.WAITING)):
            if queue != sorted(queue, key=_key):
                raise IntegrityError(f"the {status.value} requests are out of order")
            for request in queue:
                if request.status is not status:
                    raise IntegrityError(
                        f"{request.request_id} is {request.status.value} among the {status.value}"
                    )
        for request in self.running:
            if self.pages.pages_for(request.num_computed) > len(request.pages):
                raise IntegrityError(f"{request.request_id} computed more tokens than its pages hold")
        for request in self.waiting:
            if request.pages or request.slot != -1 or request.num_computed:
                raise IntegrityError(f"{request.request_id} waits, but holds pages or a seat")
