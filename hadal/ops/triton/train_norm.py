"""RMSNorm in both directions. Reference: `hadal.ops.rms_norm.rms_norm_reference`, whose roundings the forward
pass has; with x̂ = x·r, r = 1/√(mean(x²) + eps), g = dy ⊙ w,

    dx = r·(g − x̂·mean(g ⊙ x̂))          dw = Σ_t dy_t ⊙ x̂_t

One reading of x and dy gives both: every program takes a stretch of rows and leaves its share of dw, and a
small kernel sums the shares. No atomics: the same bits in every run. A stream that is normed and goes on as
well (`forked`) has the gradient of that other way added in the same kernel, rounded as two kernels would.
Legend: T rows, D width, P programs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton.sizes import ceil_div, power_of_2
from hadal.ops.triton.train_heads import turn

ELEMENTS = 4096  # of a tile: as many rows as fit, at least one
PROGRAMS = 396  # of the backward kernel at most: three on each multiprocessor of an H100
SHARES = 64  # of dw summed at once


@triton.jit
def _forward_kernel(
    x, weight, out, scale, rows, width, x_stride, out_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    normed = (value * r[:, None]).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
    y = (normed * w[None, :]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + col[None, :], y, mask=inside)
    tl.store(scale + row, r, mask=row < rows)


@triton.jit
def _backward_kernel(
    x, weight, scale, dy, dstream, dx, share, rows, width, x_stride, dy_stride, dx_stride,
    tiles, STREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)
    w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(tiles):
        row = (first + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        normed = value * r
        total += grad * normed
        g = grad * w
        along = tl.sum(g * normed, 1) / width
        d = ((g - normed * along[:, None]) * r).to(dx.dtype.element_ty)
        if STREAM:
            other = tl.load(dstream + row[:, None] * width + col[None, :], mask=inside, other=0.0)
            d = (d.to(tl.float32) + other.to(tl.float32)).to(dx.dtype.element_ty)
        tl.store(dx + row[:, None] * dx_stride + col[None, :], d, mask=inside)
    tl.store(share + tl.program_id(0) * width + col, tl.sum(total, 0), mask=col < width)


@triton.jit
def _sum_kernel(share, out, programs, width, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([SHARES, BLOCK], tl.float32)
    for start in range(0, programs, SHARES):
        p = start + tl.arange(0, SHARES)
        inside = (p < programs)[:, None] & (col < width)[None, :]
        total += tl.load(share + p[:, None] * width + col[None, :], mask=inside, other=0.0)
    tl.store(out + col, tl.sum(total, 0).to(out.dtype.element_ty), mask=col < width)


def _sizes(width: int) -> tuple[int, dict[str, int]]:
    """(rows of a tile, the kernels' constants)."""
    block = power_of_2(width)
    rows = max(1, min(64, ELEMENTS // block))
    return rows, {"ROWS": rows, "BLOCK": block, "num_warps": 16 if block > ELEMENTS else 8}


def _norm(x_TD: Tensor, weight: Tensor, eps: float, out_TD: Tensor) -> Tensor:
    """Fills out with the norm of x, both [T, D] with rows where strides say; the scales of x's rows [T]."""
    (rows, width), (tile, how) = x_TD.shape, _sizes(x_TD.shape[1])
    scale_T = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    if rows:
        _forward_kernel[(ceil_div(rows, tile),)](
            x_TD, weight, out_TD, scale_T, rows, width, x_TD.stride(0), out_TD.stride(0), eps, **how
        )
    return scale_T


def _back(
    dy_TD: Tensor, x_TD: Tensor, weight: Tensor, scale_T: Tensor, dx_TD: Tensor, dstream_TD: Tensor | None
) -> Tensor:
    """Fills dx; dw."""
    (rows, width), (tile, how) = x_TD.shape, _sizes(x_TD.shape[1])
    if not rows:
        return torch.zeros_like(weight)
    tiles = ceil_div(rows, tile)
    each = ceil_div(tiles, PROGRAMS)
    programs = ceil_div(tiles, each)
    share_PD = torch.empty((programs, width), dtype=torch.float32, device=weight.device)
    dweight = torch.empty_like(weight)
    _backward_kernel[(programs,)](
        x_TD, weight, scale_T, dy_TD, dy_TD if dstream_TD is None else dstream_TD, dx_TD, share_PD, rows,
        width, x_TD.stride(0), dy_TD.stride(0), dx_TD.stride(0), each, STREAM=dstream_TD is not None, **how,
    )  # fmt: skip
    _sum_kernel[(ceil_div(width, 32),)](
        share_PD, dweight, programs, width, SHARES=SHARES, BLOCK=32, num_warps=4
    )
    return dweight


def _flat(x: Tensor) -> Tensor:
    """[T, D], rows strided at most."""
    x_TD = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def _normed(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_TD, out = _flat(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale_T = _norm(x_TD, weight, eps, out.view(x_TD.shape))
    ctx.save_for_backward(x_TD, weight, scale_T)
    return out


def _gradients(ctx: Any, dy: Tensor, dstream: Tensor | None) -> tuple[Tensor, Tensor, None]:
    x_TD, weight, scale_T = ctx.saved_tensors
    dx = torch.empty(dy.shape, dtype=x_TD.dtype, device=dy.device)
    other_TD = None if dstream is None else dstream.reshape(x_TD.shape).contiguous()
    dweight = _back(_flat(dy), x_TD, weight, scale_T, dx.view(x_TD.shape), other_TD)
    return dx, dweight, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _normed(ctx, x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return _gradients(ctx, grads[0], None)


class _Forked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.data, _normed(ctx, x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        dstream, dy = grads
        return (dstream, None, None) if dy is None else _gradients(ctx, dy, dstream)


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_TC: Tensor, weight: Tensor, eps: float, rotation_T2r: Tensor) -> Tensor:
        kv_TC, rotation_T2r, L = _flat(kv_TC), rotation_T2r.contiguous(), weight.shape[0]
        entry_TC = torch.empty(kv_TC.shape, dtype=kv_TC.dtype, device=kv_TC.device)
        scale_T = _norm(kv_TC[:, :L], weight, eps, entry_TC[:, :L])
        turn(kv_TC[:, None, L:], rotation_T2r, entry_TC[:, None, L:], 0, back=False)
        ctx.save_for_backward(kv_TC, weight, scale_T, rotation_T2r)
        return entry_TC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kv_TC, weight, scale_T, rotation_T2r = ctx.saved_tensors
        dentry_TC, L = _flat(grads[0]), weight.shape[0]
        dkv_TC = torch.empty(kv_TC.shape, dtype=kv_TC.dtype, device=kv_TC.device)
        dweight = _back(dentry_TC[:, :L], kv_TC[:, :L], weight, scale_T, dkv_TC[:, :L], None)
        turn(dentry_TC[:, None, L:], rotation_T2r, dkv_TC[:, None, L:], 0, back=True)
        return dkv_TC, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension; rows may be strided. Keeps x and a number a row."""
    return cast(Tensor, _Norm.apply(x, weight, eps))


def forked(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x, RMSNorm(x)); the first lies where x does."""
    return cast("tuple[Tensor, Tensor]", _Forked.apply(x, weight, eps))


def latent_entry(kv_TC: Tensor, weight: Tensor, eps: float, rotation_T2r: Tensor) -> Tensor:
    """MLA's entries: the first columns normed, the others turned (hadal/ops/mla.py)."""
    return cast(Tensor, _Entry.apply(kv_TC, weight, eps, rotation_T2r))
