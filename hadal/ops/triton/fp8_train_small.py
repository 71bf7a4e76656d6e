"""FP8 training of layers too small for FP8 products: what is only multiplied is never stored as codes.

Scales are powers of two here, so that a dequantised value is exact in BF16, and products are BF16 ones of
dequantised values. A weight, a gradient, or an input cut anew along tokens goes there in one kernel, and lies
as it was: a transpose is a view. What is kept for the backward pass are codes, as elsewhere. Functions stand
for those of `hadal.ops.fp8_tiles` under the same names; in `Codes` and `Weight` made here q are the values.
Legend: as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops import fp8_tiles
from hadal.ops.fp8_tiles import TILE, Codes, Rows, Weight
from hadal.ops.triton import fp8_train, fp8_train_products
from hadal.ops.triton.fp8_train import GROUP, _e4m3, _scale, _tile
from hadal.ops.triton.fp8_train import gather as gather
from hadal.ops.triton.fp8_train import quantise as quantise
from hadal.ops.triton.fp8_train import sort_rows as sort_rows
from hadal.ops.triton.fp8_train import sum_rows as sum_rows
from hadal.ops.triton.fp8_train import swiglu as swiglu
from hadal.ops.triton.fp8_train import swiglu_backward as swiglu_backward
from hadal.ops.triton.sizes import ceil_div

WORTH = fp8_train_products.WORTH


@triton.jit
def _leave(x_RC, out, AXIS: tl.constexpr, stride, rows, channels):
    """A tile as its codes say, with a scale for each row (AXIS 1) or column (0), to where its corner lies."""
    r = tl.arange(0, GROUP)
    k = tl.arange(0, GROUP)
    s = tl.expand_dims(_scale(tl.max(tl.abs(x_RC), AXIS), True), AXIS)
    value = _e4m3(x_RC, s, True).to(tl.float32) * s
    inside = (r < rows)[:, None] & (k < channels)[None, :]
    tl.store(out + (r[:, None] * stride + k[None, :]), value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _both_kernel(x, along, across, K, R, x_stride):
    row = tl.program_id(0).to(tl.int64) * GROUP
    k = tl.program_id(1).to(tl.int64) * GROUP
    value = _tile(x + row * x_stride + k, tl.arange(0, GROUP), x_stride, R - row, K - k).to(tl.float32)
    _leave(value, along + row * K + k, 1, K, R - row, K - k)
    _leave(value, across + row * K + k, 0, K, R - row, K - k)


def quantise_both(x_RK: Tensor, power: bool) -> tuple[Codes, Codes]:
    """x in tiles along its channels, and its transpose in tiles along tokens."""
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    (R, K), device = x_RK.shape, x_RK.device
    along, across = (torch.empty((R, K), dtype=torch.bfloat16, device=device) for _ in range(2))
    if R:
        grid = ceil_div(R, TILE), ceil_div(K, TILE)
        _both_kernel[grid](x_RK, along, across, K, R, x_RK.stride(0), num_warps=8)
    return Codes(along, along, power), Codes(across.t(), across, power)


@triton.jit
def _columns_kernel(q, scale, token_R, used, out, K, R, T, ROWS: tl.constexpr):
    tile = tl.program_id(0)
    real = tile >= 0
    if ROWS:
        real = tile < tl.load(used)
    if real:
        row = tile.to(tl.int64) * GROUP
        g = tl.program_id(1).to(tl.int64)
        k = tl.arange(0, GROUP)
        source = row + k
        if ROWS:
            source = tl.load(token_R + source).to(tl.int64)
        own = (source >= 0) & (source < T)
        inside = own[:, None] & (k < K - g * GROUP)[None, :]
        code = tl.load(q + g * GROUP + (source * K)[:, None] + k[None, :], mask=inside, other=0.0)
        value = code.to(tl.float32) * tl.load(scale + g * T + source, mask=own, other=0.0)[:, None]
        _leave(value, out + row * K + g * GROUP, 0, K, R - row, K - g * GROUP)


def columns(codes: Codes, rows: Rows | None) -> Codes:
    """The transpose of codes, gathered by row where `rows` is given, cut anew along rows."""
    T, K = codes.q.shape
    R = T if rows is None else rows.token_R.shape[0]
    out = torch.empty((R, K), dtype=torch.bfloat16, device=codes.q.device)
    if R:
        token_R, used = (codes.scale, codes.scale) if rows is None else (rows.token_R, rows.used)
        _columns_kernel[(ceil_div(R, TILE), ceil_div(K, TILE))](
            codes.q, codes.scale, token_R, used, out, K, R, T, ROWS=rows is not None, num_warps=8
        )
    return Codes(out.t(), out, True)


def quantise_weight(w: Tensor, power: bool) -> Weight:
    """In blocks of 128 × 128."""
    return fp8_train.quantise_weight(w, power, torch.bfloat16)


def transposed(weight: Weight) -> Weight:
    return Weight(weight.q.transpose(-1, -2), weight.scale, weight.power)


def matmul(a: Codes, weight: Weight, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """a · Wᵀ [R, N], of each expert's rows with its own matrix of a stack."""
    x_RK, w = _values(a, dtype, rows), weight.q.to(dtype)
    return x_RK @ w.t() if rows is None else fp8_train_products._grouped(x_RK, w.transpose(1, 2), rows)


def outer(a: Codes, b: Codes, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """a · bᵀ [N, K] of two transposes [N, R] and [K, R], or [E, N, K] of each expert's rows."""
    a_NR, b_KR = _values(a, dtype, None), _values(b, dtype, None)
    if rows is not None:
        return fp8_train_products._grouped(a_NR, b_KR.t(), rows)
    R = min(a_NR.shape[1], b_KR.shape[1])  # transposed codes are filled up with zeros, values are not
    return a_NR[:, :R] @ b_KR[:, :R].t()


def outer_into(a: Codes, b: Codes, rows: Rows, into_ENK: Tensor, more: bool) -> None:
    """`outer` of each expert's rows, written to `into`, or with `more` added to it."""
    fp8_tiles.put(outer(a, b, torch.bfloat16, rows), into_ENK, more)


def _values(x: Codes, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """What codes mean, where they are codes."""
    if x.q.dtype == fp8_train.E4M3:
        return fp8_train_products.dequantise(x, dtype, None if rows is None else rows.used)
    return x.q.to(dtype)
