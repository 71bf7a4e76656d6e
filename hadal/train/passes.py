"""A micro-batch's forward and backward pass, and those of a whole step, as the host sends them one by one.

A pass leaves its gradient in the optimizer's FP32 buffer and gives what a step measures. The same function is
what hadal/train/graphs.py records.
"""

from __future__ import annotations

from torch import Tensor

from hadal.model.transformer import Transformer
from hadal.ops.fp8_training import constant_weights
from hadal.train.batches import Batch, MicroBatch
from hadal.train.losses import Objective, losses
from hadal.train.optimizer import AdamW

Measured = tuple[Tensor, Tensor]
"""[main, MTP, balance] losses, and tokens per gate and expert [G, E]: sums over micro-batches."""


def one_pass(
    model: Transformer, optimizer: AdamW, micro: MicroBatch, weight_K: Tensor, step_rows: int | Tensor,
    mtp_weight: float | Tensor, objective: Objective,
) -> Measured:  # fmt: skip
    """Forward, backward, and the gradient into the optimizer."""
    with optimizer.collecting():
        out = losses(model, micro, weight_K, step_rows, objective)
        out.total(mtp_weight, objective.sequence_alpha).backward()
    optimizer.accumulate()
    return out.parts(), out.count_GE


def passes(
    model: Transformer, optimizer: AdamW, batch: Batch, weight_K: Tensor, mtp_weight: float,
    objective: Objective,
) -> Measured:  # fmt: skip
    """All passes of a step."""
    total: Measured | None = None
    with constant_weights(objective.fp8 and len(batch.micros) > 1):
        for micro in batch.micros:
            parts, count_GE = one_pass(model, optimizer, micro, weight_K, batch.rows, mtp_weight, objective)
            total = (parts, count_GE) if total is None else (total[0] + parts, total[1] + count_GE)
    assert total is not None
    return total
