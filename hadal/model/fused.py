"""Decoding a few sequences on CPU: a whole block in one call (`block` in hadal/ops/csrc/cpu.cpp).

A call from Python costs some 20 µs, as much as a small layer's arithmetic. The kernel runs the operations
that `Block.forward` would, in the same order, on plain or packed weights. This file gathers its arguments
and says where it does not apply: gradients, exact mode, recorded routing, prompts, weights of mixed kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hadal.model.context import Context
from hadal.ops import cpu, cpu_packed
from hadal.ops.dispatch import use_cpu_kernels
from hadal.ops.linear import SMALL_M
from hadal.ops.packed import Packed

if TYPE_CHECKING:
    from hadal.model.block import Block
    from hadal.model.gqa import GqaAttention
    from hadal.model.layers import Ffn
    from hadal.model.mla import MlaAttention
    from hadal.model.moe import Moe

Numbers = list[int]


@dataclass
class Links:
    """A block's arguments, and what they were gathered from: they hold while each name still leads to the
    same object, and each tensor to the same memory. The check is cheaper than looking everything up anew."""

    numbers: Numbers
    expert_scale: float
    # every child, parameter and buffer of the block: the dictionary that names it, its name, itself
    owners: list[dict[str, Any]]
    names: list[str]
    items: list[Any]
    tensors: list[Tensor]
    addresses: list[int]

    @classmethod
    def of(cls, layer: Block, numbers: Numbers, expert_scale: float) -> Links:
        named = [
            (owner, name, item)
            for module in layer.modules()
            for owner in (module._modules, module._parameters, module._buffers)
            for name, item in owner.items()
        ]
        owners, names, items = zip(*named, strict=True)
        tensors = [item for item in items if isinstance(item, Tensor)]
        addresses = [tensor.data_ptr() for tensor in tensors]
        return cls(numbers, expert_scale, list(owners), list(names), list(items), tensors, addresses)

    def hold(self) -> bool:
        """Loops without bytecode: what a layer's weights have pushed out of the caches is slow to touch."""
        same = all(map(is_, map(dict.get, self.owners, self.names), self.items))
        return same and list(map(Tensor.data_ptr, self.tensors)) == self.addresses


def block(layer: Block, x_SD: Tensor, ctx: Context) -> Tensor | None:
    """The block's output [S, D], or None where the fused kernel does not apply."""
    if not 0 < ctx.num_decodes == ctx.num_tokens <= SMALL_M or ctx.cache is None or torch.is_grad_enabled():
        return None
    if (ctx.record_routing and layer.is_moe) or not (step := _step(x_SD, ctx)):
        return None
    links = layer.fused_links
    if links is None or not links.hold():
        links = layer.fused_links = _gather(layer, x_SD)
        if links is None:
            return None
    return cpu.block(
        x_SD,
        step,
        ctx.cache.layers[layer.layer].data_ptr(),
        links.numbers,
        layer.eps,
        layer.self_attn.scale,
        links.expert_scale,
    )


def _gather(layer: Block, x_SD: Tensor) -> Links | None:
    """The block's own arguments; None where its weights are not for the kernel."""
    norm, after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    if not use_cpu_kernels(x_SD, norm):
        return None
    mla, own = hasattr(layer.self_attn, "kv_b_proj"), layer.self_attn
    attention = _mla(cast("MlaAttention", own)) if mla else _gqa(cast("GqaAttention", own))
    rest = experts(cast("Moe", layer.mlp)) if layer.is_moe else _ffn(cast("Ffn", layer.mlp))
    if attention is None or rest is None:
        return None
    norms = (norm.data_ptr(), after.data_ptr())
    return Links.of(layer, [*norms, int(mla), *attention, int(layer.is_moe), *rest[0]], rest[1])


def _step(x_SD: Tensor, ctx: Context) -> Numbers | None:
    """Rotations, slots, pages and lengths, looked at once a pass; None where the kernel cannot read them."""
    rotation, slot, table, length, cache = tensors = (
        ctx.rotation_T2r, ctx.slot_T, ctx.block_table_SP, ctx.context_len_S, ctx.cache
    )  # fmt: skip
    if ctx.cpu_step is not None and all(map(is_, tensors, ctx.cpu_step[0])):
        return ctx.cpu_step[1]
    if rotation is None or slot is None or table is None or length is None or cache is None:
        return None
    if not use_cpu_kernels(x_SD, *cache.layers):
        return None
    readable = table.dtype == length.dtype == torch.int32 and slot.dtype == torch.int64
    if not readable or table.stride(1) != 1:
        return None
    if not (rotation.is_contiguous() and slot.is_contiguous() and length.is_contiguous()):
        return None
    numbers = [*(t.data_ptr() for t in (rotation, slot, table, length)), cache.page_size, table.stride(0)]
    ctx.cpu_step = (tensors, numbers)
    return numbers


def _matrices(*weights: Tensor | Packed) -> Numbers | None:
    """Address and kind of each; None where a packed one is not in the kernels' layout."""
    numbers: Numbers = []
    for weight in weights:
        if isinstance(weight, Packed) and weight.layout != cpu_packed.LAYOUT and not cpu_packed.ready(weight):
            return None
        numbers += cpu.matrix(weight)
    return numbers


def _mla(a: MlaAttention) -> Numbers | None:
    sizes = a.a
    if sizes.q_lora_rank is None:
        matrices = _matrices(a.q_proj.weight, a.kv_a_proj_with_mqa.weight, a.o_proj.weight)
    else:
        matrices = _matrices(
            a.q_b_proj.weight, a.kv_a_proj_with_mqa.weight, a.o_proj.weight, a.q_a_proj.weight
        )
    if matrices is None:
        return None
    first = (
        [*cpu.NONE, 0] if sizes.q_lora_rank is None else [*matrices[6:], a.q_a_layernorm.weight.data_ptr()]
    )
    widths = (sizes.q_lora_rank or 0, sizes.kv_lora_rank, sizes.qk_nope_head_dim, sizes.qk_rope_head_dim)
    latent = (a.kv_a_layernorm.weight.data_ptr(), a.kv_b_proj.matrix.data_ptr())
    return [a.heads, *widths, sizes.v_head_dim, *first, *matrices[:4], *latent, *matrices[4:6]]


def _gqa(a: GqaAttention) -> Numbers | None:
    matrices = _matrices(a.qkv_proj.weight, a.o_proj.weight)
    if matrices is None:
        return None
    bias = 0 if a.qkv_proj.bias is None else a.qkv_proj.bias.data_ptr()
    return [a.heads, a.a.num_key_value_heads, a.a.head_dim, *matrices[:2], bias, *matrices[2:]]


def _ffn(ffn: Ffn) -> tuple[Numbers, float] | None:
    matrices = _matrices(ffn.gate_up_proj.weight, ffn.down_proj.weight)
    return None if matrices is None else ([_width(ffn), *matrices], 0.0)


def _width(ffn: Ffn) -> int:
    return ffn.down_proj.weight.shape[1]


def experts(moe: Moe) -> tuple[Numbers, float] | None:
    """Arguments of the routed and shared experts (cpu.moe_block); None where the kernel does not apply."""
    stacks = (getattr(moe.experts, "gate_up_proj", None), getattr(moe.experts, "down_proj", None))
    shared = moe.shared_experts
    pair = () if shared is None else (shared.gate_up_proj.weight, shared.down_proj.weight)
    weights = (*stacks, *pair)
    kinds = {w.kind if isinstance(w, Packed) else str(getattr(w, "dtype", None)) for w in weights}
    if len(kinds) > 1 and not kinds <= {"int8", "int4"}:
        return None
    if not all(isinstance(w, Tensor | Packed) for w in weights):  # experts elsewhere
        return None
    matrices = _matrices(*cast("tuple[Tensor | Packed, ...]", weights))
    if matrices is None:
        return None
    matrices += [] if shared is not None else [*cpu.NONE, *cpu.NONE]
    gate = moe.gate
    wide = 0 if shared is None else _width(shared)
    return cpu.moe_arguments(gate.moe, gate.weight, gate.e_score_correction_bias, matrices, wide)
