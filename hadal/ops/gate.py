"""The MoE gate (V3 §2.1.2 and its published code; V2 §2.2). All in FP32.

V3 (`noaux_tc`): s = sigmoid(W·x); choose by b = s + e_score_correction_bias: groups ranked by the sum of
their two largest b, others masked with −inf, top-k of b; weights are the *unbiased* s, normalised, times the
scaling factor.
V2: s = softmax(W·x); groups ranked by their maximum (`group_limited_greedy`), or none (`greedy`).
Legend: T tokens, D hidden, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hadal.config import Moe
from hadal.ops import cpu, invariant
from hadal.ops.cross_entropy import matmul_wide
from hadal.ops.dispatch import train_triton, use_cpu_kernels, use_triton
from hadal.ops.exact import is_exact
from hadal.ops.linear import Norm, takes_norm
from hadal.ops.recompute import recomputed
from hadal.ops.rms_norm import rms_norm

SMALL_T = 64  # tokens up to which the CPU kernel, one thread, beats the torch operations


def scores(x_TD: Tensor, weight_ED: Tensor, moe: Moe) -> Tensor:
    """Affinities s, FP32 [T, E]."""
    logit_TE = _logits(x_TD, weight_ED)
    return logit_TE.sigmoid() if moe.scoring_func == "sigmoid" else logit_TE.softmax(-1)


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """W·x in FP32, [T, E]."""
    if x_TD.dtype == weight_ED.dtype == torch.bfloat16 and train_triton(x_TD, weight_ED):
        return cast(Tensor, WideProduct.apply(x_TD, weight_ED))
    wide_TD = x_TD if x_TD.dtype == torch.float32 else recomputed("norm", torch.Tensor.float, x_TD)
    return torch.nn.functional.linear(wide_TD, weight_ED.float())


class WideProduct(torch.autograd.Function):
    """x·Wᵀ of BF16 inputs with an FP32 result, on tensor cores in both directions: products of BF16 values
    are exact in FP32, and a gradient in FP32 goes back as the sum of two BF16 values, which keep 16 of its
    bits. No FP32 copy of x is made."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return matmul_wide(x_TD, weight_ED.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        high_TE = grads[0].to(x_TD.dtype)
        both = torch.cat([high_TE, (grads[0] - high_TE).to(x_TD.dtype)], 1)
        dweight_ED = matmul_wide(both.T, x_TD).unflatten(0, (2, -1)).sum(0)
        return both @ torch.cat([weight_ED, weight_ED]), dweight_ED.to(weight_ED.dtype)


def choose(score_TE: Tensor, bias_E: Tensor | None, moe: Moe) -> Tensor:
    """Indices of the chosen experts, int64 [T, K], unordered."""
    choice_TE = score_TE if bias_E is None else score_TE + bias_E
    if moe.n_group > 1 and moe.topk_method != "greedy":
        group_TGe = choice_TE.unflatten(-1, (moe.n_group, -1))
        if moe.topk_method == "noaux_tc":
            group_TG = group_TGe.topk(min(2, group_TGe.shape[-1]), -1).values.sum(-1)
        else:
            group_TG = group_TGe.amax(-1)
        dropped_TG = torch.ones_like(group_TG, dtype=torch.bool)
        dropped_TG.scatter_(1, group_TG.topk(moe.topk_group, -1, sorted=False).indices, False)
        choice_TE = group_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
    return choice_TE.topk(moe.num_experts_per_tok, -1, sorted=False).indices


def weigh(score_TE: Tensor, expert_TK: Tensor, moe: Moe) -> Tensor:
    """Combination weights of the chosen experts from the unbiased scores, FP32 [T, K]."""
    weight_TK = score_TE.gather(1, expert_TK)
    if moe.norm_topk_prob and moe.num_experts_per_tok > 1:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        # V2's published code scales only the branch that does not normalise
        if moe.topk_method != "noaux_tc":
            return weight_TK
    return weight_TK * moe.routed_scaling_factor


def gate_reference(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts int64 [T, K], weights FP32 [T, K], scores FP32 [T, E])."""
    score_TE = scores(x_TD, weight_ED, moe)
    expert_TK = choose(score_TE.detach(), bias_E, moe)
    return expert_TK, weigh(score_TE, expert_TK, moe), score_TE


def gate_with_scores(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_reference`; in training on CUDA in two kernels and a product."""
    if x_TD.dtype == torch.bfloat16 and train_triton(x_TD, weight_ED):
        from hadal.ops.triton.train_gate import gate as fast

        return fast(_logits(x_TD, weight_ED), bias_E, moe)
    return gate_reference(x_TD, weight_ED, bias_E, moe)


def gate(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gate; fused on CUDA for inference, where the scores are not kept (None)."""
    if is_exact():
        return invariant.gate(x_TD, weight_ED, bias_E, moe)
    if use_triton(x_TD, weight_ED):
        from hadal.ops.triton.gate import gate as fast

        return (*fast(x_TD, weight_ED, bias_E, moe), None)
    if use_cpu_kernels(x_TD, weight_ED) and x_TD.shape[0] <= SMALL_T:
        return (*cpu.gate(x_TD, weight_ED, bias_E, moe), None)
    return gate_reference(x_TD, weight_ED, bias_E, moe)


def gate_normed(
    x_TD: Tensor, norm: Norm, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe
) -> tuple[Tensor, Tensor, Tensor]:
    """(RMSNorm(x) [T, D], and its gate's experts and weights [T, K])."""
    if takes_norm(x_TD, weight_ED):
        from hadal.ops.triton.gate import gate_normed as fast

        return fast(x_TD, norm, weight_ED, bias_E, moe)
    x_TD = rms_norm(x_TD, *norm)
    expert_TK, weight_TK, _ = gate(x_TD, weight_ED, bias_E, moe)
    return x_TD, expert_TK, weight_TK
