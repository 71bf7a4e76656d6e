"""What an engine counts, and what it says of itself when asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hadal.engine.scheduler import Scheduler
from hadal.engine.speculation import SpeculationStats


@dataclass
class EngineStats:
    """Gauges and totals since the start (tokens, requests)."""

    running: int
    waiting: int
    cache_usage: float  # share of the cache's pages that requests hold, 0 … 1
    cache_tokens: int  # what the cache can hold
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    finished: dict[str, int]  # by finish_reason
    speculation: SpeculationStats | None = None
    exact: bool = False  # batch-invariant operations


@dataclass
class Totals:
    """Counted as steps are booked."""

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)

    def stats(
        self, scheduler: Scheduler, speculation: SpeculationStats | None, *, exact: bool
    ) -> EngineStats:  # fmt: skip
        """Totals beside the scheduler's gauges; the numbers may be from different moments of a step."""
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            cache_usage=scheduler.pages.usage,
            cache_tokens=scheduler.pages.capacity * scheduler.pages.page_size,
            preemptions=scheduler.stats.preemptions,
            prefix_queries=scheduler.stats.prefix_queries,
            prefix_hits=scheduler.stats.prefix_hits,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            finished=dict(self.finished),
            speculation=speculation,
            exact=exact,
        )
