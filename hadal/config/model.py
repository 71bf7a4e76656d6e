"""What a model is, as data: architecture parts and exact parameter counts.

Field names are those of the published `config.json` files of DeepSeek-V2/V3/R1 (arXiv 2405.04434,
2412.19437), Qwen2 and Llama-3. Nothing here imports torch, so that planners and `--help` stay instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, log
from typing import Any, Literal

Json = Mapping[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the key, the value and the remedy."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: plain, YaRN (arXiv 2309.00071) or Llama-3's frequency adjustment."""

    rope_theta: float = 10000.0
    type: Literal["default", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def softmax_mscale(self) -> float:
        """m² that multiplies the softmax scale, m = 0.1·mscale_all_dim·ln(factor) + 1 (V3: 1.8738542)."""
        if self.type != "yarn" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2

    def rotation_mscale(self) -> float:
        """Factor on cos and sin: m(mscale) / m(mscale_all_dim); 1 for every released DeepSeek model."""
        if self.type != "yarn":
            return 1.0
        if not self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale or 1.0)
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's magnitude correction 0.1·mscale·ln(factor) + 1, and 1 for factor ≤ 1."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (V2 §2.1). `q_lora_rank` None: queries come from the hidden state
    itself."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class Gqa:
    """Grouped-query attention (Qwen2, Llama-3; with as many KV heads as heads: plain MHA)."""

    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False


@dataclass(frozen=True)
class Dsa:
    """DeepSeek sparse attention's lightning indexer (V3.2-Exp): dimensions only."""

    index_n_heads: int
    index_head_dim: int
    index_topk: int


@dataclass(frozen=True)
class Moe:
    """DeepSeekMoE (arXiv 2401.06066): routed and shared experts, and the gate that chooses them."""

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True)
class Fp8:
    """Block quantisation of the stored weights (V3 §3.3; `quantization_config`)."""

    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None


@dataclass(frozen=True)
class IntGroups:
    """Integer weights in groups of input channels, symmetric: the `pack-quantized` format of
    compressed-tensors. `group_size` None: one scale a row."""

    num_bits: Literal[4, 8] = 4
    group_size: int | None = 32
    ignore: tuple[str, ...] = ()  # modules that are not quantised; what the files hold decides


@dataclass(frozen=True)
class ParameterCount:
    """Exact element counts. `active_*` are per token; MTP apart, as the released files count them."""

    main: int
    embedding: int
    head: int
    active_core: int  # without input embedding and head
    mtp_unique: int
    mtp_copies: int  # stored copies of embedding and head
    fp8_weights: int  # main + MTP matrices that are stored as FP8
    fp8_scales: int  # FP32 block scales of those
    correction_bias: int  # FP32 gate biases

    @property
    def active_with_head(self) -> int:
        return self.active_core + self.head

    @property
    def active(self) -> int:
        return self.active_core + self.head + self.embedding

    @property
    def stored(self) -> int:
        """Elements in a published FP8 folder: main, MTP with its copies, scales."""
        return self.main + self.mtp_unique + self.mtp_copies + self.fp8_scales


@dataclass(frozen=True)
class ModelConfig:
    """One architecture. Build it with `from_hf`, a preset, or by hand; `validate` runs on construction."""

    model_type: Literal["deepseek_v3", "deepseek_v32", "deepseek_v2", "deepseek", "qwen2", "llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    attention: Mla | Gqa
    rope: Rope = Rope()
    moe: Moe | None = None
    dsa: Dsa | None = None
    num_nextn_predict_layers: int = 0
    # MTP reads the main hidden state after the final norm (unpublished; see Transformer)
    mtp_after_norm: bool = True
    fp8: Fp8 | None = None
    ints: IntGroups | None = None  # how folders store the matrices: FP8 blocks, integers, or neither
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    # harmless published keys, kept for to_hf
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _validate(self)

    # --- structure ------------------------------------------------------------------------------------------
    def is_moe_layer(self, layer: int) -> bool:
        """Layers before `first_k_dense_replace` are dense; MTP blocks (index ≥ num_hidden_layers) are MoE."""
        m = self.moe
        if m is None:
            return False
        return layer >= self.num_hidden_layers or (
            layer >= m.first_k_dense_replace and layer % m.moe_layer_freq == 0
        )

    @property
    def cache_values_per_token(self) -> int:
        """Values cached per token and layer: latent + rope key for MLA (V3: 576), keys + values for GQA."""
        a = self.attention
        if isinstance(a, Mla):
            return a.kv_lora_rank + a.qk_rope_head_dim
        return 2 * a.num_key_value_heads * a.head_dim

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """Cache bytes of one token over all layers of the main model (V3 in BF16: 70,272)."""
        return self.cache_values_per_token * self.num_hidden_layers * bytes_per_value

    @property
    def softmax_scale(self) -> float:
        a = self.attention
        dim = a.qk_head_dim if isinstance(a, Mla) else a.head_dim
        return float(dim**-0.5 * self.rope.softmax_mscale())

    # --- counts ---------------------------------------------------------------------------------------------
    def parameters(self) -> ParameterCount:
        """Exact parameter counts by the shapes of §2 of the V3 report and of the published checkpoints."""
        return _count(self)

    def weight_bytes(self, dtype: Literal["bf16", "fp32", "fp8"] = "bf16", *, mtp: bool = True) -> int:
        """Bytes of the stored weights. "fp8": FP8 blocks + FP32 scales, the rest BF16, gate biases FP32."""
        n = self.parameters()
        elements = n.main + (n.mtp_unique + n.mtp_copies if mtp else 0)
        if dtype == "fp32":
            return 4 * elements
        if dtype == "bf16":
            return 2 * elements + 2 * n.correction_bias
        fp8, scales = (
            (n.fp8_weights, n.fp8_scales) if mtp else _fp8_counts(replace(self, num_nextn_predict_layers=0))
        )
        return 2 * (elements - fp8) + 2 * n.correction_bias + fp8 + 4 * scales

    # --- published form -------------------------------------------------------------------------------------
    @classmethod
    def from_hf(cls, config: Json) -> ModelConfig:
        """Read a published `config.json`. Unknown keys and unsupported settings are refused by name."""
        from hadal.config.published import from_hf

        return from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The published `config.json` of this model."""
        from hadal.config.published import to_hf

        return to_hf(self)


# --- validation ---------------------------------------------------------------------------------------------
def _validate(c: ModelConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if getattr(c, name) < 1:
            raise ConfigError(f"{name} is {getattr(c, name)}; it must be at least 1")
    if isinstance(c.attention, Gqa) and c.num_attention_heads % c.attention.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads {c.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {c.attention.num_key_value_heads}"
        )
    if isinstance(c.attention, Mla) and c.attention.qk_rope_head_dim % 2:
        raise ConfigError(
            f"qk_rope_head_dim is {c.attention.qk_rope_head_dim}; rotary pairs need an even number"
        )
    if c.rope.type != "default" and c.rope.original_max_position_embeddings < 1:
        raise ConfigError(f"rope type {c.rope.type} needs original_max_position_embeddings")
    m = c.moe
    if m is None:
        return
    if m.n_routed_experts % m.n_group:
        raise ConfigError(f"n_routed_experts {m.n_routed_experts} is not a multiple of n_group {m.n_group}")
    if not 1 <= m.topk_group <= m.n_group:
        raise ConfigError(f"topk_group is {m.topk_group}; it must lie in 1..n_group={m.n_group}")
    reach = m.n_routed_experts // m.n_group * m.topk_group
    if not 1 <= m.num_experts_per_tok <= reach:
        raise ConfigError(
            f"num_experts_per_tok is {m.num_experts_per_tok}; the kept groups hold {reach} experts"
        )


# --- exact counts -------------------------------------------------------------------------------------------
def _matrices(c: ModelConfig, layer: int) -> Iterable[tuple[int, int, int]]:
    """(rows, columns, copies) of every matrix of a block that FP8 folders store in blocks."""
    d, h, a = c.hidden_size, c.num_attention_heads, c.attention
    if isinstance(a, Mla):
        if a.q_lora_rank is None:
            yield h * a.qk_head_dim, d, 1
        else:
            yield a.q_lora_rank, d, 1
            yield h * a.qk_head_dim, a.q_lora_rank, 1
        yield a.kv_lora_rank + a.qk_rope_head_dim, d, 1
        yield h * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, 1
        yield d, h * a.v_head_dim, 1
    else:
        yield h * a.head_dim, d, 1
        yield a.num_key_value_heads * a.head_dim, d, 2
        yield d, h * a.head_dim, 1
    if c.is_moe_layer(layer) and c.moe is not None:
        m = c.moe
        widths = [(m.moe_intermediate_size, m.n_routed_experts)]
        if m.n_shared_experts:
            widths.append((m.n_shared_experts * m.moe_intermediate_size, 1))
    else:
        widths = [(c.intermediate_size, 1)]
    for width, copies in widths:
        yield width, d, 2 * copies
        yield d, width, copies


def _small(c: ModelConfig, layer: int) -> int:
    """Norms, biases and gate of a block: what FP8 folders keep in BF16 or FP32."""
    a, n = c.attention, 2 * c.hidden_size
    if isinstance(a, Mla):
        n += a.kv_lora_rank + (a.q_lora_rank or 0)
    elif a.qkv_bias:
        n += (c.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    if c.dsa is not None and isinstance(a, Mla):
        x, q = c.dsa, a.q_lora_rank or c.hidden_size
        n += x.index_n_heads * x.index_head_dim * q + c.hidden_size * (x.index_head_dim + x.index_n_heads)
        n += 2 * x.index_head_dim
    if c.is_moe_layer(layer) and c.moe is not None:
        n += c.moe.n_routed_experts * c.hidden_size + _bias_count(c)
    return n


def _bias_count(c: ModelConfig) -> int:
    return c.moe.n_routed_experts if c.moe is not None and c.moe.topk_method == "noaux_tc" else 0


def _block(c: ModelConfig, layer: int, routed: int | None = None) -> int:
    """Parameters of a block; with `routed`, only that many routed experts are counted (active parameters)."""
    total = sum(rows * cols * k for rows, cols, k in _matrices(c, layer)) + _small(c, layer)
    if routed is not None and c.moe is not None and c.is_moe_layer(layer):
        idle = c.moe.n_routed_experts - routed
        total -= idle * 3 * c.hidden_size * c.moe.moe_intermediate_size
    return total


def _fp8_counts(c: ModelConfig) -> tuple[int, int]:
    rows_b, cols_b = (c.fp8 or Fp8()).weight_block_size
    weights = scales = 0
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        for rows, cols, k in _matrices(c, layer):
            weights += rows * cols * k
            scales += ceil(rows / rows_b) * ceil(cols / cols_b) * k
    return weights, scales


def _count(c: ModelConfig) -> ParameterCount:
    embedding = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else embedding
    layers = range(c.num_hidden_layers)
    k = c.moe.num_experts_per_tok if c.moe else None
    fp8_weights, fp8_scales = _fp8_counts(c)
    mtp = c.num_nextn_predict_layers
    moe_layers = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers + mtp))
    return ParameterCount(
        main=sum(_block(c, i) for i in layers) + embedding + head + c.hidden_size,
        embedding=embedding,
        head=embedding,
        active_core=sum(_block(c, i, k) for i in layers) + c.hidden_size,
        mtp_unique=mtp * (_block(c, c.num_hidden_layers) + 3 * c.hidden_size + 2 * c.hidden_size**2),
        mtp_copies=mtp * 2 * embedding,
        fp8_weights=fp8_weights,
        fp8_scales=fp8_scales,
        correction_bias=moe_layers * _bias_count(c),
    )
