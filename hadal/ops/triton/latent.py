"""Paged MLA decode over the latent cache, split over the context with a log-sum-exp merge.

    up to 32 rows   `_token_kernel`: a program takes 16 heads of one token; reading the cache is what costs
    more            `_tall_kernel`: 64 rows of a sequence, its heads times its query tokens (a step that
                    verifies drafts has several, one behind the other in the stream, with the same pages and
                    context lengths of their own); now the tensor cores cost

A tile of entries is brought in once and serves scores and values: these are the first `rank` channels of the
keys. A grid of (block of rows, sequence, share of the context). The number of shares is fixed by the batch
size, so that a launch can be captured in a CUDA graph; the size of a share follows from the context's own
length, and programs beyond it end at once. One share writes the output directly; more leave unmerged outputs
and their log2-sum-exp2, merged by `merge`, or by `hadal.ops.triton.mla.values` on the way through W_UV. The
cache is BF16 or FP32, or bytes as in hadal/ops/latent_fp8.py, dequantised once for both uses.
References: `hadal.ops.paged`, `hadal.ops.latent_fp8`.
Legend: S sequences, Q query tokens a sequence, H heads, M rows = Q · H, N keys of a tile, L latent, R rope.
"""

from __future__ import annotations

import functools
from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.sizes import ceil_div, power_of_2

MOST_SHARES = 32
FP8_GROUP = tl.constexpr(128)


class Config(NamedTuple):
    """Block sizes; `slots`: programs that one multiprocessor runs at a time; `least`: keys that make a share
    worth its merge; `registers`: the most that a thread may have. Up to 32 rows mean the kernel by token."""

    rows: int
    keys: int
    warps: int
    stages: int
    slots: int
    least: int
    registers: int | None = None


def config_for(rows: int, fp8: bool) -> Config:
    """By the rows of a sequence: heads times query tokens.

    By token, FP8 tiles wait in registers for their turn: the compiler (3.6) does not prefetch what it has to
    convert first. With 128 registers a thread two programs fit, which hide each other's conversions.
    """
    if rows <= 32:
        return Config(16, 32, 8, 1, 2, 64, 128) if fp8 else Config(16, 32, 4, 2, 2, 32)
    return Config(64, 32, 8, 3, 1, 128) if fp8 else Config(64, 64, 8, 2, 1, 128)


class Parts(NamedTuple):
    """Attention before its merge: z of sequences with one share in use, else shares and their weights."""

    out_SHL: Tensor
    partial: Tensor  # [rows, shares, L] FP32; rows are tokens · heads
    lse: Tensor  # [rows, shares] log2-sum-exp2
    context_len_S: Tensor
    shares: int
    queries: int  # consecutive context lengths that share their pages, and so the size of a share
    least: int


@triton.jit
def _share(context_len, s, shares, QUERIES: tl.constexpr, MIN: tl.constexpr):
    """(keys of a share, shares in use) of sequence s, from its longest row."""
    longest = tl.load(context_len + s * QUERIES)
    for i in tl.static_range(1, QUERIES):
        longest = tl.maximum(longest, tl.load(context_len + s * QUERIES + i))
    size = tl.maximum(tl.cdiv(tl.cdiv(longest, shares), MIN) * MIN, MIN)
    return size, tl.maximum(tl.cdiv(longest, size), 1)


@triton.jit
def _pages(table_row, start, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each key from `start`, or the one page of them all."""
    if PAGE % BLOCK_N == 0:
        return tl.load(table_row + start // PAGE, mask=start < end, other=0)
    else:
        key = start + tl.arange(0, BLOCK_N)
        return tl.load(table_row + key // PAGE, mask=key < end, other=0)


@triton.jit
def _rows(cache, page, start, size, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the entries of keys from `start` begin, each of `size` elements."""
    n = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:  # one base, and offsets that are known when compiling
        return cache + (page.to(tl.int64) * PAGE + start % PAGE) * size + n * size
    else:
        # Said aloud: of a run key % PAGE the compiler (3.6) knows that it begins at a multiple of PAGE, and
        # keeps that for every key once a page of its own is added to each; it then loads 16 bytes at a time
        # from entries that are 8 apart.
        index = tl.multiple_of(page.to(tl.int64) * PAGE + (start + n) % PAGE, 1)
        return cache + index * size


@triton.jit
def _latents(row, seen, RANK: tl.constexpr, BLOCK_L: tl.constexpr):
    """Latents [N, L] of entries at `row`; zeros where nothing is seen, whatever the cache holds."""
    col = tl.arange(0, BLOCK_L)
    return tl.load(row[:, None] + col[None, :], mask=seen[:, None] & (col < RANK)[None, :], other=0.0)


@triton.jit
def _ropes(row, seen, ROPE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rope keys [N, R] at `row`."""
    col = tl.arange(0, BLOCK_R)
    return tl.load(row[:, None] + col[None, :], mask=seen[:, None] & (col < ROPE)[None, :], other=0.0)


@triton.jit
def _coded(row, seen, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr):
    """FP8 entries at `row`: codes [N, L], scales [N, groups], rope keys [N, R]."""
    GROUPS: tl.constexpr = RANK // FP8_GROUP
    code = _latents(row.to(tl.pointer_type(tl.float8e4nv)), seen, RANK, BLOCK_L)
    g = tl.arange(0, BLOCK_L // FP8_GROUP)
    at = (row + RANK).to(tl.pointer_type(tl.float32))[:, None] + g[None, :]
    scale = tl.load(at, mask=seen[:, None] & (g < GROUPS)[None, :], other=0.0)
    return (
        code,
        scale,
        _ropes((row + RANK + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16)), seen, ROPE, BLOCK_R),
    )


@triton.jit
def _dequantised(code, scale, dtype: tl.constexpr):
    """Latents [N, L] of codes and scales."""
    wide = code.to(tl.float16).to(tl.float32).reshape(code.shape[0], scale.shape[1], FP8_GROUP)
    return (wide * scale[:, :, None]).reshape(code.shape[0], code.shape[1]).to(dtype)


@triton.jit
def _leave(
    acc, top, total, out, partial, lse, row, real, used, shares, RANK: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Store z of `row` [M] where its share is the only one, else the share and its weight."""
    col = tl.arange(0, BLOCK_L)
    mask = real[:, None] & (col < RANK)[None, :]
    safe = tl.where(total > 0, total, 1.0)
    acc = acc / safe[:, None]
    if used == 1:
        tl.store(out + row[:, None] * RANK + col[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        at = row * shares + tl.program_id(2)
        tl.store(partial + at[:, None] * RANK + col[None, :], acc, mask=mask)
        tl.store(lse + at, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["shares"])  # one kernel for all numbers of shares
def _token_kernel(
    q, cache, table, context_len, out, partial, lse, heads, table_stride, scale, shares,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PAGE: tl.constexpr,
    FP8: tl.constexpr, MIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    ENTRY: tl.constexpr = RANK + 4 * (RANK // FP8_GROUP) + 2 * ROPE if FP8 else RANK + ROPE
    pdl.begin(PDL)
    s = tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pdl.wait(PDL)
    size, used = _share(context_len, s, shares, 1, MIN)
    if tl.program_id(2) < used:
        real = h < heads
        q_row = q + (s * heads + h) * (RANK + ROPE)
        q_ML = _latents(q_row, real, RANK, BLOCK_L)
        q_MR = _ropes(q_row + RANK, real, ROPE, BLOCK_R)
        begin = tl.program_id(2) * size
        end = tl.minimum(begin + size, tl.load(context_len + s))
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
        pages = table + s * table_stride
        n = tl.arange(0, BLOCK_N)
        if FP8:  # tiles and pages are read one ahead
            page = _pages(pages, begin, end, PAGE, BLOCK_N)
            row = _rows(cache, page, begin, ENTRY, PAGE, BLOCK_N)
            code, group, ahead = _coded(row, begin + n < end, RANK, ROPE, BLOCK_L, BLOCK_R)
            page = _pages(pages, begin + BLOCK_N, end, PAGE, BLOCK_N)
        for start in range(begin, end, BLOCK_N):
            key = start + n
            if FP8:
                latent = _dequantised(code, group, q_ML.dtype)
                rope = ahead.to(q_MR.dtype)
                row = _rows(cache, page, start + BLOCK_N, ENTRY, PAGE, BLOCK_N)
                code, group, ahead = _coded(row, key + BLOCK_N < end, RANK, ROPE, BLOCK_L, BLOCK_R)
                page = _pages(pages, start + 2 * BLOCK_N, end, PAGE, BLOCK_N)
            else:
                page = tl.load(pages + key // PAGE, mask=key < end, other=0).to(tl.int64)
                row = cache + (page * PAGE + key % PAGE) * ENTRY
                latent = _latents(row, key < end, RANK, BLOCK_L)
                rope = _ropes(row + RANK, key < end, ROPE, BLOCK_R)
            score = tl.dot(q_ML, tl.trans(latent), input_precision="ieee")
            score = tl.dot(q_MR, tl.trans(rope), score, input_precision="ieee") * scale
            score = tl.where((key < end)[None, :], score, float("-inf"))
            peak = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score - peak[:, None])
            decay = tl.exp2(top - peak)
            total = total * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
            top = peak
        _leave(acc, top, total, out, partial, lse, s * heads + h, real, used, shares, RANK, BLOCK_L)


@triton.jit(do_not_specialize=["shares"])  # one kernel for all numbers of shares
def _tall_kernel(
    q, cache, table, context_len, out, partial, lse, rows, heads, table_stride, scale, shares,
    QUERIES: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr, MIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    ENTRY: tl.constexpr = RANK + 4 * (RANK // FP8_GROUP) + 2 * ROPE if FP8 else RANK + ROPE
    pdl.begin(PDL)
    s = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pdl.wait(PDL)
    size, used = _share(context_len, s, shares, QUERIES, MIN)
    if tl.program_id(2) < used:
        real = m < rows
        q_row = q + (s * rows + m) * (RANK + ROPE)
        q_ML = _latents(q_row, real, RANK, BLOCK_L)
        q_MR = _ropes(q_row + RANK, real, ROPE, BLOCK_R)
        limit = tl.load(context_len + s * QUERIES + m // heads, mask=real, other=0)
        begin = tl.program_id(2) * size
        end = tl.minimum(begin + size, tl.max(limit, 0))
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
        pages = table + s * QUERIES * table_stride
        page = _pages(pages, begin, end, PAGE, BLOCK_N)
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            row = _rows(cache, page, start, ENTRY, PAGE, BLOCK_N)
            # a tile ahead: an address that waits for another load cannot be prefetched
            page = _pages(pages, start + BLOCK_N, end, PAGE, BLOCK_N)
            if FP8:
                code, group, coarse = _coded(row, key < end, RANK, ROPE, BLOCK_L, BLOCK_R)
                latent = _dequantised(code, group, q_ML.dtype)
                rope = coarse.to(q_MR.dtype)
            else:
                latent = _latents(row, key < end, RANK, BLOCK_L)
                rope = _ropes(row + RANK, key < end, ROPE, BLOCK_R)
            score = tl.dot(q_ML, tl.trans(latent), input_precision="ieee")
            score = tl.dot(q_MR, tl.trans(rope), score, input_precision="ieee") * scale
            score = tl.where(key[None, :] < limit[:, None], score, float("-inf"))
            peak = tl.maximum(top, tl.max(score, 1))
            base = tl.where(peak == float("-inf"), 0.0, peak)  # rows of an earlier token may see nothing here
            p = tl.exp2(score - base[:, None])
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
            top = peak
        _leave(acc, top, total, out, partial, lse, s * rows + m, real, used, shares, RANK, BLOCK_L)


@triton.jit
def merged(
    out, partial, lse, row, used, shares, SHARES: tl.constexpr, RANK: tl.constexpr, BLOCK_L: tl.constexpr
):
    """z [L] of a row in FP32: its shares weighted, or what was written directly."""
    col = tl.arange(0, BLOCK_L)
    if used == 1:
        z = tl.load(out + row * RANK + col, mask=col < RANK, other=0.0).to(tl.float32)
    else:
        i = tl.arange(0, SHARES)
        each = tl.load(lse + row * shares + i, mask=i < used, other=float("-inf"))
        at = partial + (row * shares + i[:, None]) * RANK + col[None, :]
        tile = tl.load(at, mask=(i < used)[:, None] & (col < RANK)[None, :], other=0.0)
        weight = tl.exp2(each - tl.max(each, 0))  # some share has seen a key, or there would be only one
        z = tl.sum(tile * (weight / tl.sum(weight, 0))[:, None], 0)
    return z


@triton.jit(do_not_specialize=["shares"])  # one kernel for all numbers of shares up to a power of two
def _merge_kernel(
    partial, lse, out, context_len, rows, shares, QUERIES: tl.constexpr, RANK: tl.constexpr,
    BLOCK_L: tl.constexpr, SHARES: tl.constexpr, MIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    pdl.wait(PDL)
    _, used = _share(context_len, row // rows, shares, QUERIES, MIN)
    if used > 1:
        col = tl.arange(0, BLOCK_L)
        z = merged(out, partial, lse, row, used, shares, SHARES, RANK, BLOCK_L)
        tl.store(out + row * RANK + col, z.to(out.dtype.element_ty), mask=col < RANK)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shares_for(programs: int, keys: int, slots: int, least: int) -> int:
    """Shares of a context of up to `keys`, by the waves that they take on `slots` and the tiles in each.

    A share costs its keys, and about 96 keys' time for its start and its part in the merge.
    """
    best, lowest = 1, float("inf")
    for shares in range(1, max(1, min(MOST_SHARES, keys // least)) + 1):
        each = ceil_div(ceil_div(keys, shares), least) * least
        waves = ceil_div(programs * ceil_div(keys, each), slots)
        cost = waves * (each + 96) + (64 if shares > 1 else 0)
        if cost < lowest:
            best, lowest = shares, cost
    return best


def attend(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float,
    queries: int = 1, config: Config | None = None, shares: int | None = None,
) -> Parts:  # fmt: skip
    """`mla_decode` before its merge."""
    total, heads, entry = q_SHC.shape
    if total % queries:
        raise ValueError(f"{total} rows are no multiple of {queries} queries a sequence")
    fp8 = cache_PBC.dtype == torch.uint8
    if config is None and queries * heads > 32 and pdl.on_hopper(q_SHC.device):
        from hadal.ops.triton import latent_gluon

        if latent_gluon.wants(q_SHC, cache_PBC, rank):
            return latent_gluon.attend(
                q_SHC, cache_PBC, block_table_SP, context_len_S, rank, scale, queries, shares
            )
    config = config or config_for(queries * heads, fp8)
    queries = queries if config.rows > 32 else 1  # by token, each is a sequence of its own
    rows, S, page = queries * heads, total // queries, cache_PBC.shape[1]
    blocks = ceil_div(rows, config.rows)
    slots = _multiprocessors(q_SHC.device) * config.slots
    shares = shares or shares_for(S * blocks, block_table_SP.shape[1] * page, slots, config.least)
    out = torch.empty((total, heads, rank), dtype=q_SHC.dtype, device=q_SHC.device)
    partial, lse = out, out
    if shares > 1:
        partial = torch.empty((total * heads, shares, rank), dtype=torch.float32, device=q_SHC.device)
        lse = torch.empty((total * heads, shares), dtype=torch.float32, device=q_SHC.device)
    arguments = (q_SHC.contiguous(), cache_PBC, block_table_SP, context_len_S, out, partial, lse)
    sizes = (heads, block_table_SP.stride(0), scale * log2(e), shares)
    constants = {
        "RANK": rank, "ROPE": entry - rank, "BLOCK_L": power_of_2(rank),
        "BLOCK_R": max(16, power_of_2(entry - rank)), "PAGE": page, "FP8": fp8,
        "MIN": config.least, "BLOCK_M": config.rows, "BLOCK_N": config.keys, "num_warps": config.warps,
        "num_stages": config.stages, "maxnreg": config.registers, **pdl.options(q_SHC),
    }  # fmt: skip
    grid = (blocks, S, shares)  # blocks of a sequence run side by side and meet its pages in the L2 cache
    if config.rows > 32:
        _tall_kernel[grid](*arguments, rows, *sizes, QUERIES=queries, **constants)
    else:
        _token_kernel[grid](*arguments, *sizes, **constants)
    return Parts(out, partial, lse, context_len_S, shares, queries, config.least)


def merge(parts: Parts) -> Tensor:
    """z [S·Q, H, L]."""
    total, heads, rank = parts.out_SHL.shape
    if parts.shares > 1:
        _merge_kernel[(total * heads,)](
            parts.partial, parts.lse, parts.out_SHL, parts.context_len_S, parts.queries * heads, parts.shares,
            QUERIES=parts.queries, RANK=rank, BLOCK_L=power_of_2(rank),
            SHARES=power_of_2(parts.shares), MIN=parts.least, num_warps=4,
            **pdl.options(parts.out_SHL),
        )  # fmt: skip
    return parts.out_SHL


def mla_decode(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float,
    queries: int = 1, config: Config | None = None, shares: int | None = None,
) -> Tensor:  # fmt: skip
    """z [S·Q, H, L]; see `hadal.ops.paged.mla_decode_reference`.

    With `queries` Q > 1 rows lie in groups of Q that see the same sequence: each of their block tables names
    its pages, and each row sees its own context length of them. A cache of uint8 is one in FP8
    (hadal/ops/latent_fp8.py).
    """
    return merge(
        attend(q_SHC, cache_PBC, block_table_SP, context_len_S, rank, scale, queries, config, shares)
    )
