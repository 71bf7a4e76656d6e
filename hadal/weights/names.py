"""Published tensor names ↔ parameters of `Transformer`, as a pure table (no torch).

Published folders keep every projection apart: `model.layers.3.mlp.experts.7.gate_proj.weight`. `Transformer`
fuses what is multiplied together: gate and up rows in `gate_up_proj`, q, k and v rows in `qkv_proj`, all
experts of a layer stacked under their global index. One `Slot` says where one published tensor lives:

    parameter[index][row : row + shape[0]]      (index: the expert, or nothing)

Names and shapes: DeepSeek-V2/V3 checkpoints (embedding, layers 0…L−1, MTP blocks as layers L, L+1, … with
copies of embedding and head), Qwen2 and Llama. `expected_tensors` adds the FP8 block scales
(`…weight_scale_inv`): for V3, 91,991 tensors with 684,531,386,000 elements, as on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from hadal.config import Dsa, Fp8, Gqa, IntGroups, Mla, ModelConfig, Moe

Shape = tuple[int, ...]
DtypeClass = Literal["float", "float32", "fp8", "scale", "codes", "groups", "shape"]
"""How a tensor may be stored: any float (BF16, F16, F32), F32 only, F8_E4M3 blocks, F32 block scales; and
of integer weights the codes in I32 words, a float scale a group, and the shape of what was packed."""

SCALE_SUFFIX = "_scale_inv"
CODES_SUFFIX, GROUPS_SUFFIX, SHAPE_SUFFIX = "_packed", "_scale", "_shape"
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True, slots=True)
class Slot:
    """One published tensor: its name and shape, and the rows of the parameter that it fills.

    kind "matrix": FP8 folders store it in blocks; "float": never quantised; "float32": always kept in FP32.
    copy: the file repeats another parameter (MTP's embedding and head, a tied head): compared, not loaded.
    optional: may be absent from a folder, and is not written.
    """

    name: str
    shape: Shape
    parameter: str
    index: int | None = None
    row: int = 0
    kind: Literal["matrix", "float", "float32"] = "float"
    copy: bool = False
    optional: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a folder must hold under one name."""

    shape: Shape
    dtype: DtypeClass
    slot: Slot


def slots(config: ModelConfig, *, with_mtp: bool = True) -> dict[str, Slot]:
    """Every published tensor of a model (without scales) by name, in the order in which folders list them."""
    found: dict[str, Slot] = {}
    for slot in _slots(config, with_mtp):
        found[slot.name] = slot
    return found


def expected_tensors(
    config: ModelConfig, *, with_mtp: bool = True, packed: Collection[str] | None = None
) -> dict[str, Expected]:
    """Name → shape and dtype class of every tensor in the published folder, scales of FP8 matrices included.

    packed: names whose integers the files hold (with `config.ints`; default: all that we would pack).
    Optional tensors (a copy of a tied head) are not listed: see `slots`.
    """
    expected: dict[str, Expected] = {}
    for slot in _slots(config, with_mtp):
        if slot.optional:
            continue
        if config.ints is not None and (_is_int(slot) if packed is None else slot.name in packed):
            expected |= _int_tensors(slot, config.ints)
        elif slot.kind == "matrix" and config.fp8 is not None:
            expected[slot.name] = Expected(slot.shape, "fp8", slot)
            expected[slot.name + SCALE_SUFFIX] = Expected(scale_shape(slot.shape, config.fp8), "scale", slot)
        else:
            dtype: DtypeClass = "float32" if slot.kind == "float32" else "float"
            expected[slot.name] = Expected(slot.shape, dtype, slot)
    return expected


def _is_int(slot: Slot) -> bool:
    """Whether we store a matrix in integers: as in memory (hadal/weights/quantise.py), but not the head."""
    return slot.kind == "matrix" and "kv_b_proj" not in slot.name


def _int_tensors(slot: Slot, ints: IntGroups) -> dict[str, Expected]:
    """The three tensors that stand for one of [O, I]: words [O, I·bits/32], scales [O, groups], shape [2]."""
    outs, width = slot.shape
    words = ceil(width / (32 // ints.num_bits))
    groups = 1 if ints.group_size is None else ceil(width / ints.group_size)
    return {
        slot.name + CODES_SUFFIX: Expected((outs, words), "codes", slot),
        slot.name + GROUPS_SUFFIX: Expected((outs, groups), "groups", slot),
        slot.name + SHAPE_SUFFIX: Expected((2,), "shape", slot),
    }


def parameter_shapes(config: ModelConfig, *, with_mtp: bool = True) -> dict[str, Shape]:
    """Parameter name → shape in `Transformer`, as the slots fill it."""
    rows: dict[str, int] = {}
    stacks: dict[str, int] = {}
    tails: dict[str, Shape] = {}
    for slot in _slots(config, with_mtp):
        if slot.copy:
            continue
        rows[slot.parameter] = max(rows.get(slot.parameter, 0), slot.row + slot.shape[0])
        tails[slot.parameter] = slot.shape[1:]
        if slot.index is not None:
            stacks[slot.parameter] = max(stacks.get(slot.parameter, 0), slot.index + 1)
    return {name: ((stacks[name],) if name in stacks else ()) + (rows[name], *tails[name]) for name in rows}


def scale_shape(shape: Shape, fp8: Fp8) -> Shape:
    """[ceil(out / block rows), ceil(in / block columns)]; V3's kv_a_proj: [5, 56], the last row partial."""
    return ceil(shape[0] / fp8.weight_block_size[0]), ceil(shape[1] / fp8.weight_block_size[1])


def is_harmless(name: str) -> bool:
    """Whether a folder may hold this tensor although no parameter needs it: rotary tables, recomputed."""
    return _HARMLESS.fullmatch(name) is not None


# --- the table ---------------------------------------------------------------------------------------------
def _slots(c: ModelConfig, with_mtp: bool) -> Iterator[Slot]:
    embedding = (c.vocab_size, c.hidden_size)
    head = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    yield Slot("model.embed_tokens.weight", embedding, "embed_tokens.weight")
    for layer in range(c.num_hidden_layers):
        yield from _block(c, layer, f"model.layers.{layer}.", f"layers.{layer}.")
    yield Slot("model.norm.weight", (c.hidden_size,), "norm.weight")
    tied = c.tie_word_embeddings
    yield Slot("lm_head.weight", embedding, head, copy=tied, optional=tied)
    for depth in range(c.num_nextn_predict_layers if with_mtp else 0):
        layer = c.num_hidden_layers + depth
        yield from _mtp(c, layer, f"model.layers.{layer}.", f"mtp.{depth}.", head)


def _mtp(c: ModelConfig, layer: int, there: str, here: str, head: str) -> Iterator[Slot]:
    """An MTP module: a block between `eh_proj` of [embedding, hidden] and the shared head's own norm."""
    d, embedding = c.hidden_size, (c.vocab_size, c.hidden_size)
    yield Slot(there + "embed_tokens.weight", embedding, "embed_tokens.weight", copy=True)
    yield Slot(there + "enorm.weight", (d,), here + "enorm.weight")
    yield Slot(there + "hnorm.weight", (d,), here + "hnorm.weight")
    yield Slot(there + "eh_proj.weight", (d, 2 * d), here + "eh_proj.weight")
    yield from _block(c, layer, there, here + "block.")
    yield Slot(there + "shared_head.norm.weight", (d,), here + "norm.weight")
    yield Slot(there + "shared_head.head.weight", embedding, head, copy=True)


def _block(c: ModelConfig, layer: int, there: str, here: str) -> Iterator[Slot]:
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield Slot(there + norm, (c.hidden_size,), here + norm)
    there_attn, here_attn = there + "self_attn.", here + "self_attn."
    if isinstance(c.attention, Mla):
        yield from _mla(c, c.attention, there_attn, here_attn)
    else:
        yield from _gqa(c, c.attention, there_attn, here_attn)
    if c.moe is not None and c.is_moe_layer(layer):
        yield from _moe(c, c.moe, there + "mlp.", here + "mlp.")
    else:
        yield from _ffn(c.hidden_size, c.intermediate_size, there + "mlp.", here + "mlp.")


def _mla(c: ModelConfig, a: Mla, there: str, here: str) -> Iterator[Slot]:
    d, h = c.hidden_size, c.num_attention_heads
    queries = h * a.qk_head_dim
    matrices = [("q_proj", queries, d)]
    if a.q_lora_rank is not None:
        matrices = [("q_a_proj", a.q_lora_rank, d), ("q_b_proj", queries, a.q_lora_rank)]
        yield Slot(there + "q_a_layernorm.weight", (a.q_lora_rank,), here + "q_a_layernorm.weight")
    matrices += [
        ("kv_a_proj_with_mqa", a.kv_lora_rank + a.qk_rope_head_dim, d),
        ("kv_b_proj", h * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank),
        ("o_proj", d, h * a.v_head_dim),
    ]
    for name, rows, columns in matrices:
        yield Slot(f"{there}{name}.weight", (rows, columns), f"{here}{name}.weight", kind="matrix")
    yield Slot(there + "kv_a_layernorm.weight", (a.kv_lora_rank,), here + "kv_a_layernorm.weight")
    if c.dsa is not None:
        yield from _indexer(c, c.dsa, a.q_lora_rank or d, there + "indexer.", here + "indexer.")


def _indexer(c: ModelConfig, x: Dsa, queries: int, there: str, here: str) -> Iterator[Slot]:
    """V3.2's lightning indexer: two FP8 projections, a LayerNorm, and head weights kept in high precision."""
    d = c.hidden_size
    for name, rows, columns in [
        ("wq_b", x.index_n_heads * x.index_head_dim, queries),
        ("wk", x.index_head_dim, d),
    ]:
        yield Slot(f"{there}{name}.weight", (rows, columns), f"{here}{name}.weight", kind="matrix")
    for name in ("k_norm.weight", "k_norm.bias"):
        yield Slot(there + name, (x.index_head_dim,), here + name)
    yield Slot(there + "weights_proj.weight", (x.index_n_heads, d), here + "weights_proj.weight")


def _gqa(c: ModelConfig, a: Gqa, there: str, here: str) -> Iterator[Slot]:
    heads = c.num_attention_heads
    row = 0
    for name, n in (("q_proj", heads), ("k_proj", a.num_key_value_heads), ("v_proj", a.num_key_value_heads)):
        rows = n * a.head_dim
        fused = here + "qkv_proj."
        yield Slot(f"{there}{name}.weight", (rows, c.hidden_size), fused + "weight", row=row, kind="matrix")
        if a.qkv_bias:
            yield Slot(f"{there}{name}.bias", (rows,), fused + "bias", row=row)
        row += rows
    shape = (c.hidden_size, heads * a.head_dim)
    yield Slot(there + "o_proj.weight", shape, here + "o_proj.weight", kind="matrix")


def _moe(c: ModelConfig, m: Moe, there: str, here: str) -> Iterator[Slot]:
    yield Slot(there + "gate.weight", (m.n_routed_experts, c.hidden_size), here + "gate.weight")
    if m.topk_method == "noaux_tc":
        bias = "gate.e_score_correction_bias"
        yield Slot(there + bias, (m.n_routed_experts,), here + bias, kind="float32")
    for expert in range(m.n_routed_experts):
        prefix = f"{there}experts.{expert}."
        yield from _ffn(c.hidden_size, m.moe_intermediate_size, prefix, here + "experts.", expert)
    if m.n_shared_experts:
        width = m.n_shared_experts * m.moe_intermediate_size
        yield from _ffn(c.hidden_size, width, there + "shared_experts.", here + "shared_experts.")


def _ffn(hidden: int, width: int, there: str, here: str, expert: int | None = None) -> Iterator[Slot]:
    """gate, up and down projections; stacked experts have no `.weight` suffix in `Transformer`."""
    suffix = ".weight" if expert is None else ""
    up, down = f"{here}gate_up_proj{suffix}", f"{here}down_proj{suffix}"
    yield Slot(there + "gate_proj.weight", (width, hidden), up, expert, 0, "matrix")
    yield Slot(there + "up_proj.weight", (width, hidden), up, expert, width, "matrix")
    yield Slot(there + "down_proj.weight", (hidden, width), down, expert, 0, "matrix")
