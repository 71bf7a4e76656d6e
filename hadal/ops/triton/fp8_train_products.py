"""The three products of FP8 training on a GPU, each on the fastest path that takes its shape.

    dense, 1×128 by 128×128 and by 1×128    torch's scaled_mm (cuBLASLt) on Hopper, channels in whole groups
    rows by expert, 1×128 by 128×128        fp8_gluon.py on Hopper, else fp8.py
    tokens by expert, 1×128 by 1×128        fp8_outer_gluon.py on Hopper, else the kernel here
    small or odd shapes, other GPUs         a BF16 product of dequantised codes: exact in, FP32 sums

The choice is by shape and device alone. The last path needs scales that are powers of two to be the recipe's
product; with others it runs in FP32 (hadal/ops/fp8_tiles.py).
Legend: as in fp8_tiles.py.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hadal.ops import fp8_tiles
from hadal.ops.fp8_tiles import TILE, Codes, Rows, Weight
from hadal.ops.packed import Packed
from hadal.ops.triton import fp8
from hadal.ops.triton.pdl import on_hopper
from hadal.ops.triton.sizes import ceil_div

GROUP = tl.constexpr(128)
OUTER_IN_GLUON = True  # or else the Triton kernel of gradients of experts' weights
WORTH = 256  # outputs and inputs from which FP8 products beat BF16 ones of dequantised codes


class _Stack(NamedTuple):
    """What the kernels of inference read of a packed weight."""

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    rows: int = 128


# --- dequantising -------------------------------------------------------------------------------------------
@triton.jit
def _wide_kernel(
    q, scale, used, out, K, R, ROWS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_R
    real = first >= 0
    if ROWS:
        real = first < tl.load(used) * GROUP
    if real:
        row = first.to(tl.int64) + tl.arange(0, BLOCK_R)
        g = tl.program_id(1).to(tl.int64)
        k = g * GROUP + tl.arange(0, GROUP)
        inside = (row < R)[:, None] & (k < K)[None, :]
        at = row[:, None] * K + k[None, :]
        each = tl.load(scale + g * R + row, mask=row < R, other=0.0)
        value = tl.load(q + at, mask=inside, other=0.0).to(tl.float32) * each[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def dequantise(codes: Codes, dtype: torch.dtype, used: Tensor | None = None) -> Tensor:
    """[R, K]. `used` counts tiles of 128 rows that hold anything; later rows are left unwritten."""
    R, K = codes.q.shape
    out = torch.empty((R, K), dtype=dtype, device=codes.q.device)
    _wide_kernel[(ceil_div(R, 32), ceil_div(K, TILE))](
        *codes[:2], codes.scale if used is None else used, out, K, R, ROWS=used is not None, BLOCK_R=32,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _wide_weight_kernel(q, scale, out, N, K, groups):
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    k = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = (e * N + n)[:, None] * K + k[None, :]
    s = tl.load(scale + (e * tl.num_programs(0) + tl.program_id(0)) * groups + tl.program_id(1))
    value = tl.load(q + at, mask=inside, other=0.0).to(tl.float32) * s
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def dequantise_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """[N, K] or [E, N, K]."""
    *lead, N, K = weight.q.shape
    out = torch.empty(weight.q.shape, dtype=dtype, device=weight.q.device)
    grid = ceil_div(N, TILE), ceil_div(K, TILE), lead[0] if lead else 1
    _wide_weight_kernel[grid](weight.q, weight.scale, out, N, K, grid[1], num_warps=8)
    return out


# --- x · Wᵀ -------------------------------------------------------------------------------------------------
def matmul(a: Codes, weight: Weight, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """a · Wᵀ [R, N], of each expert's rows with its own matrix of a stack."""
    path = matmul_path(a, weight, dtype, rows)
    if path == "torch":
        return fp8.scaled_mm(a.q, a.scale, cast(Packed, _stack(weight)), dtype)
    if path in ("gluon", "triton"):
        return _by_tiles(a, weight, dtype, rows, path)
    return _emulated(a, weight, dtype, rows)


def matmul_path(a: Codes, weight: Weight, dtype: torch.dtype, rows: Rows | None) -> str:
    """ "torch", "gluon", "triton" or "emulated": who multiplies, by shape and device."""
    (R, K), N = a.q.shape, weight.q.shape[-2]
    if min(N, K) < WORTH or R % TILE or K % 16 or N % 16 or not fp8._hardware(a.q.device):
        return "emulated"
    if rows is None and K % TILE == 0 and fp8._torch_multiplies_blocks(a.q.device):
        return "torch"
    return "gluon" if on_hopper(a.q.device) and dtype == torch.bfloat16 else "triton"


def _stack(weight: Weight) -> _Stack:
    return _Stack(weight.q, weight.scale, tuple(weight.q.shape))


def _by_tiles(a: Codes, weight: Weight, dtype: torch.dtype, rows: Rows | None, path: str) -> Tensor:
    if rows is None:
        expert = torch.zeros(a.q.shape[0] // TILE, dtype=torch.int32, device=a.q.device)
        used = torch.full_like(expert[:1], expert.numel())
    else:
        expert, used = rows.tile_expert, rows.used
    stack = cast(Packed, _stack(weight))
    if path == "gluon":
        from hadal.ops.triton import fp8_gluon

        return fp8_gluon.grouped_matmul(a.q, a.scale, stack, expert, used)
    return fp8.grouped_matmul(a.q, a.scale, stack, expert, used, dtype, fp8.Config())


def _emulated(a: Codes, weight: Weight, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    if not (a.power and weight.power):
        return fp8_tiles.matmul(a, weight, dtype, rows)
    x_RK = dequantise(a, dtype, None if rows is None else rows.used)
    w = dequantise_weight(weight, dtype)
    if rows is None:
        return x_RK @ w.t()
    return _grouped(x_RK, w.transpose(1, 2), rows)


def _grouped(a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """torch's grouped product; without one (the interpreter's dtypes, CPU), expert by expert."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch._grouped_mm(a, b, offs=rows.end_E)
    spans = fp8_tiles._spans(rows)
    if b.dim() == 2:
        return torch.stack([a[:, span] @ b[span] for span in spans])
    out = torch.zeros(a.shape[0], b.shape[-1], dtype=a.dtype, device=a.device)
    for e, span in enumerate(spans):
        out[span] = a[span] @ b[e]
    return out


# --- dyᵀ · x ------------------------------------------------------------------------------------------------
class OuterConfig(NamedTuple):
    """A tile is 128 × `halves` · `half` of one expert's gradient. `beside`: programs of a multiprocessor."""

    half: int = 128
    halves: int = 1
    warps: int = 8
    stages: int = 4
    beside: int = 1


@triton.jit
def _outer_kernel(
    a, b, c, a_scale, b_scale, end, N, K, n_experts,
    HALF: tl.constexpr, HALVES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(N, GROUP)
    k_tiles = tl.cdiv(K, HALF * HALVES)
    for tile in range(tl.program_id(0), n_experts * n_tiles * k_tiles, PROGRAMS):
        e = tile // (n_tiles * k_tiles)
        inside = tile % (n_tiles * k_tiles)
        n = inside % n_tiles * GROUP
        k = inside // n_tiles * (HALF * HALVES)
        first = tl.load(end + e - 1, mask=e > 0, other=0) // GROUP
        last = tl.load(end + e) // GROUP
        row = n + tl.arange(0, GROUP)
        acc_0 = tl.zeros([GROUP, HALF], tl.float32)
        acc_1 = tl.zeros([GROUP, HALF], tl.float32)
        for t in range(first, last):
            at = tl.cast(t, tl.int64)
            sa = tl.load(a_scale + at * N + row, mask=row < N, other=0.0)
            x = a.load([n, t * GROUP])
            part = tl.dot(x, b.load([k, t * GROUP]).T)
            acc_0 += part * sa[:, None] * _column_scales(b_scale + at * K, k, K, HALF)[None, :]
            if HALVES == 2:
                part = tl.dot(x, b.load([k + HALF, t * GROUP]).T)
                acc_1 += part * sa[:, None] * _column_scales(b_scale + at * K, k + HALF, K, HALF)[None, :]
        c.store([e * N + n, k], acc_0.to(c.dtype))
        if HALVES == 2:
            c.store([e * N + n, k + HALF], acc_1.to(c.dtype))


@triton.jit
def _column_scales(scale, k, K, HALF: tl.constexpr):
    column = k + tl.arange(0, HALF)
    return tl.load(scale + column, mask=column < K, other=0.0)


def outer(a: Codes, b: Codes, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """a · bᵀ [N, K] of two transposes [N, R] and [K, R], or [E, N, K] of each expert's rows."""
    path = outer_path(a, b, rows)
    if path == "torch":
        from torch.nn.functional import ScalingType, scaled_mm

        kind = ScalingType.BlockWise1x128
        return scaled_mm(a.q, b.q.t(), a.scale.t(), kind, b.scale.t(), kind, output_dtype=dtype)
    if path == "gluon" and rows is not None and dtype == torch.bfloat16:
        from hadal.ops.triton import fp8_outer_gluon

        return fp8_outer_gluon.outer(a, b, rows)
    if path in ("gluon", "triton"):
        return outer_by_tiles(a, b, dtype, rows)
    return outer_emulated(a, b, dtype, rows)


def outer_into(a: Codes, b: Codes, rows: Rows, into_ENK: Tensor, more: bool) -> None:
    """`outer` of each expert's rows, written to `into`, or with `more` added to it."""
    if outer_path(a, b, rows) == "gluon" and into_ENK.data_ptr() % 16 == 0:
        from hadal.ops.triton import fp8_outer_gluon

        fp8_outer_gluon.outer(a, b, rows, into_ENK, more)
    else:
        fp8_tiles.put(outer(a, b, torch.bfloat16, rows), into_ENK, more)


def outer_emulated(a: Codes, b: Codes, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """The product of dequantised codes."""
    if not (a.power and b.power):
        return fp8_tiles.outer(a, b, dtype, rows)
    a_NR, b_KR = dequantise(a, dtype), dequantise(b, dtype)
    return a_NR @ b_KR.t() if rows is None else _grouped(a_NR, b_KR.t(), rows)


def outer_path(a: Codes, b: Codes, rows: Rows | None) -> str:
    """ "torch", "triton" or "emulated": who multiplies, by shape and device."""
    (N, R), K = a.q.shape, b.q.shape[0]
    if min(N, K) < WORTH or R % TILE or N % 16 or K % 16 or not fp8._hardware(a.q.device):
        return "emulated"
    if rows is None:
        return "torch" if fp8._torch_multiplies_blocks(a.q.device) else "triton"
    if N % TILE:
        return "emulated"
    return "gluon" if OUTER_IN_GLUON and K % TILE == 0 and on_hopper(a.q.device) else "triton"


def outer_by_tiles(
    a: Codes, b: Codes, dtype: torch.dtype, rows: Rows | None, config: OuterConfig | None = None
) -> Tensor:
    """By the kernel here. Experts' gradients lie one below another: whole tiles of outputs only."""
    config = config or OuterConfig()
    (N, R), K, device = a.q.shape, b.q.shape[0], a.q.device
    if rows is not None and N % TILE:
        raise ValueError(f"{N} outputs of each expert: need a multiple of {TILE}")
    end = torch.full((1,), R, dtype=torch.int32, device=device) if rows is None else rows.end_E
    out = torch.empty((end.numel() * N, K), dtype=dtype, device=device)
    programs = fp8._programs(device) * config.beside
    _outer_kernel[(programs,)](
        TensorDescriptor.from_tensor(a.q, [TILE, TILE]),
        TensorDescriptor.from_tensor(b.q, [config.half, TILE]),
        TensorDescriptor.from_tensor(out, [TILE, config.half]),
        a.scale, b.scale, end, N, K, end.numel(), HALF=config.half, HALVES=config.halves,
        PROGRAMS=programs,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out if rows is None else out.view(-1, N, K)
