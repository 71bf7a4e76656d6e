"""Linear layers and experts of one to four rows. References: `hadal.ops.linear`, `hadal.ops.experts`.

For so few rows no tensor core is needed, and what costs time is waiting: a program owns BLOCK_N outputs and
asks for all of their weights at once, into registers, before its input is there; while the kernel before
ends, the weights are on their way. Then the input, products and one reduction.
Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl

MAX_ROWS = 4


class Config(NamedTuple):
    """Block sizes of a launch."""

    outputs: int
    inputs: int
    warps: int


def config_for(K: int, swiglu: bool) -> Config:
    return Config(4 if swiglu else 8, min(2048, triton.next_power_of_2(K)), 4)


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
        own = x + tl.minimum(m, M - 1) * x_stride  # rows that are not there repeat the last, and are not stored
        value = tl.load(own + k, mask=k < K, other=0.0).to(tl.float32)
        total = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        acc += tl.where((i == m)[None, :], total[:, None], 0.0)
    return acc


@triton.jit
def _stream(
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
    x, w, second, bias, residual, out, second_out, M, N, second_N, K, x_stride, blocks, ROWS: tl.constexpr,
    PAIR: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
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
    acc, up = _stream(x, M, x_stride, row, up_row, K, ROWS, SWIGLU, BLOCK_N, BLOCK_K, PDL)
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
) -> None:  # fmt: skip
    """Write x·Wᵀ (+ bias, + residual, through SwiGLU) to `out`, and of a second weight to `second_out`."""
    (M, K), N = x_MK.shape, out.shape[1]
    second_N = 0 if second_out is None else second_out.shape[1]
    c = config or config_for(K, swiglu)
    blocks = triton.cdiv(N, c.outputs)
    _gemv_kernel[(blocks + triton.cdiv(second_N, c.outputs),)](
        x_MK, weight, weight if second is None else second, x_MK if bias_N is None else bias_N,
        x_MK if residual_MN is None else residual_MN, out, out if second_out is None else second_out, M, N,
        second_N, K, x_MK.stride(0), blocks, ROWS=triton.next_power_of_2(M), PAIR=second is not None,
        BIAS=bias_N is not None, RESIDUAL=residual_MN is not None, SWIGLU=swiglu, BLOCK_N=c.outputs,
        BLOCK_K=c.inputs, num_warps=c.warps, **pdl.options(x_MK),
    )  # fmt: skip


# --- experts: a program for every (token, k) pair -----------------------------------------------------------
@triton.jit
def _store(acc, out, M, width, n, ROWS: tl.constexpr):
    m = tl.arange(0, ROWS)
    to = out + m[None, :] * width + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < width)[:, None])


@triton.jit
def _gate_up_kernel(
    x, expert, w, shared, out, tokens, pairs, hidden, width, PARTS: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_n = tl.minimum(n, width - 1)[:, None].to(tl.int64)
    if part < PARTS:  # of the shared expert, for every token
        row = shared + (part * width + weight_n) * hidden
        up_row = row + tl.cast(PARTS * width, tl.int64) * hidden
        acc, up = _stream(x, tokens, hidden, row, up_row, hidden, ROWS, True, BLOCK_N, BLOCK_K, PDL)
        acc = silu_mul(acc, up, out.dtype.element_ty)
        _store(acc, out + (pairs + part * tokens).to(tl.int64) * width, tokens, width, n, ROWS)
    else:
        pdl.wait(PDL)
        pair = part - PARTS
        row = w + (tl.load(expert + pair) * 2 * width + weight_n) * hidden
        up_row = row + tl.cast(width, tl.int64) * hidden
        acc, up = _stream(
            x + pair // K * hidden, 1, hidden, row, up_row, hidden, 1, True, BLOCK_N, BLOCK_K, False
        )
        _store(silu_mul(acc, up, out.dtype.element_ty), out + pair * width, 1, width, n, 1)


@triton.jit
def _down_kernel(
    h, expert, w, shared, out, tokens, pairs, hidden, width, PARTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_n = tl.minimum(n, hidden - 1)[:, None].to(tl.int64)
    if part < PARTS:
        row = shared + weight_n * (PARTS * width) + part * width
        first = pairs + part * tokens
        acc, _ = _stream(
            h + first * width, tokens, width, row, row, width, ROWS, False, BLOCK_N, BLOCK_K, PDL
        )
        _store(acc, out + first * hidden, tokens, hidden, n, ROWS)
    else:
        pdl.wait(PDL)  # the launch before may have begun before the one that chose the experts ended
        pair = part - PARTS
        row = w + (tl.load(expert + pair) * hidden + weight_n) * width
        acc, _ = _stream(h + pair * width, 1, width, row, row, width, 1, False, BLOCK_N, BLOCK_K, False)
        _store(acc, out + pair * hidden, 1, hidden, n, 1)


def experts(
    x_TD: Tensor, expert_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared: tuple[Tensor, Tensor] | None, parts: int, up: Config | None = None, down: Config | None = None,
) -> Tensor:  # fmt: skip
    """Rows [P + T·parts, D]: every pair's expert, then each part of the shared one for every token."""
    (tokens, hidden), K, width = x_TD.shape, expert_TK.shape[1], down_EDI.shape[2]
    pairs = tokens * K
    shared_up, shared_down = shared or (x_TD, x_TD)
    h_RI = x_TD.new_empty(pairs + parts * tokens, width)
    y_RD = x_TD.new_empty(pairs + parts * tokens, hidden)
    up, down = up or config_for(hidden, True), down or config_for(width, False)
    constants = {"PARTS": parts, "ROWS": triton.next_power_of_2(tokens), **pdl.options(x_TD)}
    _gate_up_kernel[(triton.cdiv(width, up.outputs), parts + pairs)](
        x_TD, expert_TK, gate_up_E2ID, shared_up, h_RI, tokens, pairs, hidden, width, K=K, BLOCK_N=up.outputs,
        BLOCK_K=up.inputs, num_warps=up.warps, **constants,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(hidden, down.outputs), parts + pairs)](
        h_RI, expert_TK, down_EDI, shared_down, y_RD, tokens, pairs, hidden, width, BLOCK_N=down.outputs,
        BLOCK_K=down.inputs, num_warps=down.warps, **constants,
    )  # fmt: skip
    return y_RD
