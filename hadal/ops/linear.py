"""Linear layer y = x·Wᵀ + b. Shapes: x [T, I], W [O, I], b [O] → y [T, O]."""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.ops.dispatch import use_cpu_kernels

SMALL_M = 32  # rows up to which the weight-streaming CPU kernel beats a general matrix product


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Matrix product with a weight stored [out, in]. Few rows on CPU go through a weight-streaming C kernel."""
    rows = x_TI.numel() // x_TI.shape[-1]
    if use_cpu_kernels(x_TI, weight_OI):
        from hadal.ops import cpu

        if rows <= SMALL_M or x_TI.dtype == torch.bfloat16:
            return cpu.linear(x_TI, weight_OI, bias_O)
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)
