"""Linear layers of few rows, where reading the weight is the cost. Reference: `hadal.ops.linear`.

A program owns BLOCK_N outputs (weight rows) for all input rows, or a share of their inputs, and streams its
weights once; of several shares the program that comes last adds up the partial sums, in a fixed order. Fused
behind the product: bias, SwiGLU of a gate/up pair, the residual stream, and a second matrix over the same
input.
Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import gemv, pdl
from hadal.ops.triton.arrivals import counters
from hadal.ops.triton.gemv import silu_mul
from hadal.ops.triton.sizes import ceil_div

MAX_ROWS = 32


class Config(NamedTuple):
    """Block sizes of a launch; `splits`: shares of the inputs."""

    outputs: int
    inputs: int
    warps: int
    stages: int
    splits: int


def config_for(N: int, K: int, swiglu: bool) -> Config:
    """Measured on an H100 (benchmarks/few_rows_gpu.py): tall tiles and a deep pipeline, even where that makes
    fewer programs than there are multiprocessors; wide rows are shared."""
    if swiglu:  # gate and up are not shared out
        return Config(64, 128, 4, 5, 1)
    return Config(64, 128, 4, 5, 4 if K > 4096 and N <= 8192 else 2 if N <= 2048 else 1)


@triton.jit
def _rows(
    x, w, bias, residual, out, partial, arrived, block, M, N, K, x_stride, share,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Outputs block · BLOCK_N … of one weight."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row = w + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K
    up_row = row + tl.cast(N, tl.int64) * K
    split = tl.program_id(1)
    first = split * share
    last = tl.minimum(first + share, K)
    pdl.wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_mask = (m < M)[None, :] & (k < last)[:, None]
        value = tl.load(x + m[None, :] * x_stride + k[:, None], mask=x_mask, other=0.0)
        mask = (n < N)[:, None] & (k < last)[None, :]
        acc = tl.dot(tl.load(row + k[None, :], mask=mask, other=0.0), value, acc, input_precision="ieee")
        if SWIGLU:
            up = tl.dot(tl.load(up_row + k[None, :], mask=mask, other=0.0), value, up, input_precision="ieee")
    to = m[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    done = True
    if SPLITS > 1:
        at = partial + tl.program_id(0).to(tl.int64) * SPLITS * BLOCK_N * BLOCK_M
        at += tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        tl.store(at + split * BLOCK_N * BLOCK_M, acc)
        tl.debug_barrier()  # all threads' sums are written before one of them says so
        done = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1
        if done:
            tl.store(arrived + tl.program_id(0), 0)  # for the next launch
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(at + i * BLOCK_N * BLOCK_M, cache_modifier=".cg")
    if done:
        if SWIGLU:
            acc = silu_mul(acc, up, out.dtype.element_ty)
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if RESIDUAL:  # the product is rounded before the addition, as in the unfused pair
            acc = acc.to(out.dtype.element_ty).to(tl.float32)
            acc += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_kernel(
    x, w, second, bias, residual, out, second_out, partial, arrived, M, N, second_N, K, x_stride, blocks,
    share, PAIR: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    block = tl.program_id(0)
    if PAIR:  # selected, not branched on: two branches would take the shared memory twice
        late = block >= blocks
        block = tl.where(late, block - blocks, block)
        w, out, N = tl.where(late, second, w), tl.where(late, second_out, out), tl.where(late, second_N, N)
    _rows(
        x, w, bias, residual, out, partial, arrived, block, M, N, K, x_stride, share, BIAS, RESIDUAL, SWIGLU,
        SPLITS, BLOCK_M, BLOCK_N, BLOCK_K, PDL,
    )  # fmt: skip


def wants(x: Tensor, *weights: Tensor) -> bool:
    """Whether these kernels are the better choice: few BF16 rows."""
    few = x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS
    return few and all(w.dtype == torch.bfloat16 for w in (x, *weights))


def takes_norm(x: Tensor, *weights: Tensor) -> bool:
    """Whether `norm` may be given: one row, all of it in registers."""
    return wants(x, *weights) and x.shape[0] == 1 and x.shape[1] <= gemv.MAX_NORMED


def linear(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None,
    swiglu: bool = False, dtype: torch.dtype | None = None, config: Config | gemv.Config | None = None,
    norm: gemv.Norm | None = None,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + b + residual, in `dtype` or x's; with `swiglu` the weight stacks gate rows above up rows and
    silu(gate) ⊙ up comes out; with `norm`, where `takes_norm`, RMSNorm(x) is multiplied."""
    N = weight_NK.shape[0] // (2 if swiglu else 1)
    out = torch.empty((x_MK.shape[0], N), dtype=dtype or x_MK.dtype, device=x_MK.device)
    _launch(x_MK, weight_NK, None, bias_N, residual_MN, out, None, swiglu, config, norm)
    return out


def linear_pair(
    x_MK: Tensor, first_NK: Tensor, second_NK: Tensor, config: Config | gemv.Config | None = None,
    norm: gemv.Norm | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x·W₁ᵀ, x·W₂ᵀ) in one launch."""
    out, second = (
        torch.empty((x_MK.shape[0], w.shape[0]), dtype=x_MK.dtype, device=x_MK.device)
        for w in (first_NK, second_NK)
    )
    _launch(x_MK, first_NK, second_NK, None, None, out, second, False, config, norm)
    return out, second


def _launch(
    x_MK: Tensor, weight: Tensor, second: Tensor | None, bias_N: Tensor | None, residual_MN: Tensor | None,
    out: Tensor, second_out: Tensor | None, swiglu: bool, config: Config | gemv.Config | None,
    norm: gemv.Norm | None = None,
) -> None:  # fmt: skip
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    residual_MN = None if residual_MN is None else residual_MN.contiguous()
    (M, K), N = x_MK.shape, out.shape[1]
    if isinstance(config, gemv.Config) or (config is None and M <= gemv.MAX_ROWS):
        return gemv.launch(x_MK, weight, second, bias_N, residual_MN, out, second_out, swiglu, config, norm)
    second_N = 0 if second_out is None else second_out.shape[1]
    c = config or config_for(N + second_N, K, swiglu)
    if swiglu and c.splits > 1:
        raise ValueError(f"{c.splits} splits of a SwiGLU product: gate and up are not shared out")
    share = ceil_div(ceil_div(K, c.splits), c.inputs) * c.inputs
    splits = ceil_div(K, share)
    block_m = 16 if M <= 16 else 32
    blocks, programs = ceil_div(N, c.outputs), ceil_div(N, c.outputs) + ceil_div(second_N, c.outputs)
    partial, arrived = out, out
    if splits > 1:
        size = programs * splits * c.outputs * block_m
        partial, arrived = out.new_empty(size, dtype=torch.float32), counters(out.device)
    _linear_kernel[(programs, splits)](
        x_MK, weight, weight if second is None else second, x_MK if bias_N is None else bias_N,
        x_MK if residual_MN is None else residual_MN, out,
        out if second_out is None else second_out, partial, arrived, M, N, second_N, K, x_MK.stride(0),
        blocks, share, PAIR=second is not None, BIAS=bias_N is not None, RESIDUAL=residual_MN is not None,
        SWIGLU=swiglu, SPLITS=splits, BLOCK_M=block_m, BLOCK_N=c.outputs, BLOCK_K=c.inputs,
        num_warps=c.warps, num_stages=c.stages, **pdl.options(x_MK),
    )  # fmt: skip
