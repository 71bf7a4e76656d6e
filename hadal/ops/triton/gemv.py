"""Linear layers of one row. Reference: `hadal.ops.linear`; more rows: `hadal/ops/triton/linear.py`.

One row needs no tensor core, and what costs time is waiting: a program owns BLOCK_N outputs and
asks for all of their weights at once, into registers, before its input is there; while the kernel before
ends, the weights are on their way. Then the input, products and one reduction. An RMSNorm before the product
costs no launch of its own: every program norms the row for itself, with the roundings of the separate kernel.
Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.sizes import ceil_div, power_of_2

MAX_ROWS = 1  # two to four rows run too, but there tiles on tensor cores are faster


class Config(NamedTuple):
    """Block sizes of a launch."""

    outputs: int
    inputs: int
    warps: int


class Norm(NamedTuple):
    """An RMSNorm that is taken before the product; `out` [1, K] receives the normed row where it is given."""

    weight: Tensor
    eps: float
    out: Tensor | None = None


MAX_NORMED = 4096  # inputs: the whole row is in registers


def config_for(K: int, swiglu: bool, pair: bool, normed: bool = False) -> Config:
    """Measured on an H100 (benchmarks/few_rows_gpu.py)."""
    if normed:
        inputs = power_of_2(K)
        return Config(4 if swiglu else 8, inputs, 4 if inputs <= 2048 and not pair else 8)
    if pair or K > 4096:
        return Config(8, 1024, 4) if pair else Config(8, 2048, 8)
    return Config(4 if swiglu else 8, min(2048, power_of_2(K)), 4)


@triton.jit
def silu_mul(gate, up, out_type: tl.constexpr):
    """silu(gate)·up with the roundings of the unfused path (products rounded before, silu rounded once)."""
    g = gate.to(out_type).to(tl.float32)
    return (g / (1.0 + tl.exp(-g))).to(out_type).to(tl.float32) * up.to(out_type).to(tl.float32)


@triton.jit
def _add_products(acc, tile, x, k, K, M, x_stride, ROWS: tl.constexpr):
    """acc [N, ROWS] + tile [N, k] · x[m, k] for every row m."""
    i = tl.arange(0, ROWS)
    for m in tl.static_range(ROWS):
        own = (
            x + tl.minimum(m, M - 1) * x_stride
        )  # rows that are not there repeat the last, and are not stored
        value = tl.load(own + k, mask=k < K, other=0.0).to(tl.float32)
        total = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        acc += tl.where((i == m)[None, :], total[:, None], 0.0)
    return acc


@triton.jit
def _normed(x, weight, out, K, eps, BLOCK_K: tl.constexpr, STORE: tl.constexpr):
    """RMSNorm of the row, in FP32 with the roundings of norm.py; stored by the first program."""
    k = tl.arange(0, BLOCK_K)
    value = tl.load(x + k, mask=k < K, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / K + eps)
    row = (wide * scale).to(value.dtype) * tl.load(weight + k, mask=k < K, other=0.0)
    if STORE:  # noqa: SIM102 — decided when it is compiled
        if tl.program_id(0) == 0:
            tl.store(out + k, row, mask=k < K)
    return row.to(tl.float32)


@triton.jit
def normed_products(
    x, weight, normed, row, up_row, K, eps, SWIGLU: tl.constexpr, STORE: tl.constexpr, BLOCK_K: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """`stream` of one normed row that a block holds."""
    k = tl.arange(0, BLOCK_K)
    tile = tl.load(row + k[None, :], mask=(k < K)[None, :], other=0.0)
    up_tile = tile
    if SWIGLU:
        up_tile = tl.load(up_row + k[None, :], mask=(k < K)[None, :], other=0.0)
    pdl.wait(WAIT)
    value = _normed(x, weight, normed, K, eps, BLOCK_K, STORE)[None, :]
    acc = tl.sum(tile.to(tl.float32) * value, 1)[:, None]
    up = acc
    if SWIGLU:
        up = tl.sum(up_tile.to(tl.float32) * value, 1)[:, None]
    return acc, up


@triton.jit
def stream(
    x, M, x_stride, row, up_row, K, ROWS: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Sums [N, ROWS] over the weight rows at `row` [N, 1], and at `up_row`; the first weights are asked for
    before the input is waited for, and always one step ahead."""
    k = tl.arange(0, BLOCK_K)
    tile = tl.load(row + k[None, :], mask=(k < K)[None, :], other=0.0)
    up_tile = tile
    if SWIGLU:
        up_tile = tl.load(up_row + k[None, :], mask=(k < K)[None, :], other=0.0)
    pdl.wait(WAIT)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        here, after = start + k, start + BLOCK_K + k
        following = tl.load(row + after[None, :], mask=(after < K)[None, :], other=0.0)
        following_up = following
        if SWIGLU:
            following_up = tl.load(up_row + after[None, :], mask=(after < K)[None, :], other=0.0)
            up = _add_products(up, up_tile, x, here, K, M, x_stride, ROWS)
        acc = _add_products(acc, tile, x, here, K, M, x_stride, ROWS)
        tile, up_tile = following, following_up
    return acc, up


@triton.jit
def _gemv_kernel(
    x, w, second, bias, residual, norm, out, second_out, normed, M, N, second_N, K, x_stride, blocks, eps,
    ROWS: tl.constexpr, PAIR: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    STORE: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    block = tl.program_id(0)
    if PAIR:
        late = block >= blocks
        block = tl.where(late, block - blocks, block)
        w, out, N = tl.where(late, second, w), tl.where(late, second_out, out), tl.where(late, second_N, N)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = w + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K
    up_row = row + tl.cast(N, tl.int64) * K
    if NORM:
        acc, up = normed_products(x, norm, normed, row, up_row, K, eps, SWIGLU, STORE, BLOCK_K, PDL)
    else:
        acc, up = stream(x, M, x_stride, row, up_row, K, ROWS, SWIGLU, BLOCK_N, BLOCK_K, PDL)
    m = tl.arange(0, ROWS)
    to = m[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    if SWIGLU:
        acc = silu_mul(acc, up, out.dtype.element_ty)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:  # the product is rounded before the addition, as in the unfused pair
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        acc += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


def launch(
    x_MK: Tensor, weight: Tensor, second: Tensor | None, bias_N: Tensor | None, residual_MN: Tensor | None,
    out: Tensor, second_out: Tensor | None, swiglu: bool, config: Config | None = None,
    norm: Norm | None = None,
) -> None:  # fmt: skip
    """Write x·Wᵀ (+ bias, + residual, through SwiGLU) to `out`, and of a second weight to `second_out`; with
    `norm` of one row's RMSNorm."""
    (M, K), N = x_MK.shape, out.shape[1]
    second_N = 0 if second_out is None else second_out.shape[1]
    c = config or config_for(K, swiglu, second is not None, norm is not None)
    assert norm is None or (M == 1 and c.inputs >= K), "a norm is for one row, whole in a block"
    normed = None if norm is None else norm.out
    blocks = ceil_div(N, c.outputs)
    _gemv_kernel[(blocks + ceil_div(second_N, c.outputs),)](
        x_MK, weight, weight if second is None else second, x_MK if bias_N is None else bias_N,
        x_MK if residual_MN is None else residual_MN, x_MK if norm is None else norm.weight, out,
        out if second_out is None else second_out, out if normed is None else normed, M, N, second_N, K,
        x_MK.stride(0), blocks, 0.0 if norm is None else norm.eps, ROWS=power_of_2(M),
        PAIR=second is not None, BIAS=bias_N is not None, RESIDUAL=residual_MN is not None,
        NORM=norm is not None, STORE=normed is not None, SWIGLU=swiglu, BLOCK_N=c.outputs,
        BLOCK_K=c.inputs, num_warps=c.warps, **pdl.options(x_MK),
    )  # fmt: skip
