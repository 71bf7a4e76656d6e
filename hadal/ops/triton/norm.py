"""RMSNorm, alone or behind a residual addition: one program a row. Reference: `hadal.ops.rms_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.sizes import power_of_2


@triton.jit
def _norm_kernel(
    x, delta, weight, total, out, width, x_stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < width
    scale_by = tl.load(weight + col, mask=inside, other=0.0)
    pdl.wait(PDL)
    value = tl.load(x + row * x_stride + col, mask=inside, other=0.0)
    if ADD:  # the sum is rounded to the stream's dtype before it is normed, as in the unfused pair
        value = value + tl.load(delta + row * width + col, mask=inside, other=0.0)
        tl.store(total + row * width + col, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    normed = (wide * scale).to(out.dtype.element_ty)
    tl.store(out + row * width + col, normed * scale_by, mask=inside)


def _launch(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if delta is not None else out
    block = power_of_2(width)
    _norm_kernel[(rows.shape[0],)](
        rows,
        delta.contiguous() if delta is not None else rows,
        weight,
        total,
        out,
        width,
        rows.stride(0),
        eps,
        ADD=delta is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
        **pdl.options(rows),
    )
    return total.view(x.shape), out.view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension; rows may be strided (a slice of a wider matrix)."""
    return _launch(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, RMSNorm(x + delta)) in one pass."""
    return _launch(x, delta, weight, eps)
