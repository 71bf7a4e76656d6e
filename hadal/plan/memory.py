"""How much memory a model takes to run, part by part: weights by group of tensors, cache, one step's
activations.

    weights   = Σ elements × bytes; packed matrices carry scales (FP8: FP32 a block of 128 × 128)
    cache     = tokens × sequences × (layers + MTP layers) × entry
    entry     = (kv_lora_rank + qk_rope_head_dim) values for MLA, 2 · kv_heads · head_dim for GQA
    workspace = activations and logits of one step + what a GPU's runtime itself takes

All weights must be resident or streamed: "37B active" is a matter of speed, not of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

from hadal.config import Gqa, Mla, ModelConfig, ParameterCount
from hadal.config.model import _bias_count, _matrices, _small
from hadal.config.packing import Kind, matrix_bytes
from hadal.plan.figures import PlanError

WeightDtype = Literal["int4", "int8", "fp8", "bf16", "fp32"]
CacheDtype = Literal["fp32", "bf16", "fp8", "q8_0"]
DTYPES: tuple[WeightDtype, ...] = ("int4", "int8", "fp8", "bf16", "fp32")
CACHE_DTYPES: tuple[CacheDtype, ...] = ("fp32", "bf16", "fp8", "q8_0")
DTYPE_NAMES = {"int4": "INT4", "int8": "INT8", "fp8": "FP8 blocks", "bf16": "BF16", "fp32": "FP32"}
STEP_TOKENS = 2048
STEP_SEQUENCES = 64
GPU_RUNTIME_BYTES = 600_000_000
TILE = 128  # of an FP8 latent that shares a scale


@dataclass(frozen=True)
class Group:
    """Tensors of one kind: elements, bytes in memory, and how many of these are scales."""

    name: str
    parameters: int
    bytes: int
    scales: int = 0


@lru_cache(maxsize=256)
def counts(config: ModelConfig) -> ParameterCount:
    """`config.parameters()`, counted once."""
    return config.parameters()


def value_bytes(dtype: WeightDtype) -> int:
    """Bytes of what is not packed: activations, norms, embedding (but see INT8 heads)."""
    return 4 if dtype == "fp32" else 2


@lru_cache(maxsize=256)
def weight_groups(config: ModelConfig, dtype: WeightDtype, *, with_mtp: bool = True) -> tuple[Group, ...]:
    """The weights as the engine keeps them: MLA's up-projection and the gates unpacked, correction biases in
    FP32, embedding and head of MTP modules shared. Their sum is what loading takes."""
    found: dict[str, list[int]] = {}

    def add(name: str, elements: int, size: int, scales: int = 0) -> None:
        of = found.setdefault(name, [0, 0, 0])
        for i, n in enumerate((elements, size, scales)):
            of[i] += n

    b, (D, V) = value_bytes(dtype), (config.hidden_size, config.vocab_size)
    add("embedding", V * D, V * D * b)
    layers = config.num_hidden_layers
    for layer in range(layers + (config.num_nextn_predict_layers if with_mtp else 0)):
        for name, elements, size, scales in _block(config, dtype, layer):
            add("MTP module" if layer >= layers else name, elements, size, scales)
        if layer >= layers:
            extra = 3 * D + 2 * D * D  # three norms, and the projection of embedding and hidden state
            add("MTP module", extra, extra * b)
    add("norms and biases", D, D * b)
    if dtype in ("int8", "int4"):
        coded = matrix_bytes("int8", V, D)
        add("head", 0 if config.tie_word_embeddings else V * D, coded, coded - V * D)
    elif not config.tie_word_embeddings:
        add("head", V * D, V * D * b)
    return tuple(Group(name, *sizes) for name, sizes in found.items())


def _block(config: ModelConfig, dtype: WeightDtype, layer: int) -> Iterator[tuple[str, int, int, int]]:
    """(group, elements, bytes, bytes of scales) of one block."""
    b, a, m = value_bytes(dtype), config.attention, config.moe
    matrices = list(_matrices(config, layer))
    of_attention = 3 if isinstance(a, Gqa) else 4 if a.q_lora_rank is None else 5
    up = of_attention - 2 if isinstance(a, Mla) else -1  # kv_b_proj
    sparse = config.is_moe_layer(layer)
    for i, (rows, width, copies) in enumerate(matrices):
        elements = rows * width * copies
        if i < of_attention:
            name = "attention"
        elif not sparse:
            name = "dense feed-forward"
        else:
            assert m is not None
            name = "routed experts" if i < of_attention + 2 else "shared experts"
        if dtype in ("bf16", "fp32") or i == up:
            yield name, elements, elements * b, 0
        else:
            kind: Kind = dtype  # type: ignore[assignment]
            size = matrix_bytes(kind, rows, width) * copies
            codes = rows * ceil(width * (4 if kind == "int4" else 8) / 8) * copies
            yield name, elements, size, size - codes
    gate = m.n_routed_experts * config.hidden_size if sparse and m is not None else 0
    biases = _bias_count(config) if sparse else 0
    if gate:
        yield "gates", gate + biases, gate * b + biases * 4, 0
    rest = _small(config, layer) - gate - biases
    yield "norms and biases", rest, rest * b, 0


def memory_bytes(config: ModelConfig, dtype: WeightDtype, *, with_mtp: bool = True) -> int:
    """Bytes of the weights in memory."""
    return sum(group.bytes for group in weight_groups(config, dtype, with_mtp=with_mtp))


@lru_cache(maxsize=256)
def expert_group_bytes(config: ModelConfig, dtype: WeightDtype, *, with_mtp: bool = True) -> int:
    """Bytes of all routed experts, those of MTP modules included: what offloading moves."""
    if config.moe is None:
        return 0
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if with_mtp else 0)
    return sum(
        size
        for layer in range(layers)
        for name, _, size, _ in _block(config, dtype, layer)
        if name == "routed experts"
    )


def cache_dtype_of(dtype: WeightDtype) -> CacheDtype:
    """What the cache is kept in unless asked: the dtype of what is not packed."""
    return "fp32" if dtype == "fp32" else "bf16"


def entry_bytes(config: ModelConfig, cache: CacheDtype = "bf16") -> float:
    """Cache bytes of one token in one layer. fp8: for MLA, latents in FP8 with an FP32 scale each 128 values,
    the rope key in BF16 (V3: 656 B); q8_0: llama.cpp's 34 bytes for 32 values."""
    values = config.cache_values_per_token
    if cache == "fp8":
        a = config.attention
        if not isinstance(a, Mla) or a.kv_lora_rank % TILE:
            raise PlanError(f"an FP8 cache is for MLA's latents in multiples of {TILE}; this model has none")
        return a.kv_lora_rank + 4 * (a.kv_lora_rank // TILE) + 2 * a.qk_rope_head_dim
    if cache == "q8_0":
        return values * 34 / 32
    if cache not in ("bf16", "fp32"):
        raise PlanError(f"kv-dtype is {cache!r}; use one of {', '.join(CACHE_DTYPES)}")
    return values * (4 if cache == "fp32" else 2)


def cache_bytes_per_token(
    config: ModelConfig, cache: CacheDtype = "bf16", *, with_mtp: bool = False
) -> float:
    """Cache bytes of one token over all layers; an MTP module that drafts has a layer of its own."""
    return entry_bytes(config, cache) * (config.num_hidden_layers + int(with_mtp and mtp_layers(config) > 0))


def mtp_layers(config: ModelConfig) -> int:
    """MTP blocks that the engine drafts with, and that keep a cache: at most the first."""
    return min(1, config.num_nextn_predict_layers)


def workspace(config: ModelConfig, bytes_of_value: int, device: str) -> int:
    """Activations of one step of 2,048 tokens, FP32 logits of 64 sequences; CUDA's own share on a GPU."""
    a, heads = config.attention, config.num_attention_heads
    attention = (
        heads * (2 * a.qk_head_dim + 2 * a.v_head_dim) if isinstance(a, Mla) else 4 * heads * a.head_dim
    )
    width = config.intermediate_size
    if config.moe is not None:
        width = max(width, config.moe.num_experts_per_tok * config.moe.moe_intermediate_size)
    per_token = (4 * config.hidden_size + attention + 3 * width) * bytes_of_value
    tokens = min(STEP_TOKENS, config.max_position_embeddings)
    logits = STEP_SEQUENCES * config.vocab_size * 4
    return tokens * per_token + logits + (GPU_RUNTIME_BYTES if device == "gpu" else 0)
