"""The training objective (DeepSeek-V3 report §2.1.2, §2.2, §4.2):

    L = L_main + (λ/D) Σ_k L_MTP^k + α Σ_gates L_balance

L_main and each L_MTP^k are weighted means of next-token cross-entropies over the *whole optimizer step*:
sums are divided by the step's weight totals, not by a micro-batch's, so that gradient accumulation equals
the large batch. L_balance is a mean over the step's rows (a "sequence" of the formula is one packed row),
summed over gates, the MTP module's included.

Shapes: T tokens, D hidden, K = 1 + MTP depths, G gates, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hadal.model.context import Context
from hadal.model.layers import Linear
from hadal.model.mtp import Mtp
from hadal.model.transformer import Transformer
from hadal.ops.cross_entropy import linear_cross_entropy, weighted_cross_entropy
from hadal.ops.fp8_training import Scales, fp8_training
from hadal.ops.recompute import recompute
from hadal.train.balance import expert_counts, sequence_loss
from hadal.train.batches import MicroBatch


@dataclass(frozen=True)
class Objective:
    """The coefficients of the objective that hold for a whole run."""

    sequence_alpha: float = 0.0
    z_loss: float = 0.0
    recompute: tuple[str, ...] = ()  # what the backward pass makes again (hadal/ops/recompute.py)
    fp8: bool = False  # linear layers multiply in FP8, forward and backward (hadal/ops/fp8_training.py)
    fp8_scales: Scales = "power_of_two"


@dataclass
class Losses:
    """One micro-batch's share of a step: FP32 scalars that sum over the step's micro-batches."""

    main: Tensor
    mtp: Tensor  # mean over depths; 0 without MTP
    balance: Tensor  # without α; 0 where α = 0, or without gates
    count_GE: Tensor  # int64: tokens per gate and expert; [0, 0] for a dense model

    def total(self, mtp_weight: float | Tensor, alpha: float) -> Tensor:
        """The scalar to differentiate. A weight on the device is not looked at."""
        total = self.main
        if isinstance(mtp_weight, Tensor) or mtp_weight:
            total = total + mtp_weight * self.mtp
        if alpha:
            total = total + alpha * self.balance
        return total

    def parts(self) -> Tensor:
        """[main, mtp, balance], detached."""
        return torch.stack([self.main, self.mtp, self.balance]).detach()


def losses(
    model: Transformer, micro: MicroBatch, weight_K: Tensor, step_rows: int | Tensor, objective: Objective
) -> Losses:
    """Forward pass of a micro-batch of a step whose weights sum to `weight_K` and which has `step_rows`
    rows (a number, or one on the device)."""
    context = micro.context(record_routing=True)
    share_KT = micro.weight_KT / weight_K.clamp(min=1e-6)[:, None]
    with recompute(objective.recompute), fp8_training(objective.fp8, objective.fp8_scales):
        mean_K = weighted_losses(model, micro, context, share_KT, objective.z_loss)
    main, zero = mean_K[0], torch.zeros_like(mean_K[0])
    balance, count_GE = _balance(context, micro, model, step_rows, objective.sequence_alpha > 0)
    return Losses(
        main=main,
        mtp=torch.stack(mean_K[1:]).mean() if len(mean_K) > 1 else zero,
        balance=zero if balance is None else balance,
        count_GE=count_GE,
    )


def weighted_losses(
    model: Transformer, micro: MicroBatch, context: Context, share_KT: Tensor, z_loss: float = 0.0
) -> list[Tensor]:
    """Σ_t share_t·nll_t of the main model and of each MTP depth: scalars. Of `share_KT` nothing is
    differentiated."""
    head_VD = _head(model).matrix
    return [
        weighted_cross_entropy(normed_TD, head_VD, target_T, share_T, z_loss=z_loss)
        for normed_TD, target_T, share_T in zip(
            _normed(model, micro, context), micro.target_KT, share_KT, strict=True
        )
    ]


def cross_entropies(
    model: Transformer, micro: MicroBatch, context: Context, z_loss: float = 0.0
) -> list[Tensor]:
    """nll_T of the main model and of each MTP depth, in nats."""
    head_VD = _head(model).matrix
    pairs = zip(_normed(model, micro, context), micro.target_KT, strict=True)
    return [
        linear_cross_entropy(normed_TD, head_VD, target_T, z_loss=z_loss) for normed_TD, target_T in pairs
    ]


def _head(model: Transformer) -> Linear:
    return model.embed_tokens if model.lm_head is None else model.lm_head


def _normed(model: Transformer, micro: MicroBatch, context: Context) -> Iterator[Tensor]:
    """What the head takes [T, D], of the main model and of each MTP depth in turn."""
    hidden_TD = model(micro.token_KT[0], context)
    yield model.norm(hidden_TD)
    for depth, module in enumerate(model.mtp):
        hidden_TD = model.mtp_forward(hidden_TD, micro.token_KT[depth + 1], context, depth)
        yield cast(Mtp, module).norm(hidden_TD)


def _balance(
    context: Context, micro: MicroBatch, model: Transformer, step_rows: int | Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """(Σ over gates of the sequence-wise loss or None, count_GE)."""
    moe = model.config.moe
    if moe is None or not context.routing:
        return None, torch.zeros(0, 0, dtype=torch.int64, device=micro.position_T.device)
    total, counts = None, []
    for record in context.routing:
        depth = max(0, record.layer - model.config.num_hidden_layers + 1)
        counted_T = micro.counted_KT[depth]
        counts.append(expert_counts(record.expert_TK, moe.n_routed_experts, counted_T))
        if wanted:
            value = sequence_loss(record.score_TE, moe.num_experts_per_tok, micro.rows, counted_T) / step_rows
            total = value if total is None else total + value
    return total, torch.stack(counts)


def correction_biases(model: Transformer) -> list[Tensor]:
    """The gates' FP32 correction biases in the order in which a forward pass records them; [] without any."""
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    gates = [block.mlp.gate for block in blocks if block.is_moe]
    return [gate.e_score_correction_bias for gate in gates if gate.e_score_correction_bias is not None]
