"""Rows for grouped products, sorted by expert without a sort. Reference: `hadal.ops.experts.dispatch`.

The P = T·K pairs are cut into at most CHUNKS runs. One kernel counts each run's pairs of every expert; the
next gives every pair its place: the pairs of lower experts, then those of its expert in earlier runs, then
those before it in its run. That is a stable sort, bit for bit the same in every run of the program, and the
inverse that `combine` wants comes for free. A third copies each token's row to its K places.
Legend: P pairs, T tokens, K per token, D hidden, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton.sizes import ceil_div, power_of_2

CHUNKS = 128  # runs of pairs, each one program's
BLOCK_P = 64  # pairs looked at together


@triton.jit
def _count_kernel(
    expert, counts, pairs, chunk, n_experts, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    run = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    first = run * chunk
    for start in range(first, first + chunk, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1).to(tl.int32)
        count += tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + run * n_experts + e, count, mask=e < n_experts)


@triton.jit
def _place_kernel(
    expert, counts, place, offset, pairs, chunk, runs, n_experts,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], tl.int32)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, runs, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = (r < runs)[:, None] & (e < n_experts)[None, :]
        tile = tl.load(counts + r[:, None] * n_experts + e[None, :], mask=inside, other=0)
        total += tl.sum(tile, 0)
        before += tl.sum(tl.where((r < run)[:, None], tile, 0), 0)
    end = tl.cumsum(total, 0)
    if run == 0:
        tl.store(offset + e, end, mask=e < n_experts)
    at = end - total + before  # where this run's next pair of each expert goes
    i = tl.arange(0, BLOCK_P)
    first = run * chunk
    for start in range(first, first + chunk, BLOCK_P):
        pair = start + i
        mine = tl.load(expert + pair, mask=pair < pairs, other=-1).to(tl.int32)
        rank = tl.sum(((mine[:, None] == mine[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
        hit = mine[:, None] == e[None, :]
        to = tl.sum(tl.where(hit, at[None, :], 0), 1) + rank
        tl.store(place + pair, to.to(tl.int64), mask=pair < pairs)
        at += tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _spread_kernel(x, place, out, width, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    row = tl.load(x + token * x_stride + col, mask=inside, other=0.0)
    for k in tl.static_range(K):
        to = tl.load(place + token * K + k)
        tl.store(out + to * width + col, row, mask=inside)


def places(expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(row [T·K] of each flat pair in the order by expert, int64; end [E] of each expert's rows, int32)."""
    expert_TK = expert_TK.contiguous()
    pairs, device = expert_TK.numel(), expert_TK.device
    place = torch.empty(pairs, dtype=torch.int64, device=device)
    if not pairs:
        return place, torch.zeros(n_experts, dtype=torch.int32, device=device)
    offset = torch.empty(n_experts, dtype=torch.int32, device=device)
    chunk = ceil_div(ceil_div(pairs, CHUNKS), BLOCK_P) * BLOCK_P
    runs = ceil_div(pairs, chunk)
    counts = torch.empty((runs, n_experts), dtype=torch.int32, device=device)
    block_e = power_of_2(n_experts)
    _count_kernel[(runs,)](
        expert_TK, counts, pairs, chunk, n_experts, BLOCK_P=BLOCK_P, BLOCK_E=block_e, num_warps=4
    )
    _place_kernel[(runs,)](
        expert_TK, counts, place, offset, pairs, chunk, runs, n_experts,
        BLOCK_P=BLOCK_P, BLOCK_E=block_e, BLOCK_R=max(1, 4096 // block_e), num_warps=4,
    )  # fmt: skip
    return place, offset


def spread(x_TD: Tensor, place: Tensor, K: int) -> Tensor:
    """[T·K, D]: the row of pair p's token at place[p]."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    tokens, width = x_TD.shape
    out = torch.empty((tokens * K, width), dtype=x_TD.dtype, device=x_TD.device)
    if tokens:
        block = min(2048, power_of_2(width))
        _spread_kernel[(tokens, ceil_div(width, block))](
            x_TD, place, out, width, x_TD.stride(0), K=K, BLOCK=block, num_warps=max(1, min(8, block // 256))
        )
    return out
