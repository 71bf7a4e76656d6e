"""The sampling fields that the surfaces share, read into `SamplingParams`. Bounds are those of the engine or
tighter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hadal.engine.errors import RequestError
from hadal.engine.params import INT32_MAX, MAX_LOGIT_BIAS, MAX_STOP_LENGTH, MAX_STOPS, SamplingParams
from hadal.serve.errors import ApiError, bad, overloaded
from hadal.serve.fields import Fields, shown

MAX_N = 16
MAX_SEQUENCES = 128  # prompts × n of one request
SEED_LOW, SEED_HIGH = -(2**63), 2**63 - 1

# Bookkeeping of clients that cannot change a token.
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)


def sampling_fields(fields: Fields, vocab_size: int) -> dict[str, Any]:
    """The fields of OpenAI's two generation routes, and the extras that vLLM's clients know."""
    given: dict[str, Any] = {
        "max_tokens": max_tokens(fields),
        "min_tokens": fields.integer("min_tokens", 0, INT32_MAX),
        "temperature": fields.number("temperature", 0.0, 2.0),
        "top_p": _top_p(fields),
        "top_k": top_k(fields),
        "min_p": fields.number("min_p", 0.0, 1.0),
        "presence_penalty": fields.number("presence_penalty", -2.0, 2.0),
        "frequency_penalty": fields.number("frequency_penalty", -2.0, 2.0),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100.0),
        "seed": fields.integer("seed", SEED_LOW, SEED_HIGH),
        "stop": stops(fields),
        "stop_token_ids": _token_ids(fields, "stop_token_ids", vocab_size),
        "ignore_eos": fields.boolean("ignore_eos"),
        "include_stop": fields.boolean("include_stop_str_in_output"),
        "logit_bias": logit_bias(fields, vocab_size),
    }
    return {name: value for name, value in given.items() if value is not None}


def make_params(given: dict[str, Any], defaults: Mapping[str, Any] | None) -> SamplingParams:
    """SamplingParams: what the request says over what the model asks for; the engine's refusals as 400."""
    try:
        return SamplingParams(**{**(defaults or {}), **given})
    except RequestError as error:
        raise refused(error) from None


def refused(error: RequestError, retry_after: int = 1) -> ApiError:
    """The engine's refusal as an answer: 400, or 503 when its queue is full."""
    if error.code == "queue_full":
        return overloaded(error.message, retry_after)
    return bad(error.message, error.field, error.code)


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Parameters of the n-th choice: a given seed moves on by one, or all choices would be alike."""
    if choice == 0 or params.seed is None:
        return params
    seed = params.seed + choice
    return replace(params, seed=seed if seed <= SEED_HIGH else seed - 2**64)


def max_tokens(fields: Fields) -> int | None:
    """max_tokens, or its newer name max_completion_tokens."""
    old = fields.integer("max_tokens", 1, 2**31 - 1)
    new = fields.integer("max_completion_tokens", 1, 2**31 - 1)
    if old is not None and new is not None and old != new:
        raise bad(f"max_tokens = {old} and max_completion_tokens = {new} contradict each other", "max_tokens")
    return new if old is None else old


def top_k(fields: Fields) -> int | None:
    """0 and -1 both mean: all tokens."""
    value = fields.integer("top_k", -1, INT32_MAX)
    return 0 if value == -1 else value


def _top_p(fields: Fields) -> float | None:
    value = fields.number("top_p", 0.0, 1.0)
    if value == 0.0:
        raise bad(
            "top_p must be greater than 0 and at most 1, not 0; for greedy decoding use temperature 0",
            "top_p",
        )
    return value


def stops(fields: Fields, field: str = "stop") -> tuple[str, ...] | None:
    """A string or an array of up to 16, each of 1 to 1024 characters."""
    value = fields.take(field)
    if value is None:
        return None
    items = [value] if isinstance(value, str) else value
    name = fields.name(field)
    if not isinstance(items, list):
        raise bad(f"{name} must be a string or an array of strings, not {shown(value)}", name)
    if len(items) > MAX_STOPS:
        raise bad(f"{name} has {len(items)} strings; at most {MAX_STOPS} are allowed", name)
    for item in items:
        if not isinstance(item, str):
            raise bad(f"{name} must hold strings, not {shown(item)}", name)
        if not 1 <= len(item) <= MAX_STOP_LENGTH:
            raise bad(f"{name}: a string must have 1 to {MAX_STOP_LENGTH} characters, not {len(item)}", name)
    return tuple(items)


def logit_bias(fields: Fields, vocab_size: int) -> dict[int, float] | None:
    """{"token id": bias}: ids as decimal strings, biases from -100 to 100, at most 1024 entries."""
    value = fields.take("logit_bias")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad(f"logit_bias must be an object of token ids and numbers, not {shown(value)}", "logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise bad(f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed", "logit_bias")
    entries = Fields(value, "logit_bias.")
    biases: dict[int, float] = {}
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise bad(f"logit_bias: {shown(key)} is not a token id from 0 to {vocab_size - 1}", "logit_bias")
        bias = entries.number(key, -100.0, 100.0)
        if bias is None:
            raise bad(f"logit_bias.{key} must be a number, not null", "logit_bias")
        biases[int(key)] = bias
    return biases


def _token_ids(fields: Fields, field: str, vocab_size: int) -> tuple[int, ...] | None:
    items = fields.array(field, 64)
    if items is None:
        return None
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
            message = f"{fields.name(field)}: {shown(item)} is not a token id from 0 to {vocab_size - 1}"
            raise bad(message, fields.name(field))
    return tuple(items)
