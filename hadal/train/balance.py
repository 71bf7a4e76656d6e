"""Expert balance: the loss-free bias, the sequence-wise loss, and how far from balance a load is.

Bias (DeepSeek-V3 §2.1.2; Wang et al., arXiv 2408.15664), once per optimizer step, from the counts c of all
its tokens:

    b_i ← b_i + γ·sign(mean(c) − c_i)

Sequence-wise loss (V3 eq. 17–20), for a sequence of T tokens, N_r experts, K_r of them per token:

    L = α Σ_i f_i P_i      f_i = N_r/(K_r·T) Σ_t 1[s_it among the K_r largest of s_·t]
    s'_it = s_it / Σ_j s_jt      P_i = 1/T Σ_t s'_it

f counts the top K_r of the *unbiased* scores; the gradient flows through P alone. A perfectly even sequence
has Σ f_i P_i = 1.

    MaxVio = (max(c) − mean(c)) / mean(c)

Shapes: T tokens, E experts, K experts per token, S sequences, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hadal.ops.dispatch import train_triton


def expert_counts(expert_TK: Tensor, n_experts: int, counted_T: Tensor | None = None) -> Tensor:
    """How many of the counted tokens chose each expert, count_E in int64. `counted_T` (bool) leaves out
    padding."""
    hit_TE = _membership(expert_TK, n_experts)
    if counted_T is not None:
        hit_TE = hit_TE & counted_T[:, None]
    return hit_TE.sum(0)


def _membership(expert_TK: Tensor, n_experts: int) -> Tensor:
    """hit_TE, true where token t chose expert e."""
    hit_TE = torch.zeros(expert_TK.shape[0], n_experts, dtype=torch.bool, device=expert_TK.device)
    return hit_TE.scatter_(1, expert_TK, True)


@torch.no_grad()
def update_biases(biases: Sequence[Tensor], count_GE: Tensor, speed: float | Tensor) -> None:
    """b += γ·sign(mean − count) in place, for each gate's bias_E and its row of `count_GE`. Biases stay
    FP32."""
    count_GE = count_GE.double()  # exact for any count that fits a run
    push_GE = torch.sign(count_GE.mean(-1, keepdim=True) - count_GE).float() * speed
    for bias_E, push_E in zip(biases, push_GE, strict=True):
        if bias_E.dtype != torch.float32:
            raise TypeError(
                f"a correction bias must stay FP32, got {bias_E.dtype}: γ = 0.001 is lost in less"
            )
        bias_E.add_(push_E)


def max_violation(count_GE: Tensor) -> Tensor:
    """MaxVio of each gate, [G] in FP32; 0 is perfect balance, E/K − 1 total collapse. 0 for a gate without
    tokens."""
    mean_G = count_GE.float().mean(-1)
    return (count_GE.amax(-1).float() - mean_G) / mean_G.clamp(min=1.0 / count_GE.shape[-1])


def sequence_loss_reference(score_TE: Tensor, top_k: int) -> Tensor:
    """Σ_i f_i P_i of one sequence, symbol by symbol as printed above (without α)."""
    tokens, experts = score_TE.shape
    total = score_TE.new_zeros(())
    for i in range(experts):
        chosen = sum(1 for t in range(tokens) if i in score_TE[t].topk(top_k).indices.tolist())
        f_i = experts / (top_k * tokens) * chosen
        p_i = (
            sum((score_TE[t, i] / score_TE[t].sum() for t in range(tokens)), start=score_TE.new_zeros(()))
            / tokens
        )
        total = total + f_i * p_i
    return total


def sequence_loss(score_TE: Tensor, top_k: int, rows: int, counted_T: Tensor | None = None) -> Tensor:
    """Σ over `rows` equal stretches of the stream of Σ_i f_i P_i (without α), in FP32: one value for the
    stream.

    `counted_T` (bool) leaves out padding: a row's means run over its counted tokens, and a row without any
    adds 0. Raises ValueError when the stream does not divide into `rows`.
    """
    tokens, experts = score_TE.shape
    if tokens % rows:
        raise ValueError(f"{tokens} tokens do not divide into {rows} rows")
    if counted_T is None:
        counted_T = torch.ones(tokens, dtype=torch.bool, device=score_TE.device)
    if train_triton(score_TE):
        from hadal.ops.triton.train_gate import sequence_loss as fast

        return fast(score_TE, top_k, rows, counted_T)
    hit_TE = (
        _membership(score_TE.detach().topk(top_k, -1, sorted=False).indices, experts) & counted_T[:, None]
    )
    share_TE = score_TE * (counted_T / score_TE.sum(-1))[:, None]
    size_S = counted_T.view(rows, -1).sum(1).clamp(min=1)
    f_SE = hit_TE.view(rows, -1, experts).sum(1) * (experts / (top_k * size_S))[:, None]
    p_SE = share_TE.view(rows, -1, experts).sum(1) / size_S[:, None]
    return (f_SE * p_SE).sum()
