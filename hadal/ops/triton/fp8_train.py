"""Quantising for FP8 training: each kernel reads a tensor once and leaves all the codes that are wanted.

The definitions are in hadal/ops/fp8_tiles.py, whose functions these stand for under the same names. Tiles of
128 × 128 are held in registers, so that codes along channels and along tokens (transposed, as the tensor
cores want both sides of a product) come from one reading. SwiGLU is joined with quantising in both
directions; rows are gathered by expert as codes. Nothing waits for the device: kernels themselves read how
many tiles of sorted rows are in use.

A tile's rows are taken in an order (`_order`) that gives each thread rows that lie together, and eight of
their channels: codes of rows leave as eight bytes without another thread's help, and transposed ones pass
through shared memory a word at a time, not a byte.
Legend: as there.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops import fp8_tiles
from hadal.ops.fp8_tiles import Codes, Rows, Weight
from hadal.ops.triton.fp8_train_products import matmul as matmul
from hadal.ops.triton.fp8_train_products import outer as outer
from hadal.ops.triton.fp8_train_products import outer_into as outer_into
from hadal.ops.triton.pdl import on_hopper
from hadal.ops.triton.sizes import ceil_div, power_of_2

GROUP = tl.constexpr(128)
AMAX_MIN = tl.constexpr(fp8_tiles.AMAX_MIN)
COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")  # the interpreter knows no PTX
TILE = fp8_tiles.TILE
E4M3 = torch.float8_e4m3fn


# --- parts --------------------------------------------------------------------------------------------------
@triton.jit
def _scale(amax, POWER: tl.constexpr):
    """amax / 448 with a floor, as a power of two rounded up.

    448 is 1.75 · 2^8: the power is amax's own, over 2^8, and the next where amax's mantissa exceeds 1.75.
    """
    amax = tl.maximum(amax, AMAX_MIN)
    if POWER:
        bits = (amax.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000
        s = (bits - 0x4000000).to(tl.float32, bitcast=True)
        return tl.where(amax < float("inf"), s, amax)
    return tl.div_rn(amax, 448.0)


@triton.jit
def _e4m3(x, s, POWER: tl.constexpr):
    """Codes of x / s, at most 448; s has x's shape but for 1 along the tile. NaN stays NaN."""
    if POWER:  # the reciprocal of a power of two is exact
        scaled = x * (0x7F000000 - s.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        scaled = tl.div_rn(x, tl.broadcast_to(s, x.shape))
    return scaled.to(tl.float8e4nv)


@triton.jit
def _order(BLOCK_R: tl.constexpr, STEP: tl.constexpr):
    """The rows of a tile in the order in which they are held: STEP at a time are loaded, two a warp, and
    those that meet in a thread, STEP apart in this order, lie together."""
    i = tl.arange(0, BLOCK_R)
    return i % STEP * (BLOCK_R // STEP) + i // STEP


@triton.jit
def _eights():
    """Places along a tile, to be read and written eight at a time: so all kinds agree on who holds what."""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, GROUP), 8), 8)


@triton.jit
def _tile(x, r, stride, rows, channels):
    """The tile whose corner x is, its rows in the order r; zeros past the rows and channels that are left.

    Corners are 64-bit, places inside a tile 32-bit, to spare registers: matrices of up to 16M rows.
    """
    k = _eights()
    inside = (r < rows)[:, None] & (k < channels)[None, :]
    return tl.load(x + (r[:, None] * stride + k[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_rows(x_RC, r, q, scale, stride, rows, channels, POWER: tl.constexpr):
    """A tile's codes and its rows' scales, to where its corner lies."""
    k = _eights()
    s = _scale(tl.max(tl.abs(x_RC), 1), POWER)
    inside = (r < rows)[:, None] & (k < channels)[None, :]
    tl.store(q + (r[:, None] * stride + k[None, :]), _e4m3(x_RC, s[:, None], POWER), mask=inside)
    tl.store(scale + r, s, mask=r < rows)


@triton.jit
def _store_columns(x_RC, q, scale, padded, channels, STEP: tl.constexpr, POWER: tl.constexpr):
    """A tile's transposed codes and its columns' scales, to where its corner lies; all of its rows."""
    r = _eights()
    k = tl.arange(0, GROUP)
    s = _scale(tl.max(tl.abs(x_RC), 0), POWER)
    code = tl.reshape(tl.trans(_e4m3(x_RC, s[None, :], POWER)), [GROUP, GROUP // STEP, STEP])
    code = tl.reshape(tl.permute(code, (0, 2, 1)), [GROUP, GROUP])  # rows in order again
    tl.store(q + (k[:, None] * padded + r[None, :]), code, mask=(k < channels)[:, None])
    tl.store(scale + k, s, mask=k < channels)


# --- activations --------------------------------------------------------------------------------------------
@triton.jit
def _rows_kernel(x, q, scale, K, R, x_stride, POWER: tl.constexpr, BLOCK_R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    k = tl.program_id(1).to(tl.int64) * GROUP
    r = tl.arange(0, BLOCK_R)
    value = _tile(x + row * x_stride + k, r, x_stride, R - row, K - k).to(tl.float32)
    _store_rows(value, r, q + row * K + k, scale + k // GROUP * R + row, K, R - row, K - k, POWER)


def quantise(x_RK: Tensor, power: bool) -> Codes:
    """In tiles of 1 × 128."""
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    R, K = x_RK.shape
    q = torch.empty((R, K), dtype=E4M3, device=x_RK.device)
    scale = torch.empty((ceil_div(K, TILE), R), dtype=torch.float32, device=x_RK.device)
    if R:
        _rows_kernel[(ceil_div(R, 32), ceil_div(K, TILE))](
            x_RK, q, scale, K, R, x_RK.stride(0), POWER=power, BLOCK_R=32, num_warps=4
        )
    return Codes(q, scale, power)


@triton.jit
def _both_kernel(
    x, used, q, scale, q_columns, scale_columns, K, R, padded, x_stride,
    POWER: tl.constexpr, USED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    real = tile >= 0
    if USED:
        real = tile < tl.load(used)
    if real:
        row = tile.to(tl.int64) * GROUP
        k = tl.program_id(1).to(tl.int64) * GROUP
        r = _order(GROUP, STEP)
        value = _tile(x + row * x_stride + k, r, x_stride, R - row, K - k).to(tl.float32)
        at = scale + k // GROUP * R + row
        _store_rows(value, r, q + row * K + k, at, K, R - row, K - k, POWER)
        at = scale_columns + tile.to(tl.int64) * K + k
        _store_columns(value, q_columns + k * padded + row, at, padded, K - k, STEP, POWER)


def quantise_both(x_RK: Tensor, power: bool, rows: Rows | None = None) -> tuple[Codes, Codes]:
    """In tiles of 1 × 128, and the transpose in tiles of 1 × 128 rows; one reading."""
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    (R, K), padded = x_RK.shape, ceil_div(x_RK.shape[0], TILE) * TILE
    along, across = _empty(R, K, power, x_RK.device), _empty(K, padded, power, x_RK.device)
    if R:
        _both_kernel[(padded // TILE, ceil_div(K, TILE))](
            x_RK, along.scale if rows is None else rows.used, *along[:2], *across[:2], K, R, padded,
            x_RK.stride(0), POWER=power, USED=rows is not None, STEP=16, num_warps=8,
        )  # fmt: skip
    return along, across


def _empty(R: int, K: int, power: bool, device: torch.device) -> Codes:
    q = torch.empty((R, K), dtype=E4M3, device=device)
    return Codes(q, torch.empty((ceil_div(K, TILE), R), dtype=torch.float32, device=device), power)


@triton.jit
def _columns_kernel(
    q, scale, token_R, used, q_columns, scale_columns, K, R, T, padded, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    real = tile >= 0
    if ROWS:
        real = tile < tl.load(used)
    if real:
        row = tile.to(tl.int64) * GROUP + _order(GROUP, STEP)
        g = tl.program_id(1).to(tl.int64)
        k = _eights()
        source = row
        if ROWS:
            source = tl.load(token_R + row).to(tl.int64)
        own = (source >= 0) & (source < T)
        inside = own[:, None] & (k < K - g * GROUP)[None, :]
        code = tl.load(q + g * GROUP + (source * K)[:, None] + k[None, :], mask=inside, other=0.0)
        each = tl.load(scale + g * T + source, mask=own, other=0.0)
        value = code.to(tl.float32) * each[:, None]
        at = scale_columns + tile.to(tl.int64) * K + g * GROUP
        corner = q_columns + g * GROUP * padded + tile.to(tl.int64) * GROUP
        _store_columns(value, corner, at, padded, K - g * GROUP, STEP, True)


def columns(codes: Codes, rows: Rows | None) -> Codes:
    """The transpose of codes, gathered by row where `rows` is given, cut anew along rows."""
    T, K = codes.q.shape
    R = T if rows is None else rows.token_R.shape[0]
    padded = ceil_div(R, TILE) * TILE
    out = _empty(K, padded, True, codes.q.device)
    if R:
        token_R, used = (codes.scale, codes.scale) if rows is None else (rows.token_R, rows.used)
        _columns_kernel[(padded // TILE, ceil_div(K, TILE))](
            codes.q, codes.scale, token_R, used, *out[:2], K, R, T, padded, ROWS=rows is not None, STEP=16,
            num_warps=8,
        )  # fmt: skip
    return out


# --- rows by expert -----------------------------------------------------------------------------------------
def sort_rows(expert_TK: Tensor, n_experts: int) -> Rows:
    from hadal.ops.triton.route import places

    rank, end_E = places(expert_TK, n_experts)
    return fp8_tiles.rows_of(rank, end_E.long(), expert_TK.flatten(), expert_TK.shape[1])


@triton.jit
def _gather_kernel(
    word, scale, token_R, used, out, out_scale, words, T, R, groups,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_R
    if first < tl.load(used) * GROUP:
        row = first.to(tl.int64) + tl.arange(0, BLOCK_R)
        token = tl.load(token_R + row).to(tl.int64)
        real = (token >= 0)[:, None]
        w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (w < words)[None, :]
        value = tl.load(word + token[:, None] * words + w[None, :], mask=inside & real, other=0)
        tl.store(out + row[:, None] * words + w[None, :], value, mask=inside)
        if tl.program_id(1) == 0:
            g = tl.arange(0, BLOCK_G).to(tl.int64)
            there = (g < groups)[None, :]
            each = tl.load(scale + g[None, :] * T + token[:, None], mask=there & real, other=1.0)
            tl.store(out_scale + g[None, :] * R + row[:, None], each, mask=there)


def gather(codes: Codes, rows: Rows) -> Codes:
    """The codes of each row's token; zero, with scale 1, in gaps. Tiles not in use are left unwritten."""
    (T, K), R = codes.q.shape, rows.token_R.shape[0]
    out = _empty(R, K, codes.power, codes.q.device)
    word = torch.int64 if K % 8 == 0 else torch.uint8
    source, target = codes.q.view(word), out.q.view(word)
    words, groups = source.shape[1], codes.scale.shape[0]
    block = min(128, power_of_2(words))
    _gather_kernel[(R // 32, ceil_div(words, block))](
        source, codes.scale, rows.token_R, rows.used, target, out.scale, words, T, R, groups,
        BLOCK_R=32, BLOCK=block, BLOCK_G=power_of_2(groups), num_warps=4,
    )  # fmt: skip
    return out


def sum_rows(
    row_RD: Tensor, rows: Rows, shared_TD: Tensor | None = None, residual_TD: Tensor | None = None
) -> Tensor:
    """[T, D]: the sum of each token's rows, and of what is added to them, in FP32."""
    from hadal.ops.triton.experts import combine

    one_TK = torch.ones(rows.place_TK.shape, dtype=torch.float32, device=row_RD.device)
    return combine(row_RD, rows.place_TK, one_TK, shared_TD, residual_TD)


# --- SwiGLU -------------------------------------------------------------------------------------------------
@triton.jit
def _swiglu_kernel(
    x, weight, used, q, scale, kept, kept_scale, width, R, POWER: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_R
    real = first >= 0
    if ROWS:
        real = first < tl.load(used) * GROUP
    if real:
        row = first.to(tl.int64)
        groups = tl.num_programs(1).to(tl.int64)
        g = tl.program_id(1).to(tl.int64)
        k = g * GROUP
        corner = row * (2 * width) + k
        r = tl.arange(0, BLOCK_R)
        gate = _tile(x + corner, r, 2 * width, R - row, width - k).to(tl.float32)
        up = _tile(x + corner + width, r, 2 * width, R - row, width - k).to(tl.float32)
        _store_rows(gate, r, kept + corner, kept_scale + g * R + row, 2 * width, R - row, width - k, True)
        at = kept_scale + (g + groups) * R + row
        _store_rows(up, r, kept + corner + width, at, 2 * width, R - row, width - k, True)
        hidden = gate * tl.sigmoid(gate) * up
        if ROWS:
            hidden = hidden * tl.load(weight + row + r)[:, None]
        hidden = hidden.to(x.dtype.element_ty).to(tl.float32)
        _store_rows(hidden, r, q + row * width + k, scale + g * R + row, width, R - row, width - k, POWER)


def swiglu(
    gate_up_R2I: Tensor, weight_R: Tensor | None, power: bool, rows: Rows | None
) -> tuple[Codes, Codes]:
    """(codes of w · silu(gate) ⊙ up, codes of gate and up)."""
    R, width = gate_up_R2I.shape[0], gate_up_R2I.shape[1] // 2
    device, groups = gate_up_R2I.device, ceil_div(width, TILE)
    hidden = _empty(R, width, power, device)
    scale = torch.empty((2 * groups, R), dtype=torch.float32, device=device)
    kept = Codes(torch.empty((R, 2 * width), dtype=E4M3, device=device), scale, True)
    if R:
        _swiglu_kernel[(ceil_div(R, 32), groups)](
            gate_up_R2I, scale if weight_R is None else weight_R, scale if rows is None else rows.used,
            *hidden[:2], *kept[:2], width, R, POWER=power, ROWS=rows is not None, BLOCK_R=32, num_warps=4,
        )  # fmt: skip
    return hidden, kept


@triton.jit
def _kept(kept, scale, r, stride, rows, channels):
    """A tile of gate or up, dequantised."""
    each = tl.load(scale + r, mask=r < rows, other=0.0)
    return _tile(kept, r, stride, rows, channels).to(tl.float32) * each[:, None]


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) to 2^-21 of itself: the square of a root takes two instructions, a quotient eight."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _narrow(x, kind: tl.constexpr):
    """x in the dtype `kind`. To BF16 two at a time: one by one they would go through the slow unit that
    exponentials need."""
    if kind == tl.bfloat16 and COMPILED:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return x.to(kind)


@triton.jit
def _leave(
    x, r, d, d_scale, d_columns, d_columns_scale, stride, padded, rows, channels,
    STEP: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient: as codes in both directions, or as it is."""
    if WHOLE:
        _store_rows(x.to(tl.float32), r, d, d_scale, stride, rows, channels, POWER)
        _store_columns(x.to(tl.float32), d_columns, d_columns_scale, padded, channels, STEP, POWER)
    else:
        k = _eights()
        inside = (r < rows)[:, None] & (k < channels)[None, :]
        tl.store(d + (r[:, None] * stride + k[None, :]), x, mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    kept, kept_scale, dh, weight, used, d, d_scale, d_columns, d_columns_scale, h_columns, h_columns_scale,
    dweight, width, R, padded, POWER: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """All three results are made from one reading and held in the model's dtype until they are cut."""
    tile = tl.program_id(0).to(tl.int64)
    real = tile >= 0
    if ROWS:
        real = tile < tl.load(used)
    if real:
        g = tl.program_id(1).to(tl.int64)
        groups = tl.num_programs(1).to(tl.int64)
        row, k, stride = tile * GROUP, g * GROUP, 2 * width
        rows, channels = R - row, width - k
        kind = dh.dtype.element_ty
        kept += row * stride + k
        at = kept_scale + g * R + row
        r = _order(GROUP, STEP)
        gate = _kept(kept, at, r, stride, rows, channels)
        up = _kept(kept + width, at + groups * R, r, stride, rows, channels)
        grad = _tile(dh + row * width + k, r, width, rows, channels).to(tl.float32)
        share = _sigmoid(gate)
        silu = gate * share
        hidden = silu * up
        if ROWS:
            w = tl.load(weight + row + r)[:, None]
            tl.store(dweight + g * R + row + r, tl.sum(grad * hidden, 1))
            hidden *= w
            grad *= w
        hidden = _narrow(hidden, kind)
        dup = _narrow(grad * silu, kind)
        dgate = _narrow(grad * (share * (1.0 + gate * (1.0 - share))) * up, kind)
        at = h_columns_scale + tile * width + k
        corner = h_columns + k * padded + row
        _store_columns(hidden.to(tl.float32), corner, at, padded, channels, STEP, POWER)
        d += row * stride + k
        d_scale += g * R + row
        d_columns += k * padded + row
        d_columns_scale += tile * stride + k
        _leave(
            dgate, r, d, d_scale, d_columns, d_columns_scale, stride, padded, rows, channels, STEP, POWER,
            WHOLE,
        )  # fmt: skip
        _leave(
            dup, r, d + width, d_scale + groups * R, d_columns + width.to(tl.int64) * padded,
            d_columns_scale + width, stride, padded, rows, channels, STEP, POWER, WHOLE,
        )  # fmt: skip


def _in_gluon(dh_RI: Tensor) -> bool:
    if not on_hopper(dh_RI.device):
        return False
    from hadal.ops.triton import fp8_swiglu_gluon

    return fp8_swiglu_gluon.takes(dh_RI)


def swiglu_backward(
    kept: Codes, dh_RI: Tensor, weight_R: Tensor | None, power: bool, rows: Rows | None
) -> tuple[Codes, Codes, Codes, Tensor | None]:
    """Codes of the gradient of [gate, up], of its transpose, of the hidden values' transpose; that of w.

    Where the width is no multiple of 128, a tile of [gate, up] can hold some of both: then the gradient is
    written in the model's dtype, and quantised by another kernel.
    """
    R, width = dh_RI.shape
    device, padded, groups = dh_RI.device, ceil_div(R, TILE) * TILE, ceil_div(width, TILE)
    whole = width % TILE == 0
    hidden = _empty(width, padded, power, device)
    dweight = torch.empty((groups if rows is not None else 0, R), dtype=torch.float32, device=device)
    if whole:
        d, across = _empty(R, 2 * width, power, device), _empty(2 * width, padded, power, device)
        out: tuple[Tensor, ...] = (*d[:2], *across[:2])
    else:
        plain = torch.empty((R, 2 * width), dtype=dh_RI.dtype, device=device)
        out = (plain,) * 4
    if whole and _in_gluon(dh_RI):
        from hadal.ops.triton import fp8_swiglu_gluon

        fp8_swiglu_gluon.swiglu_backward(kept, dh_RI, weight_R, rows, d, across, hidden, dweight)
    elif R:
        _swiglu_backward_kernel[(padded // TILE, groups)](
            *kept[:2], dh_RI, dweight if weight_R is None else weight_R,
            dweight if rows is None else rows.used, *out, *hidden[:2], dweight, width, R, padded,
            POWER=power, ROWS=rows is not None, WHOLE=whole, STEP=32, num_warps=16,
        )  # fmt: skip
    if not whole:
        d, across = quantise_both(plain, power, rows)
    return d, across, hidden, None if rows is None else dweight.sum(0)


# --- weights ------------------------------------------------------------------------------------------------
@triton.jit
def _weight_kernel(w, q, scale, N, K, groups, POWER: tl.constexpr):
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    k = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = (e * N + n)[:, None] * K + k[None, :]
    value = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(value), 1), 0)
    s = tl.div_rn(amax, 448.0)
    s = tl.maximum(s, 1.1754943508222875e-38)
    if POWER:
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    s = tl.where(amax == 0.0, 1.0, s)
    code = _e4m3(value, tl.full([1, 1], 1.0, tl.float32) * s, POWER)
    if q.dtype.element_ty != tl.float8e4nv:
        code = (code.to(tl.float32) * s).to(q.dtype.element_ty)
    tl.store(q + at, code, mask=inside)
    tl.store(scale + (e * tl.num_programs(0) + tl.program_id(0)) * groups + tl.program_id(1), s)


def quantise_weight(w: Tensor, power: bool, dtype: torch.dtype = E4M3) -> Weight:
    """In blocks of 128 × 128; in another dtype than E4M3 what its codes mean."""
    w = w.contiguous()
    *lead, N, K = w.shape
    blocks = ceil_div(N, TILE), ceil_div(K, TILE)
    q = torch.empty(w.shape, dtype=dtype, device=w.device)
    scale = torch.empty((*lead, *blocks), dtype=torch.float32, device=w.device)
    stack = lead[0] if lead else 1
    _weight_kernel[(*blocks, stack)](w, q, scale, N, K, blocks[1], POWER=power, num_warps=8)
    return Weight(q, scale, power)


@triton.jit
def _transpose_kernel(q, out, N, K):
    e = tl.program_id(2).to(tl.int64) * N * K
    n = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    k = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = (n < N)[:, None] & (k < K)[None, :]
    value = tl.load(q + e + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0)
    tl.store(out + e + k.to(tl.int64)[:, None] * N + n[None, :], tl.trans(value), mask=tl.trans(inside))


def transposed(weight: Weight) -> Weight:
    """The same blocks for the product with the matrix's transpose: codes [.., K, N]."""
    *lead, N, K = weight.q.shape
    out = torch.empty((*lead, K, N), dtype=E4M3, device=weight.q.device)
    grid = ceil_div(N, TILE), ceil_div(K, TILE), lead[0] if lead else 1
    _transpose_kernel[grid](weight.q.view(torch.uint8), out.view(torch.uint8), N, K, num_warps=8)
    return Weight(out, weight.scale.transpose(-1, -2).contiguous(), weight.power)
