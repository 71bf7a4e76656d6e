"""Linear layers of few rows, where reading the weight is the cost. Reference: `hadal.ops.linear`.

A program owns BLOCK_N output columns (weight rows) for all input rows and streams its weights once; SwiGLU
can be fused into a gate/up product. At 1 and 32 rows of V2-Lite's shapes on an H100: up to 18% below cuBLAS.
Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton.experts import _silu_mul

MAX_ROWS = 32
MAX_INPUTS = 4096  # wider rows are cuBLAS's: it splits them over programs


@triton.jit
def _linear_kernel(
    x, w, bias, out, M, N, K, x_stride, BIAS: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row = w + n[:, None].to(tl.int64) * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (n < N)[:, None] & (k < K)[None, :]
        x_mask = (m < M)[None, :] & (k < K)[:, None]
        value = tl.load(x + m[None, :] * x_stride + k[:, None], mask=x_mask, other=0.0)
        acc = tl.dot(tl.load(row + k[None, :], mask=mask, other=0.0), value, acc, input_precision="ieee")
        if SWIGLU:
            up_row = row + tl.cast(N, tl.int64) * K
            up = tl.dot(tl.load(up_row + k[None, :], mask=mask, other=0.0), value, up, input_precision="ieee")
    if SWIGLU:
        acc = _silu_mul(acc, up, out.dtype.element_ty)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    to = out + m[None, :] * N + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def wants(x: Tensor, weight_NK: Tensor) -> bool:
    """Whether these kernels are the better choice: few BF16 rows that are not too wide."""
    narrow = x.dtype == torch.bfloat16 and weight_NK.shape[1] <= MAX_INPUTS
    return narrow and x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, swiglu: bool = False) -> Tensor:
    """x·Wᵀ + b; with `swiglu` the weight stacks gate rows above up rows and silu(gate) ⊙ up comes out."""
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    (M, K), N = x_MK.shape, weight_NK.shape[0] // (2 if swiglu else 1)
    out = torch.empty((M, N), dtype=x_MK.dtype, device=x_MK.device)
    block_n, block_k, warps, stages = (16, 256, 2, 4 if swiglu else 5) if N <= 8192 else (64, 128, 4, 3)
    _linear_kernel[(triton.cdiv(N, block_n),)](
        x_MK, weight_NK, x_MK if bias_N is None else bias_N, out, M, N, K, x_MK.stride(0),
        BIAS=bias_N is not None, SWIGLU=swiglu, BLOCK_M=16 if M <= 16 else 32, BLOCK_N=block_n,
        BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
