"""The backward pass of SwiGLU in FP8 training, in Gluon, for Hopper: one reading, five tensors of codes.

From the codes of gate and up, and the gradient of w · silu(gate) ⊙ up: the gradient of [gate, up] along
channels and along tokens, the hidden values along tokens, the gradient of w. What it computes is
`hadal.ops.fp8_tiles.swiglu_backward`; Triton's own kernel for it, where this one does not go, is in
fp8_train.py.

A program walks over tiles of 128 rows × 128 channels; the copy engine brings the next one while it works on
this. Along channels a warp holds whole rows. Along tokens values change hands as BF16, through shared memory,
so that a warp holds whole columns: their maxima need no other warp, and codes leave sixteen bytes at a time.
Legend: R rows, D channels of a tile; W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hadal.ops import fp8_tiles
from hadal.ops.fp8_tiles import Codes, Rows
from hadal.ops.triton.fp8 import _programs
from hadal.ops.triton.fp8_gluon import GROUP, barrier, read
from hadal.ops.triton.pdl import on_hopper

AMAX_MIN = gl.constexpr(fp8_tiles.AMAX_MIN)
BYTES = gl.constexpr(4 * 128 * 128)  # of a tile: gate, up, and the gradient in BF16
# a thread's share, its warp's threads, the warps; the dimension that lies together
EACH = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [16, 1], [1, 0]))  # fewer registers, for weighted rows
FOURS = gl.constexpr(gl.BlockedLayout([4, 8], [2, 16], [16, 1], [1, 0]))  # fewer instructions
ACROSS = gl.constexpr(gl.BlockedLayout([16, 2], [8, 4], [1, 16], [0, 1]))
WARPS = 16


@gluon.jit
def _scale(amax, POWER: gl.constexpr):
    """See fp8_train.py."""
    amax = gl.maximum(amax, AMAX_MIN)
    if POWER:
        bits = (amax.to(gl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000
        s = (bits - 0x4000000).to(gl.float32, bitcast=True)
        return gl.where(amax < float("inf"), s, amax)
    return gl.div_rn(amax, gl.full_like(amax, 448.0))


@gluon.jit
def _e4m3(x, s, POWER: gl.constexpr):
    """Codes of x / s, at most 448; s has x's shape but for 1 along the tile."""
    if POWER:  # the reciprocal of a power of two is exact
        scaled = x * (0x7F000000 - s.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    else:
        scaled = gl.div_rn(x, s + gl.zeros_like(x))
    return scaled.to(gl.float8e4nv)


@gluon.jit
def _narrow(x):
    """To BF16 two at a time: one by one they would go through the slow unit that exponentials need."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _sigmoid(x):
    """See fp8_train.py."""
    root = gl.rsqrt(1.0 + gl.exp2(x * -1.4426950408889634))
    return root * root


@gluon.jit
def _along(x_RD, q, scale, stride, POWER: gl.constexpr, ALONG: gl.constexpr):
    """A tile's codes and its rows' scales, to where its corner lies."""
    r = gl.arange(0, GROUP, gl.SliceLayout(1, ALONG))
    k = gl.arange(0, GROUP, gl.SliceLayout(0, ALONG))
    x_RD = x_RD.to(gl.float32)
    s_R = _scale(gl.max(gl.abs(x_RD), 1), POWER)
    gl.store(q + (r[:, None] * stride + k[None, :]), _e4m3(x_RD, s_R[:, None], POWER))
    gl.store(scale + r, s_R)


@gluon.jit
def _across(x_RD, q, scale, R, POWER: gl.constexpr):
    """A tile's transposed codes and its columns' scales, to where its corner lies."""
    r = gl.arange(0, GROUP, gl.SliceLayout(1, ACROSS))
    k = gl.arange(0, GROUP, gl.SliceLayout(0, ACROSS))
    x_RD = gl.convert_layout(x_RD, ACROSS).to(gl.float32)
    s_D = _scale(gl.max(gl.abs(x_RD), 0), POWER)
    at = q + k.to(gl.int64) * R
    gl.store(at[None, :] + r[:, None], _e4m3(x_RD, s_D[None, :], POWER))
    gl.store(scale + k, s_D)


@gluon.jit
def _fetch(kept, dh, gate_smem, up_smem, grad_smem, bar, tile, groups, width, pred):
    row = tile // groups * GROUP
    k = tile % groups * GROUP
    mbarrier.expect(bar, BYTES, pred=pred)
    read(kept, [row, k], bar, gate_smem, pred=pred)
    read(kept, [row, width + k], bar, up_smem, pred=pred)
    read(dh, [row, k], bar, grad_smem, pred=pred)


@gluon.jit
def _swiglu_backward_kernel(
    kept, dh, kept_scale, weight, used, d, d_scale, d_columns, d_columns_scale, h_columns, h_columns_scale,
    dweight, width, R, POWER: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    ALONG: gl.constexpr = EACH if ROWS else FOURS
    gate_smem = gl.allocate_shared_memory(kept.dtype, [GROUP, GROUP], kept.layout)
    up_smem = gl.allocate_shared_memory(kept.dtype, [GROUP, GROUP], kept.layout)
    grad_smem = gl.allocate_shared_memory(dh.dtype, [GROUP, GROUP], dh.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    groups = width // GROUP
    tiles = R // GROUP * groups
    if ROWS:
        tiles = gl.load(used).to(gl.int32) * groups
    r = gl.arange(0, GROUP, gl.SliceLayout(1, ALONG))
    first = gl.program_id(0)
    _fetch(kept, dh, gate_smem, up_smem, grad_smem, bar, first, groups, width, first < tiles)
    phase = 0
    for tile in range(first, tiles, gl.num_programs(0)):
        g = (tile % groups).to(gl.int64)
        row = (tile // groups * GROUP).to(gl.int64)
        at = kept_scale + g * R + row
        gate_R = gl.load(at + r)
        up_R = gl.load(at + groups.to(gl.int64) * R + r)
        mbarrier.wait(bar, phase)
        phase ^= 1
        gate = gate_smem.load(ALONG)
        up = up_smem.load(ALONG)
        grad = grad_smem.load(ALONG)
        barrier()  # all have read the tile: the next may come
        ahead = tile + gl.num_programs(0)
        _fetch(kept, dh, gate_smem, up_smem, grad_smem, bar, ahead, groups, width, ahead < tiles)
        gate = gate.to(gl.float32) * gate_R[:, None]
        up = up.to(gl.float32) * up_R[:, None]
        grad = grad.to(gl.float32)
        share = _sigmoid(gate)
        silu = gate * share
        dgate = share * (1.0 + gate * (1.0 - share)) * up
        hidden = silu * up
        if ROWS:
            w = gl.load(weight + row + r)[:, None]
            gl.store(dweight + g * R + row + r, gl.sum(grad * hidden, 1))
            hidden *= w
            grad *= w
        hidden = _narrow(hidden)
        dup = _narrow(grad * silu)
        dgate = _narrow(grad * dgate)
        k = g * GROUP
        stride = 2 * width
        corner = d + row * stride + k
        tile_row = (tile // groups).to(gl.int64)
        _across(hidden, h_columns + k * R + row, h_columns_scale + tile_row * width + k, R, POWER)
        _along(dgate, corner, d_scale + g * R + row, stride, POWER, ALONG)
        _along(dup, corner + width, d_scale + (g + groups) * R + row, stride, POWER, ALONG)
        corner = d_columns + k * R + row
        scale = d_columns_scale + tile_row * stride + k
        _across(dgate, corner, scale, R, POWER)
        _across(dup, corner + width.to(gl.int64) * R, scale + width, R, POWER)


def takes(dh_RI: Tensor) -> bool:
    """Whether it goes here: whole tiles in BF16, on Hopper and nothing later."""
    R, width = dh_RI.shape
    whole = R > 0 and R % 128 == 0 and width % 128 == 0 and dh_RI.is_contiguous()
    return whole and dh_RI.dtype == torch.bfloat16 and on_hopper(dh_RI.device)


def swiglu_backward(
    kept: Codes, dh_RI: Tensor, weight_R: Tensor | None, rows: Rows | None,
    d: Codes, across: Codes, hidden: Codes, dweight: Tensor,
) -> None:  # fmt: skip
    """Fills d [R, 2W], its transpose, the hidden values' transpose, and dweight [groups, R]."""
    R, width = dh_RI.shape
    nothing = kept.scale
    _swiglu_backward_kernel[(_programs(dh_RI.device),)](
        TensorDescriptor.from_tensor(kept.q, [128, 128], gl.NVMMASharedLayout(128, 8, 2)),
        TensorDescriptor.from_tensor(dh_RI, [128, 128], gl.NVMMASharedLayout(128, 16, 2)),
        kept.scale, nothing if weight_R is None else weight_R, nothing if rows is None else rows.used,
        *d[:2], *across[:2], *hidden[:2], dweight, width, R, POWER=d.power, ROWS=rows is not None,
        num_warps=WARPS,
    )  # fmt: skip
