"""What surrounds MLA decode attention: cache entries, absorbed queries before it, values of heads behind it.

    `write_latent`   norm of the latent and rotation of the rope key, written to the cache; a program a token
    `queries`        the same for a step of few tokens, together with W_UK·q_nope and the rotated q_rope
    `values`         the merge of attention's shares together with W_UV·z

The latter two are for few rows: they stream the weights once for every 16 tokens, or for every few, and keep
them in registers from before their inputs are there (`pdl`). Caches are BF16 or FP32, or bytes as in
hadal/ops/latent_fp8.py. References: `hadal.ops.mla`, `hadal.ops.latent_fp8`, `hadal.ops.absorbed`.
Legend: T tokens, S sequences, H heads, n nope, L latent, R rope, C = L + R, v value width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.fp8 import GROUP, _quantise
from hadal.ops.triton.latent import Parts, _share, merged
from hadal.ops.triton.sizes import ceil_div, power_of_2

TOKENS = 16  # of a program of `queries`: the least side of a tensor core's tile
LATENTS = 64  # of its part of W_UK
VALUES = 32  # of a program of `values`
VALUE_PROGRAMS = 1056  # eight for each of an H100's 132 multiprocessors; with more, they take several tokens


@triton.jit
def _rotated(source, rotation, real, half, BLOCK_R: tl.constexpr):
    """Rotated pairs (2i, 2i + 1) of `source` [.., pairs] by a token's cosines and sines at `rotation`."""
    pair = tl.arange(0, BLOCK_R)[None, :]
    cos = tl.load(rotation + pair, mask=real, other=0.0)
    sin = tl.load(rotation + half + pair, mask=real, other=0.0)
    a = tl.load(source + 2 * pair, mask=real, other=0.0).to(tl.float32)
    b = tl.load(source + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _store_entry(
    token, kv, weight, rotation, cache, slot, entry, half, kv_stride, eps,
    RANK: tl.constexpr, FP8: tl.constexpr, WANTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The entry of a token into the cache, and where WANTED, unquantised into `entry`."""
    dtype: tl.constexpr = kv.dtype.element_ty
    width = RANK + 2 * half
    if FP8:
        GROUPS: tl.constexpr = RANK // GROUP
        g = tl.arange(0, BLOCK_L // GROUP)
        col = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        row = cache + tl.load(slot + token) * (RANK + 4 * GROUPS + 4 * half)
    else:
        col = tl.arange(0, BLOCK_L)[None, :]
        row = cache + tl.load(slot + token) * width
    inside = col < RANK
    latent = tl.load(kv + token * kv_stride + col, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(latent * latent, 1), 0) / RANK + eps)
    normed = (latent * factor).to(dtype) * tl.load(weight + col, mask=inside, other=0.0)
    real = tl.arange(0, BLOCK_R)[None, :] < half
    first, second = _rotated(kv + token * kv_stride + RANK, rotation + token * 2 * half, real, half, BLOCK_R)
    first, second = first.to(dtype), second.to(dtype)
    at = 2 * tl.arange(0, BLOCK_R)[None, :]
    if FP8:
        code, scale = _quantise(normed.to(tl.float32))
        tl.store(row.to(tl.pointer_type(tl.float8e4nv)) + col, code, mask=inside)
        tl.store((row + RANK).to(tl.pointer_type(tl.float32)) + g, scale, mask=g < GROUPS)
        rope = (row + RANK + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16))
        tl.store(rope + at, first.to(tl.bfloat16), mask=real)
        tl.store(rope + at + 1, second.to(tl.bfloat16), mask=real)
    else:
        tl.store(row + col, normed, mask=inside)
        tl.store(row + RANK + at, first, mask=real)
        tl.store(row + RANK + at + 1, second, mask=real)
    if WANTED:
        to = entry + token * width
        tl.store(to + col, normed, mask=inside)
        tl.store(to + RANK + at, first, mask=real)
        tl.store(to + RANK + at + 1, second, mask=real)


@triton.jit
def _entry_kernel(
    kv, weight, rotation, cache, slot, entry, half, kv_stride, eps,
    RANK: tl.constexpr, FP8: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    pdl.wait(PDL)
    _store_entry(
        token, kv, weight, rotation, cache, slot, entry, half, kv_stride, eps,
        RANK, FP8, True, BLOCK_L, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _queries_kernel(
    q, kv, weight, rotation, up, cache, slot, out, tokens, heads, half, q_stride, q_head, kv_stride,
    up_stride, eps, entries,
    NOPE: tl.constexpr, RANK: tl.constexpr, FP8: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: `entries` programs for the cache, then heads × parts of the latent; times blocks of tokens."""
    pdl.begin(PDL)
    if tl.program_id(0) < entries:
        token = (tl.program_id(1) * BLOCK_T + tl.program_id(0)).to(tl.int64)
        pdl.wait(PDL)
        if token < tokens:
            _store_entry(
                token, kv, weight, rotation, cache, slot, out, half, kv_stride, eps,
                RANK, FP8, False, BLOCK_E, BLOCK_R,
            )  # fmt: skip
    else:
        PARTS: tl.constexpr = (RANK + BLOCK_L - 1) // BLOCK_L
        head = (tl.program_id(0) - entries) // PARTS
        part = (tl.program_id(0) - entries) % PARTS
        col = part * BLOCK_L + tl.arange(0, BLOCK_L)
        d = tl.arange(0, BLOCK_D)
        at = up + head.to(tl.int64) * up_stride + d[:, None] * RANK + col[None, :]
        w_DL = tl.load(at, mask=(d < NOPE)[:, None] & (col < RANK)[None, :], other=0.0)
        t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        real = (t < tokens)[:, None]
        pdl.wait(PDL)
        q_row = q + t[:, None] * q_stride + head * q_head
        q_TD = tl.load(q_row + d[None, :], mask=real & (d < NOPE)[None, :], other=0.0)
        latent = tl.dot(q_TD, w_DL, input_precision="ieee").to(out.dtype.element_ty)
        to = out + (t[:, None] * heads + head) * (RANK + 2 * half)
        tl.store(to + col[None, :], latent, mask=real & (col < RANK)[None, :])
        if part == 0:
            pair = tl.arange(0, BLOCK_R)[None, :]
            mask = real & (pair < half)
            first, second = _rotated(q_row + NOPE, rotation + t[:, None] * 2 * half, mask, half, BLOCK_R)
            tl.store(to + RANK + 2 * pair, first.to(out.dtype.element_ty), mask=mask)
            tl.store(to + RANK + 2 * pair + 1, second.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["shares"])
def _values_kernel(
    z, partial, lse, up, out, context_len, tokens, heads, each, up_stride, shares,
    QUERIES: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr, MIN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: parts of the values, heads, and groups of `each` tokens."""
    pdl.begin(PDL)
    head = tl.program_id(1)
    col = tl.arange(0, BLOCK_L)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = up + head.to(tl.int64) * up_stride + v[:, None] * RANK + col[None, :]
    w_VL = tl.load(at, mask=(v < WIDTH)[:, None] & (col < RANK)[None, :], other=0.0)
    first = tl.program_id(2).to(tl.int64) * each
    pdl.wait(PDL)
    for i in range(tl.minimum(each, tokens - first)):
        token = first + i
        row = token * heads + head
        _, used = _share(context_len, token // QUERIES, shares, QUERIES, MIN)
        z_L = merged(z, partial, lse, row, used, shares, SHARES, RANK, BLOCK_L)
        z_L = z_L.to(out.dtype.element_ty).to(tl.float32)  # as attention alone would have left it
        y_V = tl.sum(w_VL.to(tl.float32) * z_L[None, :], 1)
        tl.store(out + row * WIDTH + v, y_V.to(out.dtype.element_ty), mask=v < WIDTH)


def write_latent(
    kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, cache: Tensor, slot_T: Tensor
) -> Tensor:
    """Entries [T, C], also stored at `slot_T` of a cache [pages, page, C], or uint8 [pages, page, bytes]."""
    kv_TC = kv_TC if kv_TC.stride(1) == 1 else kv_TC.contiguous()
    (tokens, width), rank = kv_TC.shape, norm_L.shape[0]
    entry = torch.empty((tokens, width), dtype=kv_TC.dtype, device=kv_TC.device)
    half = (width - rank) // 2
    _entry_kernel[(tokens,)](
        kv_TC, norm_L, rotation_T2r.contiguous(), cache, slot_T, entry, half, kv_TC.stride(0), eps,
        RANK=rank, FP8=cache.dtype == torch.uint8, BLOCK_L=power_of_2(rank),
        BLOCK_R=power_of_2(half), num_warps=2, **pdl.options(kv_TC),
    )  # fmt: skip
    return entry


def queries(
    q_THw: Tensor, kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, up_HnL: Tensor,
    cache: Tensor, slot_T: Tensor,
) -> Tensor:  # fmt: skip
    """Absorbed queries [T, H, C] of q [T, H, n + R], and the tokens' entries stored in the cache.

    q and kv may be strided views with contiguous last dimensions; so may W_UK be by head, [H, n, L].
    """
    q_THw = q_THw if q_THw.stride(2) == 1 else q_THw.contiguous()
    kv_TC = kv_TC if kv_TC.stride(1) == 1 else kv_TC.contiguous()
    (tokens, heads, _), (_, nope, rank) = q_THw.shape, up_HnL.shape
    half = (kv_TC.shape[1] - rank) // 2
    entries = min(tokens, TOKENS)
    out = torch.empty((tokens, heads, kv_TC.shape[1]), dtype=q_THw.dtype, device=q_THw.device)
    _queries_kernel[(entries + heads * ceil_div(rank, LATENTS), ceil_div(tokens, TOKENS))](
        q_THw, kv_TC, norm_L, rotation_T2r.contiguous(), up_HnL, cache, slot_T, out, tokens, heads, half,
        q_THw.stride(0), q_THw.stride(1), kv_TC.stride(0), up_HnL.stride(0), eps, entries,
        NOPE=nope, RANK=rank, FP8=cache.dtype == torch.uint8, BLOCK_T=TOKENS,
        BLOCK_D=max(16, power_of_2(nope)), BLOCK_L=LATENTS, BLOCK_E=power_of_2(rank),
        BLOCK_R=power_of_2(half), num_warps=4, **pdl.options(q_THw),
    )  # fmt: skip
    return out


def values(parts: Parts, up_HvL: Tensor) -> Tensor:
    """Head outputs W_UV·z, [T, H·v], of attention before its merge; W_UV [H, v, L] may be strided by head."""
    (tokens, heads, rank), width = parts.out_SHL.shape, up_HvL.shape[1]
    out = torch.empty((tokens, heads * width), dtype=parts.out_SHL.dtype, device=up_HvL.device)
    blocks = ceil_div(width, VALUES)
    each = ceil_div(tokens, max(1, VALUE_PROGRAMS // (blocks * heads)))
    _values_kernel[(blocks, heads, ceil_div(tokens, each))](
        parts.out_SHL, parts.partial, parts.lse, up_HvL, out, parts.context_len_S, tokens, heads, each,
        up_HvL.stride(0), parts.shares, QUERIES=parts.queries, RANK=rank, WIDTH=width,
        SHARES=power_of_2(parts.shares), MIN=parts.least, BLOCK_L=power_of_2(rank),
        BLOCK_V=VALUES, num_warps=8, **pdl.options(out),
    )  # fmt: skip
    return out
