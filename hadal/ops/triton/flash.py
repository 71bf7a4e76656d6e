"""Causal attention of a flat stream in one kernel: no mask in memory, no padding, any lengths. Reference:
`hadal.ops.attention`.

A program takes BLOCK_M queries of one head and walks over the keys that they see, with a running softmax in
FP32: first the tiles that all its queries see whole, then the few at the diagonal, masked. A table of blocks,
built on the host, says which queries a program takes and how many keys the first of them sees; the longest
walks start first. Keys may come in two parts, [nope; rope], from two tensors, of which the second may be one
for all heads: MLA's keys need not be put together. Values may be narrower than keys. Unlike cuDNN's kernels,
which are planned anew for every length, it is compiled once.
Legend: T queries, N keys, H heads, G key/value heads, C key width, V value width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.kept import kept
from hadal.ops.triton.sizes import power_of_2

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """Queries and keys of a tile, warps, stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def config_for(width: int) -> Config:
    """Measured on an H100 (benchmarks/kernels_gpu.py, part prefill): MLA's 192 columns, and 128."""
    return Config(128, 64, 8, 3) if width > 128 else Config(64, 64, 4, 2)


@triton.jit
def _tile(pointer, rows, stride, col, WIDTH: tl.constexpr, BLOCK: tl.constexpr, real, MASKED: tl.constexpr):
    """[rows, BLOCK] at the pointer; masked only where it must be."""
    at = pointer + rows[:, None] * stride + col[None, :]
    if MASKED:
        return tl.load(at, mask=real[:, None] & (col < WIDTH)[None, :], other=0.0)
    if WIDTH != BLOCK:
        return tl.load(at, mask=(col < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _walk(
    acc, total, top, q_first, q_second, k, r, v, k_stride, r_stride, v_stride, begin, end, seen, scale,
    FIRST: tl.constexpr, SECOND: tl.constexpr, VALUE: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Keys begin … end − 1; row m sees keys below seen[m] (all of them, unless MASKED)."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_N)
        row = key.to(tl.int64)
        real = key < end
        first = _tile(k, row, k_stride, tl.arange(0, BLOCK_F), FIRST, BLOCK_F, real, MASKED)
        score = tl.dot(q_first, tl.trans(first), input_precision="ieee")
        if SECOND > 0:
            second = _tile(r, row, r_stride, tl.arange(0, BLOCK_S), SECOND, BLOCK_S, real, MASKED)
            score = tl.dot(q_second, tl.trans(second), score, input_precision="ieee")
        if MASKED:
            score = tl.where(key[None, :] < seen[:, None], score, float("-inf"))
        peak = tl.maximum(top, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - peak[:, None])
        decay = tl.exp2(top - peak)
        total = total * decay + tl.sum(p, 1)
        value = _tile(v, row, v_stride, tl.arange(0, BLOCK_V), VALUE, BLOCK_V, real, MASKED)
        acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
        top = peak
    return acc, total, top


@triton.jit
def _flash_kernel(
    q, k, r, v, out, blocks, q_stride, q_head, k_stride, k_head, r_stride, r_head, v_stride, v_head,
    out_stride, repeat, scale, FIRST: tl.constexpr, SECOND: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    entry = blocks + tl.program_id(1) * 4
    q_begin, rows = tl.load(entry).to(tl.int64), tl.load(entry + 1)
    k_begin, sees = tl.load(entry + 2).to(tl.int64), tl.load(entry + 3)
    m = tl.arange(0, BLOCK_M)
    real = m < rows
    at = q + (q_begin + m[:, None]) * q_stride + head * q_head
    col = tl.arange(0, BLOCK_F)
    q_first = tl.load(at + col[None, :], mask=real[:, None] & (col < FIRST)[None, :], other=0.0)
    q_second = q_first
    if SECOND > 0:
        rest = tl.arange(0, BLOCK_S)
        q_second = tl.load(
            at + FIRST + rest[None, :], mask=real[:, None] & (rest < SECOND)[None, :], other=0.0
        )
    group = head // repeat
    k += k_begin * k_stride + group * k_head
    r += k_begin * r_stride + group * r_head
    v += k_begin * v_stride + group * v_head
    seen = sees + m
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    whole = sees // BLOCK_N * BLOCK_N
    acc, total, top = _walk(
        acc, total, top, q_first, q_second, k, r, v, k_stride, r_stride, v_stride, 0, whole, seen, scale,
        FIRST, SECOND, VALUE, BLOCK_F, BLOCK_S, BLOCK_V, BLOCK_N, False, STAGES,
    )  # fmt: skip
    acc, total, top = _walk(
        acc, total, top, q_first, q_second, k, r, v, k_stride, r_stride, v_stride, whole, sees + rows - 1,
        seen, scale, FIRST, SECOND, VALUE, BLOCK_F, BLOCK_S, BLOCK_V, BLOCK_N, True, STAGES,
    )  # fmt: skip
    col = tl.arange(0, BLOCK_V)
    to = out + (q_begin + m[:, None]) * out_stride + head * VALUE + col[None, :]
    inside = real[:, None] & (col < VALUE)[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=64)
def _blocks(
    q_len: tuple[int, ...], k_len: tuple[int, ...], block: int, device: torch.device
) -> Tensor:  # fmt: skip
    """int32 [blocks, 4]: first query, queries, first key, keys that the first query sees; the same for every
    layer of a step, so kept."""
    table: list[tuple[int, int, int, int]] = []
    q_begin = k_begin = 0
    for queries, keys in zip(q_len, k_len, strict=True):
        for i in range(0, queries, block):
            table.append((q_begin + i, min(block, queries - i), k_begin, keys - queries + i + 1))
        q_begin, k_begin = q_begin + queries, k_begin + keys
    table.sort(key=lambda entry: -entry[3])
    host = torch.tensor(table, dtype=torch.int32).view(-1, 4)
    if device.type == "cuda":  # from pinned memory: the host does not wait for the device
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def wants(q_THC: Tensor, v_NGV: Tensor) -> bool:
    """Whether this kernel can take it: half precision, and widths that tensor cores take without waste."""
    width, value = q_THC.shape[2], v_NGV.shape[2]
    return q_THC.element_size() == 2 and width in (64, 128, 192) and value in (64, 128)


def attention(
    q_THC: Tensor, k_NGC: Tensor, v_NGV: Tensor, q_len: Sequence[int], k_len: Sequence[int], scale: float,
    rope_NR: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """[T, H, V]; see `hadal.ops.attention.attention`. rope_NR: the last R columns of every head's keys, which
    `k_NGC` then lacks."""
    config = config or config_for(q_THC.shape[2])
    (T, H, width), (_, G, first) = q_THC.shape, k_NGC.shape
    if rope_NR is not None:
        second, r_stride, r_head = rope_NR, rope_NR.stride(0), 0
    else:  # a width that is no power of two is taken in two
        first = 1 << (width.bit_length() - 1)
        second, r_stride, r_head = k_NGC[..., first:], k_NGC.stride(0), k_NGC.stride(1)
    rest, value = width - first, v_NGV.shape[2]
    if any(x.stride(-1) != 1 for x in (q_THC, k_NGC, v_NGV, second)) or second.shape[-1] != rest:
        raise ValueError(
            "keys of both parts together must be as wide as queries, all with rows that lie flat"
        )
    out = torch.empty((T, H, value), dtype=q_THC.dtype, device=q_THC.device)
    blocks = kept(_blocks(tuple(q_len), tuple(k_len), config.queries, q_THC.device))
    _flash_kernel[(H, blocks.shape[0])](
        q_THC, k_NGC, second if rest else k_NGC, v_NGV, out, blocks, q_THC.stride(0), q_THC.stride(1),
        k_NGC.stride(0), k_NGC.stride(1), r_stride, r_head, v_NGV.stride(0), v_NGV.stride(1), out.stride(0),
        H // G, scale * LOG2_E, FIRST=first, SECOND=rest, VALUE=value,
        BLOCK_F=max(16, power_of_2(first)), BLOCK_S=max(16, power_of_2(rest or 1)),
        BLOCK_V=max(16, power_of_2(value)), BLOCK_M=config.queries, BLOCK_N=config.keys,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return out
