"""Routed experts for up to a few hundred tokens: reading weights is the cost. Reference: `hadal.ops.experts`.

Three kernels: gate_up product + SwiGLU, down product, weighted sum. A program owns one expert and a block of
its output rows; it finds the (token, k) pairs routed to it by itself, so nothing is sorted, nothing is
synchronised with the host, and every expert's weights are read once for each BLOCK_M of its rows. The shared
expert runs in the same launches, as so many parts of the routed width that every token chose.
Legend: P = T·K pairs, R = P + T·parts rows, D hidden, I width, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.gemv import silu_mul
from hadal.ops.triton.sizes import ceil_div, power_of_2


class Tiles(NamedTuple):
    """Block sizes of a kernel."""

    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def _swiglu_kernel(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    gate = tl.load(x + row * 2 * width + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + col, mask=inside, other=0.0).to(tl.float32)
    value = silu_mul(gate, up, out.dtype.element_ty)
    tl.store(out + row * width + col, value.to(out.dtype.element_ty), mask=inside)


def swiglu(x_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up, [T, 2I] → [T, I]."""
    x_T2I = x_T2I.contiguous()
    tokens, width = x_T2I.shape[0], x_T2I.shape[1] // 2
    out = torch.empty((tokens, width), dtype=x_T2I.dtype, device=x_T2I.device)
    if tokens:
        _swiglu_kernel[(tokens, ceil_div(width, 1024))](x_T2I, out, width, BLOCK=1024, num_warps=4)
    return out


# --- one expert, BLOCK_M rows at a time ---------------------------------------------------------------------
@triton.jit
def _rows_of_expert(mine, rank, pair, first, BLOCK_M: tl.constexpr):
    """Pairs number first … first + BLOCK_M − 1 among this expert's, −1 where there are fewer."""
    wanted = first + tl.arange(0, BLOCK_M)
    hit = mine[None, :] & (rank[None, :] == wanted[:, None])
    return tl.max(tl.where(hit, pair[None, :], -1), 1)


@triton.jit
def gate_up_rows(
    x, row, to_row, gate_row, up_row, out, n, hidden, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """silu(gate)·up of the rows `row` of x (−1: none) into the rows `to_row` of out [.., width]."""
    x_row = x + tl.maximum(row, 0).to(tl.int64) * hidden
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, hidden, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = (n[:, None] < width) & (d[None, :] < hidden)
        x_mask = (row >= 0)[None, :] & (d < hidden)[:, None]
        value = tl.load(x_row[None, :] + d[:, None], mask=x_mask, other=0.0)
        gate_tile = tl.load(gate_row + d[None, :], mask=mask, other=0.0)
        gate = tl.dot(gate_tile, value, gate, input_precision="ieee")
        up = tl.dot(tl.load(up_row + d[None, :], mask=mask, other=0.0), value, up, input_precision="ieee")
    y = silu_mul(gate, up, out.dtype.element_ty)
    to = out + tl.maximum(to_row, 0).to(tl.int64)[None, :] * width + n[:, None]
    tl.store(to, y.to(out.dtype.element_ty), mask=(row >= 0)[None, :] & (n < width)[:, None])


@triton.jit
def down_rows(
    h, row, w_row, out, n, hidden, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr
):
    """The down product of the rows `row` of h (−1: none) into the same rows of out [.., hidden]."""
    h_row = h + tl.maximum(row, 0).to(tl.int64) * width
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        mask = (n[:, None] < hidden) & (i[None, :] < width)
        h_mask = (row >= 0)[None, :] & (i < width)[:, None]
        value = tl.load(h_row[None, :] + i[:, None], mask=h_mask, other=0.0)
        acc = tl.dot(tl.load(w_row + i[None, :], mask=mask, other=0.0), value, acc, input_precision="ieee")
    to = out + tl.maximum(row, 0).to(tl.int64)[None, :] * hidden + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(row >= 0)[None, :] & (n < hidden)[:, None])


@triton.jit
def _gate_up_kernel(
    x, expert, w, shared, out, tokens, pairs, hidden, width, PARTS: tl.constexpr,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_n = tl.minimum(n, width - 1)[:, None].to(tl.int64)
    i = tl.arange(0, BLOCK_M)
    if part < PARTS:  # of the shared expert, for every token
        gate_row = shared + (part * width + weight_n) * hidden
        up_row = gate_row + tl.cast(PARTS * width, tl.int64) * hidden
        pdl.wait(PDL)
        for first in range(0, tokens, BLOCK_M):
            row = tl.where(first + i < tokens, first + i, -1)
            to_row = pairs + part * tokens + row
            gate_up_rows(x, row, to_row, gate_row, up_row, out, n, hidden, width, BLOCK_M, BLOCK_N, BLOCK_D)
    else:
        pdl.wait(PDL)
        e = (part - PARTS).to(tl.int64)
        pair = tl.arange(0, BLOCK_P)
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        gate_row = w + (e * 2 * width + weight_n) * hidden
        for first in range(0, tl.sum(mine.to(tl.int32), 0), BLOCK_M):
            row = _rows_of_expert(mine, rank, pair, first, BLOCK_M)
            gate_up_rows(
                x, tl.where(row >= 0, row // K, -1), row, gate_row,
                gate_row + tl.cast(width, tl.int64) * hidden, out, n, hidden, width, BLOCK_M, BLOCK_N,
                BLOCK_D,
            )  # fmt: skip


@triton.jit
def _down_kernel(
    h, expert, w, shared, out, tokens, pairs, hidden, width, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_n = tl.minimum(n, hidden - 1)[:, None].to(tl.int64)
    i = tl.arange(0, BLOCK_M)
    if part < PARTS:
        w_row = shared + weight_n * (PARTS * width) + part * width
        pdl.wait(PDL)
        for first in range(0, tokens, BLOCK_M):
            row = tl.where(first + i < tokens, pairs + part * tokens + first + i, -1)
            down_rows(h, row, w_row, out, n, hidden, width, BLOCK_M, BLOCK_N, BLOCK_I)
    else:
        pdl.wait(PDL)
        e = (part - PARTS).to(tl.int64)
        pair = tl.arange(0, BLOCK_P)
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        w_row = w + (e * hidden + weight_n) * width
        for first in range(0, tl.sum(mine.to(tl.int32), 0), BLOCK_M):
            row = _rows_of_expert(mine, rank, pair, first, BLOCK_M)
            down_rows(h, row, w_row, out, n, hidden, width, BLOCK_M, BLOCK_N, BLOCK_I)


@triton.jit
def _combine_kernel(
    y, place, weight, shared, residual, out, tokens, hidden, PARTS: tl.constexpr,
    K: tl.constexpr, PLACED: tl.constexpr, SHARED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    pdl.wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < hidden
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        at = token * K + k
        if PLACED:
            at = tl.load(place + at)
        row = tl.load(y + at * hidden + col, mask=inside, other=0.0).to(tl.float32)
        acc += row * tl.load(weight + token * K + k)
    for part in tl.static_range(PARTS):
        at = tokens * (K + part) + token
        acc += tl.load(y + at * hidden + col, mask=inside, other=0.0).to(tl.float32)
    if SHARED:
        acc += tl.load(shared + token * hidden + col, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual + token * hidden + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + col, acc.to(out.dtype.element_ty), mask=inside)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared: tuple[Tensor, Tensor] | None = None, residual_TD: Tensor | None = None,
    tiles: tuple[Tiles, Tiles] | None = None, rows_a_tile: int | None = None,
) -> Tensor:  # fmt: skip
    """Σ_k w_k · expert_k(x) + shared(x) + residual, [T, D], summed in FP32. `shared`: the gate_up [2S, D] and
    down [D, S] weights of an expert for all tokens, S a multiple of the routed width."""
    parts, width = 0, down_EDI.shape[2]
    if shared is not None:
        parts = shared[1].shape[1] // width
        if parts * width != shared[1].shape[1]:
            raise ValueError(f"a shared width of {shared[1].shape[1]} is no multiple of {width}")
    x_TD = x_TD.contiguous()
    if x_TD.shape[0] == 1 and tiles is None:
        from hadal.ops.triton import experts_one

        weights = (gate_up_E2ID, down_EDI, shared, parts)
        return experts_one.experts(x_TD, expert_TK, weight_TK, *weights, residual_TD)
    (tokens, hidden), K, n_experts = x_TD.shape, expert_TK.shape[1], down_EDI.shape[0]
    pairs = tokens * K
    shared_up, shared_down = shared or (x_TD, x_TD)
    h_RI = x_TD.new_empty(pairs + parts * tokens, width)
    y_RD = x_TD.new_empty(pairs + parts * tokens, hidden)
    block_m = rows_a_tile or _rows_a_tile(pairs, n_experts)
    inputs = 256 // x_TD.element_size() if block_m <= 32 else 64
    up, down = tiles or (Tiles(64, inputs, 4, 4 if inputs == 128 else 3), Tiles(64, inputs, 4, 4))
    constants = {
        "PARTS": parts, "BLOCK_P": power_of_2(pairs), "BLOCK_M": block_m, **pdl.options(x_TD),
    }  # fmt: skip
    _gate_up_kernel[(ceil_div(width, up.outputs), parts + n_experts)](
        x_TD, expert_TK, gate_up_E2ID, shared_up, h_RI, tokens, pairs, hidden, width, K=K,
        BLOCK_N=up.outputs, BLOCK_D=up.inputs, num_warps=up.warps, num_stages=up.stages,
        **constants,
    )  # fmt: skip
    _down_kernel[(ceil_div(hidden, down.outputs), parts + n_experts)](
        h_RI, expert_TK, down_EDI, shared_down, y_RD, tokens, pairs, hidden, width, BLOCK_N=down.outputs,
        BLOCK_I=down.inputs, num_warps=down.warps, num_stages=down.stages, **constants,
    )  # fmt: skip
    return _combine(y_RD, None, weight_TK, None, residual_TD, parts)


def _rows_a_tile(pairs: int, n_experts: int) -> int:
    """Rows of an expert that share one reading of its weights: what an even spread gives. A second reading
    comes from the L2 cache, and costs less than rows that are not there."""
    return min(64, max(16, power_of_2(pairs // n_experts)))


def combine(
    row_ND: Tensor,
    place: Tensor,
    weight_TK: Tensor,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each token's K rows, which lie at `place`; see `hadal.ops.experts.combine`."""
    return _combine(row_ND, place, weight_TK, shared_TD, residual_TD)


def _combine(
    row_ND: Tensor,
    place: Tensor | None,
    weight_TK: Tensor,
    shared_TD: Tensor | None,
    residual_TD: Tensor | None,
    parts: int = 0,
) -> Tensor:
    """parts: rows of the shared expert for every token, behind all pairs' rows."""
    (tokens, K), hidden = weight_TK.shape, row_ND.shape[1]
    out_TD = torch.empty((tokens, hidden), dtype=row_ND.dtype, device=row_ND.device)
    _combine_kernel[(tokens, ceil_div(hidden, 1024))](
        row_ND, row_ND if place is None else place, weight_TK,
        row_ND if shared_TD is None else shared_TD.contiguous(),
        row_ND if residual_TD is None else residual_TD.contiguous(), out_TD, tokens, hidden,
        PARTS=parts, K=K, PLACED=place is not None, SHARED=shared_TD is not None,
        RESIDUAL=residual_TD is not None, BLOCK=1024, num_warps=4, **pdl.options(row_ND),
    )  # fmt: skip
    return out_TD
