"""Weights in fewer bits, as sizes: which kinds there are, their groups, and what a model takes in memory.

What the kinds hold is defined in hadal/ops/packed.py, which weights are packed in hadal/weights/quantise.py.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

from hadal.config.model import ConfigError, Mla, ModelConfig, _matrices

Kind = Literal["fp8", "int8", "int4"]
KINDS: tuple[Kind, ...] = ("fp8", "int8", "int4")
GROUP: dict[Kind, int] = {"fp8": 128, "int8": 128, "int4": 32}  # input channels that share a scale
BITS: dict[Kind, int] = {"fp8": 8, "int8": 8, "int4": 4}
FP8_ROWS = 128


def resident_kind(config: ModelConfig, quantize: str | None) -> Kind | None:
    """How the matrices lie in memory: as asked ("off": plainly), by default a folder's integers as they are.

    Raises ConfigError for an unknown kind.
    """
    if quantize is None:
        return None if config.ints is None else "int4" if config.ints.num_bits == 4 else "int8"
    if quantize == "off":
        return None
    if quantize not in KINDS:
        raise ConfigError(f"quantize is {quantize!r}; use one of {', '.join(KINDS)}, or off")
    return quantize


def matrix_bytes(kind: Kind, outs: int, width: int) -> int:
    """Bytes of one packed matrix: codes, and FP32 scales a block (fp8) or BF16 scales a row and group."""
    scales = ceil(outs / FP8_ROWS) * 4 if kind == "fp8" else outs * 2
    return outs * ceil(width * BITS[kind] / 8) + scales * ceil(width / GROUP[kind])


def packed_bytes(config: ModelConfig, kind: Kind, value_bytes: int = 2, *, mtp: bool = True) -> int:
    """Bytes in memory of a model with packed weights, the rest taking `value_bytes` a value.

    Exact for int8 and int4; for fp8 where stacked matrices are a multiple of 128 rows high. Embedding and
    head of MTP modules are shared with the main model.
    """
    n, a = config.parameters(), config.attention
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    plain = n.main + (n.mtp_unique if mtp else 0)
    packed = 0
    for layer in range(layers):
        matrices = list(_matrices(config, layer))
        if isinstance(a, Mla):  # kv_b_proj stays plain
            up = config.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim)
            matrices.remove((up, a.kv_lora_rank, 1))
        for rows, width, copies in matrices:
            plain -= rows * width * copies
            packed += matrix_bytes(kind, rows, width) * copies
    if kind != "fp8":
        packed += matrix_bytes("int8", config.vocab_size, config.hidden_size)
        plain -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    biases = n.correction_bias if mtp else _main_bias(config)
    return packed + plain * value_bytes + biases * (4 - value_bytes)


def expert_bytes(config: ModelConfig, kind: Kind | None, value_bytes: int = 2) -> int:
    """Bytes in memory of one routed expert of one layer; 0 for a dense model."""
    if config.moe is None:
        return 0
    shapes = [(config.moe.moe_intermediate_size, config.hidden_size)] * 2
    shapes.append((config.hidden_size, config.moe.moe_intermediate_size))
    if kind is None:
        return sum(outs * width * value_bytes for outs, width in shapes)
    return sum(matrix_bytes(kind, outs, width) for outs, width in shapes)


def expert_count(config: ModelConfig, *, mtp: bool = True) -> int:
    """Routed experts of all layers."""
    if config.moe is None:
        return 0
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return config.moe.n_routed_experts * sum(config.is_moe_layer(i) for i in range(layers))


def _main_bias(config: ModelConfig) -> int:
    """Values of the gates' correction biases, which stay FP32, without the MTP modules'."""
    m = config.moe
    if m is None or m.topk_method != "noaux_tc":
        return 0
    return m.n_routed_experts * sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
