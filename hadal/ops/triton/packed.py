"""Products with packed weights (hadal/ops/packed.py, the reference) on CUDA; codes lie in the plain layout.

    one or two  no tensor cores: codes wait in registers for their input (packed_gemv.py)
    few rows    codes become BF16 in registers, the weights are streamed once (packed_tiles.py)
    more rows   INT8, INT4: a linear layer is dequantised once and multiplied by cuBLAS; experts go through
                the same tiles, rows sorted by expert. FP8: activations are quantised too (fp8.py)
    many rows   INT8, INT4 experts, too, are dequantised once and multiplied in groups

The shared expert runs in the launches of up to FEW_TOKENS tokens, as so many parts of the routed width.

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
from hadal.ops.triton import fp8, packed_gemv, pdl
from hadal.ops.triton.arrivals import counters
from hadal.ops.triton.experts import _combine, _rows_a_tile, _rows_of_expert
from hadal.ops.triton.gemv import silu_mul
from hadal.ops.triton.packed_tiles import product, product_pair
from hadal.ops.triton.route import places
from hadal.ops.triton.sizes import ceil_div, power_of_2

STREAMED_ROWS = 64  # beyond, dequantising a matrix once costs less than doing it for every tile of rows
FEW_TOKENS = 256  # experts: up to here a program takes an expert, and the shared one's parts; beyond, a tile
FOUND_PAIRS = 512  # experts: beyond, rows are listed first; finding its own takes a program's registers
DEQUANTISED_ROWS = 128  # of an expert, on average: beyond, unpacking once beats unpacking for every tile
PAIRED_TOKENS = 2  # experts: up to here every (token, k) pair has programs of its own
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


def takes_shared(x_TD: Tensor, gate_up: Packed, down: Packed, shared: tuple[Packed, Packed]) -> bool:
    """Whether `experts` can run this shared expert in its own launches: few tokens, weights like the routed
    ones, of a width that is so many times theirs and ends with a group and a block of rows."""
    width = down.shape[-1]
    alike = all(
        (a.kind, a.group, a.rows, a.layout) == (b.kind, b.group, b.rows, b.layout)
        for a, b in zip((gate_up, down), shared, strict=True)
    )
    whole = shared[1].shape[-1] % width == 0 and width % down.group == 0 and width % gate_up.rows == 0
    return x_TD.shape[0] <= FEW_TOKENS and alike and whole and wants_experts(x_TD, gate_up, down)


def wants_few(x: Tensor, *weights: Packed) -> bool:
    """Whether packed_gemv.py takes these, in one launch where there are two weights: a row or two of BF16."""
    few = x.dim() == 2 and 0 < x.shape[0] <= packed_gemv.MAX_ROWS and x.dtype == torch.bfloat16
    alike = len({(w.kind, w.group, w.rows) for w in weights}) == 1
    return few and alike and all(packed_gemv.wants(w) for w in weights)


def _tiled(weight: Packed) -> bool:
    return weight.layout == "plain" and weight.group in (32, 64, 128)


# --- linear layers ------------------------------------------------------------------------------------------
@triton.jit
def _linear_kernel(
    x, codes, scale, bias, residual, out, partial, arrived, M, N, K, x_stride, code_stride, groups, share,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr, INT4: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    code_row = codes + n.to(tl.int64) * code_stride
    scale_row = scale + (n // HIGH).to(tl.int64) * groups
    first, last = split * share, tl.minimum(K, (split + 1) * share)
    pdl.wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = product(
        acc, x + m.to(tl.int64) * x_stride, m < M, code_row, scale_row, n < N, first, last, K, code_stride,
        INT4, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    done = True
    if SPLITS > 1:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        at = partial + tile.to(tl.int64) * SPLITS * BLOCK_N * BLOCK_M
        at += tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(at + split * BLOCK_N * BLOCK_M, acc)
        tl.debug_barrier()  # all threads' sums are written before one of them says so
        done = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if done:
            tl.store(arrived + tile, 0)  # for the next launch
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(at + i * BLOCK_N * BLOCK_M, cache_modifier=".cg")
    if done:
        to = m[None, :].to(tl.int64) * N + n[:, None]
        inside = (m < M)[None, :] & (n < N)[:, None]
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if RESIDUAL:  # the product is rounded before the addition, as in the unfused pair
            acc = acc.to(out.dtype.element_ty).to(tl.float32)
            acc += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


def linear(
    x_TI: Tensor, weight_OI: Packed, bias_O: Tensor | None = None, residual_TO: Tensor | None = None
) -> Tensor:
    """x·Wᵀ + b + residual, [.., O]."""
    x = x_TI.reshape(-1, x_TI.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    residual = None if residual_TO is None else residual_TO.reshape(x.shape[0], -1)
    if x.shape[0] <= packed_gemv.MAX_ROWS and packed_gemv.wants(weight_OI):
        out = packed_gemv.linear(x, weight_OI, bias_O, residual)
    elif x.shape[0] <= STREAMED_ROWS:
        out = streamed(x, weight_OI, bias_O, residual)
    else:
        if _both_in_fp8(x, weight_OI):
            out = fp8.linear(x, weight_OI, bias_O)
        else:
            out = torch.nn.functional.linear(x, dequantise(weight_OI, x.dtype), bias_O)
        out = out if residual is None else residual + out
    return out.view(*x_TI.shape[:-1], out.shape[1])


def _both_in_fp8(x: Tensor, weight: Packed) -> bool:
    """Whether torch multiplies FP8 by FP8 here. For other sizes our own grouped product takes longer than
    dequantising the weight (2048 × 10944, H100: 362 against 286 µs for 4096 rows, 155 against 53 for 256)."""
    whole = weight.kind == "fp8" and weight.rows == 128 and weight.shape[1] % 128 == 0
    return whole and weight.shape[0] % 16 == 0 and fp8.wants(x, weight)


def tiles_for(kind: str, group: int, rows: int, outputs: int) -> Tiles:
    """Block sizes of `streamed`. INT4 reads 256 channels at once, the others one group."""
    block_m = min(64, max(16, power_of_2(rows)))
    if block_m <= 32:
        outputs = 32 if outputs <= 8192 else 64  # a warp for every 16, so that none converts what another has
        return Tiles(block_m, outputs, 256 if kind == "int4" else group, outputs // 16, 4)
    return Tiles(block_m, 128, 128 if kind == "int4" else group, 8, 3)


def splits_for(tiles: Tiles, rows: int, outputs: int, inputs: int) -> int:
    """Shares of the inputs: as many as fill the machine, each of four steps or more."""
    programs = ceil_div(rows, tiles.rows) * ceil_div(outputs, tiles.outputs)
    return max(1, min(TARGET_PROGRAMS // programs, inputs // (4 * tiles.inputs), 8))


def streamed(
    x_MK: Tensor, weight_NK: Packed, bias_N: Tensor | None = None, residual_MN: Tensor | None = None,
    tiles: Tiles | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + b + residual, the weight read once for each `tiles.rows` rows; shares are added in a fixed order
    by the program that comes last."""
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    t = tiles or tiles_for(weight_NK.kind, weight_NK.group, M, N)
    splits = splits or splits_for(t, M, N, K)
    share = ceil_div(ceil_div(K, splits), t.inputs) * t.inputs
    splits = ceil_div(K, share)
    out = torch.empty((M, N), dtype=x_MK.dtype, device=x_MK.device)
    grid = (ceil_div(M, t.rows), ceil_div(N, t.outputs), splits)
    partial, arrived = out, out
    if splits > 1:
        size = grid[0] * grid[1] * splits * t.outputs * t.rows
        partial = torch.empty(size, dtype=torch.float32, device=out.device)
        arrived = counters(out.device)
    _linear_kernel[grid](
        x_MK, weight_NK.codes, weight_NK.scale, x_MK if bias_N is None else bias_N,
        x_MK if residual_MN is None else residual_MN.contiguous(), out, partial, arrived, M, N, K,
        x_MK.stride(0), weight_NK.codes.shape[-1], weight_NK.scale.shape[-1], share, BIAS=bias_N is not None,
        RESIDUAL=residual_MN is not None, SPLITS=splits, INT4=weight_NK.kind == "int4",
        GROUP=weight_NK.group, HIGH=weight_NK.rows, BLOCK_M=t.rows, BLOCK_N=t.outputs, BLOCK_K=t.inputs,
        num_warps=t.warps, num_stages=t.stages, **pdl.options(x_MK),
    )  # fmt: skip
    return out


@triton.jit
def _dequantise_kernel(
    codes, scale, out, K, code_stride, groups, INT4: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if INT4:
        code = tl.load(codes + n * code_stride + k // 2, mask=k < K, other=0).to(tl.int32)
        value = ((code >> (4 * (k % 2))) & 15).to(tl.float32) - 8.0
    else:
        value = tl.load(codes + n * code_stride + k, mask=k < K, other=0.0).to(tl.float32)
    value *= tl.load(scale + n // ROWS * groups + k // GROUP, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=k < K)


def dequantise(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K], or a stack of such whose blocks do not cross their borders, in one pass; equal to
    `Packed.dequantise`."""
    *lead, N, K = weight.shape
    assert not lead or N % weight.rows == 0, "a block of rows crosses the border of a matrix"
    out = torch.empty((*lead, N, K), dtype=dtype, device=weight.device)
    _dequantise_kernel[(out.numel() // K, ceil_div(K, 1024))](
        weight.codes, weight.scale, out, K, weight.codes.shape[-1], weight.scale.shape[-1],
        INT4=weight.kind == "int4", GROUP=weight.group, ROWS=weight.rows, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


# --- experts ------------------------------------------------------------------------------------------------
@triton.jit
def _gate_up_kernel(
    x, expert, order, tile, codes, scale, shared, shared_scale, out, tokens, pairs, tiles, hidden, width,
    code_stride, groups, scale_rows, PARTS: tl.constexpr, K: tl.constexpr, FOUND: tl.constexpr,
    INT4: tl.constexpr, GROUP: tl.constexpr, HIGH: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    pdl.wait(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    common = part < PARTS  # of the shared expert, for every token
    e = tl.maximum(part - PARTS, 0).to(tl.int64)
    first, last = 0, 0
    if FOUND == "tiles":
        first = tl.load(tile + tiles + e)
        last = tl.load(tile + 2 * tiles + e)
        e = tl.load(tile + e).to(tl.int64)
    elif FOUND == "listed":
        first = tl.where(common | (e == 0), 0, tl.load(tile + tl.maximum(e - 1, 0)))
        last = tl.where(common, tokens, tl.load(tile + e))
    else:
        pair = tl.arange(0, BLOCK_P)
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        last = tl.where(common, tokens, tl.sum(mine.to(tl.int32), 0))
    top = tl.where(common, part.to(tl.int64) * width, e * 2 * width)  # row of the first gate
    to_up = tl.where(common, PARTS * width, width)
    codes, scale = tl.where(common, shared, codes), tl.where(common, shared_scale, scale)
    gate_codes = codes + (top + n) * code_stride
    scale += tl.where(common, 0, e * scale_rows) * groups
    top = tl.where(common, part.to(tl.int64) * width, 0)
    for at in range(first, last, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        if FOUND == "inside":
            to_row = _rows_of_expert(mine, rank, pair, at, BLOCK_M)
        else:
            to_row = tl.load(order + i, mask=i < tl.where(common, 0, last), other=-1).to(tl.int32)
        to_row = tl.where(common, tl.where(i < tokens, pairs + part * tokens + i, -1), to_row)
        real = tl.maximum(to_row, 0)
        gate, up = product_pair(
            tl.zeros([BLOCK_N, BLOCK_M], tl.float32), tl.zeros([BLOCK_N, BLOCK_M], tl.float32),
            x + tl.where(common, tl.minimum(i, tokens - 1), real // K).to(tl.int64) * hidden, to_row >= 0,
            gate_codes, gate_codes + to_up.to(tl.int64) * code_stride, scale + (top + n) // HIGH * groups,
            scale + (top + n + to_up) // HIGH * groups, n < width, hidden, code_stride, INT4, GROUP, BLOCK_M,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = silu_mul(gate, up, out.dtype.element_ty)
        to = out + real.to(tl.int64)[None, :] * width + n[:, None]
        tl.store(to, y.to(out.dtype.element_ty), mask=(to_row >= 0)[None, :] & (n < width)[:, None])


@triton.jit
def _down_kernel(
    h, expert, order, tile, codes, scale, shared, shared_scale, out, tokens, pairs, tiles, hidden, width,
    code_stride, groups, scale_rows, PARTS: tl.constexpr, FOUND: tl.constexpr, INT4: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    pdl.wait(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    common = part < PARTS
    e = tl.maximum(part - PARTS, 0).to(tl.int64)
    first, last = 0, 0
    if FOUND == "tiles":
        first = tl.load(tile + tiles + e)
        last = tl.load(tile + 2 * tiles + e)
        e = tl.load(tile + e).to(tl.int64)
    elif FOUND == "listed":
        first = tl.where(common | (e == 0), 0, tl.load(tile + tl.maximum(e - 1, 0)))
        last = tl.where(common, tokens, tl.load(tile + e))
    else:
        pair = tl.arange(0, BLOCK_P)
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1) == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        last = tl.where(common, tokens, tl.sum(mine.to(tl.int32), 0))
    code_row = codes + (e * hidden + n) * code_stride
    scale_row = scale + (e * scale_rows + n // HIGH) * groups
    if PARTS > 0:  # a part's inputs lie in the rows of the whole
        wide = tl.cast(n, tl.int64) * PARTS + part
        code_row = tl.where(common, shared + wide * code_stride, code_row)
        wide = tl.cast(n // HIGH, tl.int64) * PARTS + part
        scale_row = tl.where(common, shared_scale + wide * groups, scale_row)
    for at in range(first, last, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        if FOUND == "inside":
            row = _rows_of_expert(mine, rank, pair, at, BLOCK_M)
        else:
            row = tl.load(order + i, mask=i < tl.where(common, 0, last), other=-1).to(tl.int32)
        row = tl.where(common, tl.where(i < tokens, pairs + part * tokens + i, -1), row)
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
    shared: tuple[Packed, Packed] | None = None,
) -> Tensor:  # fmt: skip
    """Σ_k w_k · expert_k(x) + shared + residual, [T, D], summed in FP32. `shared`: the weights of the expert
    that all tokens use, where `takes_shared`; `shared_TD`: what it gave."""
    x_TD = x_TD.contiguous()
    many = x_TD.shape[0] > FEW_TOKENS
    if many and gate_up_E2ID.kind == "fp8" and fp8.wants(x_TD, gate_up_E2ID) and fp8.wants_width(down_EDI):
        return fp8.experts(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared_TD, residual_TD)
    if many and expert_TK.numel() > DEQUANTISED_ROWS * down_EDI.shape[0] and gate_up_E2ID.kind != "fp8":
        from hadal.ops.experts import experts_grouped

        stacks = dequantise(gate_up_E2ID, x_TD.dtype), dequantise(down_EDI, x_TD.dtype)
        return experts_grouped(x_TD, expert_TK, weight_TK, *stacks, shared_TD, residual_TD)
    parts = 0 if shared is None else shared[1].shape[1] // down_EDI.shape[2]
    paired = x_TD.shape[0] <= PAIRED_TOKENS and packed_gemv.wants_experts(gate_up_E2ID, down_EDI)
    if paired:
        y_RD = packed_gemv.experts(x_TD, expert_TK, gate_up_E2ID, down_EDI, shared, parts)
    else:
        y_RD = expert_rows(x_TD, expert_TK, gate_up_E2ID, down_EDI, many, shared=shared)
    return _combine(y_RD, None, weight_TK, shared_TD, residual_TD, parts)


def expert_tiles(kind: str, group: int, rows: int, pair: bool) -> Tiles:
    """Block sizes of the two expert kernels for `rows` rows of an expert; `pair`: gate and up together."""
    inputs = 128 if kind == "int4" else group
    if rows <= 32:
        return Tiles(rows, 64, inputs, 4, 3 if pair else 4)
    return Tiles(rows, 64 if pair else 128, inputs, 8 if rows >= 64 else 4, 3)


def expert_rows(
    x_TD: Tensor, expert_TK: Tensor, gate_up_E2ID: Packed, down_EDI: Packed, many: bool,
    tiles: tuple[Tiles, Tiles] | None = None, shared: tuple[Packed, Packed] | None = None,
) -> Tensor:  # fmt: skip
    """The output of every (token, k) pair's expert, [T·K, D], in the order of the pairs; then that of each
    part of the shared expert for every token (not where there are `many`)."""
    (tokens, hidden), K = x_TD.shape, expert_TK.shape[1]
    n_experts, _, width = down_EDI.shape
    pairs = tokens * K
    rows = _rows_a_tile(pairs, n_experts)
    up, down = tiles or tuple(
        expert_tiles(w.kind, w.group, rows, w is gate_up_E2ID) for w in (gate_up_E2ID, down_EDI)
    )
    order, tile, found = expert_TK, expert_TK, "inside"
    if many:
        (order, tile), found = _sorted(expert_TK, n_experts, rows), "tiles"
    elif pairs > FOUND_PAIRS:
        (order, tile), found = _listed(expert_TK, n_experts), "listed"
    programs = tile.shape[1] if many else n_experts
    parts = 0 if shared is None else shared[1].shape[1] // width
    shared_up, shared_down = shared or (gate_up_E2ID, down_EDI)
    h_RI = torch.empty((pairs + parts * tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    y_RD = torch.empty((pairs + parts * tokens, hidden), dtype=x_TD.dtype, device=x_TD.device)
    how = {
        "FOUND": found, "BLOCK_P": power_of_2(pairs) if found == "inside" else 16, "PARTS": parts,
        **pdl.options(x_TD),
    }  # fmt: skip
    _gate_up_kernel[(ceil_div(width, up.outputs), parts + programs)](
        x_TD, expert_TK, order, tile, gate_up_E2ID.codes, gate_up_E2ID.scale, shared_up.codes,
        shared_up.scale, h_RI, tokens, pairs, programs, hidden, width, *_strides(gate_up_E2ID), K=K, **how,
        **_constants(gate_up_E2ID, up),
    )  # fmt: skip
    _down_kernel[(ceil_div(hidden, down.outputs), parts + programs)](
        h_RI, expert_TK, order, tile, down_EDI.codes, down_EDI.scale, shared_down.codes, shared_down.scale,
        y_RD, tokens, pairs, programs, hidden, width, *_strides(down_EDI), **how,
        **_constants(down_EDI, down),
    )  # fmt: skip
    return y_RD


def _strides(weight: Packed) -> tuple[int, int, int]:
    """Bytes of a row of codes, groups of a row, rows of scales of a matrix."""
    return weight.codes.shape[-1], weight.scale.shape[-1], weight.scale.shape[-2]


def _constants(weight: Packed, tiles: Tiles) -> dict[str, int | bool]:
    return {
        "INT4": weight.kind == "int4", "GROUP": weight.group, "HIGH": weight.rows, "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.outputs, "BLOCK_K": tiles.inputs, "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }  # fmt: skip


def _listed(expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts [P], and one past each expert's last [E]."""
    place, end_E = places(expert_TK, n_experts)
    order = torch.empty_like(place)
    return order.scatter_(0, place, torch.arange(place.numel(), device=place.device)), end_E


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
    tile = torch.arange(ceil_div(flat.numel(), rows) + n_experts, device=flat.device)
    expert = torch.searchsorted(tile_end_E, tile, right=True).clamp_(max=n_experts - 1)
    before = tile_end_E[expert] - (counts_E[expert] + rows - 1) // rows
    first = end_E[expert] - counts_E[expert] + (tile - before) * rows
    last = torch.minimum(first + rows, end_E[expert])
    return flat.argsort(stable=True), torch.stack([expert, torch.minimum(first, last), last]).int()
