"""Heads for attention in one kernel: rotation in place, keys put together. Reference: `hadal.ops.heads`.

A program takes one token and a block of its heads. What it rotates it has read whole before it writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.sizes import ceil_div, power_of_2


@triton.jit
def _mla_heads_kernel(
    q, rotation, kv, rope, k, tokens, keys, heads, q_stride, kv_stride, rope_stride, WIDTH: tl.constexpr,
    NOPE: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    real = (head < heads)[:, None]
    r = tl.arange(0, BLOCK_R)
    if row < tokens:
        half: tl.constexpr = ROPE // 2
        pair = tl.arange(0, BLOCK_R // 2)
        cos = tl.load(rotation + row * ROPE + pair, mask=pair < half, other=0.0)[None, :]
        sin = tl.load(rotation + row * ROPE + half + pair, mask=pair < half, other=0.0)[None, :]
        at = q + row * q_stride + head[:, None] * (NOPE + ROPE) + NOPE + r[None, :]
        inside = real & (r < ROPE)[None, :]
        both = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [BLOCK_H, BLOCK_R // 2, 2]))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_H, BLOCK_R])
        tl.store(at, turned.to(q.dtype.element_ty), mask=inside)
    if row < keys:
        n = tl.arange(0, BLOCK_N)
        inside = real & (n < NOPE)[None, :]
        to = k + (row * heads + head[:, None]) * (NOPE + ROPE)
        nope = tl.load(kv + row * kv_stride + head[:, None] * WIDTH + n[None, :], mask=inside, other=0.0)
        tl.store(to + n[None, :], nope, mask=inside)
        shared = tl.load(rope + row * rope_stride + r, mask=r < ROPE, other=0.0)[None, :]
        inside = real & (r < ROPE)[None, :]
        tl.store(to + NOPE + r[None, :], tl.broadcast_to(shared, [BLOCK_H, BLOCK_R]), mask=inside)


def mla_heads(q_THC: Tensor, rotation_T2r: Tensor, kv_NHw: Tensor, rope_NR: Tensor) -> Tensor:
    """Keys [N, H, C]; the queries' rope parts are rotated where they lie."""
    (T, H, width), (N, _, both), R = q_THC.shape, kv_NHw.shape, rope_NR.shape[1]
    if q_THC.stride()[1:] != (width, 1) or kv_NHw.stride()[1:] != (both, 1) or rope_NR.stride(1) != 1:
        raise ValueError("heads must lie side by side: q and kv are views of projections' outputs")
    k = torch.empty((N, H, width), dtype=kv_NHw.dtype, device=kv_NHw.device)
    block_h = min(16, power_of_2(H))
    if not (T or N):
        return k
    _mla_heads_kernel[(max(T, N), ceil_div(H, block_h))](
        q_THC, rotation_T2r.contiguous(), kv_NHw, rope_NR, k, T, N, H, q_THC.stride(0), kv_NHw.stride(0),
        rope_NR.stride(0), WIDTH=both, NOPE=width - R, ROPE=R, BLOCK_H=block_h,
        BLOCK_N=power_of_2(width - R), BLOCK_R=power_of_2(R), num_warps=4,
    )  # fmt: skip
    return k


def rotate_queries(q_THC: Tensor, rotation_T2r: Tensor, nope: int) -> None:
    """The queries' rope parts, rotated where they lie."""
    mla_heads(q_THC, rotation_T2r, q_THC[:0], q_THC[:0, 0, nope:])


@triton.jit
def _gqa_heads_kernel(
    qkv, rotation, cache, slot, heads, groups, stride, WIDTH: tl.constexpr, CACHED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    half: tl.constexpr = WIDTH // 2
    r = tl.arange(0, BLOCK_R)
    pdl.wait(PDL)
    cos = tl.load(rotation + token * WIDTH + r, mask=r < half, other=0.0)[None, :]
    sin = tl.load(rotation + token * WIDTH + half + r, mask=r < half, other=0.0)[None, :]
    inside = (head < heads + 2 * groups)[:, None] & (r < half)[None, :]
    at = qkv + token * stride + head[:, None] * WIDTH + r[None, :]
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + half, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    turns = (head < heads + groups)[:, None]
    first = tl.where(turns, (a * cos - b * sin).to(first.dtype), first)
    second = tl.where(turns, (b * cos + a * sin).to(second.dtype), second)
    tl.store(at, first, mask=inside & turns)
    tl.store(at + half, second, mask=inside & turns)
    if CACHED:
        entry = tl.load(slot + token) * 2 * groups + head[:, None] - heads
        to = cache + entry * WIDTH + r[None, :]
        kept = inside & (head >= heads)[:, None]
        tl.store(to, first, mask=kept)
        tl.store(to + half, second, mask=kept)


def gqa_heads(
    qkv_THC: Tensor,
    rotation_T2r: Tensor,
    groups: int,
    cache_PB2GC: Tensor | None = None,
    slot_T: Tensor | None = None,
) -> Tensor:
    """The stacked heads [T, H + 2G, C], q and k rotated where they lie; k and v to the cache, if given."""
    if qkv_THC.stride()[1:] != (qkv_THC.shape[2], 1):
        raise ValueError("heads must lie side by side: qkv is a view of the projection's output")
    tokens, stacked, width = qkv_THC.shape
    block_h = min(8, power_of_2(stacked))
    if tokens:
        _gqa_heads_kernel[(tokens, ceil_div(stacked, block_h))](
            qkv_THC, rotation_T2r.contiguous(), qkv_THC if cache_PB2GC is None else cache_PB2GC,
            qkv_THC if slot_T is None else slot_T, stacked - 2 * groups, groups, qkv_THC.stride(0),
            WIDTH=width, CACHED=cache_PB2GC is not None, BLOCK_H=block_h,
            BLOCK_R=power_of_2(width // 2), num_warps=2, **pdl.options(qkv_THC),
        )  # fmt: skip
    return qkv_THC
