"""The gate in one kernel for a few tokens: product, scores, groups and top-k. Reference: `hadal.ops.gate`.

Programs share the gate's weight among them, experts and channels, and leave partial logits; the one that
arrives last adds them up in a fixed order and chooses. For one token this saves a launch and the latency of
a small matrix product; for many the choice, made by one program, would be the slower part.
Legend: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.config import Moe
from hadal.ops.triton import pdl
from hadal.ops.triton.arrivals import counters
from hadal.ops.triton.gate import _choose, constants, weight_factor

MAX_TOKENS = 4


@triton.jit
def _fused_kernel(
    x, w, bias, partial, arrived, expert, weight, tokens, n_experts, hidden, x_stride, share, scale,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    K: tl.constexpr, TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    m = tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * share
    if PDL:
        line = tl.minimum(begin + tl.arange(0, 16) * pdl.LINE, hidden - 1)
        pdl.prefetch(w + tl.minimum(e, n_experts - 1)[:, None].to(tl.int64) * hidden + line[None, :], PDL)
    pdl.wait(PDL)
    acc = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    for start in range(begin, tl.minimum(begin + share, hidden), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        w_mask = (e < n_experts)[:, None] & (d < hidden)[None, :]
        x_mask = (m < tokens)[None, :] & (d < hidden)[:, None]
        tile = tl.load(w + e[:, None].to(tl.int64) * hidden + d[None, :], mask=w_mask, other=0.0)
        value = tl.load(x + m[None, :] * x_stride + d[:, None], mask=x_mask, other=0.0)
        acc = tl.dot(tile, value, acc, input_precision="ieee")
    to = partial + (tl.program_id(1) * tokens + m[None, :]) * n_experts + e[:, None]
    tl.store(to, acc, mask=(m < tokens)[None, :] & (e < n_experts)[:, None])
    tl.debug_barrier()  # all threads' sums are written before one of them says so
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    if before == tl.num_programs(0) * SPLITS - 1:
        g = tl.arange(0, BLOCK_G)
        p = tl.arange(0, BLOCK_P)
        index = g[:, None] * PER_GROUP + p[None, :]
        real = (g[:, None] < GROUPS) & (p[None, :] < PER_GROUP)
        for token in range(tokens):
            logit = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
            for split in tl.static_range(SPLITS):
                at = partial + (split * tokens + token) * n_experts + index
                logit += tl.load(at, mask=real, other=0.0, cache_modifier=".cg")
            logit = tl.where(real, logit, float("-inf"))
            _choose(
                logit, bias, expert, weight, token, index, real, g, p, n_experts, scale, GROUPS, BLOCK_G,
                BLOCK_P, K, TOPK_GROUP, SIGMOID, BIASED, SUM_OF_TWO, NORMALISE, BLOCK_K,
            )  # fmt: skip
        tl.store(arrived, 0)  # for the next launch


def wants(x_TD: Tensor) -> bool:
    """Whether this kernel takes so few rows."""
    return 0 < x_TD.shape[0] <= MAX_TOKENS and x_TD.dtype == torch.bfloat16


def gate(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe, block_e: int = 16,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(experts int64 [T, K], weights FP32 [T, K])."""
    (tokens, hidden), n_experts, K = x_TD.shape, weight_ED.shape[0], moe.num_experts_per_tok
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens; this gate takes up to {MAX_TOKENS}")
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    splits = splits or max(1, min(8, hidden // 1024))
    share = triton.cdiv(triton.cdiv(hidden, splits), 256) * 256
    partial = torch.empty((splits, tokens, n_experts), dtype=torch.float32, device=x_TD.device)
    expert_TK = torch.empty((tokens, K), dtype=torch.int64, device=x_TD.device)
    weight_TK = torch.empty((tokens, K), dtype=torch.float32, device=x_TD.device)
    _fused_kernel[(triton.cdiv(n_experts, block_e), splits)](
        x_TD, weight_ED, bias_E if bias_E is not None else partial, partial, counters(x_TD.device), expert_TK,
        weight_TK, tokens, n_experts, hidden, x_TD.stride(0), share, weight_factor(moe), BLOCK_E=block_e,
        BLOCK_M=16, BLOCK_D=256, SPLITS=splits, **constants(moe, n_experts, bias_E is not None),
        num_warps=4, num_stages=3, **pdl.options(x_TD),
    )  # fmt: skip
    return expert_TK, weight_TK
