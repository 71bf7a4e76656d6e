"""How fast an answer came, and what share of the machine's limit that is.

Share = bytes per token × tokens per second / measured memory bandwidth; the bytes are those of
`hadal.plan.speed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hadal.cli.terminal import human_seconds

if TYPE_CHECKING:
    from hadal.engine import Update


@dataclass(frozen=True)
class Rate:
    """The pace of one answer. Seconds; `decode` is tokens/s after the first, so without prefill."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token: float | None
    total: float
    decode: float | None
    bandwidth_share: float | None = None

    @classmethod
    def of(
        cls, *, prompt: int, cached: int, completion: int, started: float, first: float | None, ended: float
    ) -> Rate:
        """From counts and monotonic times; `first`: when the first text arrived, None if none did."""
        decode = None
        if first is not None and completion > 1 and ended > first:
            decode = (completion - 1) / (ended - first)
        wait = None if first is None else first - started
        return cls(prompt, cached, completion, wait, ended - started, decode)

    @classmethod
    def of_metrics(cls, last: Update) -> Rate:
        """From the engine's own clock: the last update of a request."""
        times = last.metrics
        ttft = times.ttft if times else None
        total = times.finished - times.arrival if times and times.finished else 0.0
        decode = times.tokens_per_s if times else None
        return cls(last.prompt_tokens, last.cached_tokens, last.completion_tokens, ttft, total, decode)

    def line(self) -> str:
        """`41 tokens · 212 tokens/s · first token after 18 ms · 14% of memory bandwidth`."""
        parts = [f"{self.completion_tokens} token{'' if self.completion_tokens == 1 else 's'}"]
        if self.decode is not None:
            parts.append(f"{self.decode:.{0 if self.decode >= 100 else 1}f} tokens/s")
        if self.first_token is not None:
            parts.append(f"first token after {human_seconds(self.first_token)}")
        if self.bandwidth_share is not None:
            parts.append(share_text(self.bandwidth_share))
        if self.cached_tokens:
            parts.append(f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens from cache")
        return " · ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "time_to_first_token_s": self.first_token,
            "total_s": self.total,
            "tokens_per_s": self.decode,
            "memory_bandwidth_share": self.bandwidth_share,
        }


def share_text(share: float) -> str:
    """A share of the copy rate; above it the weights come from the processor's caches, and that is said."""
    text = f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"
    cached = " (weights stay in the processor's cache)" if share > 1 else ""
    return f"{text} of this machine's memory bandwidth{cached}"
