"""Products with packed weights (hadal/ops/packed.py, the reference) on CUDA; codes lie in the plain layout.

    few rows    codes become BF16 in registers, the weights are streamed once (packed_tiles.py)
    many rows   INT8, INT4: a linear layer is dequantised once and multiplied by cuBLAS; experts go through
                the same tiles, rows sorted by expert. FP8: activations are quantised too (fp8.py)

For few rows nothing but the weights' own rounding is lost: activations stay BF16, sums are FP32.
Legend: M rows, N outputs, K inputs; T tokens, D hidden, I width, E experts, P = T · K pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.packed import Packed
from hadal.ops.triton import fp8
from hadal.ops.triton.experts import _combine, _rows_a_tile, _rows_of_expert
from hadal.ops.triton.gemv import silu_mul
from hadal.ops.triton.packed_tiles import product, product_pair

STREAMED_ROWS = 256  # INT8, INT4: beyond, dequantising a matrix once costs less than doing it for every tile
FP8_STREAMED_ROWS = 64  # FP8: beyond, tensor cores multiply the codes themselves
FEW_TOKENS = 256  # experts: up to here a program finds its rows itself; beyond, they are sorted
TARGET_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


class Tiles(NamedTuple):
    """Block sizes of a kernel."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def wants_linear(x_TI: Tensor, weight_OI: Packed) -> bool:
    """Whether `linear` takes these: BF16 rows, not none, and groups that a tile can hold."""
    return x_TI.dtype == torch.bfloat16 and x_TI.numel() > 0 and _tiled(weight_OI)


def wants_experts(x_TD: Tensor, gate_up_E2ID: Packed, down_EDI: Packed) -> bool:
    """Whether `experts` takes these."""
    return wants_linear(x_TD, gate_up_E2ID) and _tiled(down_EDI) and down_EDI.kind == gate_up_E2ID.kind


def _tiled(weight: Packed) -> bool:
    return weight.layout == "plain" and weight.group in (32, 64, 128)


# --- linear layers ------------------------------------------------------------------------------------------
@triton.jit
def _linear_kernel(
    x, codes, scale, bias, out, M, N, K, x_stride, code_stride, groups, share, BIAS: tl.constexpr,
    PARTIAL: tl.constexpr, INT4: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    code_row = codes + n.to(tl.int64) * code_stride
    scale_row = scale + (n // ROWS).to(tl.int64) * groups
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = product(
        acc, x + m.to(tl.int64) * x_stride, m < M, code_row, scale_row, n < N, split * share,
        tl.minimum(K, (split + 1) * share), K, code_stride, INT4, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    to = out + m[None, :].to(tl.int64) * N + n[:, None]
    if PARTIAL:
        to += split.to(tl.int64) * M * N
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _sum_kernel(partial, bias, out, size, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial + split * size + at, mask=at < size, other=0.0)
    if BIAS:
        acc += tl.load(bias + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


def linear(x_TI: Tensor, weight_OI: Packed, bias_O: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b, [.., O]."""
    x = x_TI.reshape(-1, x_TI.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    if weight_OI.kind == "fp8" and x.shape[0] > FP8_STREAMED_ROWS and fp8.wants(x, weight_OI):
        out = fp8.linear(x, weight_OI, bias_O)
    elif x.shape[0] > STREAMED_ROWS:
        out = torch.nn.functional.linear(x, dequantise(weight_OI, x.dtype), bias_O)
    else:
        out = streamed(x, weight_OI, bias_O)
    return out.view(*x_TI.shape[:-1], out.shape[1])


def tiles_for(kind: str, group: int, rows: int, outputs: int) -> Tiles:
    """Block sizes of `streamed`. INT4 reads 256 channels at once, the others one group."""
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    if block_m <= 32:
        outputs = 32 if outputs <= 8192 else 64  # a warp for every 16, so that none converts what another has
        return Tiles(block_m, outputs, 256 if kind == "int4" else group, outputs // 16, 4)
    return Tiles(min(block_m, 64), 128, 128 if kind == "int4" else group, 8, 3)


def splits_for(tiles: Tiles, rows: int, outputs: int, inputs: int) -> int:
    """Shares of the inputs: as many as fill the machine, each of four steps or more."""
    programs = triton.cdiv(rows, tiles.rows) * triton.cdiv(outputs, tiles.outputs)
    return max(1, min(TARGET_PROGRAMS // programs, inputs // (4 * tiles.inputs), 8))


def streamed(
    x_MK: Tensor, weight_NK: Packed, bias_N: Tensor | None = None, tiles: Tiles | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + b, the weight read once for each `tiles.rows` rows; shares are added in a fixed order."""
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    t = tiles or tiles_for(weight_NK.kind, weight_NK.group, M, N)
    splits = splits or splits_for(t, M, N, K)
    share = triton.cdiv(triton.cdiv(K, splits), t.inputs) * t.inputs
    out = torch.empty((M, N), dtype=x_MK.dtype, device=x_MK.device)
    to = out if splits == 1 else torch.empty((splits, M, N), dtype=torch.float32, device=x_MK.device)
    _linear_kernel[(triton.cdiv(M, t.rows), triton.cdiv(N, t.outputs), splits)](
        x_MK, weight_NK.codes, weight_NK.scale, x_MK if bias_N is None else bias_N, to, M, N, K,
        x_MK.stride(0), weight_NK.codes.shape[-1], weight_NK.scale.shape[-1], share,
        BIAS=bias_N is not None and splits == 1, PARTIAL=splits > 1, INT4=weight_NK.kind == "int4",
        GROUP=weight_NK.group, ROWS=weight_NK.rows, BLOCK_M=t.rows, BLOCK_N=t.outputs, BLOCK_K=t.inputs,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if splits > 1:
        _sum_kernel[(triton.cdiv(M * N, 1024),)](
            to, x_MK if bias_N is None else bias_N, out, M * N, N, SPLITS=splits, BIAS=bias_N is not None,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _dequantise_kernel(
    codes, scale, out, K, code_stride, groups, INT4: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if INT4:
        code = tl.load(codes + n * code_stride + k // 2, mask=k < K, other=0).to(tl.int32)
        value = ((code >> (4 * (k % 2))) & 15).to(tl.float32) - 8.0
    else:
        value = tl.load(codes + n * code_stride + k, mask=k < K, other=0.0).to(tl.float32)
    value *= tl.load(scale + n // ROWS * groups + k // GROUP, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=k < K)


def dequantise(weight_NK: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in one pass; equal to `Packed.dequantise`."""
    N, K = weight_NK.shape
    out = torch.empty((N, K), dtype=dtype, device=weight_NK.device)
    _dequantise_kernel[(triton.cdiv(K, 1024), N)](
        weight_NK.codes, weight_NK.scale, out, K, weight_NK.codes.shape[-1], weight_NK.scale.shape[-1],
        INT4=weight_NK.kind == "int4", GROUP=weight_NK.group, ROWS=weight_NK.rows, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


# --- experts ------------------------------------------------------------------------------------------------
@triton.jit
def _gate_up_kernel(
    x, expert, order, tile, codes, scale, out, pairs, tiles, hidden, width, code_stride, groups, scale_rows,
    K: tl.constexpr, SORTED: tl.constexpr, INT4: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.program_id(1).to(tl.int64)
    first, last = 0, 0
    if SORTED:
        first = tl.load(tile + tiles + e)
        last = tl.load(tile + 2 * tiles + e)
        e = tl.load(tile + e).to(tl.int64)
    else:
        pair = tl.arange(0, BLOCK_P)
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        last = tl.sum(mine.to(tl.int32), 0)
    gate_codes = codes + (e * 2 * width + n) * code_stride
    gate_scales = scale + (e * scale_rows + n // ROWS) * groups
    up_scales = scale + (e * scale_rows + (n + width) // ROWS) * groups
    for at in range(first, last, BLOCK_M):
        if SORTED:
            i = at + tl.arange(0, BLOCK_M)
            row = tl.load(order + i, mask=i < last, other=-1).to(tl.int32)
        else:
            row = _rows_of_expert(mine, rank, pair, at, BLOCK_M)
        real = tl.maximum(row, 0)
        gate, up = product_pair(
            tl.zeros([BLOCK_N, BLOCK_M], tl.float32), tl.zeros([BLOCK_N, BLOCK_M], tl.float32),
            x + (real // K).to(tl.int64) * hidden, row >= 0, gate_codes,
            gate_codes + tl.cast(width, tl.int64) * code_stride, gate_scales, up_scales, n < width, hidden,
            code_stride, INT4, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = silu_mul(gate, up, out.dtype.element_ty)
        to = out + real.to(tl.int64)[None, :] * width + n[:, None]
        tl.store(to, y.to(out.dtype.element_ty), mask=(row >= 0)[None, :] & (n < width)[:, None])


@triton.jit
def _down_kernel(
    h, expert, order, tile, codes, scale, out, pairs, tiles, hidden, width, code_stride, groups, scale_rows,
    SORTED: tl.constexpr, INT4: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.program_id(1).to(tl.int64)
    first, last = 0, 0
    if SORTED:
        first = tl.load(tile + tiles + e)
        last = tl.load(tile + 2 * tiles + e)
        e = tl.load(tile + e).to(tl.int64)
    else:
        pair = tl.arange(0, BLOCK_P)
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        last = tl.sum(mine.to(tl.int32), 0)
    code_row = codes + (e * hidden + n) * code_stride
    scale_row = scale + (e * scale_rows + n // ROWS) * groups
    for at in range(first, last, BLOCK_M):
        if SORTED:
            i = at + tl.arange(0, BLOCK_M)
            row = tl.load(order + i, mask=i < last, other=-1).to(tl.int32)
        else:
            row = _rows_of_expert(mine, rank, pair, at, BLOCK_M)
        real = tl.maximum(row, 0)
        acc = product(
            tl.zeros([BLOCK_N, BLOCK_M], tl.float32), h + real.to(tl.int64) * width, row >= 0, code_row,
            scale_row, n < hidden, 0, width, width, code_stride, INT4, GROUP, BLOCK_M,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        to = out + real.to(tl.int64)[None, :] * hidden + n[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(row >= 0)[None, :] & (n < hidden)[:, None])


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Packed, down_EDI: Packed,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ_k w_k · expert_k(x) + shared + residual, [T, D], summed in FP32."""
    x_TD = x_TD.contiguous()
    many = x_TD.shape[0] > FEW_TOKENS
    if many and gate_up_E2ID.kind == "fp8" and fp8.wants(x_TD, gate_up_E2ID) and fp8.wants_width(down_EDI):
        return fp8.experts(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared_TD, residual_TD)
    y_PD = expert_rows(x_TD, expert_TK, gate_up_E2ID, down_EDI, many)
    return _combine(y_PD, None, weight_TK, shared_TD, residual_TD)


def expert_tiles(kind: str, group: int, rows: int, pair: bool) -> Tiles:
    """Block sizes of the two expert kernels for `rows` rows of an expert; `pair`: gate and up together."""
    inputs = 128 if kind == "int4" else group
    if rows <= 32:
        return Tiles(rows, 64, inputs, 4, 3 if pair else 4)
    return Tiles(rows, 64 if pair else 128, inputs, 8 if rows >= 64 else 4, 3)


def expert_rows(
    x_TD: Tensor, expert_TK: Tensor, gate_up_E2ID: Packed, down_EDI: Packed, many: bool,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:  # fmt: skip
    """The output of every (token, k) pair's expert, [T·K, D], in the order of the pairs."""
    (tokens, hidden), K = x_TD.shape, expert_TK.shape[1]
    n_experts, _, width = down_EDI.shape
    pairs = tokens * K
    rows = _rows_a_tile(pairs, n_experts)
    up, down = tiles or tuple(
        expert_tiles(w.kind, w.group, rows, w is gate_up_E2ID) for w in (gate_up_E2ID, down_EDI)
    )
    order, tile = _sorted(expert_TK, n_experts, rows) if many else (expert_TK, expert_TK)
    programs = tile.shape[1] if many else n_experts
    h_PI = torch.empty((pairs, width), dtype=x_TD.dtype, device=x_TD.device)
    y_PD = torch.empty((pairs, hidden), dtype=x_TD.dtype, device=x_TD.device)
    found = {"SORTED": many, "BLOCK_P": 16 if many else triton.next_power_of_2(pairs)}
    _gate_up_kernel[(triton.cdiv(width, up.outputs), programs)](
        x_TD, expert_TK, order, tile, gate_up_E2ID.codes, gate_up_E2ID.scale, h_PI, pairs, programs, hidden,
        width, *_strides(gate_up_E2ID), K=K, **found, **_constants(gate_up_E2ID, up),
    )  # fmt: skip
    _down_kernel[(triton.cdiv(hidden, down.outputs), programs)](
        h_PI, expert_TK, order, tile, down_EDI.codes, down_EDI.scale, y_PD, pairs, programs, hidden, width,
        *_strides(down_EDI), **found, **_constants(down_EDI, down),
    )  # fmt: skip
    return y_PD


def _strides(weight: Packed) -> tuple[int, int, int]:
    """Bytes of a row of codes, groups of a row, rows of scales of a matrix."""
    return weight.codes.shape[-1], weight.scale.shape[-1], weight.scale.shape[-2]


def _constants(weight: Packed, tiles: Tiles) -> dict[str, int | bool]:
    return {
        "INT4": weight.kind == "int4", "GROUP": weight.group, "ROWS": weight.rows, "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.outputs, "BLOCK_K": tiles.inputs, "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }  # fmt: skip


def _sorted(expert_TK: Tensor, n_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts [P], and the map of tiles [3, tiles]: expert, first, one past last.

    The number of tiles is the most that there can be, so that the host need not know the counts; tiles
    without rows have first = last.
    """
    flat = expert_TK.flatten()
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=flat.device)
    counts_E.scatter_add_(0, flat, torch.ones_like(flat))
    end_E = counts_E.cumsum(0)
    tile_end_E = ((counts_E + rows - 1) // rows).cumsum(0)
    tile = torch.arange(triton.cdiv(flat.numel(), rows) + n_experts, device=flat.device)
    expert = torch.searchsorted(tile_end_E, tile, right=True).clamp_(max=n_experts - 1)
    before = tile_end_E[expert] - (counts_E[expert] + rows - 1) // rows
    first = end_E[expert] - counts_E[expert] + (tile - before) * rows
    last = torch.minimum(first + rows, end_E[expert])
    return flat.argsort(stable=True), torch.stack([expert, torch.minimum(first, last), last]).int()
