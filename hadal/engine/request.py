"""What goes into the engine and what comes out: parameters, requests, updates, completions. No tensors.

A `Request` is one sequence: its prompt, its parameters, and the state that scheduler and engine keep of it.
The caller sees `Update`s while it runs (each carries the text that became safe since the last one) and may
fold them into one `Completion`. All times are seconds of `time.monotonic()`.
"""

from __future__ import annotations

import hashlib
import reprlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, Protocol

import numpy as np

from hadal.engine.pooling import POOLINGS, Pooling

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
GREEDY_BELOW = 1e-4  # a temperature below this is greedy: logits / temperature would leave float32's range
INT32_MAX = 2**31 - 1


class RequestError(ValueError):
    """A request that cannot be served. `field` names the offending parameter, `code` the kind of error."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code


class EngineError(RuntimeError):
    """The engine cannot start or go on; the message says why and what to change."""


class Matcher(Protocol):
    """The state of one constrained generation: which tokens may come next (see hadal.text.grammar)."""

    def mask(self) -> Any:
        """Allowed tokens: bool [vocab], or int32 [ceil(vocab/32)]: bit i % 32 of word i // 32 is token i."""

    def accept(self, token_id: int) -> Any:
        """Advance by one token."""

    def is_done(self) -> bool:
        """True when the text is complete and nothing may follow but the end."""


def _shown(value: Any) -> str:
    """`value` for an error message: short, and safe for integers that Python refuses to print."""
    if isinstance(value, int) and abs(value) >= 2**70:
        return "a huge number"
    return reprlib.repr(value)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer from {low} to {high}, not {_shown(value)}", name)
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, not {_shown(value)}", name)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Finite and in [low, high]; in (low, high] with `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number from {low} to {high}, not {_shown(value)}", name)
    inside = low < value <= high if above else low <= value <= high  # also refuses NaN
    if not inside:
        bound = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise RequestError(f"{name} must be {bound}, not {_shown(value)}", name)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise RequestError(f"{name} must be a string or a list of strings", name)
    if len(items) > MAX_STOPS:
        raise RequestError(f"{name} holds {len(items)} strings; at most {MAX_STOPS} are allowed", name)
    for item in items:
        if not 0 < len(item) <= MAX_STOP_LENGTH:
            raise RequestError(
                f"{name}: a string must have 1 to {MAX_STOP_LENGTH} characters, not {len(item)}", name
            )
    return tuple(items)


def _token_ids(name: str, value: Any, limit: int) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, set, frozenset)):
        raise RequestError(f"{name} must be a list of token ids", name)
    if len(value) > limit:
        raise RequestError(f"{name} holds {len(value)} ids; at most {limit} are allowed", name)
    for item in value:
        _integer(name, item, 0, INT32_MAX)
    return tuple(value)


def _logit_bias(value: Any) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError("logit_bias must map token ids to numbers", "logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(value)} entries, more than {MAX_LOGIT_BIAS}", "logit_bias")
    for token_id, bias in value.items():
        _integer("logit_bias", token_id, 0, INT32_MAX)
        _number("logit_bias", bias, -100.0, 100.0)
    return {int(token_id): float(bias) for token_id, bias in value.items()}


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Bounds are two-sided; a violation raises `RequestError` with `field`.

    Order of application (hadal/ops/sampling.py): repetition, frequency and presence penalties, logit bias,
    bans (min_tokens, grammar), temperature, top_k, top_p (of what top_k left), min_p.

    max_tokens      at most so many new tokens; None: up to the end of the context
    min_tokens      end-of-text and stop_token_ids are banned before so many tokens (stop strings still end)
    temperature     0 (or below 1e-4) takes the most likely token
    top_k           0 keeps all tokens; ties at the cut are kept
    seed            same seed, prompt and parameters: same text, whatever else runs; None: drawn by the engine
    logprobs        log-probability of each new token and of the `logprobs` most likely ones, of the model's
                    own distribution, before any of the above (as OpenAI's API does)
    logprobs_of     "sampler": `logprobs` are of the distribution that tokens are drawn from instead, which
                    reinforcement learning needs; with temperature and logit bias, and nothing else of the
                    above, since a trainer could not repeat it
    prompt_logprobs the model's, of the prompt's tokens
    include_stop    keep the matched stop string in the text
    grammar         a function without arguments that returns a fresh `Matcher`
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_of: Literal["model", "sampler"] = "model"
    prompt_logprobs: int | None = None
    include_stop: bool = False
    grammar: Callable[[], Matcher] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, INT32_MAX)
        _integer("min_tokens", self.min_tokens, 0, INT32_MAX if self.max_tokens is None else self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, INT32_MAX)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {_shown(getattr(self, name))}", name)
        if self.grammar is not None and not callable(self.grammar):
            raise RequestError("grammar must be a function that returns a matcher", "grammar")
        self._check_logprobs_of()
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, 64))

    def _check_logprobs_of(self) -> None:
        if self.logprobs_of not in ("model", "sampler"):
            raise RequestError(
                f'logprobs_of must be "model" or "sampler", not {_shown(self.logprobs_of)}', "logprobs_of"
            )
        cut = self.top_k != 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.is_greedy
        changed = self.has_penalties or self.min_tokens or self.grammar is not None
        if self.logprobs_of == "sampler" and (cut or changed):
            raise RequestError(
                'logprobs_of "sampler" goes with a temperature above 0 and logit_bias, without top_k, top_p, '
                "min_p, penalties, min_tokens and grammar: a trainer must be able to repeat it",
                "logprobs_of",
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True)
class PoolingParams:
    """How to turn a prompt into one vector: `pooling` (hadal/engine/pooling.py) over the hidden states of
    `layer`: 0 is the embedding, i the output of the i-th block, the last (also -1) comes after the final
    norm. special: pool control tokens too."""

    pooling: Pooling = "mean"
    layer: int = -1
    normalize: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise RequestError(
                f"pooling must be one of {', '.join(POOLINGS)}, not {_shown(self.pooling)}", "pooling"
            )
        _integer("layer", self.layer, -1, INT32_MAX)
        if not isinstance(self.normalize, bool):
            raise RequestError(f"normalize must be true or false, not {_shown(self.normalize)}", "normalize")


@dataclass(slots=True)
class TokenLogprob:
    """Natural log-probability of a token, and the most likely ones at its place as (id, log-probability)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


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


class Status(Enum):
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
        return len(self.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
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
        raise RequestError(f"{field_name} must hold integers only, not {_shown(bad)}", field_name)
    try:
        words = array("i", ids)
        view = np.frombuffer(words, np.int32)
        wrong = view.min() < 0 or view.max() >= vocab_size
    except OverflowError:
        wrong = True
    if wrong:
        low, high = min(ids), max(ids)
        bad = low if low < 0 else high
        message = f"{field_name} holds token id {_shown(bad)}; ids go from 0 to {vocab_size - 1}"
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
]
