"""A `Request`: one sequence inside the engine, with the state that scheduler and engine keep of it. No
tensors.

What it asks for is in hadal/engine/params.py, what its caller sees in hadal/engine/updates.py; their names
can be imported from here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from hadal.engine.errors import EngineError, RequestError
from hadal.engine.params import Matcher, PoolingParams, SamplingParams, shown
from hadal.engine.updates import (
    Completion,
    FinishReason,
    Gathered,
    RequestMetrics,
    TokenLogprob,
    Update,
    merge_updates,
)

__all__ = [
    "Completion",
    "EngineError",
    "FinishReason",
    "Gathered",
    "Matcher",
    "PoolingParams",
    "Request",
    "RequestError",
    "RequestMetrics",
    "SamplingParams",
    "Status",
    "TokenLogprob",
    "Update",
    "check_token_ids",
    "merge_updates",
    "pack_token_ids",
    "resolve_max_tokens",
    "root_hash",
]


class Status(Enum):
    """Where a request stands with the scheduler."""

    WAITING = "waiting"  # in the queue, holds no page (new, or preempted)
    RUNNING = "running"  # holds pages and a slot
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence inside the engine. The scheduler owns `status`, `pages`, `slot`, `num_computed`,
    `num_committed` and `page_hashes`; the engine owns the rest.

    token_ids = prompt, then what was generated; the first `num_computed` of them have (or will have, once the
    step that is under way ends) their keys in the cache. `draft_ids` are guesses for what follows token_ids
    (speculation): scheduled after the known tokens, and forgotten at commit.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    arrival: float
    max_tokens: int  # new tokens, resolved against the context's length
    priority: int = 0  # lower runs first
    cache_salt: str = ""
    deadline: float | None = None  # dropped from the queue if not started by then
    seed: int = 0
    pooling: PoolingParams | None = None
    on_update: Callable[[Update], None] | None = None
    detokenizer: Any = None
    matcher: Matcher | None = None
    eos_ids: frozenset[int] = frozenset()  # end the request (empty with ignore_eos)
    # the output follows from prompt and parameters alone, whatever is drafted: greedy, or with a seed
    repeatable: bool = True
    prompt_array: array[int] | None = None  # prompt_ids as C integers, where the caller has them so

    token_ids: list[int] = field(init=False)
    prompt_words: array[int] = field(init=False)  # the prompt as C integers: converted once, not a page each
    draft_ids: list[int] = field(default_factory=list, init=False)
    status: Status = field(default=Status.WAITING, init=False)
    order: int = field(default=0, init=False)  # place of arrival, given by the scheduler
    slot: int = field(default=-1, init=False)  # row of this sequence in the runner's tables
    pages: list[int] = field(default_factory=list, init=False)
    page_hashes: list[bytes] = field(default_factory=list, init=False)
    num_computed: int = field(default=0, init=False)
    num_committed: int = field(default=0, init=False)  # full pages whose hash was offered to the prefix cache
    cached_tokens: int = field(default=0, init=False)  # of the prompt, found in the prefix cache at the start
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list, init=False)
    pool_weights: Any = None  # of a pooling request, FP32 [prompt]
    pool_state: Any = field(default=None, init=False)  # its running sum
    stop_reason: str | int | None = field(default=None, init=False)
    sent_first_update: bool = field(default=False, init=False)
    metrics: RequestMetrics = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.prompt_words = self.prompt_array or array("i", self.prompt_ids)
        self.metrics = RequestMetrics(self.arrival)

    @property
    def prompt_len(self) -> int:
        """Tokens."""
        return len(self.prompt_ids)

    @property
    def num_generated(self) -> int:
        """New tokens so far, one that ended the text included."""
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """The new tokens."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def max_len(self) -> int:
        """Most tokens that this request can ever have in the cache (the last new token is never fed back)."""
        return len(self.prompt_ids) + max(self.max_tokens - 1, 0)

    @property
    def needs_every_prompt_row(self) -> bool:
        """Whether tokens found in the prefix cache would leave a gap in the answer."""
        if self.pooling is not None:
            return True
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_ids)

    def hashes(self, page_size: int, ahead: int = 0) -> list[bytes]:
        """Hash of each full page of token_ids, chained: h_i = SHA-256(h_{i-1}, tokens of page i), h_{-1} from
        the salt. Computed once a page; equal hashes mean equal salt, page size and tokens up to there.

        ahead: tokens after a page that its content depends on, too (the same in every call)."""
        done = self.page_hashes
        full = max(0, len(self.token_ids) - ahead) // page_size
        if len(done) < full:
            parent = done[-1] if done else root_hash(self.cache_salt, page_size)
            for start in range(len(done) * page_size, full * page_size, page_size):
                stop = start + page_size + ahead
                inside = stop <= len(self.prompt_words)
                page = self.prompt_words[start:stop] if inside else array("i", self.token_ids[start:stop])
                parent = hashlib.sha256(parent + page.tobytes()).digest()
                done.append(parent)
        return done


def root_hash(salt: str, page_size: int) -> bytes:
    """What the first page's hash is chained to: no page is shared between salts or page sizes."""
    return hashlib.sha256(b"hadal-prefix-%d:" % page_size + salt.encode("utf-8", "surrogatepass")).digest()


def check_token_ids(prompt_ids: Any, vocab_size: int, field_name: str = "prompt") -> list[int]:
    """A copy of the prompt as a list of ints, each in [0, vocab_size). Raises RequestError."""
    return pack_token_ids(prompt_ids, vocab_size, field_name)[0]


def pack_token_ids(
    prompt_ids: Any, vocab_size: int, field_name: str = "prompt"
) -> tuple[list[int], array[int]]:  # fmt: skip
    """`check_token_ids`, and the same as C integers."""
    if isinstance(prompt_ids, (str, bytes)) or not isinstance(prompt_ids, Sequence):
        raise RequestError(f"{field_name} must be a list of token ids", field_name)
    ids = list(prompt_ids)
    if not ids:
        raise RequestError(f"{field_name} is empty: give at least one token", field_name)
    if set(map(type, ids)) != {int}:
        bad = next(token for token in ids if type(token) is not int)
        raise RequestError(f"{field_name} must hold integers only, not {shown(bad)}", field_name)
    try:
        words = array("i", ids)
        view = np.frombuffer(words, np.int32)
        wrong = view.min() < 0 or view.max() >= vocab_size
    except OverflowError:
        wrong = True
    if wrong:
        low, high = min(ids), max(ids)
        bad = low if low < 0 else high
        message = f"{field_name} holds token id {shown(bad)}; ids go from 0 to {vocab_size - 1}"
        raise RequestError(message, field_name)
    return ids, words


def resolve_max_tokens(prompt_len: int, max_tokens: int | None, limit: int) -> int:
    """New tokens that a request may have, so that prompt + new ≤ limit. A prompt must leave room for one.
    Raises RequestError with the counts."""
    if prompt_len >= limit:
        raise RequestError(
            f"the prompt has {prompt_len} tokens, and the context holds {limit} with at least 1 new token; "
            f"shorten the prompt by {prompt_len - limit + 1}",
            "prompt",
            "context_length_exceeded",
        )
    if max_tokens is None:
        return limit - prompt_len
    if prompt_len + max_tokens > limit:
        raise RequestError(
            f"the prompt has {prompt_len} tokens and max_tokens is {max_tokens}: {prompt_len + max_tokens} "
            f"together, and the context holds {limit}; lower max_tokens to {limit - prompt_len}",
            "max_tokens",
            "context_length_exceeded",
        )
    return max_tokens
