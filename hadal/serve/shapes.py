"""Parts of OpenAI's answers that several routes share: ids, usage, log-probabilities in both shapes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hadal.engine.request import TokenLogprob
from hadal.text.tokenizer import Tokenizer


def new_id(prefix: str) -> str:
    """An unguessable identifier such as chatcmpl-5f…"""
    return f"{prefix}-{secrets.token_hex(12)}"


@dataclass
class Usage:
    """Token counts of a whole answer. A prompt is counted once, however many choices it has (as OpenAI
    does)."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def shape(self) -> dict[str, Any]:
        """OpenAI's and DeepSeek's names for the same counts."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": self.prompt - self.cached,
        }


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; one that is only part of a character is spelt `bytes:\\xe2\\x80`, as OpenAI does."""
    data = tokenizer.id_to_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    """One token of `choices[].logprobs.content`."""

    def shape(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.id_to_bytes(token_id)
        return {"token": token_name(tokenizer, token_id), "logprob": finite(logprob), "bytes": list(data)}

    return {
        **shape(entry.token_id, entry.logprob),
        "top_logprobs": [shape(token_id, logprob) for token_id, logprob in entry.top],
    }


def finite(logprob: float) -> float:
    """JSON has no -inf: a token that could not be sampled is shown at -9999, as OpenAI does."""
    return max(logprob, -9999.0)


class LegacyLogprobs:
    """The shape of /completions, on which lm-eval counts: four lists of equal length, the first token of a
    prompt with null, `top_logprobs` as dicts that always hold the token itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.offset = 0
        self._pending = b""

    def shape(self, token_ids: Iterable[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Further tokens; offsets go on from the last call."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            tokens.append(token_name(self.tokenizer, token_id))
            values.append(None if entry is None else finite(entry.logprob))
            tops.append(None if entry is None else self._top(entry))
            offsets.append(self.offset)
            self._advance(token_id)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top = {token_name(self.tokenizer, entry.token_id): finite(entry.logprob)}
        for token_id, logprob in entry.top:
            name = token_name(self.tokenizer, token_id)
            top[name] = max(finite(logprob), top.get(name, -9999.0))
        return top

    def _advance(self, token_id: int) -> None:
        """Characters that this token completes."""
        data = self._pending + self.tokenizer.id_to_bytes(token_id, skip_control=True)
        try:
            self.offset += len(data.decode("utf-8"))
            self._pending = b""
        except UnicodeDecodeError as error:
            cut = error.start if error.reason == "unexpected end of data" else len(data)
            self.offset += len(data[:cut].decode("utf-8", "replace"))
            self._pending = data[cut:]
