"""Routed experts for up to a few hundred tokens: reading weights is the cost. Reference: `hadal.ops.experts`.

Three kernels: gate_up product + SwiGLU, down product, weighted sum. A program owns one expert and a block of
its output rows; it finds the (token, k) pairs routed to it by itself, so nothing is sorted, nothing is
synchronised with the host, and every expert's weights are read once for each BLOCK_M of its rows.
Legend: P = T·K pairs, D hidden, I width, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _silu_mul(gate, up, out_type: tl.constexpr):
    """silu(gate)·up with the roundings of the unfused path (products rounded before, silu rounded once)."""
    g = gate.to(out_type).to(tl.float32)
    return (g / (1.0 + tl.exp(-g))).to(out_type).to(tl.float32) * up.to(out_type).to(tl.float32)


@triton.jit
def _swiglu_kernel(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    gate = tl.load(x + row * 2 * width + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + col, mask=inside, other=0.0).to(tl.float32)
    value = _silu_mul(gate, up, out.dtype.element_ty)
    tl.store(out + row * width + col, value.to(out.dtype.element_ty), mask=inside)


def swiglu(x_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up, [T, 2I] → [T, I]."""
    x_T2I = x_T2I.contiguous()
    tokens, width = x_T2I.shape[0], x_T2I.shape[1] // 2
    out = torch.empty((tokens, width), dtype=x_T2I.dtype, device=x_T2I.device)
    if tokens:
        _swiglu_kernel[(tokens, triton.cdiv(width, 1024))](x_T2I, out, width, BLOCK=1024, num_warps=4)
    return out


# --- one expert, BLOCK_M rows at a time ---------------------------------------------------------------------
@triton.jit
def _rows_of_expert(mine, rank, pair, first, BLOCK_M: tl.constexpr):
    """Pairs number first … first + BLOCK_M − 1 among this expert's, −1 where there are fewer."""
    wanted = first + tl.arange(0, BLOCK_M)
    hit = mine[None, :] & (rank[None, :] == wanted[:, None])
    return tl.max(tl.where(hit, pair[None, :], -1), 1)


@triton.jit
def _gate_up_kernel(
    x, expert, w, out, pairs, hidden, width,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.arange(0, BLOCK_P)
    mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
    count = tl.sum(mine.to(tl.int32), 0)
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    gate_row = w + (e * 2 * width + n[:, None]) * hidden
    up_row = gate_row + width * hidden
    for first in range(0, count, BLOCK_M):
        row = _rows_of_expert(mine, rank, pair, first, BLOCK_M)
        x_row = x + (tl.maximum(row, 0) // K).to(tl.int64) * hidden
        gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, hidden, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = (n[:, None] < width) & (d[None, :] < hidden)
            value = tl.load(
                x_row[None, :] + d[:, None], mask=(row >= 0)[None, :] & (d < hidden)[:, None], other=0.0
            )
            gate = tl.dot(
                tl.load(gate_row + d[None, :], mask=mask, other=0.0), value, gate, input_precision="ieee"
            )
            up = tl.dot(tl.load(up_row + d[None, :], mask=mask, other=0.0), value, up, input_precision="ieee")
        y = _silu_mul(gate, up, out.dtype.element_ty)
        to = out + tl.maximum(row, 0).to(tl.int64)[None, :] * width + n[:, None]
        tl.store(to, y.to(out.dtype.element_ty), mask=(row >= 0)[None, :] & (n < width)[:, None])


@triton.jit
def _down_kernel(
    h, expert, w, out, pairs, hidden, width,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.arange(0, BLOCK_P)
    mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
    count = tl.sum(mine.to(tl.int32), 0)
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    w_row = w + (e * hidden + n[:, None]) * width
    for first in range(0, count, BLOCK_M):
        row = _rows_of_expert(mine, rank, pair, first, BLOCK_M)
        h_row = h + tl.maximum(row, 0).to(tl.int64) * width
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, width, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            mask = (n[:, None] < hidden) & (i[None, :] < width)
            value = tl.load(
                h_row[None, :] + i[:, None], mask=(row >= 0)[None, :] & (i < width)[:, None], other=0.0
            )
            acc = tl.dot(
                tl.load(w_row + i[None, :], mask=mask, other=0.0), value, acc, input_precision="ieee"
            )
        to = out + tl.maximum(row, 0).to(tl.int64)[None, :] * hidden + n[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(row >= 0)[None, :] & (n < hidden)[:, None])


@triton.jit
def _combine_kernel(
    y, place, weight, shared, residual, out, hidden,
    K: tl.constexpr, PLACED: tl.constexpr, SHARED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    if SHARED:
        acc += tl.load(shared + token * hidden + col, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual + token * hidden + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + col, acc.to(out.dtype.element_ty), mask=inside)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ_k w_k · expert_k(x) + shared + residual, [T, D], summed in FP32."""
    tokens, hidden = x_TD.shape
    K, (n_experts, _, width) = expert_TK.shape[1], down_EDI.shape
    pairs = tokens * K
    x_TD = x_TD.contiguous()
    h_PI = torch.empty((pairs, width), dtype=x_TD.dtype, device=x_TD.device)
    y_PD = torch.empty((pairs, hidden), dtype=x_TD.dtype, device=x_TD.device)
    blocks = {"BLOCK_P": triton.next_power_of_2(pairs), "BLOCK_M": _rows_a_tile(pairs, n_experts)}
    _gate_up_kernel[(triton.cdiv(width, 64), n_experts)](
        x_TD, expert_TK, gate_up_E2ID, h_PI, pairs, hidden, width,
        K=K, **blocks, BLOCK_N=64, BLOCK_D=128 if blocks["BLOCK_M"] == 16 else 64, num_warps=4, num_stages=3,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(hidden, 64), n_experts)](
        h_PI, expert_TK, down_EDI, y_PD, pairs, hidden, width,
        **blocks, BLOCK_N=64, BLOCK_I=128 if blocks["BLOCK_M"] == 16 else 64, num_warps=4, num_stages=4,
    )  # fmt: skip
    return _combine(y_PD, None, weight_TK, shared_TD, residual_TD)


def _rows_a_tile(pairs: int, n_experts: int) -> int:
    """Rows of an expert that share one reading of its weights: half as much again as an even spread gives."""
    return min(64, max(16, triton.next_power_of_2(pairs * 3 // (2 * n_experts))))


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
) -> Tensor:
    (tokens, K), hidden = weight_TK.shape, row_ND.shape[1]
    out_TD = torch.empty((tokens, hidden), dtype=row_ND.dtype, device=row_ND.device)
    _combine_kernel[(tokens, triton.cdiv(hidden, 1024))](
        row_ND, row_ND if place is None else place, weight_TK,
        row_ND if shared_TD is None else shared_TD.contiguous(),
        row_ND if residual_TD is None else residual_TD.contiguous(), out_TD, hidden, K=K,
        PLACED=place is not None, SHARED=shared_TD is not None, RESIDUAL=residual_TD is not None,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out_TD
