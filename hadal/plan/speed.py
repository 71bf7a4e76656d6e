"""What a step must read and compute: the arithmetic behind every ceiling.

Decode: one token at batch 1 reads the active weights (all but the input embedding, of which it reads one row)
and the cache of every token before it: bytes = active parameters × bytes each + context × KV bytes per token.
In a batch of B the tokens of a step share experts: of a layer's E routed experts, E · (1 − (1 − k/E)^B) are
read on average where the gate spreads its choices evenly. Prefill: 2 FLOP per active weight and token, and
causal attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from hadal.config import Mla, ModelConfig


def expected_experts(experts: int, chosen: int, batch: float) -> float:
    """How many of a layer's experts `batch` tokens touch, when each picks `chosen` of them evenly."""
    return experts * (1 - (1 - chosen / experts) ** batch)


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
        chosen = config.moe.num_experts_per_tok
        touched = expected_experts(config.moe.n_routed_experts, chosen, batch)
        active += int((touched - chosen) * routed_parameters(config))
    return active * bytes_per_weight


def step_bytes(
    config: ModelConfig, context: float, *, bytes_per_weight: float, bytes_per_value: float, batch: int = 1
) -> float:
    """Bytes that one decode step reads: weights once, and each sequence's cache of `context` tokens."""
    cache = batch * context * config.kv_bytes_per_token(bytes_per_value)
    return weight_bytes_per_step(config, bytes_per_weight, batch) + cache


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """FLOP of a prefill of `tokens`: 2 per active weight and token, plus causal attention. No head: it is
    applied to a prompt's last token alone."""
    heads, a = config.num_attention_heads, config.attention
    per_pair = a.qk_head_dim + a.v_head_dim if isinstance(a, Mla) else 2 * a.head_dim
    attention = 2 * heads * per_pair * tokens * (tokens + 1) / 2 * config.num_hidden_layers
    return 2 * config.parameters().active_core * tokens + attention


@dataclass(frozen=True)
class StepWork:
    """What a model's decode steps read, in bytes: `always` by every step, `routed` all routed experts,
    `cache_per_token` of one sequence. `experts` of a layer, of which a token picks `chosen`.

    With speculation a step computes `drafts` more tokens of each sequence, and an MTP drafter then reads
    `draft_always` and its share of `draft_routed` for each draft.
    """

    always: int
    routed: int
    experts: int
    chosen: int
    cache_per_token: float
    drafts: int = 0
    draft_always: int = 0
    draft_routed: int = 0

    def touched(self, tokens: int) -> float:
        """Experts of a layer that `tokens` touch under even routing; 0 without experts."""
        return expected_experts(self.experts, self.chosen, tokens) if self.experts else 0.0

    def bytes(self, batch: int, context: float, touched: float | None = None) -> float:
        """Read by a step of `batch` sequences that have `context` tokens; `touched` experts a layer if known,
        else what even routing gives."""
        tokens = batch * (1 + self.drafts)
        share = (self.touched(tokens) if touched is None else touched) / max(1, self.experts)
        drafting = self.draft_always + self.touched(batch) / max(1, self.experts) * self.draft_routed
        read = self.always + share * self.routed + self.drafts * drafting
        return read + batch * context * self.cache_per_token
