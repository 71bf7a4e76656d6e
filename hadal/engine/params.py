"""What a request asks for: `SamplingParams` and `PoolingParams`, checked when they are made. No tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hadal.engine.errors import RequestError
from hadal.engine.pooling import POOLINGS, Pooling

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
GREEDY_BELOW = 1e-4  # a temperature below this is greedy: logits / temperature would leave float32's range
INT32_MAX = 2**31 - 1


class Matcher(Protocol):
    """The state of one constrained generation: which tokens may come next (see hadal.text.grammar)."""

    def mask(self) -> Any:
        """Allowed tokens: bool [vocab], or int32 [ceil(vocab/32)]: bit i % 32 of word i // 32 is token i."""

    def accept(self, token_id: int) -> Any:
        """Advance by one token."""

    def is_done(self) -> bool:
        """True when the text is complete and nothing may follow but the end."""


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
                raise RequestError(f"{name} must be true or false, not {shown(getattr(self, name))}", name)
        if self.grammar is not None and not callable(self.grammar):
            raise RequestError("grammar must be a function that returns a matcher", "grammar")
        self._check_logprobs_of()
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, 64))

    def _check_logprobs_of(self) -> None:
        if self.logprobs_of not in ("model", "sampler"):
            raise RequestError(
                f'logprobs_of must be "model" or "sampler", not {shown(self.logprobs_of)}', "logprobs_of"
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
        """Whether the most likely token is taken, and nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change what comes next, beyond the model."""
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
                f"pooling must be one of {', '.join(POOLINGS)}, not {shown(self.pooling)}", "pooling"
            )
        _integer("layer", self.layer, -1, INT32_MAX)
        if not isinstance(self.normalize, bool):
            raise RequestError(f"normalize must be true or false, not {shown(self.normalize)}", "normalize")


# --- checks of values from outside ---


def shown(value: Any) -> str:
    """`value` for an error message: short, and safe for integers that Python refuses to print."""
    if isinstance(value, int) and abs(value) >= 2**70:
        return "a huge number"
    return reprlib.repr(value)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer from {low} to {high}, not {shown(value)}", name)
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, not {shown(value)}", name)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Finite and in [low, high]; in (low, high] with `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number from {low} to {high}, not {shown(value)}", name)
    inside = low < value <= high if above else low <= value <= high  # also refuses NaN
    if not inside:
        bound = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise RequestError(f"{name} must be {bound}, not {shown(value)}", name)


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
