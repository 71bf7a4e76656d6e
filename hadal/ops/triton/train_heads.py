"""From projections to what attention takes, and its gradients back, each in one pass. Reference:
`hadal.ops.heads`.

    turned      the last R columns of every head, rotated           back: rotated by the opposite angle
    keys        k_h = [nope_h; rope], v_h, of [nope_h; v_h] and     back: dropes of all heads add up
                one rope key for all heads; zeros behind v_h
    narrow      the first columns of every head                     back: zeros behind them
    stacked     q, k, v of stacked heads, q and k rotated           back: into one tensor again

A program takes one token and a block of its heads. Outputs are new and contiguous.
Legend: T tokens, H heads, G key/value heads, C head width, R rope, r = R/2, w = nope + value width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton.sizes import ceil_div, power_of_2


def _flat_heads(x: Tensor) -> Tensor:
    """Heads side by side; rows may be strided."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


# --- MLA: queries, and any last columns ---------------------------------------------------------------------
@triton.jit
def _turn_kernel(
    x, rotation, out, heads, x_stride, out_stride, NOPE: tl.constexpr, ROPE: tl.constexpr,
    BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    half: tl.constexpr = ROPE // 2
    pair = tl.arange(0, BLOCK_R // 2)
    cos = tl.load(rotation + token * ROPE + pair, mask=pair < half, other=0.0)[None, :]
    sin = tl.load(rotation + token * ROPE + half + pair, mask=pair < half, other=0.0)[None, :]
    if BACK:
        sin = -sin
    at = x + token * x_stride + head * (NOPE + ROPE)
    to = out + token * out_stride + head * (NOPE + ROPE)
    if NOPE > 0:
        n = tl.arange(0, BLOCK_N)[None, :]
        inside = (head < heads) & (n < NOPE)
        tl.store(to + n, tl.load(at + n, mask=inside, other=0.0), mask=inside)
    r = tl.arange(0, BLOCK_R)[None, :]
    inside = (head < heads) & (r < ROPE)
    both = tl.load(at + NOPE + r, mask=inside, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(both, [BLOCK_H, BLOCK_R // 2, 2]))
    turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_H, BLOCK_R])
    tl.store(to + NOPE + r, turned.to(out.dtype.element_ty), mask=inside)


def turn(x_THC: Tensor, rotation_T2r: Tensor, out_THC: Tensor, nope: int, back: bool) -> None:
    """Copy heads, the columns from `nope` on rotated (pairs interleaved); rows of both may be strided."""
    tokens, heads, width = x_THC.shape
    block_h = min(16, power_of_2(heads))
    if tokens:
        _turn_kernel[(tokens, ceil_div(heads, block_h))](
            x_THC, rotation_T2r, out_THC, heads, x_THC.stride(0), out_THC.stride(0), NOPE=nope,
            ROPE=width - nope, BACK=back, BLOCK_H=block_h, BLOCK_N=power_of_2(nope),
            BLOCK_R=power_of_2(width - nope), num_warps=4 if block_h * width >= 1024 else 1,
        )  # fmt: skip


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THC: Tensor, rotation_T2r: Tensor, nope: int) -> Tensor:
        rotation_T2r = rotation_T2r.contiguous()
        ctx.save_for_backward(rotation_T2r)
        ctx.nope = nope
        out_THC = torch.empty(x_THC.shape, dtype=x_THC.dtype, device=x_THC.device)
        turn(_flat_heads(x_THC), rotation_T2r, out_THC, nope, back=False)
        return out_THC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dx_THC = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
        turn(_flat_heads(grads[0]), ctx.saved_tensors[0], dx_THC, ctx.nope, back=True)
        return dx_THC, None, None


def turned(x_THC: Tensor, rotation_T2r: Tensor, nope: int) -> Tensor:
    """Heads with their columns from `nope` on rotated."""
    return cast(Tensor, _Turned.apply(x_THC, rotation_T2r, nope))


# --- MLA: keys and values -----------------------------------------------------------------------------------
@triton.jit
def _keys_kernel(
    kv, rope, k, v, heads, kv_stride, rope_stride, NOPE: tl.constexpr, VALUE: tl.constexpr,
    WIDE: tl.constexpr, ROPE: tl.constexpr, BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Values lie WIDE apart. BACK: kv and rope are written from the gradients k and v; then BLOCK_H holds all
    heads."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    real = head < heads
    row = kv + token * kv_stride + head * (NOPE + VALUE)
    key = k + (token * heads + head) * (NOPE + ROPE)
    value = v + (token * heads + head) * WIDE
    n, c, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)[None, :], tl.arange(0, BLOCK_R)
    in_n, in_c = real & (n < NOPE)[None, :], real & (c < VALUE)
    in_r = real & (r < ROPE)[None, :]
    n = n[None, :]
    if BACK:
        tl.store(row + n, tl.load(key + n, mask=in_n, other=0.0), mask=in_n)
        tl.store(row + NOPE + c, tl.load(value + c, mask=in_c, other=0.0), mask=in_c)
        part = tl.load(key + NOPE + r[None, :], mask=in_r, other=0.0).to(tl.float32)
        total = tl.sum(part, 0).to(rope.dtype.element_ty)
        tl.store(rope + token * rope_stride + r, total, mask=r < ROPE)
    else:
        tl.store(key + n, tl.load(row + n, mask=in_n, other=0.0), mask=in_n)
        tl.store(value + c, tl.load(row + NOPE + c, mask=in_c, other=0.0), mask=real & (c < WIDE))
        shared = tl.load(rope + token * rope_stride + r, mask=r < ROPE, other=0.0)[None, :]
        tl.store(key + NOPE + r[None, :], tl.broadcast_to(shared, [BLOCK_H, BLOCK_R]), mask=in_r)


def _keys(kv_THw: Tensor, rope_TR: Tensor, k_THC: Tensor, v_THv: Tensor, back: bool) -> None:
    (tokens, heads, width), wide, R = k_THC.shape, v_THv.shape[2], rope_TR.shape[1]
    value = kv_THw.shape[2] - (width - R)
    block_h = power_of_2(heads) if back else min(16, power_of_2(heads))
    if tokens:
        _keys_kernel[(tokens, ceil_div(heads, block_h))](
            kv_THw, rope_TR, k_THC, v_THv, heads, kv_THw.stride(0), rope_TR.stride(0), NOPE=width - R,
            VALUE=value, WIDE=wide, ROPE=R, BACK=back, BLOCK_H=block_h, BLOCK_N=power_of_2(width - R),
            BLOCK_V=power_of_2(wide), BLOCK_R=power_of_2(R), num_warps=8 if block_h > 16 else 4,
        )  # fmt: skip


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_THw: Tensor, rope_TR: Tensor, nope: int, wide: int) -> tuple[Tensor, Tensor]:
        (T, H, width), R = kv_THw.shape, rope_TR.shape[1]
        ctx.nope, ctx.value = nope, width - nope
        rope_TR = rope_TR if rope_TR.stride(1) == 1 else rope_TR.contiguous()
        k_THC, v_THv = kv_THw.new_empty(T, H, nope + R), kv_THw.new_empty(T, H, wide)
        _keys(_flat_heads(kv_THw), rope_TR, k_THC, v_THv, back=False)
        return k_THC, v_THv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dk_THC, dv_THv = (g.contiguous() for g in grads)
        (T, H, width), value, nope = dk_THC.shape, ctx.value, ctx.nope
        dkv_THw = dk_THC.new_empty(T, H, nope + value)
        drope_TR = dk_THC.new_empty(T, width - nope)
        _keys(dkv_THw, drope_TR, dk_THC, dv_THv, back=True)
        return dkv_THw, drope_TR, None, None


def keys_and_values(
    kv_THw: Tensor, rope_TR: Tensor, nope: int, wide: int | None = None
) -> tuple[Tensor, Tensor]:
    """Keys [T, H, nope + R] and values [T, H, w − nope], or `wide` with zeros behind them."""
    wide = kv_THw.shape[2] - nope if wide is None else wide
    return cast("tuple[Tensor, Tensor]", _Keys.apply(kv_THw, rope_TR, nope, wide))


# --- columns of heads ---------------------------------------------------------------------------------------
@triton.jit
def _narrow_kernel(
    x, out, count, WIDTH: tl.constexpr, WIDE: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr
):
    """out [.., WIDTH] of x [.., WIDE], or BACK: x of out, zeros behind."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BACK:
        column = at % WIDE
        own = (at < count) & (column < WIDTH)
        value = tl.load(out + at // WIDE * WIDTH + column, mask=own, other=0.0)
        tl.store(x + at, value, mask=at < count)
    else:
        value = tl.load(x + at // WIDTH * WIDE + at % WIDTH, mask=at < count, other=0.0)
        tl.store(out + at, value, mask=at < count)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THC: Tensor, width: int) -> Tensor:
        x_THC, ctx.wide = x_THC.contiguous(), x_THC.shape[2]
        out = x_THC.new_empty(*x_THC.shape[:2], width)
        if out.numel():
            _narrow_kernel[(ceil_div(out.numel(), 1024),)](
                x_THC, out, out.numel(), WIDTH=width, WIDE=ctx.wide, BACK=False, BLOCK=1024, num_warps=4
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dout = grads[0].contiguous()
        dx = dout.new_empty(*dout.shape[:2], ctx.wide)
        if dx.numel():
            _narrow_kernel[(ceil_div(dx.numel(), 1024),)](
                dx, dout, dx.numel(), WIDTH=dout.shape[2], WIDE=ctx.wide, BACK=True, BLOCK=1024, num_warps=4
            )
        return dx, None


def narrow(x_THC: Tensor, width: int) -> Tensor:
    """The first `width` columns of every head."""
    return cast(Tensor, _Narrow.apply(x_THC, width))


# --- GQA ----------------------------------------------------------------------------------------------------
@triton.jit
def _stacked_kernel(
    qkv, rotation, q, k, v, heads, groups, stride, WIDTH: tl.constexpr, BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BACK: qkv is written from the gradients q, k, v."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    half: tl.constexpr = WIDTH // 2
    r = tl.arange(0, BLOCK_R)
    cos = tl.load(rotation + token * WIDTH + r, mask=r < half, other=0.0)[None, :]
    sin = tl.load(rotation + token * WIDTH + half + r, mask=r < half, other=0.0)[None, :]
    r = r[None, :]
    in_q = (head < heads) & (r < half)
    in_k = (head >= heads) & (head < heads + groups) & (r < half)
    in_v = (head >= heads + groups) & (head < heads + 2 * groups) & (r < half)
    turns = head < heads + groups
    row = qkv + token * stride + head * WIDTH + r
    to_q = q + (token * heads + head) * WIDTH + r
    to_k = k + (token * groups + head - heads) * WIDTH + r
    to_v = v + (token * groups + head - heads - groups) * WIDTH + r
    if BACK:
        a = tl.load(to_q, mask=in_q, other=0.0) + tl.load(to_k, mask=in_k, other=0.0)
        b = tl.load(to_q + half, mask=in_q, other=0.0) + tl.load(to_k + half, mask=in_k, other=0.0)
        a += tl.load(to_v, mask=in_v, other=0.0)
        b += tl.load(to_v + half, mask=in_v, other=0.0)
        sin = -sin
    else:
        inside = (head < heads + 2 * groups) & (r < half)
        a, b = tl.load(row, mask=inside, other=0.0), tl.load(row + half, mask=inside, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    first = tl.where(turns, (x * cos - y * sin).to(a.dtype), a)
    second = tl.where(turns, (y * cos + x * sin).to(b.dtype), b)
    if BACK:
        inside = (head < heads + 2 * groups) & (r < half)
        tl.store(row, first, mask=inside)
        tl.store(row + half, second, mask=inside)
    else:
        tl.store(to_q, first, mask=in_q)
        tl.store(to_q + half, second, mask=in_q)
        tl.store(to_k, first, mask=in_k)
        tl.store(to_k + half, second, mask=in_k)
        tl.store(to_v, first, mask=in_v)
        tl.store(to_v + half, second, mask=in_v)


def _stacked(
    qkv: Tensor, rotation_T2r: Tensor, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, back: bool
) -> None:
    (tokens, heads, width), groups = q_THC.shape, k_TGC.shape[1]
    block_h = min(16, power_of_2(heads + 2 * groups))
    if tokens:
        _stacked_kernel[(tokens, ceil_div(heads + 2 * groups, block_h))](
            qkv, rotation_T2r, q_THC, k_TGC, v_TGC, heads, groups, qkv.stride(0), WIDTH=width, BACK=back,
            BLOCK_H=block_h, BLOCK_R=power_of_2(width // 2), num_warps=4,
        )  # fmt: skip


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotation_T2r: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        rotation_T2r = rotation_T2r.contiguous()
        ctx.save_for_backward(rotation_T2r)
        T, stacked, C = qkv.shape
        q, k, v = (qkv.new_empty(T, heads, C) for heads in (stacked - 2 * groups, groups, groups))
        _stacked(_flat_heads(qkv), rotation_T2r, q, k, v, back=False)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dq, dk, dv = (g.contiguous() for g in grads)
        (T, H, C), groups = dq.shape, dk.shape[1]
        dqkv = dq.new_empty(T, H + 2 * groups, C)
        _stacked(dqkv, ctx.saved_tensors[0], dq, dk, dv, back=True)
        return dqkv, None, None


def gqa_heads(qkv_THC: Tensor, rotation_T2r: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of stacked heads [T, H + 2G, C]; halves of q and k rotated."""
    return cast("tuple[Tensor, Tensor, Tensor]", _Stacked.apply(qkv_THC, rotation_T2r, groups))
