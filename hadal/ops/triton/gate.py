"""Group-limited top-k routing in one kernel behind one matrix product. Reference: `hadal.ops.gate`.

One program a token holds its scores as [groups, experts of a group], both padded to powers of two. One token
alone takes a single launch, with the norm before it: an expert a program, and the last to finish chooses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.config import Moe
from hadal.ops.triton import gemv, pdl
from hadal.ops.triton import linear as few_rows
from hadal.ops.triton.arrivals import counters
from hadal.ops.triton.sizes import power_of_2


@triton.jit
def _argmax_2d(value, index, NOTHING: tl.constexpr):
    """(largest value, smallest index that holds it) of a 2-D tile."""
    best = tl.max(tl.max(value, 1), 0)
    at = tl.where(value == best, index, NOTHING)
    return best, tl.min(tl.min(at, 1), 0)


@triton.jit
def _choose(
    value, bias, expert, weight, token, index, real, g, p, n_experts, scale,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    K: tl.constexpr, TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores, groups and top-k of one token's logits [groups, experts of a group]; stores what it chose."""
    if SIGMOID:
        score = tl.where(real, 1.0 / (1.0 + tl.exp(-value)), 0.0)
    else:
        shifted = tl.where(real, tl.exp(value - tl.max(tl.max(value, 1), 0)), 0.0)
        score = shifted / tl.sum(tl.sum(shifted, 1), 0)
    choice = score
    if BIASED:
        choice = choice + tl.load(bias + index, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    if TOPK_GROUP < GROUPS:
        first = tl.max(choice, 1)
        rank = first
        if SUM_OF_TWO:
            at = tl.min(tl.where(choice == first[:, None], p[None, :], BLOCK_P), 1)
            second = tl.max(tl.where(p[None, :] == at[:, None], float("-inf"), choice), 1)
            rank = first + tl.where(second == float("-inf"), 0.0, second)
        rank = tl.where(g < GROUPS, rank, float("-inf"))
        kept = tl.zeros([BLOCK_G], tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            best = tl.max(rank, 0)
            at_g = tl.min(tl.where((rank == best) & (kept == 0), g, BLOCK_G), 0)
            kept = tl.where(g == at_g, 1, kept)
            rank = tl.where(g == at_g, float("-inf"), rank)
        choice = tl.where(kept[:, None] == 1, choice, float("-inf"))
    slot = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    gathered = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        best, at = _argmax_2d(choice, index, 1 << 30)
        at = tl.minimum(at, n_experts - 1)  # NaN scores: any valid expert, so that no address goes astray
        picked = tl.sum(tl.sum(tl.where(index == at, score, 0.0) * tl.where(real, 1.0, 0.0), 1), 0)
        chosen = tl.where(slot == k, at, chosen)
        gathered = tl.where(slot == k, picked, gathered)
        choice = tl.where(index == at, float("-inf"), choice)
    if NORMALISE:
        gathered = gathered / (tl.sum(gathered, 0) + 1e-20)
    tl.store(expert + token * K + slot, chosen.to(tl.int64), mask=slot < K)
    tl.store(weight + token * K + slot, gathered * scale, mask=slot < K)


@triton.jit
def _gate_kernel(
    logit, bias, expert, weight, n_experts, scale,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    K: tl.constexpr, TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    pdl.wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    p = tl.arange(0, BLOCK_P)
    index = g[:, None] * PER_GROUP + p[None, :]
    real = (g[:, None] < GROUPS) & (p[None, :] < PER_GROUP)
    value = tl.load(logit + token * n_experts + index, mask=real, other=float("-inf"))
    _choose(
        value, bias, expert, weight, token, index, real, g, p, n_experts, scale, GROUPS, BLOCK_G, BLOCK_P, K,
        TOPK_GROUP, SIGMOID, BIASED, SUM_OF_TWO, NORMALISE, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _gate_one_kernel(
    x, norm, w, bias, normed, logit, expert, weight, arrived, hidden, eps, n_experts, scale,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    K: tl.constexpr, TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    n = tl.program_id(0) + tl.arange(0, 1)
    row = w + n[:, None].to(tl.int64) * hidden
    value, _ = gemv.normed_products(x, norm, normed, row, row, hidden, eps, False, True, BLOCK_D, PDL)
    tl.store(logit + n[:, None], value)
    tl.debug_barrier()  # the logit is written before anybody is told
    if tl.atomic_add(arrived, 1, sem="acq_rel") == n_experts - 1:
        tl.store(arrived, 0)  # for the next launch
        g = tl.arange(0, BLOCK_G)
        p = tl.arange(0, BLOCK_P)
        index = g[:, None] * PER_GROUP + p[None, :]
        real = (g[:, None] < GROUPS) & (p[None, :] < PER_GROUP)
        all_of_them = tl.load(logit + index, mask=real, other=float("-inf"), cache_modifier=".cg")
        _choose(
            all_of_them, bias, expert, weight, 0, index, real, g, p, n_experts, scale, GROUPS, BLOCK_G,
            BLOCK_P, K, TOPK_GROUP, SIGMOID, BIASED, SUM_OF_TWO, NORMALISE, BLOCK_K,
        )  # fmt: skip


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """FP32 router logits. BF16 products are exact in FP32: a BF16 product with FP32 output loses nothing."""
    if few_rows.wants(x_TD, weight_ED):
        return few_rows.linear(x_TD, weight_ED, dtype=torch.float32)
    if x_TD.dtype == torch.bfloat16 and x_TD.is_cuda:
        return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
    return x_TD.float() @ weight_ED.float().t()


def gate(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor]:
    """(experts int64 [T, K], weights FP32 [T, K])."""
    return route(gate_logits(x_TD, weight_ED), bias_E, moe)


def gate_normed(
    x_TD: Tensor, norm: tuple[Tensor, float], weight_ED: Tensor, bias_E: Tensor | None, moe: Moe
) -> tuple[Tensor, Tensor, Tensor]:
    """(RMSNorm(x), its experts and weights) of one token (`linear.takes_norm`): the router's product norms,
    and leaves the normed row for the experts."""
    n_experts, hidden = weight_ED.shape
    normed_TD, x_TD, K = torch.empty_like(x_TD), x_TD.contiguous(), moe.num_experts_per_tok
    logit_E, weight_TK = (x_TD.new_empty(size, dtype=torch.float32) for size in ((n_experts,), (1, K)))
    expert_TK = x_TD.new_empty((1, K), dtype=torch.int64)
    block = power_of_2(hidden)
    _gate_one_kernel[(n_experts,)](
        x_TD, norm[0], weight_ED, bias_E if bias_E is not None else logit_E, normed_TD, logit_E, expert_TK,
        weight_TK, counters(x_TD.device), hidden, norm[1], n_experts, weight_factor(moe),
        **constants(moe, n_experts, bias_E is not None), BLOCK_D=block,
        num_warps=1 if block <= 2048 and n_experts <= 64 else 2, **pdl.options(x_TD),
    )  # fmt: skip
    return normed_TD, expert_TK, weight_TK


def route(logit_TE: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor]:
    """`gate` from the router's logits."""
    tokens, n_experts = logit_TE.shape
    K = moe.num_experts_per_tok
    expert_TK = torch.empty((tokens, K), dtype=torch.int64, device=logit_TE.device)
    weight_TK = torch.empty((tokens, K), dtype=torch.float32, device=logit_TE.device)
    _gate_kernel[(tokens,)](
        logit_TE, bias_E if bias_E is not None else logit_TE, expert_TK, weight_TK, n_experts,
        weight_factor(moe), **constants(moe, n_experts, bias_E is not None),
        num_warps=1 if n_experts <= 64 else 4, **pdl.options(logit_TE),
    )  # fmt: skip
    return expert_TK, weight_TK


def _normalises(moe: Moe) -> bool:
    return moe.norm_topk_prob and moe.num_experts_per_tok > 1


def weight_factor(moe: Moe) -> float:
    """What the weights are multiplied with: V2 scales only the branch that does not normalise."""
    scaled = moe.topk_method == "noaux_tc" or not _normalises(moe)
    return moe.routed_scaling_factor if scaled else 1.0


def constants(moe: Moe, n_experts: int, biased: bool) -> dict[str, int | bool]:
    """What the kernels are compiled for."""
    groups = moe.n_group if moe.topk_method != "greedy" else 1
    per_group = n_experts // groups
    return {
        "GROUPS": groups, "PER_GROUP": per_group, "BLOCK_G": power_of_2(groups),
        "BLOCK_P": power_of_2(per_group), "K": moe.num_experts_per_tok,
        "TOPK_GROUP": moe.topk_group if groups > 1 else 1, "SIGMOID": moe.scoring_func == "sigmoid",
        "BIASED": biased, "SUM_OF_TWO": moe.topk_method == "noaux_tc", "NORMALISE": _normalises(moe),
        "BLOCK_K": power_of_2(moe.num_experts_per_tok),
    }  # fmt: skip
