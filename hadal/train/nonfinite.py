"""A loss or a gradient that is not finite: where it came from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hadal.model.transformer import Transformer
from hadal.train.batches import Batch
from hadal.train.losses import Objective, losses
from hadal.train.schedules import Knobs


class NonFiniteError(RuntimeError):
    """Training met a NaN or an infinity; the update was not applied. `step` and `where` say when, where."""

    def __init__(self, step: int, tokens: int, main: float, mtp: float, norm: float, where: str) -> None:
        self.step, self.where = step, where
        what = [
            f"{name} is {value}"
            for name, value in (("loss", main), ("MTP loss", mtp), ("gradient norm", norm))
            if not math.isfinite(value)
        ]
        super().__init__(
            f"step {step} ({tokens:,} tokens): {', '.join(what) or 'balance loss is not finite'}; {where}. "
            "The update was not applied: weights are those of the step before. --resume tries the step again "
            "with the same recipe, which helps if the machine was at fault; else look at the data of this "
            "step, or start anew (another --out) with a lower learning_rate.peak"
        )


def describe(model: Transformer, batch: Batch, knobs: Knobs, objective: Objective) -> str:
    """Run the batch again with a watch on every module, and name the first value that is not finite."""
    first: list[str] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        if not first and any(isinstance(v, Tensor) and not v.isfinite().all() for v in values):
            first.append(names[module])

    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        return f"these weights were not finite before the step: {_some(broken)}"
    handles = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):
            return _search(model, batch, knobs, objective, first)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None


def _search(model: Transformer, batch: Batch, knobs: Knobs, objective: Objective, first: list[str]) -> str:
    for number, micro in enumerate(batch.micros):
        place = f"micro-batch {number + 1} of {len(batch.micros)} (rows up to {batch.position})"
        out = losses(model, micro, batch.weight_K, batch.rows, objective)
        if first:
            return f"the first value that is not finite leaves {first[0]}, in {place}"
        if not out.parts().isfinite().all():
            return f"every module's output is finite, the loss is not, in {place}"
        out.total(knobs.mtp_weight, objective.sequence_alpha).backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if bad:
            return f"the loss is finite, the gradients of {_some(bad)} are not, in {place}"
    return "every gradient is finite by itself: their sum of squares overflows"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
