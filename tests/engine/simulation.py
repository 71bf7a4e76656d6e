"""A model and a cache without tensors, to drive the scheduler: the next token is a function of all tokens
before it, and each cache entry remembers the whole prefix that it was computed from, so that a wrongly
shared, lost or stale page is noticed the moment that it is read."""

from __future__ import annotations

import hashlib
import random

from hadal.engine.blocks import SCRATCH_PAGE, PageAllocator
from hadal.engine.request import Request, SamplingParams
from hadal.engine.scheduler import Schedule, Scheduler

VOCAB = 50


def entry(tokens: list[int], salt: str) -> bytes:
    """What a cache entry of the last of `tokens` depends on."""
    return hashlib.sha1(repr((salt, tokens)).encode()).digest()


def next_token(tokens: list[int], seed: int) -> int:
    return hashlib.sha1(repr((seed, tokens)).encode()).digest()[0] % VOCAB


def expected_output(request: Request) -> list[int]:
    tokens = list(request.prompt_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens, request.seed))
    return tokens[len(request.prompt_ids) :]


class Simulation:
    """Scheduler, fake cache, fake model. `step` checks everything that a step can be checked for."""

    def __init__(
        self,
        num_pages: int = 20,
        page_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        prefix_caching: bool = True,
        drafts: random.Random | None = None,
    ) -> None:
        self.pages = PageAllocator(num_pages, page_size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(self.pages, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.cache: dict[tuple[int, int], bytes] = {}
        self.requests: dict[str, Request] = {}
        self.done: dict[str, Request] = {}
        self.drafts = drafts
        self.added = 0
        self.steps = 0
        self.computed = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        priority: int = 0,
        salt: str = "",
        deadline: float | None = None,
        params: SamplingParams | None = None,
        seed: int = 0,
    ) -> Request:
        request = Request(
            f"r{self.added}", prompt, params or SamplingParams(), 0.0, max_tokens,
            priority=priority, cache_salt=salt, deadline=deadline, seed=seed,
        )  # fmt: skip
        self.scheduler.add(request)
        self.added += 1
        self.requests[request.request_id] = request
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.requests.pop(request.request_id, None)

    def step(self, now: float = 0.0) -> Schedule:
        plan = self.scheduler.schedule(now)
        self.steps += 1
        self._check_plan(plan)
        rejected = self._compute(plan)
        self.scheduler.commit(plan, rejected)
        for request in plan.expired:
            self.done[request.request_id] = self.requests.pop(request.request_id)
        for sequence in plan.sequences:
            request = sequence.request
            if request.num_generated >= request.max_tokens:
                self.scheduler.finish(request)
                self.done[request.request_id] = self.requests.pop(request.request_id)
            elif self.drafts is not None and sequence.samples:
                self._draft(request, self.drafts)
        return plan

    def run(self, max_steps: int = 10_000) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.steps < max_steps, "no end: somebody starves"

    def _check_plan(self, plan: Schedule) -> None:
        sizes = [sequence.num_tokens for sequence in plan.sequences]
        assert plan.num_tokens == sum(sizes) <= self.scheduler.max_num_batched_tokens
        assert len(sizes) <= self.scheduler.max_num_seqs
        assert all(size == 1 for size in sizes[: plan.num_decodes])
        phases = [0 if s.num_tokens == 1 and s.is_decode else 1 if s.is_decode else 2 for s in plan.sequences]
        assert phases == sorted(phases), "decodes come first, then drafts, then prompts"
        assert plan.num_decodes == phases.count(0)
        names = [sequence.request.request_id for sequence in plan.sequences]
        assert len(set(names)) == len(names)
        assert self.scheduler.running or not plan.sequences

    def _compute(self, plan: Schedule) -> dict[str, int]:
        """Write every query token's entry, then read back every sequence whole; sample; verify drafts."""
        size = self.pages.page_size
        rejected: dict[str, int] = {}
        written: set[tuple[int, int]] = set()
        streams = []
        for s in plan.sequences:
            tokens = s.request.token_ids + s.request.draft_ids[: s.num_drafts]
            assert s.num_tokens > 0
            for index in range(s.start, s.start + s.num_tokens):
                place = (s.pages[index // size], index % size)
                assert place not in written and place[0] != SCRATCH_PAGE, "two tokens in one place"
                written.add(place)
                self.cache[place] = entry(tokens[: index + 1], s.request.cache_salt)
            streams.append(tokens)
        for s, tokens in zip(plan.sequences, streams, strict=True):
            for index in range(s.start + s.num_tokens):
                found = self.cache[(s.pages[index // size], index % size)]
                assert found == entry(tokens[: index + 1], s.request.cache_salt), (
                    "stale or foreign cache entry"
                )
            self.computed += s.num_tokens
            assert s.samples == (s.start + s.num_tokens - s.num_drafts == len(s.request.token_ids))
            if s.samples:
                rejected[s.request.request_id] = self._sample(s.request, s.num_drafts)
        return rejected

    def _sample(self, request: Request, num_drafts: int) -> int:
        """Append the accepted drafts and one more token; returns how many drafts were rejected."""
        drafts = request.draft_ids[:num_drafts]
        for place, draft in enumerate(drafts):
            token = next_token(request.token_ids, request.seed)
            request.token_ids.append(token)
            if token != draft:
                return num_drafts - place
        request.token_ids.append(next_token(request.token_ids, request.seed))
        return 0

    def _draft(self, request: Request, rng: random.Random) -> None:
        tokens = list(request.token_ids)
        for _ in range(rng.randrange(4)):
            right = next_token(tokens, request.seed)
            tokens.append(right if rng.random() < 0.7 else rng.randrange(VOCAB))
        request.draft_ids[:] = tokens[len(request.token_ids) :]
