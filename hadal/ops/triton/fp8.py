"""FP8 products with FP8 activations (V3 §3.3): 1×128 activations, 128×128 weights, FP32 promotion.

    y[m, n] = Σ_g sx[m, g] · sw[block of n, g] · Σ_{k in g} qx[m, k] · qw[n, k]      g: 128 channels

The inner sum is one chain of FP8 tensor-core products, whose adder keeps about 14 bits; the outer sum is
FP32, in registers. Activations are quantised by fused kernels: while rows are scattered to their experts,
behind SwiGLU, or behind an RMSNorm. References: `hadal.ops.fp8` for the numbers, `hadal.ops.packed` for the
products.

Rows lie sorted by expert, every expert's first row at a multiple of 128, so that a tile of 128 rows belongs
to one expert and can be loaded and stored whole. Scales of activations lie group-major, [G, R].
Legend: R rows with gaps, N outputs, K inputs, G groups of 128, T tokens, D hidden, E experts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hadal.ops.packed import Packed
from hadal.ops.triton import pdl
from hadal.ops.triton.experts import _combine
from hadal.ops.triton.gemv import silu_mul

GROUP = tl.constexpr(128)
ALIGN = 128  # rows of a tile, and what every expert's first row is a multiple of


class Sorted(NamedTuple):
    """Where (token, k) pairs lie once sorted: row of each [T·K], expert of each tile, tiles in use [1]."""

    place: Tensor
    tile_expert: Tensor
    used: Tensor


class Config(NamedTuple):
    """Block sizes of the grouped product: a tile is 128 rows × `halves` · `half` outputs."""

    half: int = 128
    halves: int = 2
    warps: int = 8
    stages: int = 3
    together: int = 8  # row tiles that walk through the outputs together, for the L2 cache
    flatten: bool = True


# --- quantising ---------------------------------------------------------------------------------------------
@triton.jit
def _quantise(x_GC):
    """(codes, scale of each row) of FP32 values: s = max(max|x|, 1e-4) / 448, as hadal/ops/fp8.py."""
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x_GC), 1), 1e-4), 448.0)
    scaled = tl.div_rn(x_GC, tl.broadcast_to(scale[:, None], x_GC.shape))
    q = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return q.to(tl.float8e4nv), scale


@triton.jit
def _rows_kernel(x, place, q, scale, K, R, x_stride, COPIES: tl.constexpr, BLOCK_G: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + token * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    code, each = _quantise(value)
    for copy in tl.static_range(max(COPIES, 1)):
        row = token
        if COPIES > 0:
            row = tl.load(place + token * COPIES + copy)
        tl.store(q + row * K + k, code, mask=k < K)
        tl.store(scale + g.to(tl.int64) * R + row, each, mask=g * GROUP < K)


def quantise_rows(
    x_TK: Tensor, place: Tensor | None = None, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """(codes [R, K], scales [G, R]) of each row, or of each row at its places [T·copies] among `rows`."""
    tokens, width = x_TK.shape
    rows = rows or tokens
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    groups = triton.cdiv(width, 128)
    q = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x_TK.device)
    scale = torch.empty((groups, rows), dtype=torch.float32, device=x_TK.device)
    block = min(16, triton.next_power_of_2(groups))
    _rows_kernel[(tokens, triton.cdiv(groups, block))](
        x_TK, scale if place is None else place, q, scale, width, rows, x_TK.stride(0),
        COPIES=0 if place is None else place.numel() // tokens, BLOCK_G=block, num_warps=4,
    )  # fmt: skip
    return q, scale


@triton.jit
def _swiglu_kernel(x, used, q, scale, K, R, USED: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    real = row == row
    if USED:
        real = row < tl.load(used).to(tl.int64) * TILE
    if real:
        g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        gate = tl.load(x + row * 2 * K + k, mask=k < K, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * K + K + k, mask=k < K, other=0.0).to(tl.float32)
        value = silu_mul(gate, up, x.dtype.element_ty).to(x.dtype.element_ty).to(tl.float32)
        code, each = _quantise(value)
        tl.store(q + row * K + k, code, mask=k < K)
        tl.store(scale + g.to(tl.int64) * R + row, each, mask=g * GROUP < K)


def swiglu_quantise(x_R2I: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes [R, I], scales [G, R]) of silu(gate) ⊙ up, rounded to x's dtype first, as unfused.

    `used` [1] counts tiles of 128 rows that hold anything; later rows are left unwritten.
    """
    rows, width = x_R2I.shape[0], x_R2I.shape[1] // 2
    x_R2I = x_R2I.contiguous()
    groups = triton.cdiv(width, 128)
    q = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x_R2I.device)
    scale = torch.empty((groups, rows), dtype=torch.float32, device=x_R2I.device)
    block = min(16, triton.next_power_of_2(groups))
    _swiglu_kernel[(rows, triton.cdiv(groups, block))](
        x_R2I, scale if used is None else used, q, scale, width, rows, USED=used is not None, BLOCK_G=block,
        TILE=ALIGN, num_warps=4,
    )  # fmt: skip
    return q, scale


@triton.jit
def _norm_kernel(
    x, delta, weight, total, normed, q, scale, K, R, x_stride, eps, ADD: tl.constexpr, BLOCK_G: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0)
    if ADD:  # rounded to the stream's dtype before it is normed, as in hadal/ops/triton/norm.py
        value = value + tl.load(delta + row * K + k, mask=k < K, other=0.0)
        tl.store(total + row * K + k, value, mask=k < K)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / K + eps)
    out = (wide * factor).to(normed.dtype.element_ty) * tl.load(weight + k, mask=k < K, other=0.0)
    tl.store(normed + row * K + k, out, mask=k < K)
    code, each = _quantise(out.to(tl.float32))
    tl.store(q + row * K + k, code, mask=k < K)
    tl.store(scale + g.to(tl.int64) * R + row, each, mask=g * GROUP < K)


def rms_norm_quantise(
    x_TK: Tensor, weight_K: Tensor, eps: float, delta_TK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + delta, RMSNorm of it, its codes [T, K], their scales [G, T]) in one pass over x."""
    tokens, width = x_TK.shape
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    groups = triton.cdiv(width, 128)
    normed = torch.empty((tokens, width), dtype=x_TK.dtype, device=x_TK.device)
    total = torch.empty_like(normed) if delta_TK is not None else x_TK
    q = torch.empty((tokens, width), dtype=torch.float8_e4m3fn, device=x_TK.device)
    scale = torch.empty((groups, tokens), dtype=torch.float32, device=x_TK.device)
    block = triton.next_power_of_2(groups)
    _norm_kernel[(tokens,)](
        x_TK, x_TK if delta_TK is None else delta_TK.contiguous(), weight_K, total, normed, q, scale, width,
        tokens, x_TK.stride(0), eps, ADD=delta_TK is not None, BLOCK_G=block,
        num_warps=min(max(block // 2, 1), 16),
    )  # fmt: skip
    return total, normed, q, scale


# --- the product --------------------------------------------------------------------------------------------
@triton.jit
def _grouped_kernel(
    a, b, c, a_scale, b_scale, tile_expert, used, N, K, R, scale_rows, groups,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    TOGETHER: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.load(used)
    n_tiles = tl.cdiv(N, HALF * HALVES)
    for tile in tl.range(tl.program_id(0), row_tiles * n_tiles, PROGRAMS, flatten=FLATTEN):
        band = tile // (TOGETHER * n_tiles)
        height = tl.minimum(row_tiles - band * TOGETHER, TOGETHER)
        inside = tile % (TOGETHER * n_tiles)
        m = band * TOGETHER + inside % height
        n = inside // height * (HALF * HALVES)
        e = tl.load(tile_expert + m)
        sa_row = a_scale + m * BLOCK_M + tl.arange(0, BLOCK_M)
        w_row = e * N + n
        s_row = b_scale + (e * scale_rows).to(tl.int64) * groups
        acc_0 = tl.zeros([BLOCK_M, HALF], tl.float32)
        acc_1 = tl.zeros([BLOCK_M, HALF], tl.float32)
        for g in range(groups):
            sa = tl.load(sa_row)
            sa_row += R
            x = a.load([m * BLOCK_M, g * GROUP])
            acc_0 += _promote(
                tl.dot(x, b.load([w_row, g * GROUP]).T), sa, s_row + g, n, N, groups, ROWS, HALF
            )
            if HALVES == 2:
                w = b.load([w_row + HALF, g * GROUP])
                acc_1 += _promote(tl.dot(x, w.T), sa, s_row + g, n + HALF, N, groups, ROWS, HALF)
        c.store([m * BLOCK_M, n], acc_0.to(c.dtype))
        if HALVES == 2:
            c.store([m * BLOCK_M, n + HALF], acc_1.to(c.dtype))


@triton.jit
def _promote(part, sa, sb, n, N, groups, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The sum of one group of channels, in its units: times the row's scale and the block's."""
    if ROWS % HALF == 0:  # one block of the weight holds all these outputs; past the edge nothing is stored
        return part * (sa * tl.load(sb + tl.minimum(n, N - 1) // ROWS * groups))[:, None]
    else:
        column = tl.minimum(n + tl.arange(0, HALF), N - 1)
        return part * (sa[:, None] * tl.load(sb + column // ROWS * groups)[None, :])


@functools.cache
def _programs(device: torch.device) -> int:
    """One program for each multiprocessor; a few in the interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def grouped_matmul(
    q_RK: Tensor, scale_GR: Tensor, weight_ENK: Packed, tile_expert: Tensor, used: Tensor,
    dtype: torch.dtype = torch.bfloat16, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """[R, N]: every tile of 128 rows times its expert's matrix. Rows of unused tiles are left unwritten.

    `weight_ENK`: FP8 [E, N, K] or one matrix [N, K]; R a multiple of 128; K and N multiples of 16 and 8.
    """
    if config is None and pdl.on_hopper(q_RK.device):
        from hadal.ops.triton import fp8_gluon

        if fp8_gluon.wants(q_RK, weight_ENK, dtype):
            return fp8_gluon.grouped_matmul(q_RK, scale_GR, weight_ENK, tile_expert, used)
    config = config or Config()
    (R, K), N = q_RK.shape, weight_ENK.shape[-2]
    if R % ALIGN or K % 16 or N % 8:
        raise ValueError(f"{R} rows × {K} inputs × {N} outputs: need multiples of 128, 16 and 8")
    out = torch.empty((R, N), dtype=dtype, device=q_RK.device)
    codes = weight_ENK.codes.view(-1, K)
    _grouped_kernel[(_programs(q_RK.device),)](
        TensorDescriptor.from_tensor(q_RK, [ALIGN, 128]),
        TensorDescriptor.from_tensor(codes, [config.half, 128]),
        TensorDescriptor.from_tensor(out, [ALIGN, config.half]),
        scale_GR, weight_ENK.scale, tile_expert, used, N, K, R, weight_ENK.scale.shape[-2],
        weight_ENK.scale.shape[-1], ROWS=weight_ENK.rows, BLOCK_M=ALIGN, HALF=config.half,
        HALVES=config.halves, TOGETHER=config.together, PROGRAMS=_programs(q_RK.device),
        FLATTEN=config.flatten, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


# --- linear layers and experts ------------------------------------------------------------------------------
def wants(x: Tensor, weight: Packed) -> bool:
    """Whether these kernels can take it: blocks of 128 channels, rows that a tensor map can address."""
    fits = weight.kind == "fp8" and weight.group == 128 and weight.layout == "plain"
    outputs, inputs = weight.shape[-2:]
    return (
        fits and inputs % 16 == 0 and outputs % 8 == 0 and x.dtype == torch.bfloat16 and _hardware(x.device)
    )


def wants_width(down: Packed) -> bool:
    """Whether the second product can follow the first."""
    return down.kind == "fp8" and down.group == 128 and down.shape[-1] % 16 == 0 and down.shape[-2] % 8 == 0


@functools.cache
def _hardware(device: torch.device) -> bool:
    """FP8 tensor cores, and copies by tensor map."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _torch_multiplies_blocks(device: torch.device) -> bool:
    """Whether torch's own product takes 1×128 and 128×128 scales: cuBLAS 12.9 and later, Hopper only."""
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and version >= (12, 9)


def linear(x_MK: Tensor, weight_NK: Packed, bias_N: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b with x quantised; [M, N] in x's dtype."""
    M, K = x_MK.shape
    rows = triton.cdiv(M, ALIGN) * ALIGN
    place = torch.arange(M, device=x_MK.device) if rows != M else None
    q, scale = quantise_rows(x_MK, place, rows)
    if (
        _torch_multiplies_blocks(x_MK.device)
        and weight_NK.rows == 128
        and K % 128 == 0
        and weight_NK.shape[0] % 16 == 0
    ):
        out = scaled_mm(q, scale, weight_NK, x_MK.dtype)
    else:
        tiles = rows // ALIGN
        expert = torch.zeros(tiles, dtype=torch.int32, device=x_MK.device)
        out = grouped_matmul(q, scale, weight_NK, expert, torch.full_like(expert[:1], tiles), x_MK.dtype)
    out = out[:M]
    return out if bias_N is None else out + bias_N


def scaled_mm(q_RK: Tensor, scale_GR: Tensor, weight_NK: Packed, dtype: torch.dtype) -> Tensor:
    """torch's product with block scales. It wants the weight's scales padded to a multiple of four groups."""
    from torch.nn.functional import ScalingType, pad
    from torch.nn.functional import scaled_mm as multiply

    missing = -weight_NK.scale.shape[1] % 4
    padded = pad(weight_NK.scale, (0, missing)) if missing else weight_NK.scale
    return multiply(
        q_RK, weight_NK.codes.t(), scale_GR.t(), ScalingType.BlockWise1x128, padded.t(),
        ScalingType.BlockWise128x128, output_dtype=dtype,
    )  # fmt: skip


def sort_rows(expert_TK: Tensor, n_experts: int) -> Sorted:
    """Rows of all pairs, sorted by expert, each expert's at a multiple of 128. The host learns no count."""
    flat = expert_TK.flatten()
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=flat.device)
    counts_E.scatter_add_(0, flat, torch.ones_like(flat))
    tiles_E = (counts_E + ALIGN - 1) // ALIGN
    end_E = tiles_E.cumsum(0)
    order = flat.argsort(stable=True)
    number = torch.arange(flat.numel(), device=flat.device)
    shift_E = (end_E - tiles_E) * ALIGN - (counts_E.cumsum(0) - counts_E)  # row less number, of each expert
    place = torch.empty_like(flat)
    place[order] = number + shift_E[flat[order]]
    tile = torch.arange(tiles_at_most(flat.numel(), n_experts), device=flat.device)
    expert = torch.searchsorted(end_E, tile, right=True).clamp_(max=n_experts - 1)
    return Sorted(place, expert.int(), end_E[-1:].int())


def tiles_at_most(pairs: int, n_experts: int) -> int:
    """Tiles of 128 rows for `pairs` rows of at most `n_experts` experts, each with less than one to spare."""
    return min(pairs, triton.cdiv(pairs, ALIGN) + n_experts)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Packed, down_EDI: Packed,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Σ_k w_k · expert_k(x) + shared + residual, [T, D], activations in FP8 before both products."""
    where = sort_rows(expert_TK, down_EDI.shape[0])
    rows = where.tile_expert.shape[0] * ALIGN
    q, scale = quantise_rows(x_TD, where.place, rows)
    hidden = grouped_matmul(q, scale, gate_up_E2ID, where.tile_expert, where.used, x_TD.dtype, config)
    q, scale = swiglu_quantise(hidden, where.used)
    row_RD = grouped_matmul(q, scale, down_EDI, where.tile_expert, where.used, x_TD.dtype, config)
    return _combine(row_RD, where.place, weight_TK, shared_TD, residual_TD)
