"""Reading weights into a GPU's cache before their turn (hadal/ops/triton/ahead.py); elsewhere, nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hadal.ops.dispatch import use_triton


def wants(x_TD: Tensor) -> bool:
    """Whether it pays for these hidden states: few rows, inference, a GPU that can."""
    if not x_TD.is_cuda or not use_triton(x_TD):
        return False
    from hadal.ops.triton import ahead

    return ahead.wants(x_TD)


def start(weights: Sequence[Tensor]) -> None:
    """Begin to read these, if there are any; the kernels launched next do not wait for it."""
    if weights:
        from hadal.ops.triton import ahead

        ahead.start(weights)


def finish(device: torch.device) -> None:
    """Before the step ends, after any `start`."""
    from hadal.ops.triton import ahead

    ahead.finish(device)
