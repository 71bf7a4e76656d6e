"""Paged MLA decode: all rows that look at one sequence share a pass over its latent pages.

Rows of a sequence are its heads, times its query tokens: a step that verifies drafts has several, one behind
the other in the stream, with the same pages and context lengths of their own. A tile of keys is brought into
shared memory once and used for scores and for values: these are the first `rank` channels of the entries.

    up to 32 rows   `_narrow_kernel`: keys are the tensor core's long side, score[n, m] and z[l, m]; blocks
                    of 16 rows, since three tiles of keys for the pipeline fill the shared memory
    more            `_tall_kernel`: blocks of 64 rows are the long side, score[m, n] and z[m, l]

A grid of (block of rows, sequence, share of the context); the size of a share follows from the context's own
length, so that a short context in a captured graph wastes programs, not work. One share writes its output
directly; more leave unmerged outputs and their log2-sum-exp2 for `_merge_kernel`. The cache is BF16 or FP32,
or bytes as in hadal/ops/latent_fp8.py. References: `hadal.ops.paged`, `hadal.ops.latent_fp8`.
Legend: S sequences, Q query tokens a sequence, H heads, M rows = Q · H, N keys of a tile, L latent, R rope.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# Tuples grow by addition in kernels: Triton neither unpacks them nor knows their types.
from __future__ import annotations

import functools
from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_SHARE = 128  # keys that make a share worth its merge
MOST_SHARES = 64
FP8_GROUP = tl.constexpr(128)


class Config(NamedTuple):
    """Block sizes; `slots`: programs that one multiprocessor runs at a time."""

    rows: int
    keys: int
    warps: int
    stages: int
    slots: int


def config_for(rows: int, fp8: bool) -> Config:
    """By the rows of a sequence. Chosen by what compiles for sm_90 with few spills; not yet tuned on a card.

    Tiles are prefetched from three stages on only: with two, the compiler (3.6) fetches after it computed.
    """
    if rows <= 32:
        return Config(16, 64, 8, 3, 1) if fp8 else Config(16, 64, 4, 3, 1)
    return Config(64, 32, 8, 3, 1)


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
    """The page of each key from `start`, or the one page of them all. Loaded a tile ahead: an address that
    waits for another load cannot be prefetched."""
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
        return cache + (page.to(tl.int64) * PAGE + (start + n) % PAGE) * size


@triton.jit
def _latents(row, seen, RANK: tl.constexpr, BLOCK_L: tl.constexpr):
    """Latents [N, L] of BF16 entries at `row`; zeros where nothing is seen, whatever the cache holds."""
    col = tl.arange(0, BLOCK_L)
    return tl.load(row[:, None] + col[None, :], mask=seen[:, None] & (col < RANK)[None, :], other=0.0)


@triton.jit
def _dequantised(row, seen, dtype: tl.constexpr, RANK: tl.constexpr, BLOCK_L: tl.constexpr):
    """Latents [N, L] of FP8 entries at `row`."""
    GROUPS: tl.constexpr = RANK // FP8_GROUP
    code = _latents(row.to(tl.pointer_type(tl.float8e4nv)), seen, RANK, BLOCK_L)
    g = tl.arange(0, GROUPS)
    at = (row + RANK).to(tl.pointer_type(tl.float32))[:, None] + g[None, :]
    scale = tl.load(at, mask=seen[:, None] & (g < GROUPS)[None, :], other=0.0)
    wide = code.to(tl.float16).to(tl.float32).reshape(row.shape[0], GROUPS, FP8_GROUP)
    return (wide * scale[:, :, None]).reshape(row.shape[0], BLOCK_L).to(dtype)


@triton.jit
def _ropes(row, seen, ROPE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rope keys [N, R] at `row`."""
    col = tl.arange(0, BLOCK_R)
    return tl.load(row[:, None] + col[None, :], mask=seen[:, None] & (col < ROPE)[None, :], other=0.0)


@triton.jit(do_not_specialize=["shares"])  # one kernel for all numbers of shares
def _narrow_kernel(
    q, cache, table, context_len, out, partial, lse, rows, heads, table_stride, scale, shares,
    QUERIES: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, PAGE: tl.constexpr, MIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    size, used = _share(context_len, s, shares, QUERIES, MIN)
    if tl.program_id(2) < used:
        col = tl.arange(0, BLOCK_L)
        rope_col = tl.arange(0, BLOCK_R)
        real = m < rows
        q_row = q + (s * rows + m) * (RANK + ROPE)
        q_LM = tl.load(q_row[None, :] + col[:, None], mask=real[None, :] & (col < RANK)[:, None], other=0.0)
        rope_mask = real[None, :] & (rope_col < ROPE)[:, None]
        q_RM = tl.load(q_row[None, :] + RANK + rope_col[:, None], mask=rope_mask, other=0.0)
        limit = tl.load(context_len + s * QUERIES + m // heads, mask=real, other=0)
        begin = tl.program_id(2) * size
        end = tl.minimum(begin + size, tl.max(limit, 0))
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
        pages = table + s * QUERIES * table_stride
        n = tl.arange(0, BLOCK_N)
        row = _rows(cache, _pages(pages, begin, end, PAGE, BLOCK_N), begin, RANK + ROPE, PAGE, BLOCK_N)
        page = _pages(pages, begin + BLOCK_N, end, PAGE, BLOCK_N)
        rope = _ropes(row + RANK, begin + n < end, ROPE, BLOCK_R)
        for start in range(begin, end, BLOCK_N):
            key = start + n
            latent = _latents(row, key < end, RANK, BLOCK_L)
            after = start + BLOCK_N
            row = _rows(cache, page, after, RANK + ROPE, PAGE, BLOCK_N)
            page = _pages(pages, after + BLOCK_N, end, PAGE, BLOCK_N)
            # in registers, not in the pipeline: three tiles in shared memory leave no room for rope keys
            ahead = _ropes(row + RANK, after + n < end, ROPE, BLOCK_R)
            score = tl.dot(latent, q_LM, input_precision="ieee")
            score = tl.dot(rope, q_RM, score, input_precision="ieee") * scale
            score = tl.where(key[:, None] < limit[None, :], score, float("-inf"))
            peak = tl.maximum(top, tl.max(score, 0))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            p = tl.exp2(score - base[None, :])
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(p, 0)
            acc = tl.dot(tl.trans(latent), p.to(latent.dtype), acc * decay[None, :], input_precision="ieee")
            top = peak
            rope = ahead
        safe = tl.where(total > 0, total, 1.0)
        acc = acc / safe[None, :]
        at = s * rows + m
        mask = real[None, :] & (col < RANK)[:, None]
        if used == 1:
            tl.store(out + at[None, :] * RANK + col[:, None], acc.to(out.dtype.element_ty), mask=mask)
        else:
            at = at * shares + tl.program_id(2)
            tl.store(partial + at[None, :] * RANK + col[:, None], acc, mask=mask)
            tl.store(lse + at, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=real)


@triton.jit
def _groups(row, seen, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_R: tl.constexpr):
    """FP8 entries at `row`: codes and scales, a tuple each over groups of channels, and rope."""
    GROUPS: tl.constexpr = RANK // FP8_GROUP
    col = tl.arange(0, FP8_GROUP)
    rope_col = tl.arange(0, BLOCK_R)
    code_row = row.to(tl.pointer_type(tl.float8e4nv))
    scale_row = (row + RANK).to(tl.pointer_type(tl.float32))
    codes, scales = (), ()
    for g in tl.static_range(GROUPS):
        at = code_row[:, None] + g * FP8_GROUP + col[None, :]
        codes = codes + (tl.load(at, mask=seen[:, None], other=0.0),)
        scales = scales + (tl.load(scale_row + g, mask=seen, other=0.0),)
    rope_row = (row + RANK + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16))
    rope_mask = seen[:, None] & (rope_col < ROPE)[None, :]
    return codes, scales, tl.load(rope_row[:, None] + rope_col[None, :], mask=rope_mask, other=0.0)


@triton.jit(do_not_specialize=["shares"])  # one kernel for all numbers of shares
def _narrow_fp8_kernel(
    q, cache, table, context_len, out, partial, lse, rows, heads, table_stride, scale, shares,
    QUERIES: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, PAGE: tl.constexpr, MIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`_narrow_kernel` by groups of 128 channels, each dequantised when its turn comes; z[m, l] there.

    The compiler (3.6) does not prefetch values that it has to convert for two products, so that two programs
    on a multiprocessor must hide each other's loads: what counts is few registers.
    """
    GROUPS: tl.constexpr = RANK // FP8_GROUP
    s = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    size, used = _share(context_len, s, shares, QUERIES, MIN)
    if tl.program_id(2) < used:
        col = tl.arange(0, FP8_GROUP)
        rope_col = tl.arange(0, BLOCK_R)
        real = m < rows
        q_row = q + (s * rows + m) * (RANK + ROPE)
        q_LM, acc = (), ()
        for g in tl.static_range(GROUPS):
            at = q_row[None, :] + g * FP8_GROUP + col[:, None]
            q_LM = q_LM + (tl.load(at, mask=real[None, :], other=0.0),)
            acc = acc + (tl.zeros([BLOCK_M, FP8_GROUP], tl.float32),)
        rope_mask = real[None, :] & (rope_col < ROPE)[:, None]
        q_RM = tl.load(q_row[None, :] + RANK + rope_col[:, None], mask=rope_mask, other=0.0)
        limit = tl.load(context_len + s * QUERIES + m // heads, mask=real, other=0)
        begin = tl.program_id(2) * size
        end = tl.minimum(begin + size, tl.max(limit, 0))
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        pages = table + s * QUERIES * table_stride
        page = _pages(pages, begin, end, PAGE, BLOCK_N)
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            row = _rows(cache, page, start, RANK + 4 * GROUPS + 2 * ROPE, PAGE, BLOCK_N)
            page = _pages(pages, start + BLOCK_N, end, PAGE, BLOCK_N)
            codes, scales, rope = _groups(row, key < end, RANK, ROPE, BLOCK_R)
            score = tl.dot(rope.to(q_RM.dtype), q_RM, input_precision="ieee")
            latent = ()
            for g in tl.static_range(GROUPS):
                wide = codes[g].to(tl.float16).to(tl.float32) * scales[g][:, None]
                latent = latent + (wide.to(q_RM.dtype),)
                score = tl.dot(latent[g], q_LM[g], score, input_precision="ieee")
            score = tl.where(key[:, None] < limit[None, :], score * scale, float("-inf"))
            peak = tl.maximum(top, tl.max(score, 0))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            p = tl.exp2(score - base[None, :])
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(p, 0)
            p_MN = tl.trans(p.to(q_RM.dtype))
            added = ()
            for g in tl.static_range(GROUPS):
                old = acc[g] * decay[:, None]
                added = added + (tl.dot(p_MN, latent[g], old, input_precision="ieee"),)
            acc, top = added, peak
        safe = tl.where(total > 0, total, 1.0)
        at = s * rows + m
        if used == 1:
            for g in tl.static_range(GROUPS):
                to = out + at[:, None] * RANK + g * FP8_GROUP + col[None, :]
                tl.store(to, (acc[g] / safe[:, None]).to(out.dtype.element_ty), mask=real[:, None])
        else:
            at = at * shares + tl.program_id(2)
            for g in tl.static_range(GROUPS):
                part = partial + at[:, None] * RANK + g * FP8_GROUP + col[None, :]
                tl.store(part, acc[g] / safe[:, None], mask=real[:, None])
            tl.store(lse + at, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["shares"])  # one kernel for all numbers of shares
def _tall_kernel(
    q, cache, table, context_len, out, partial, lse, rows, heads, table_stride, scale, shares,
    QUERIES: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr, MIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    size, used = _share(context_len, s, shares, QUERIES, MIN)
    if tl.program_id(2) < used:
        col = tl.arange(0, BLOCK_L)
        rope_col = tl.arange(0, BLOCK_R)
        real = m < rows
        q_row = q + (s * rows + m) * (RANK + ROPE)
        q_ML = tl.load(q_row[:, None] + col[None, :], mask=real[:, None] & (col < RANK)[None, :], other=0.0)
        rope_mask = real[:, None] & (rope_col < ROPE)[None, :]
        q_MR = tl.load(q_row[:, None] + RANK + rope_col[None, :], mask=rope_mask, other=0.0)
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
            if FP8:
                GROUPS: tl.constexpr = RANK // FP8_GROUP
                row = _rows(cache, page, start, RANK + 4 * GROUPS + 2 * ROPE, PAGE, BLOCK_N)
                latent = _dequantised(row, key < end, q_ML.dtype, RANK, BLOCK_L)
                rope_row = (row + RANK + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16))
            else:
                row = _rows(cache, page, start, RANK + ROPE, PAGE, BLOCK_N)
                latent = _latents(row, key < end, RANK, BLOCK_L)
                rope_row = row + RANK
            page = _pages(pages, start + BLOCK_N, end, PAGE, BLOCK_N)
            rope = _ropes(rope_row, key < end, ROPE, BLOCK_R).to(q_MR.dtype)
            score = tl.dot(q_ML, tl.trans(latent), input_precision="ieee")
            score = tl.dot(q_MR, tl.trans(rope), score, input_precision="ieee") * scale
            score = tl.where(key[None, :] < limit[:, None], score, float("-inf"))
            peak = tl.maximum(top, tl.max(score, 1))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            p = tl.exp2(score - base[:, None])
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
            top = peak
        safe = tl.where(total > 0, total, 1.0)
        acc = acc / safe[:, None]
        at = s * rows + m
        mask = real[:, None] & (col < RANK)[None, :]
        if used == 1:
            tl.store(out + at[:, None] * RANK + col[None, :], acc.to(out.dtype.element_ty), mask=mask)
        else:
            at = at * shares + tl.program_id(2)
            tl.store(partial + at[:, None] * RANK + col[None, :], acc, mask=mask)
            tl.store(lse + at, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["shares"])  # one kernel for all numbers of shares
def _merge_kernel(
    partial, lse, out, context_len, rows, shares, QUERIES: tl.constexpr, RANK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MIN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    _, used = _share(context_len, s, shares, QUERIES, MIN)
    if used > 1:
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tl.arange(0, BLOCK_L)
        at = (s * rows + m) * shares
        mask = (m < rows)[:, None] & (col < RANK)[None, :]
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
        for i in range(used):
            each = tl.load(lse + at + i, mask=m < rows, other=float("-inf"))
            tile = tl.load(partial + (at + i)[:, None] * RANK + col[None, :], mask=mask, other=0.0)
            peak = tl.maximum(top, each)
            base = tl.where(peak == float("-inf"), 0.0, peak)
            decay, part = tl.exp2(top - base), tl.exp2(each - base)
            total = total * decay + part
            acc = acc * decay[:, None] + tile * part[:, None]
            top = peak
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (s * rows + m)[:, None] * RANK + col[None, :], acc.to(out.dtype.element_ty), mask=mask)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def shares_for(programs: int, keys: int, slots: int) -> int:
    """Shares of a context of up to `keys`, by the waves that they take on `slots` and the tiles in each.

    A share costs its keys, and about 96 keys' time for its start and its part in the merge.
    """
    best, least = 1, float("inf")
    for shares in range(1, max(1, min(MOST_SHARES, keys // MIN_SHARE)) + 1):
        each = triton.cdiv(triton.cdiv(keys, shares), MIN_SHARE) * MIN_SHARE
        cost = triton.cdiv(programs * triton.cdiv(keys, each), slots) * (each + 96) + (
            64 if shares > 1 else 0
        )
        if cost < least:
            best, least = shares, cost
    return best


def mla_decode(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float,
    queries: int = 1, config: Config | None = None, shares: int | None = None,
) -> Tensor:  # fmt: skip
    """z [S·Q, H, L]; see `hadal.ops.paged.mla_decode_reference`.

    With `queries` Q > 1 rows lie in groups of Q that see the same sequence: the block table of a group's
    first row is read for all of them, and each row sees its own context length of those pages. A cache of
    uint8 is one in FP8 (hadal/ops/latent_fp8.py).
    """
    total, heads, entry = q_SHC.shape
    if total % queries:
        raise ValueError(f"{total} rows are no multiple of {queries} queries a sequence")
    fp8 = cache_PBC.dtype == torch.uint8
    rows, S, page = queries * heads, total // queries, cache_PBC.shape[1]
    config = config or config_for(rows, fp8)
    blocks = triton.cdiv(rows, config.rows)
    slots = _multiprocessors(q_SHC.device) * config.slots
    shares = shares or shares_for(S * blocks, block_table_SP.shape[1] * page, slots)
    out = torch.empty((total, heads, rank), dtype=q_SHC.dtype, device=q_SHC.device)
    partial, lse = out, out
    if shares > 1:
        partial = torch.empty((total * heads, shares, rank), dtype=torch.float32, device=q_SHC.device)
        lse = torch.empty((total * heads, shares), dtype=torch.float32, device=q_SHC.device)
    kernel, extra = (_narrow_fp8_kernel if fp8 else _narrow_kernel), {}
    if config.rows > 32:
        kernel, extra = _tall_kernel, {"FP8": fp8}
    kernel[(blocks, S, shares)](  # blocks of a sequence run side by side and meet its pages in the L2 cache
        q_SHC.contiguous(), cache_PBC, block_table_SP, context_len_S, out, partial, lse, rows, heads,
        block_table_SP.stride(0), scale * log2(e), shares, QUERIES=queries, RANK=rank,
        ROPE=entry - rank, BLOCK_L=triton.next_power_of_2(rank),
        BLOCK_R=max(16, triton.next_power_of_2(entry - rank)), PAGE=page, **extra,
        MIN=MIN_SHARE, BLOCK_M=config.rows, BLOCK_N=config.keys, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    if shares > 1:
        _merge_kernel[(S, triton.cdiv(rows, 4))](
            partial, lse, out, context_len_S, rows, shares, QUERIES=queries, RANK=rank,
            BLOCK_L=triton.next_power_of_2(rank), MIN=MIN_SHARE, BLOCK_M=4, num_warps=4,
        )  # fmt: skip
    return out
