"""How fast an answer came, and what share of the machine's limit that is.

One decoded token at batch 1 reads the active weights (all but the input embedding, of which it reads one row)
and the cache of every token before it: bytes = active parameters × bytes each + context × KV bytes per token.
Share = bytes per token × tokens per second / measured memory bandwidth. In a batch of B the tokens of a step
share experts: of a layer's E routed experts, E · (1 − (1 − k/E)^B) are read on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hadal.cli.terminal import human_seconds
from hadal.config import Mla, ModelConfig

if TYPE_CHECKING:
    from hadal.engine import Update


def routed_parameters(config: ModelConfig) -> int:
    """Parameters of one layer's worth of *one* routed expert, times the layers that have experts."""
    if config.moe is None:
        return 0
    layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    return 3 * config.hidden_size * config.moe.moe_intermediate_size * layers


def weight_bytes_per_step(config: ModelConfig, bytes_per_weight: float, batch: int = 1) -> float:
    """Bytes of weights that one decode step of `batch` sequences reads."""
    active = config.parameters().active_with_head
    if config.moe is not None:
        experts, chosen = config.moe.n_routed_experts, config.moe.num_experts_per_tok
        touched = experts * (1 - (1 - chosen / experts) ** batch)
        active += int((touched - chosen) * routed_parameters(config))
    return active * bytes_per_weight


def step_bytes(
    config: ModelConfig, context: float, *, bytes_per_weight: float, bytes_per_value: float, batch: int = 1
) -> float:
    """Bytes that one decode step reads: weights once, and each sequence's cache of `context` tokens."""
    cache = batch * context * config.kv_bytes_per_token(bytes_per_value)
    return weight_bytes_per_step(config, bytes_per_weight, batch) + cache


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """FLOP of a prefill of `tokens`: 2 per active weight and token, plus causal attention."""
    heads, a = config.num_attention_heads, config.attention
    per_pair = a.qk_head_dim + a.v_head_dim if isinstance(a, Mla) else 2 * a.head_dim
    attention = 2 * heads * per_pair * tokens * (tokens + 1) / 2 * config.num_hidden_layers
    return 2 * config.parameters().active_core * tokens + attention


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
