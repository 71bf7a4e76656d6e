"""Ollama's `options`, `think`, `format` and `keep_alive`, in this engine's terms."""

from __future__ import annotations

import re
from typing import Any

from hadal.engine.params import INT32_MAX
from hadal.serve.errors import bad
from hadal.serve.fields import Fields, shown
from hadal.serve.sampling import SEED_HIGH, SEED_LOW, stops

# How llama.cpp lays out memory and threads: nothing of it changes a token here. num_ctx is among them because
# the server's context is fixed at its start, and a prompt is never cut.
LAYOUT = (
    "num_ctx",
    "num_keep",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "numa",
    "low_vram",
    "f16_kv",
    "logits_all",
    "vocab_only",
    "use_mmap",
    "use_mlock",
    "embedding_only",
)
_DURATION = re.compile(r"-?(?:(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+|\d+(?:\.\d+)?)")


def read_options(fields: Fields) -> dict[str, Any]:
    """Keyword arguments of SamplingParams. `max_tokens` may be more than fits: the caller cuts it."""
    options = fields.object("options")
    if options is None:
        return {}
    repeat = options.number("repeat_penalty", 0.01, 100.0)
    given: dict[str, Any] = {
        "max_tokens": _num_predict(options),
        "temperature": options.number("temperature", 0.0, 2.0),
        "top_k": options.integer("top_k", 0, INT32_MAX),
        "top_p": options.number("top_p", 0.0, 1.0) or None,  # Ollama's 0 is "off"
        "min_p": options.number("min_p", 0.0, 1.0),
        "seed": options.integer("seed", SEED_LOW, SEED_HIGH),
        "stop": stops(options),
        "repetition_penalty": repeat or None,
        "presence_penalty": options.number("presence_penalty", -2.0, 2.0),
        "frequency_penalty": options.number("frequency_penalty", -2.0, 2.0),
    }
    options.neutral("tfs_z", 1.0, "tail-free sampling does not exist here")
    options.neutral("typical_p", 1.0, "typical sampling does not exist here")
    options.neutral("mirostat", 0, "mirostat does not exist here; use temperature, top_p, top_k, min_p")
    options.ignore(("mirostat_tau", "mirostat_eta"))
    _window(options, given)
    options.ignore(LAYOUT)
    options.finish()
    return {name: value for name, value in given.items() if value is not None}


def _window(options: Fields, given: dict[str, Any]) -> None:
    """Penalties here look at the whole text (repeat_last_n: -1); 0 turns the repeat penalty off."""
    last = options.integer("repeat_last_n", -1, INT32_MAX)
    options.neutral("penalize_newline", True, "newlines are penalized like other tokens")
    if last == 0:
        given["repetition_penalty"] = None
    elif last not in (None, -1) and given["repetition_penalty"] not in (None, 1.0):
        raise bad("options.repeat_last_n must be -1 (the whole text) or 0 (off) beside repeat_penalty",
                  "options.repeat_last_n", "unsupported_parameter")  # fmt: skip


def _num_predict(options: Fields) -> int | None:
    value = options.integer("num_predict", -2, INT32_MAX)
    if value == 0:
        raise bad("options.num_predict must be at least 1, or -1 for no limit, not 0", "options.num_predict")
    return None if value is None or value < 0 else value


def read_think(fields: Fields) -> bool | None:
    """true, false, or a level (the models have no degrees: every level means on). None: the model's own
    way."""
    value = fields.take("think")
    if value is None or isinstance(value, bool):
        return value
    if value in ("low", "medium", "high", "max"):
        return True
    raise bad(f"think must be true, false, 'low', 'medium' or 'high', not {shown(value)}", "think")


def unloads(fields: Fields) -> bool:
    """Whether keep_alive asks to unload after this request. Other durations keep what is anyway kept."""
    value = fields.take("keep_alive")
    if value is None:
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value == 0
    if isinstance(value, str) and len(value) < 40 and _DURATION.fullmatch(value):
        return not re.search(r"[1-9]", value)
    raise bad(
        f"keep_alive must be a number of seconds or a duration such as '5m', not {shown(value)}", "keep_alive"
    )
