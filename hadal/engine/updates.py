"""What comes out of the engine: updates while a request runs, and a `Completion` of all of them. No tensors.

All times are seconds of `time.monotonic()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class TokenLogprob:
    """Natural log-probability of a token, and the most likely ones at its place as (id, log-probability)."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: seconds of time.monotonic(), None where it did not get so far."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    completion_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0  # drafts that were verified
    accepted_tokens: int = 0  # of these, right

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first step."""
        return None if self.first_scheduled is None else self.first_scheduled - self.arrival

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tokens_per_s(self) -> float | None:
        """Rate of decoding: tokens after the first, over the time that they took. None below two tokens."""
        if self.first_token is None or self.finished is None or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / max(self.finished - self.first_token, 1e-9)


@dataclass(slots=True)
class Update:
    """What became known about a request since the last update. Counts are running totals."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None  # first update only; None for the first token
    embedding: list[float] | None = None  # of a pooling request
    metrics: RequestMetrics | None = None  # with finish_reason


class Gathered:
    """Updates of one request, merged as they come: none of them need be kept."""

    __slots__ = ("_last", "_logprobs", "_prompt_logprobs", "_text", "_token_ids")

    def __init__(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._last: Update | None = None

    def add(self, update: Update) -> None:
        """Take in the next update."""
        self._last = update
        self._text.append(update.text)
        self._token_ids += update.token_ids
        if update.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs += update.logprobs
        if self._prompt_logprobs is None:
            self._prompt_logprobs = update.prompt_logprobs

    def whole(self) -> Update:
        """One update that says what all of them (at least one) say together."""
        assert self._last is not None
        return replace(
            self._last, text="".join(self._text), token_ids=self._token_ids, logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )  # fmt: skip


def merge_updates(updates: Sequence[Update]) -> Update:
    """One update that says what `updates` (of one request, in order, at least one) say together."""
    if len(updates) == 1:
        return updates[0]
    gathered = Gathered()
    for update in updates:
        gathered.add(update)
    return gathered.whole()


@dataclass
class Completion:
    """A finished request. `reasoning` and `content` split `text` after a chat; else content = text."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None
    prompt_tokens: int
    cached_tokens: int
    metrics: RequestMetrics
    error: str | None = None
    reasoning: str = ""
    content: str = ""

    @classmethod
    def from_updates(cls, updates: Sequence[Update]) -> Completion:
        """Fold the updates of one finished request. Raises ValueError when the last one does not end it."""
        whole = merge_updates(updates)
        if whole.finish_reason is None or whole.metrics is None:
            raise ValueError("the request has not finished: its last update has no finish_reason")
        return cls(
            whole.text, list(whole.token_ids), whole.finish_reason, whole.stop_reason, whole.logprobs,
            whole.prompt_logprobs, whole.prompt_tokens, whole.cached_tokens, whole.metrics, whole.error,
            content=whole.text,
        )  # fmt: skip
