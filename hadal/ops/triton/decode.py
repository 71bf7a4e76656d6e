"""Paged GQA decode attention, split over the context with a log-sum-exp merge. Reference: `hadal.ops.paged`.

A program takes one sequence, a block of query heads and one share of the context; it keeps a running softmax
in FP32 and writes its unmerged output with its log-sum-exp. A second kernel merges the shares. The number of
shares is fixed by the batch size alone, so that the launch can be captured in a CUDA graph; shares beyond a
short context are empty and say so with −inf.
Legend: S sequences, H heads, G key/value heads, C head width, N keys a tile. MLA: latent.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.sizes import power_of_2

AHEAD, STAGES = False, 2  # the block table read a tile early, with three stages or more: not yet measured
TARGET_PROGRAMS = 264  # two programs for each of an H100's 132 multiprocessors
MIN_SHARE = 64  # keys that make a share worth its merge


@triton.jit
def _share(context_len, SPLITS: tl.constexpr, MIN: tl.constexpr):
    """[begin, end) of this program's share, a multiple of MIN keys."""
    size = tl.cdiv(tl.cdiv(context_len, SPLITS), MIN) * MIN
    begin = tl.program_id(2) * size
    return begin, tl.minimum(begin + size, context_len)


@triton.jit
def _gqa_kernel(
    q, cache, table, context_len, partial, lse, out, heads, per_group, groups, q_stride, table_stride, scale,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, MIN: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    s = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    i = tl.arange(0, BLOCK_H)
    h = g * per_group + i
    col = tl.arange(0, BLOCK_C)
    mine = (i < per_group)[:, None] & (col < WIDTH)[None, :]
    pdl.wait(PDL)
    q_tile = tl.load(q + s * q_stride + h[:, None] * WIDTH + col[None, :], mask=mine, other=0.0)
    begin, end = _share(tl.load(context_len + s), SPLITS, MIN)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    if AHEAD:  # pages a tile ahead: keys whose address waits for a load cannot be prefetched
        first = begin + tl.arange(0, BLOCK_N)
        page = tl.load(table + s * table_stride + first // PAGE, mask=first < end, other=0)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        if not AHEAD:
            page = tl.load(table + s * table_stride + n // PAGE, mask=n < end, other=0)
        row = cache + ((page.to(tl.int64) * PAGE + n % PAGE) * 2 * groups + g) * WIDTH
        if AHEAD:
            after = n + BLOCK_N
            page = tl.load(table + s * table_stride + after // PAGE, mask=after < end, other=0)
        mask = (n < end)[:, None] & (col < WIDTH)[None, :]
        k = tl.load(row[:, None] + col[None, :], mask=mask, other=0.0)
        v = tl.load(row[:, None] + groups * WIDTH + col[None, :], mask=mask, other=0.0)
        score = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((n < end)[None, :], score, float("-inf"))
        peak = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - peak[:, None])
        decay = tl.exp(top - peak)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = peak
    safe = tl.where(total > 0, total, 1.0)
    acc = acc / safe[:, None]
    if SPLITS == 1:
        to = out + (s * heads + h[:, None]) * WIDTH + col[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=mine)
    else:
        row = (s * heads + h) * SPLITS + tl.program_id(2)
        tl.store(partial + row[:, None] * BLOCK_C + col[None, :], acc, mask=mine)
        tl.store(lse + row, tl.where(total > 0, top + tl.log(safe), float("-inf")), mask=i < per_group)


@triton.jit
def _merge_kernel(
    partial, lse, out, width, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    pdl.begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    col = tl.arange(0, BLOCK)
    pdl.wait(PDL)
    each = tl.load(lse + row * SPLITS + split)
    peak = tl.max(each, 0)
    share = tl.where(each > float("-inf"), tl.exp(each - peak), 0.0)
    share = share / tl.sum(share, 0)
    real = (share > 0)[:, None] & (col < width)[None, :]  # empty shares are not read
    tile = tl.load(partial + (row * SPLITS + split[:, None]) * BLOCK + col[None, :], mask=real, other=0.0)
    value = tl.sum(tile * share[:, None], 0)
    tl.store(out + row * width + col, value.to(out.dtype.element_ty), mask=col < width)


def _splits(programs: int, table_SP: Tensor, page: int) -> int:
    """Shares of the context: enough programs for the machine, no more than the longest context can use."""
    useful = max(1, table_SP.shape[1] * page // MIN_SHARE)
    wanted = max(1, TARGET_PROGRAMS // programs)
    return 1 << max(0, (min(useful, wanted, 32)).bit_length() - 1)


def gqa_decode(
    q_SHC: Tensor, cache_PB2GC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, scale: float,
    ahead: bool = AHEAD, stages: int = STAGES,
) -> Tensor:  # fmt: skip
    """Output [S, H, C]; see `hadal.ops.paged.gqa_decode_reference`.

    `ahead` reads the block table a tile early; with three stages or more the compiler (3.6) then prefetches
    keys and values, which it does not with two.
    """
    q_SHC = q_SHC if q_SHC.stride()[1:] == (q_SHC.shape[2], 1) else q_SHC.contiguous()
    S, H, width = q_SHC.shape
    page, groups = cache_PB2GC.shape[1], cache_PB2GC.shape[3]
    block_c = max(16, power_of_2(width))
    splits = _splits(S * groups, block_table_SP, page)
    out = torch.empty((S, H, width), dtype=q_SHC.dtype, device=q_SHC.device)
    partial = lse = out
    if splits > 1:
        partial = torch.empty((S * H, splits, block_c), dtype=torch.float32, device=q_SHC.device)
        lse = torch.empty((S * H, splits), dtype=torch.float32, device=q_SHC.device)
    _gqa_kernel[(S, groups, splits)](
        q_SHC, cache_PB2GC, block_table_SP, context_len_S, partial, lse, out, H, H // groups, groups,
        q_SHC.stride(0), block_table_SP.stride(0), scale, WIDTH=width, BLOCK_C=block_c, PAGE=page,
        SPLITS=splits, BLOCK_H=max(16, power_of_2(H // groups)), BLOCK_N=64, MIN=MIN_SHARE,
        AHEAD=ahead, num_warps=4, num_stages=stages, **pdl.options(q_SHC),
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(S * H,)](
            partial, lse, out, width, BLOCK=block_c, SPLITS=splits, num_warps=4, **pdl.options(q_SHC)
        )
    return out
