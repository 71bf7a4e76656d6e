"""Rotary embedding in one kernel, both pair layouts. Reference: `hadal.ops.rope`. x [T, H, R] as it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_kernel(
    x, rotation, out, heads, half, t_stride, h_stride, out_t_stride, out_h_stride, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_R)
    mask = (head[:, None] < heads) & (pair[None, :] < half)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half
    cos = tl.load(rotation + token * 2 * half + pair, mask=pair < half, other=0.0)[None, :]
    sin = tl.load(rotation + token * 2 * half + half + pair, mask=pair < half, other=0.0)[None, :]
    base = x + token * t_stride + head[:, None] * h_stride
    a = tl.load(base + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + second[None, :], mask=mask, other=0.0).to(tl.float32)
    to = out + token * out_t_stride + head[:, None] * out_h_stride
    tl.store(to + first[None, :], (a * cos - b * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(to + second[None, :], (b * cos + a * sin).to(out.dtype.element_ty), mask=mask)


def rotate(x: Tensor, rotation_T2r: Tensor, interleaved: bool) -> Tensor:
    """Rotated copy of x [T, H, R] or [T, R], contiguous."""
    x_THR = x if x.dim() == 3 else x.unsqueeze(1)
    if x_THR.stride(-1) != 1:
        x_THR = x_THR.contiguous()
    out = torch.empty(x_THR.shape, dtype=x.dtype, device=x.device)
    rotate_into(x_THR, rotation_T2r, out, interleaved)
    return out.view(x.shape)


def rotate_into(x_THR: Tensor, rotation_T2r: Tensor, out_THR: Tensor, interleaved: bool) -> None:
    """Write the rotated heads into a (strided) tensor; the last dimensions of both are contiguous."""
    tokens, heads, width = x_THR.shape
    block_h = min(triton.next_power_of_2(heads), 16)
    _rotate_kernel[(tokens, triton.cdiv(heads, block_h))](
        x_THR,
        rotation_T2r.contiguous(),
        out_THR,
        heads,
        width // 2,
        x_THR.stride(0),
        x_THR.stride(1),
        out_THR.stride(0),
        out_THR.stride(1),
        INTERLEAVED=interleaved,
        BLOCK_H=block_h,
        BLOCK_R=triton.next_power_of_2(width // 2),
        num_warps=2,
    )
