"""Tiles of FP8 training and products of them, in plain torch: what the kernels of
hadal/ops/triton/fp8_train.py are held to, and the path of all other devices and shapes.

A scale is max|x| / 448 of its tile, found online; as a power of two it is rounded up (V3.1's UE8M0). Then a
dequantised value is *exact in BF16*: E4M3 has four significant bits, BF16 eight. So on a GPU a BF16 product
of dequantised codes, whose sums are FP32, has the numerics of the recipe, at BF16's speed. Gradients are far
smaller than activations, so no floor of 1e-4 is put under a tile's largest value, as inference does: scales
go down to 2^-100, where the smallest code times its scale is still a normal number of BF16.

Rows of experts lie sorted, every expert's first row at a multiple of 128, so that no tile along tokens
crosses a border; rows in between (gaps) are zeros.
Legend: T tokens, R rows with gaps, K inputs, N outputs, I width, G groups of 128, E experts.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hadal.ops.fp8 import dequantise_blocks, quantise_activations, quantise_blocks

TILE = 128
SCALE_MIN = 2.0**-100
AMAX_MIN = 448.0 * SCALE_MIN


class Codes(NamedTuple):
    """A matrix [R, K] in tiles of 1 × 128: E4M3 codes, scales [G, R] (rows lie together), and whether these
    are powers of two."""

    q: Tensor
    scale: Tensor
    power: bool


class Weight(NamedTuple):
    """A matrix [N, K], or a stack of them, in blocks of 128 × 128."""

    q: Tensor
    scale: Tensor
    power: bool


class Rows(NamedTuple):
    """Where the (token, expert) pairs of a batch lie once sorted."""

    place_TK: Tensor  # int64: the row of each pair
    token_R: Tensor  # int32: the token of each row, -1 in gaps
    tile_expert: Tensor  # int32: the expert of each tile of 128 rows
    used: Tensor  # int32 [1]: tiles that hold anything
    end_E: Tensor  # int32: the end of each expert's rows, gaps included


def _bytes(q: Tensor) -> Tensor:
    """Codes as torch can index, transpose and concatenate them."""
    return q.view(torch.uint8)


# --- rows ---------------------------------------------------------------------------------------------------
def sort_rows(expert_TK: Tensor, n_experts: int) -> Rows:
    """Pairs sorted by expert, stably. The host learns no count: there is room for any distribution."""
    flat, top_k = expert_TK.flatten(), expert_TK.shape[1]
    rank = torch.empty_like(flat)
    order = flat.argsort(stable=True)
    rank[order] = torch.arange(flat.numel(), device=flat.device)
    count_E = torch.zeros(n_experts, dtype=torch.int64, device=flat.device)
    count_E.scatter_add_(0, flat, torch.ones_like(flat))
    return rows_of(rank, count_E.cumsum(0), flat, top_k)


def rows_of(rank: Tensor, end_E: Tensor, flat: Tensor, top_k: int) -> Rows:
    """Rows from each pair's rank in the order by expert, and the end of each expert's ranks."""
    device, n_experts = flat.device, end_E.numel()
    count_E = torch.diff(end_E, prepend=end_E.new_zeros(1))
    tiles_E = (count_E + TILE - 1) // TILE
    tile_end_E = tiles_E.cumsum(0)
    place = rank + ((tile_end_E - tiles_E) * TILE - (end_E - count_E))[flat]
    tiles = tiles_at_most(flat.numel(), n_experts)
    token_R = torch.full((tiles * TILE,), -1, dtype=torch.int32, device=device)
    token_R[place] = torch.arange(flat.numel(), dtype=torch.int32, device=device) // top_k
    expert = torch.searchsorted(tile_end_E, torch.arange(tiles, device=device), right=True)
    return Rows(
        place.unflatten(0, (-1, top_k)), token_R, expert.clamp_(max=n_experts - 1).int(),
        tile_end_E[-1:].int(), (tile_end_E * TILE).int(),
    )  # fmt: skip


def tiles_at_most(pairs: int, n_experts: int) -> int:
    """Tiles of 128 rows for `pairs` rows of at most `n_experts` experts, each with less than one to spare."""
    return max(1, min(pairs, -(-pairs // TILE) + n_experts))


def sum_rows(
    row_RD: Tensor, rows: Rows, shared_TD: Tensor | None = None, residual_TD: Tensor | None = None
) -> Tensor:
    """[T, D]: the sum of each token's rows, and of what is added to them, in FP32."""
    tokens, top_k = rows.place_TK.shape
    row_TKD = row_RD.index_select(0, rows.place_TK.flatten()).view(tokens, top_k, -1)
    sum_TD = row_TKD.float().sum(1)
    for other_TD in (shared_TD, residual_TD):
        sum_TD = sum_TD if other_TD is None else sum_TD + other_TD.float()
    return sum_TD.to(row_RD.dtype)


# --- quantising ---------------------------------------------------------------------------------------------
def quantise(x_RK: Tensor, power: bool) -> Codes:
    q, scale_RG = quantise_activations(x_RK, power_of_two=power, floor=AMAX_MIN)
    return Codes(q, scale_RG.t().contiguous(), power)


def dequantise(codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """[R, K]; into BF16 exact where scales are powers of two."""
    scale_RK = codes.scale.t().repeat_interleave(TILE, 1)[:, : codes.q.shape[1]]
    return (codes.q.float() * scale_RK).to(dtype)


def quantise_both(x_RK: Tensor, power: bool) -> tuple[Codes, Codes]:
    """x in tiles along its channels, and its transpose in tiles along tokens (filled up with zeros)."""
    return quantise(x_RK, power), _columns(x_RK, power)


def _columns(x_RK: Tensor, power: bool) -> Codes:
    return quantise(pad(x_RK, (0, 0, 0, -x_RK.shape[0] % TILE)).t(), power)


def gather(codes: Codes, rows: Rows) -> Codes:
    """The codes of each row's token; zero, with scale 1, in gaps."""
    real_R, token_R = rows.token_R >= 0, rows.token_R.clamp(min=0)
    q = torch.where(real_R[:, None], _bytes(codes.q)[token_R], 0).view(codes.q.dtype)
    return Codes(q, torch.where(real_R, codes.scale[:, token_R], 1.0), codes.power)


def columns(codes: Codes, rows: Rows | None) -> Codes:
    """The transpose, cut anew along tokens, of codes or of what `gather` makes of them. Scales are powers of
    two before and after: a value keeps its bits but for those that a larger neighbour pushes out."""
    return _columns(dequantise(codes if rows is None else gather(codes, rows)), True)


def quantise_weight(w: Tensor, power: bool) -> Weight:
    q, scale = quantise_blocks(w, power_of_two=power)
    return Weight(q.contiguous(), scale, power)


def transposed(weight: Weight) -> Weight:
    """The same blocks for the product with the matrix's transpose: codes [.., K, N]."""
    q = _bytes(weight.q).transpose(-1, -2).contiguous().view(weight.q.dtype)
    return Weight(q, weight.scale.transpose(-1, -2).contiguous(), weight.power)


# --- SwiGLU -------------------------------------------------------------------------------------------------
def swiglu(
    gate_up_R2I: Tensor, weight_R: Tensor | None, power: bool, rows: Rows | None
) -> tuple[Codes, Codes]:
    """(codes of w · silu(gate) ⊙ up, codes of gate and of up to make that again). `rows` tells kernels where
    nothing lies."""
    gate, up = gate_up_R2I.float().chunk(2, -1)
    hidden_RI = torch.nn.functional.silu(gate) * up
    if weight_R is not None:
        hidden_RI = hidden_RI * weight_R[:, None]
    both = quantise(gate, True), quantise(up, True)
    q = torch.cat([_bytes(part.q) for part in both], 1).view(both[0].q.dtype)
    kept = Codes(q, torch.cat([part.scale for part in both]), True)
    return quantise(hidden_RI.to(gate_up_R2I.dtype), power), kept


def swiglu_backward(
    kept: Codes, dh_RI: Tensor, weight_R: Tensor | None, power: bool, rows: Rows | None
) -> tuple[Codes, Codes, Codes, Tensor | None]:
    """From the gradient of w · silu(gate) ⊙ up: codes of that of [gate, up], of its transpose, of the
    transpose of the hidden values made again; the gradient of w."""
    halves = kept.q.chunk(2, 1), kept.scale.chunk(2, 0)
    gate, up = (dequantise(Codes(q, scale, True)) for q, scale in zip(*halves, strict=True))
    dh, share = dh_RI.float(), torch.sigmoid(gate)
    silu = gate * share
    dweight_R = None
    hidden_RI, d = silu * up, dh
    if weight_R is not None:
        dweight_R = (dh * hidden_RI).sum(1)
        hidden_RI, d = hidden_RI * weight_R[:, None], dh * weight_R[:, None]
    dgate = d * up * share * (1 + gate * (1 - share))
    out = torch.cat([dgate, d * silu], 1).to(dh_RI.dtype)
    if rows is not None:
        gaps = (rows.token_R < 0)[:, None]
        out, hidden_RI = out.masked_fill(gaps, 0.0), hidden_RI.masked_fill(gaps, 0.0)
    return *quantise_both(out, power), _columns(hidden_RI.to(dh_RI.dtype), power), dweight_R


# --- products -----------------------------------------------------------------------------------------------
def matmul(a: Codes, weight: Weight, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """a · Wᵀ [R, N], of each expert's rows with its own matrix of a stack."""
    wide = _wide(a, weight, dtype)
    x_RK = dequantise(a, wide)
    w = dequantise_blocks(weight.q, weight.scale, dtype=wide)
    if rows is None:
        return (x_RK @ w.t()).to(dtype)
    if wide == torch.bfloat16:
        return torch._grouped_mm(x_RK, w.transpose(1, 2), offs=rows.end_E)
    y_RN = x_RK.new_zeros(x_RK.shape[0], w.shape[1])
    for e, span in enumerate(_spans(rows)):
        y_RN[span] = x_RK[span] @ w[e].t()
    return y_RN.to(dtype)


def outer(a: Codes, b: Codes, dtype: torch.dtype, rows: Rows | None) -> Tensor:
    """a · bᵀ [N, K] of two transposes [N, R] and [K, R], or [E, N, K] of each expert's rows."""
    wide = _wide(a, b, dtype)
    a_NR, b_KR = dequantise(a, wide), dequantise(b, wide)
    if rows is None:
        return (a_NR @ b_KR.t()).to(dtype)
    if wide == torch.bfloat16:
        return torch._grouped_mm(a_NR, b_KR.t(), offs=rows.end_E)
    return torch.stack([a_NR[:, span] @ b_KR[:, span].t() for span in _spans(rows)]).to(dtype)


def outer_into(a: Codes, b: Codes, rows: Rows, into_ENK: Tensor, more: bool) -> None:
    """`outer` of each expert's rows, written to `into`, or with `more` added to it."""
    put(outer(a, b, into_ENK.dtype, rows), into_ENK, more)


def put(made: Tensor, into: Tensor, more: bool) -> None:
    """Write to `into`, or with `more` add to it."""
    if more:
        into.add_(made)
    else:
        into.copy_(made)


def _wide(a: Codes, b: Codes | Weight, dtype: torch.dtype) -> torch.dtype:
    """In what dequantised values are multiplied: BF16 where it is exact and a GPU has its tensor cores."""
    exact = a.power and b.power and dtype == torch.bfloat16
    return torch.bfloat16 if exact and a.q.is_cuda else torch.float32


def _spans(rows: Rows) -> list[slice]:
    """Each expert's rows. (Where the host must know, it waits for the device.)"""
    ends = [0, *rows.end_E.tolist()]
    return [slice(first, last) for first, last in itertools.pairwise(ends)]
