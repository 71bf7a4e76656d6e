"""The tall kernel of latent.py in Gluon (Triton's language of explicit layouts), for Hopper.

Triton's `_tall_kernel` gives both warp groups the same scores to compute: where a product feeds another, its
compiler (3.6) lays all warps along the rows, and 64 rows are one warp group's. Here the two halve the keys
for scores and the latent for values. Two tiles of 64 keys (73,728 bytes each) are in shared memory beside
the queries; while one is at work the other is on its way. Of an FP8 cache, the codes of the next tile are on
their way while this one, dequantised in shared memory, is at work.
On an H100 0.77 of FlashMLA's speed at 128 heads, where Triton's kernel has 0.46.
Reference: `hadal.ops.paged.mla_decode_reference`.
"""

from __future__ import annotations

from math import e, log2

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hadal.ops.triton.latent import Parts, _multiprocessors, merge, shares_for
from hadal.ops.triton.sizes import ceil_div

ROWS, KEYS, LEAST = 64, 64, 128
# named otherwise in Triton 3.6 than since
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _fetch(
    latents, ropes, cache, page, start, end,
    RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Send for the entries of keys from `start`, all on one page; what is not seen becomes zero."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    slim: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    base = cache + (page.to(gl.int64) * PAGE + start % PAGE) * (RANK + ROPE)
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, wide))
    col = gl.arange(0, RANK, gl.SliceLayout(0, wide))
    at = base + n[:, None] * (RANK + ROPE) + col[None, :]
    load(latents, at, mask=(start + n < end)[:, None])
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, slim))
    col = gl.arange(0, ROPE, gl.SliceLayout(0, slim))
    at = base + RANK + n[:, None] * (RANK + ROPE) + col[None, :]
    load(ropes, at, mask=(start + n < end)[:, None])
    async_copy.commit_group()


@gluon.jit
def _fetch_coded(
    codes, ropes, cache, page, start, end,
    RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """`_fetch` of FP8 entries: their codes and rope keys sent for; returns the scales, a group each."""
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [1, 32], [8, 1], [1, 0])
    slim: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    part: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0]))
    SIZE: gl.constexpr = RANK + 4 * (RANK // 128) + 2 * ROPE
    base = cache + (page.to(gl.int64) * PAGE + start % PAGE) * SIZE
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, wide))
    col = gl.arange(0, RANK, gl.SliceLayout(0, wide))
    load(codes, base + n[:, None] * SIZE + col[None, :], mask=(start + n < end)[:, None])
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, slim))
    col = gl.arange(0, ROPE, gl.SliceLayout(0, slim))
    row = (base + RANK + 4 * (RANK // 128)).to(gl.pointer_type(gl.bfloat16))
    load(ropes, row + n[:, None] * (SIZE // 2) + col[None, :], mask=(start + n < end)[:, None])
    async_copy.commit_group()
    n = gl.arange(0, BLOCK_N, part)
    row = (base + RANK).to(gl.pointer_type(gl.float32)) + n * (SIZE // 4)
    seen = start + n < end
    s0 = gl.load(row, mask=seen, other=0.0)
    s1 = gl.load(row + 1, mask=seen, other=0.0)
    s2 = gl.load(row + 2, mask=seen, other=0.0)
    s3 = gl.load(row + 3, mask=seen, other=0.0)
    return s0, s1, s2, s3


@gluon.jit
def _dequantise(latents, codes, scale, g: gl.constexpr):
    """A group of 128 channels, from codes to BF16, both in shared memory."""
    part: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0])
    code = codes.slice(g * 128, 128, dim=1).load(part).to(gl.float8e4nv, bitcast=True)
    wide = code.to(gl.float16).to(gl.float32) * scale[:, None]
    latents.slice(g * 128, 128, dim=1).store(wide.to(gl.bfloat16))


@gluon.jit
def _page(pages, start, end, PAGE: gl.constexpr):
    return gl.load(pages + start // PAGE, mask=start < end, other=0)


@gluon.jit
def _query(q_row, real, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr):
    """Channels of the queries [M, WIDTH] in shared memory; `q_row` [M, 1] and `real` [M, 1] are blocked."""
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    col = gl.arange(0, WIDTH, gl.SliceLayout(0, blocked))
    tile = gl.load(q_row + col[None, :], mask=real, other=0.0)
    return gl.allocate_shared_memory(tile.dtype, [BLOCK_M, WIDTH], shared, tile)


@gluon.jit
def _leave(acc, top, total, out, partial, lse, s, first, rows, used, shares):
    """Store z of rows from `first` where the share is the only one, else the share and its weight."""
    row_n: gl.constexpr = top.type.layout
    halves_l: gl.constexpr = acc.type.layout
    row_l: gl.constexpr = gl.SliceLayout(1, halves_l)
    BLOCK_M: gl.constexpr = acc.shape[0]
    RANK: gl.constexpr = acc.shape[1]
    safe = gl.where(total > 0, total, 1.0)
    acc = acc / gl.convert_layout(safe, row_l)[:, None]
    m_l = first + gl.arange(0, BLOCK_M, row_l)
    col = gl.arange(0, RANK, gl.SliceLayout(0, halves_l))
    row = s * rows + m_l
    real = (m_l < rows)[:, None]
    if used == 1:
        gl.store(out + row[:, None] * RANK + col[None, :], acc.to(out.dtype.element_ty), mask=real)
    else:
        at = row * shares + gl.program_id(2)
        gl.store(partial + at[:, None] * RANK + col[None, :], acc, mask=real)
        m_n = first + gl.arange(0, BLOCK_M, row_n)
        weight = gl.where(total > 0, top + gl.log2(safe), float("-inf"))
        gl.store(lse + (s * rows + m_n) * shares + gl.program_id(2), weight, mask=m_n < rows)


@gluon.jit(do_not_specialize=["shares"])
def _tall_kernel(
    q, cache, table, context_len, out, partial, lse, rows, heads, table_stride, scale, shares,
    QUERIES: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, FP8: gl.constexpr,
    MIN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    halves_n: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    halves_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    row_n: gl.constexpr = gl.SliceLayout(1, halves_n)
    row_l: gl.constexpr = gl.SliceLayout(1, halves_l)
    s = gl.program_id(1).to(gl.int64)
    longest = gl.load(context_len + s * QUERIES)
    for i in gl.static_range(1, QUERIES):
        longest = gl.maximum(longest, gl.load(context_len + s * QUERIES + i))
    size = gl.maximum(gl.cdiv(gl.cdiv(longest, shares), MIN) * MIN, MIN)
    used = gl.maximum(gl.cdiv(longest, size), 1)
    if gl.program_id(2) < used:
        first = gl.program_id(0) * BLOCK_M
        m = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, blocked))
        q_row = q + (s * rows + m)[:, None] * (RANK + ROPE)
        q_ML = _query(q_row, (m < rows)[:, None], RANK, BLOCK_M)
        q_MR = _query(q_row + RANK, (m < rows)[:, None], ROPE, BLOCK_M)
        latents = gl.allocate_shared_memory(q.dtype.element_ty, [1 if FP8 else 2, BLOCK_N, RANK], shared)
        ropes = gl.allocate_shared_memory(q.dtype.element_ty, [2, BLOCK_N, ROPE], shared)
        p_MN = gl.allocate_shared_memory(q.dtype.element_ty, [BLOCK_M, BLOCK_N], shared)
        m_n = first + gl.arange(0, BLOCK_M, row_n)
        limit = gl.load(context_len + s * QUERIES + m_n // heads, mask=m_n < rows, other=0)
        begin = gl.program_id(2) * size
        end = gl.minimum(begin + size, longest)
        top = gl.full([BLOCK_M], float("-inf"), gl.float32, row_n)
        weights = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, halves_n)  # added up across warps at the end
        acc = gl.full([BLOCK_M, RANK], 0.0, gl.float32, halves_l)
        zero = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, halves_n)
        pages = table + s * QUERIES * table_stride
        if FP8:
            bytes16: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 8, [1, 0])
            codes = gl.allocate_shared_memory(gl.uint8, [BLOCK_N, RANK], bytes16)
            page = _page(pages, begin, end, PAGE)
            s0, s1, s2, s3 = _fetch_coded(
                codes, ropes.index(0), cache, page, begin, end, RANK, ROPE, PAGE, BLOCK_N
            )
            page = _page(pages, begin + BLOCK_N, end, PAGE)
        else:
            for i in gl.static_range(2):
                start = begin + i * BLOCK_N
                page = _page(pages, start, end, PAGE)
                _fetch(latents.index(i), ropes.index(i), cache, page, start, end, RANK, ROPE, PAGE, BLOCK_N)
            page = _page(pages, begin + 2 * BLOCK_N, end, PAGE)
        turn = 0
        for start in range(begin, end, BLOCK_N):
            rope = ropes.index(turn)
            if FP8:
                latent = latents.index(0)
                async_copy.wait_group(0)
                barrier()
                _dequantise(latent, codes, s0, 0)
                _dequantise(latent, codes, s1, 1)
                _dequantise(latent, codes, s2, 2)
                _dequantise(latent, codes, s3, 3)
                fence_async_shared()
                barrier()  # the codes are read: the next ones may come, while this tile is at work
                after = start + BLOCK_N
                s0, s1, s2, s3 = _fetch_coded(
                    codes, ropes.index(1 - turn), cache, page, after, end, RANK, ROPE, PAGE, BLOCK_N
                )
                page = _page(pages, after + BLOCK_N, end, PAGE)
            else:
                latent = latents.index(turn)
                async_copy.wait_group(1)
                fence_async_shared()
                barrier()
            score = warpgroup_mma(q_ML, latent.permute((1, 0)), zero, use_acc=False, is_async=True)
            score = warpgroup_mma(q_MR, rope.permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=(score,)) * scale
            key = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, halves_n))
            score = gl.where(key[None, :] < limit[:, None], score, float("-inf"))
            peak = gl.maximum(top, gl.max(score, 1))
            base = gl.where(peak == float("-inf"), 0.0, peak)  # rows of an earlier token may see nothing here
            p = gl.exp2(score - base[:, None])
            decay = gl.exp2(top - base)
            weights = weights * decay[:, None] + p
            top = peak
            p_MN.store(p.to(q.dtype.element_ty))
            fence_async_shared()
            acc = acc * gl.convert_layout(decay, row_l)[:, None]
            barrier()
            acc = warpgroup_mma(p_MN, latent, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()  # both warp groups are done with this tile
            if not FP8:
                after = start + 2 * BLOCK_N
                _fetch(latent, rope, cache, page, after, end, RANK, ROPE, PAGE, BLOCK_N)
                page = _page(pages, after + BLOCK_N, end, PAGE)
            turn = 1 - turn
        async_copy.wait_group(0)
        _leave(acc, top, gl.sum(weights, 1), out, partial, lse, s, first, rows, used, shares)


def wants(q_SHC: Tensor, cache_PBC: Tensor, rank: int) -> bool:
    """Whether the sizes are those of the published models, on pages of whole tiles."""
    suits = q_SHC.dtype == torch.bfloat16 and cache_PBC.dtype in (torch.bfloat16, torch.uint8)
    return suits and (rank, q_SHC.shape[2]) == (512, 576) and cache_PBC.shape[1] % KEYS == 0


def attend(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float,
    queries: int = 1, shares: int | None = None,
) -> Parts:  # fmt: skip
    """`hadal.ops.triton.latent.attend` for published sizes, and pages of whole tiles."""
    (total, heads, entry), page = q_SHC.shape, cache_PBC.shape[1]
    fp8 = cache_PBC.dtype == torch.uint8
    if not wants(q_SHC, cache_PBC, rank):
        raise ValueError(
            f"entries of {rank} + {entry - rank} in {cache_PBC.dtype} on pages of {page}; "
            f"this kernel takes 512 + 64 in bfloat16, or FP8 and bfloat16, on pages of a multiple of {KEYS}"
        )
    rows, S = queries * heads, total // queries
    blocks = ceil_div(rows, ROWS)
    slots = _multiprocessors(q_SHC.device)
    shares = shares or shares_for(S * blocks, block_table_SP.shape[1] * page, slots, LEAST)
    out = torch.empty((total, heads, rank), dtype=q_SHC.dtype, device=q_SHC.device)
    partial, lse = out, out
    if shares > 1:
        partial = torch.empty((total * heads, shares, rank), dtype=torch.float32, device=q_SHC.device)
        lse = torch.empty((total * heads, shares), dtype=torch.float32, device=q_SHC.device)
    _tall_kernel[(blocks, S, shares)](
        q_SHC.contiguous(), cache_PBC, block_table_SP, context_len_S, out, partial, lse, rows, heads,
        block_table_SP.stride(0), scale * log2(e), shares, QUERIES=queries, RANK=rank, ROPE=entry - rank,
        PAGE=page, FP8=fp8, MIN=LEAST, BLOCK_M=ROWS, BLOCK_N=KEYS, num_warps=8,
    )  # fmt: skip
    return Parts(out, partial, lse, context_len_S, shares, queries, LEAST)


def mla_decode(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float,
    queries: int = 1, shares: int | None = None,
) -> Tensor:  # fmt: skip
    """z [S·Q, H, L]; see `hadal.ops.triton.latent.mla_decode`."""
    return merge(attend(q_SHC, cache_PBC, block_table_SP, context_len_S, rank, scale, queries, shares))
