"""SwiGLU, and the ways of rows to experts and back, in both directions. Reference: `hadal.ops.experts`.

    rows      row[place[t, k]] = x[t]                 dx[t] = Σ_k drow[place[t, k]]
    combine   out[t] = Σ_k w[t, k]·row[place[t, k]]   drow[place[t, k]] = w[t, k]·dout[t]
              + shared[t] + residual[t]               dw[t, k] = ⟨row[place[t, k]], dout[t]⟩

Every row is read once and written once, sums are FP32 in a fixed order: the same bits in every run.
Legend: T tokens, K experts a token, N = T·K rows, D hidden, I width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import route
from hadal.ops.triton.gemv import silu_mul
from hadal.ops.triton.sizes import ceil_div, power_of_2

ELEMENTS = 1024  # of a program of the SwiGLU kernels


# --- SwiGLU -------------------------------------------------------------------------------------------------
@triton.jit
def _swiglu_kernel(x, out, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    from_gate = at // WIDTH * (2 * WIDTH) + at % WIDTH
    gate = tl.load(x + from_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + from_gate + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, silu_mul(gate, up, out.dtype.element_ty).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(x, dout, dx, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    from_gate = at // WIDTH * (2 * WIDTH) + at % WIDTH
    gate = tl.load(x + from_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + from_gate + WIDTH, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dx + from_gate, dgate.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + from_gate + WIDTH, (dy * silu).to(dx.dtype.element_ty), mask=inside)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T2I: Tensor) -> Tensor:
        x_T2I = x_T2I.contiguous()
        ctx.save_for_backward(x_T2I)
        out = x_T2I.new_empty(*x_T2I.shape[:-1], x_T2I.shape[-1] // 2)
        if out.numel():
            _swiglu_kernel[(ceil_div(out.numel(), ELEMENTS),)](
                x_T2I, out, out.numel(), WIDTH=out.shape[-1], BLOCK=ELEMENTS, num_warps=4
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x_T2I,) = ctx.saved_tensors
        dout, dx = grads[0].contiguous(), torch.empty_like(x_T2I)
        if dout.numel():
            _swiglu_backward_kernel[(ceil_div(dout.numel(), ELEMENTS),)](
                x_T2I, dout, dx, dout.numel(), WIDTH=dout.shape[-1], BLOCK=ELEMENTS, num_warps=4
            )
        return dx


def swiglu(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up of [.., 2I]; keeps its input for the backward pass."""
    return cast(Tensor, _Swiglu.apply(gate_up_T2I))


# --- rows of tokens, sorted by expert -----------------------------------------------------------------------
@triton.jit
def _gather_sum_kernel(
    row, place, weight, shared, residual, out, hidden, K: tl.constexpr, WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ_k (w[t, k]·) row[place[t, k]] (+ shared[t]) (+ residual[t])."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < hidden
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        at = tl.load(place + token * K + k)
        value = tl.load(row + at * hidden + col, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + token * K + k)
        acc += value
    if SHARED:
        acc += tl.load(shared + token * hidden + col, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual + token * hidden + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + col, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_backward_kernel(
    row, place, weight, dout, drow, dweight, hidden, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < hidden
    dy = tl.load(dout + token * hidden + col, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        at = tl.load(place + token * K + k)
        value = tl.load(row + at * hidden + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(dweight + token * K + k, tl.sum(value * dy, 0))
        scaled = dy * tl.load(weight + token * K + k)
        tl.store(drow + at * hidden + col, scaled.to(drow.dtype.element_ty), mask=inside)


def _gather_sum(
    row_ND: Tensor, place: Tensor, K: int, weight_TK: Tensor | None = None, shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    tokens, hidden = place.numel() // K, row_ND.shape[1]
    out_TD = row_ND.new_empty(tokens, hidden)
    block = min(2048, power_of_2(hidden))
    if tokens:
        _gather_sum_kernel[(tokens, ceil_div(hidden, block))](
            row_ND, place, row_ND if weight_TK is None else weight_TK,
            row_ND if shared_TD is None else shared_TD, row_ND if residual_TD is None else residual_TD,
            out_TD, hidden, K=K, WEIGHTED=weight_TK is not None, SHARED=shared_TD is not None,
            RESIDUAL=residual_TD is not None, BLOCK=block, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return out_TD


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, place: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.K = K
        return route.spread(x_TD, place, K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather_sum(grads[0].contiguous(), ctx.saved_tensors[0], ctx.K), None, None


def spread(x_TD: Tensor, place: Tensor, K: int) -> Tensor:
    """[T·K, D]: the row of pair p's token at place[p] (`route.places`)."""
    return cast(Tensor, _Spread.apply(x_TD, place, K))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row_ND: Tensor, place: Tensor, weight_TK: Tensor, shared_TD: Tensor | None,
        residual_TD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        row_ND, weight_TK = row_ND.contiguous(), weight_TK.contiguous()
        ctx.save_for_backward(row_ND, place, weight_TK)
        others = [None if x is None else x.contiguous() for x in (shared_TD, residual_TD)]
        return _gather_sum(row_ND, place, weight_TK.shape[1], weight_TK, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_ND, place, weight_TK = ctx.saved_tensors
        dout_TD = grads[0].contiguous()
        (tokens, hidden), block = dout_TD.shape, power_of_2(dout_TD.shape[1])
        drow_ND, dweight_TK = torch.empty_like(row_ND), torch.empty_like(weight_TK)
        if tokens:
            _combine_backward_kernel[(tokens,)](
                row_ND, place, weight_TK, dout_TD, drow_ND, dweight_TK, hidden, K=weight_TK.shape[1],
                BLOCK=block, num_warps=max(1, min(16, block // 256)),
            )  # fmt: skip
        shared, residual = (dout_TD if wanted else None for wanted in ctx.needs_input_grad[3:])
        return drow_ND, None, dweight_TK, shared, residual


def combine(
    row_ND: Tensor, place: Tensor, weight_TK: Tensor, shared_TD: Tensor | None, residual_TD: Tensor | None
) -> Tensor:
    """See `hadal.ops.experts.combine`; keeps rows and weights (FP32) for the backward pass."""
    return cast(Tensor, _Combine.apply(row_ND, place, weight_TK, shared_TD, residual_TD))
