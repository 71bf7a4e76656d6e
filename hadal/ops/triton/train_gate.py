"""The gate from its logits, and the sequence-wise balance loss, in both directions. References:
`hadal.ops.gate.gate_reference`, `hadal.train.balance.sequence_loss`.

Legend: T tokens, E experts, K per token, S sequences of the stream, C runs of a sequence.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.config import Moe
from hadal.ops.triton.gate import _choose, constants, weight_factor
from hadal.ops.triton.sizes import ceil_div, power_of_2

RUN = 256  # tokens of a program of the balance loss
TILE = 32  # of them looked at together


@triton.jit
def _forward_kernel(
    logit, bias, expert, weight, score, n_experts, scale,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    K: tl.constexpr, TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    index = g[:, None] * PER_GROUP + p[None, :]
    real = (g[:, None] < GROUPS) & (p[None, :] < PER_GROUP)
    value = tl.load(logit + token * n_experts + index, mask=real, other=float("-inf"))
    _choose(
        value, bias, expert, weight, token, index, real, g, p, n_experts, scale, GROUPS, BLOCK_G, BLOCK_P, K,
        TOPK_GROUP, SIGMOID, BIASED, SUM_OF_TWO, NORMALISE, BLOCK_K,
    )  # fmt: skip
    if SIGMOID:
        kept = 1.0 / (1.0 + tl.exp(-value))
    else:
        kept = tl.exp(value - tl.max(tl.max(value, 1), 0))
        kept = kept / tl.sum(tl.sum(kept, 1), 0)
    tl.store(score + token * n_experts + index, kept, mask=real)


@triton.jit
def _backward_kernel(
    score, expert, dweight, dscore, dlogit, n_experts, scale, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, WEIGHTS: tl.constexpr,
    SCORES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    e, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real = e < n_experts
    s = tl.load(score + token * n_experts + e, mask=real, other=0.0)
    ds = tl.zeros([BLOCK_E], tl.float32)
    if SCORES:
        ds += tl.load(dscore + token * n_experts + e, mask=real, other=0.0)
    if WEIGHTS:
        chosen = tl.load(expert + token * K + slot, mask=slot < K, other=0)
        picked = tl.load(score + token * n_experts + chosen, mask=slot < K, other=0.0)
        dw = tl.load(dweight + token * K + slot, mask=slot < K, other=0.0) * scale
        if NORMALISE:  # w = s / Σs
            total = tl.sum(picked, 0) + 1e-20
            dw = (dw - tl.sum(dw * picked, 0) / total) / total
        for k in tl.static_range(K):
            own = tl.load(expert + token * K + k)
            ds += tl.where(e == own, tl.sum(tl.where(slot == k, dw, 0.0), 0), 0.0)
    if SIGMOID:
        dz = ds * s * (1.0 - s)
    else:
        dz = s * (ds - tl.sum(s * ds, 0))
    tl.store(dlogit + token * n_experts + e, dz, mask=real)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logit_TE: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor, Tensor]:
        logit_TE = logit_TE.contiguous()
        (tokens, n_experts), K = logit_TE.shape, moe.num_experts_per_tok
        expert_TK = torch.empty((tokens, K), dtype=torch.int64, device=logit_TE.device)
        weight_TK, score_TE = logit_TE.new_empty(tokens, K), torch.empty_like(logit_TE)
        how = constants(moe, n_experts, bias_E is not None)
        _forward_kernel[(tokens,)](
            logit_TE, logit_TE if bias_E is None else bias_E, expert_TK, weight_TK, score_TE, n_experts,
            weight_factor(moe), **how, num_warps=1 if n_experts <= 64 else 4,
        )  # fmt: skip
        ctx.save_for_backward(score_TE, expert_TK)
        ctx.moe, ctx.how = moe, how
        ctx.mark_non_differentiable(expert_TK)
        ctx.set_materialize_grads(False)
        return expert_TK, weight_TK, score_TE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        score_TE, expert_TK = ctx.saved_tensors
        _, dweight_TK, dscore_TE = (None if g is None else g.contiguous() for g in grads)
        (tokens, n_experts), dlogit_TE = score_TE.shape, torch.empty_like(score_TE)
        _backward_kernel[(tokens,)](
            score_TE, expert_TK, score_TE if dweight_TK is None else dweight_TK,
            score_TE if dscore_TE is None else dscore_TE, dlogit_TE, n_experts, weight_factor(ctx.moe),
            K=ctx.how["K"], BLOCK_K=ctx.how["BLOCK_K"], BLOCK_E=power_of_2(n_experts),
            SIGMOID=ctx.how["SIGMOID"], NORMALISE=ctx.how["NORMALISE"], WEIGHTS=dweight_TK is not None,
            SCORES=dscore_TE is not None, num_warps=1 if n_experts <= 64 else 4,
        )  # fmt: skip
        return dlogit_TE, None, None


def gate(logit_TE: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor, Tensor]:
    """(experts int64 [T, K], weights [T, K], scores [T, E]) of FP32 logits."""
    return cast("tuple[Tensor, Tensor, Tensor]", _Gate.apply(logit_TE, bias_E, moe))


# --- the sequence-wise balance loss -------------------------------------------------------------------------
@triton.jit
def _balance_kernel(
    score, counted, hits, shares, length, n_experts, K: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of a run of one sequence's tokens: how often each expert is among the K best, and Σ of its shares."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    hit_sum, share_sum = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, RUN, TILE):
        t = run * RUN + start + tl.arange(0, TILE)
        inside = (t < length)[:, None] & (e < n_experts)[None, :]
        at = (row * length + t)[:, None] * n_experts + e[None, :]
        s = tl.load(score + at, mask=inside, other=0.0)
        counts = tl.load(counted + row * length + t, mask=t < length, other=0) != 0
        best = tl.where(inside, s, float("-inf"))
        hit = tl.zeros([TILE, BLOCK_E], tl.float32)
        for _ in tl.static_range(K):
            top = tl.max(best, 1)
            own = tl.min(tl.where(best == top[:, None], e[None, :], BLOCK_E), 1)
            mine = e[None, :] == own[:, None]
            hit = tl.where(mine, 1.0, hit)
            best = tl.where(mine, float("-inf"), best)
        hit_sum += tl.sum(tl.where(counts[:, None] & inside, hit, 0.0), 0)
        share = s / tl.maximum(tl.sum(s, 1), 1e-30)[:, None]
        share_sum += tl.sum(tl.where(counts[:, None] & inside, share, 0.0), 0)
    to = (row * tl.num_programs(1) + run) * n_experts + e
    tl.store(hits + to, hit_sum, mask=e < n_experts)
    tl.store(shares + to, share_sum, mask=e < n_experts)


@triton.jit
def _balance_backward_kernel(
    score, counted, pull, grad, dscore, tokens, length, n_experts, TILE: tl.constexpr, BLOCK_E: tl.constexpr
):
    """dscore of Σ_e pull[s, e] Σ_t share[t, e]."""
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    e = tl.arange(0, BLOCK_E)
    inside = (t < tokens)[:, None] & (e < n_experts)[None, :]
    s = tl.load(score + t[:, None] * n_experts + e[None, :], mask=inside, other=0.0)
    g = tl.load(pull + (t // length)[:, None] * n_experts + e[None, :], mask=inside, other=0.0)
    counts = tl.load(counted + t, mask=t < tokens, other=0) != 0
    total = tl.maximum(tl.sum(s, 1), 1e-30)[:, None]
    ds = (g - tl.sum(g * s, 1)[:, None] / total) / total * tl.load(grad)
    ds = tl.where(counts[:, None], ds, 0.0)
    tl.store(dscore + t[:, None] * n_experts + e[None, :], ds, mask=inside)


class _SequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_TE: Tensor, top_k: int, rows: int, counted_T: Tensor) -> Tensor:
        score_TE = score_TE.contiguous()
        tokens, n_experts = score_TE.shape
        length = tokens // rows
        hit_SCE = score_TE.new_empty(rows, ceil_div(length, RUN), n_experts)
        share_SCE = torch.empty_like(hit_SCE)
        _balance_kernel[hit_SCE.shape[:2]](
            score_TE, counted_T, hit_SCE, share_SCE, length, n_experts, K=top_k, RUN=RUN, TILE=TILE,
            BLOCK_E=power_of_2(n_experts), num_warps=4,
        )  # fmt: skip
        size_S = counted_T.view(rows, -1).sum(1).clamp(min=1)[:, None]
        pull_SE = hit_SCE.sum(1) * (n_experts / top_k) / size_S.square()  # f / size: f·P = Σ pull·share
        ctx.save_for_backward(score_TE, counted_T, pull_SE)
        return (pull_SE * share_SCE.sum(1)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        score_TE, counted_T, pull_SE = ctx.saved_tensors
        (tokens, n_experts), dscore_TE = score_TE.shape, torch.empty_like(score_TE)
        _balance_backward_kernel[(ceil_div(tokens, TILE),)](
            score_TE, counted_T, pull_SE, grads[0].contiguous(), dscore_TE, tokens,
            tokens // pull_SE.shape[0], n_experts, TILE=TILE, BLOCK_E=power_of_2(n_experts), num_warps=4,
        )  # fmt: skip
        return dscore_TE, None, None, None


def sequence_loss(score_TE: Tensor, top_k: int, rows: int, counted_T: Tensor) -> Tensor:
    """Σ over sequences of Σ_i f_i P_i, a scalar."""
    return cast(Tensor, _SequenceLoss.apply(score_TE, top_k, rows, counted_T.contiguous()))
