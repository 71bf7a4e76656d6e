"""Experts of one token in two launches. Reference: `hadal.ops.experts`; more tokens: experts.py.

Each of the token's experts, and each part of the shared one (experts.py says what that is), has programs of
its own; of the down product's, the last one to finish a block of outputs adds up all experts' rows there, and
the residual.
Legend: K experts, R = parts + K rows, D hidden, I width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.arrivals import counters
from hadal.ops.triton.experts import Tiles, down_rows, gate_up_rows
from hadal.ops.triton.sizes import ceil_div

UP, DOWN = Tiles(64, 128, 4, 4), Tiles(64, 128, 4, 4)


@triton.jit
def _gate_up_kernel(
    x, expert, w, shared, out, hidden, width, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    part = tl.program_id(1)
    is_shared = part < PARTS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(n, width - 1)[:, None].to(tl.int64) * hidden
    pdl.wait(PDL)
    e = tl.load(expert + tl.maximum(part - PARTS, 0))
    base = tl.where(is_shared, shared + tl.cast(part * width, tl.int64) * hidden, w + e * 2 * width * hidden)
    apart = tl.where(is_shared, PARTS * width, width).to(tl.int64) * hidden  # from gate rows to up rows
    i = tl.arange(0, 16)
    row = tl.where(i == 0, 0, -1)
    gate_up_rows(
        x, row, part + row, base + own, base + apart + own, out, n, hidden, width, 16, BLOCK_N, BLOCK_D
    )


@triton.jit
def _down_kernel(
    h, expert, weight, w, shared, residual, rows, out, arrived, hidden, width, PARTS: tl.constexpr,
    K: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    part = tl.program_id(1)
    is_shared = part < PARTS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(n, hidden - 1)[:, None].to(tl.int64)
    pdl.wait(PDL)
    e = tl.load(expert + tl.maximum(part - PARTS, 0))
    base = tl.where(is_shared, shared + part * width, w + e * hidden * width)
    stride = tl.where(is_shared, PARTS * width, width)
    i = tl.arange(0, 16)
    down_rows(
        h, tl.where(i == 0, part, -1), base + own * stride, rows, n, hidden, width, 16, BLOCK_N, BLOCK_I
    )
    tl.debug_barrier()  # all threads' outputs are written before one of them says so
    if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == PARTS + K - 1:
        tl.store(arrived + tl.program_id(0), 0)  # for the next launch
        acc = tl.zeros([BLOCK_N], tl.float32)
        for k in tl.static_range(K):
            at = rows + (PARTS + k) * hidden + n
            y = tl.load(at, mask=n < hidden, other=0.0, cache_modifier=".cg").to(tl.float32)
            acc += y * tl.load(weight + k)
        for k in tl.static_range(PARTS):
            at = rows + k * hidden + n
            acc += tl.load(at, mask=n < hidden, other=0.0, cache_modifier=".cg").to(tl.float32)
        if RESIDUAL:
            acc += tl.load(residual + n, mask=n < hidden, other=0.0).to(tl.float32)
        tl.store(out + n, acc.to(out.dtype.element_ty), mask=n < hidden)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared: tuple[Tensor, Tensor] | None, parts: int, residual_TD: Tensor | None,
    up: Tiles = UP, down: Tiles = DOWN,
) -> Tensor:  # fmt: skip
    """Σ_k w_k · expert_k(x) + shared(x) + residual, [1, D], summed in FP32."""
    hidden, K, width = x_TD.shape[1], expert_TK.shape[1], down_EDI.shape[2]
    shared_up, shared_down = shared or (x_TD, x_TD)
    h_RI = x_TD.new_empty(parts + K, width)
    y_RD = x_TD.new_empty(parts + K, hidden)
    out_TD = torch.empty_like(x_TD)
    narrow = 1 if x_TD.element_size() == 2 else 2  # FP32 tiles have half the inputs
    _gate_up_kernel[(ceil_div(width, up.outputs), parts + K)](
        x_TD, expert_TK, gate_up_E2ID, shared_up, h_RI, hidden, width, PARTS=parts, BLOCK_N=up.outputs,
        BLOCK_D=up.inputs // narrow, num_warps=up.warps, num_stages=up.stages, **pdl.options(x_TD),
    )  # fmt: skip
    _down_kernel[(ceil_div(hidden, down.outputs), parts + K)](
        h_RI, expert_TK, weight_TK, down_EDI, shared_down, x_TD if residual_TD is None else residual_TD, y_RD,
        out_TD, counters(x_TD.device), hidden, width, PARTS=parts, K=K, RESIDUAL=residual_TD is not None,
        BLOCK_N=down.outputs, BLOCK_I=down.inputs // narrow, num_warps=down.warps, num_stages=down.stages,
        **pdl.options(x_TD),
    )  # fmt: skip
    return out_TD
