"""FP8 products in training (DeepSeek-V3 report §3.3): the three products of a linear layer, E4M3 everywhere.

    Fprop  y  = x·Wᵀ     x in tiles of 1 token × 128 inputs, W in blocks of 128 × 128
    Dgrad  dx = dy·W     dy in tiles of 1 token × 128 outputs, W's blocks as they are
    Wgrad  dW = dyᵀ·x    dy and x in tiles of 128 tokens × 1 channel

Scales are found online, from the largest value of each tile. The input is kept for the backward pass as codes
(one byte an element) with scales that are powers of two: cut anew along tokens there, a value keeps its bits
but for those that a larger neighbour pushes out at the small end. Sums are FP32, each 128 products scaled
apart, as if both sides were dequantised; they are here (a reference, for any device).
Embedding, head, gates, norms, attention, and MTP's joining projection stay in the model's dtype.

    with fp8_training():
        loss = …
Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from hadal.ops.fp8 import (
    dequantise_activations,
    dequantise_blocks,
    quantise_activations,
    quantise_blocks,
)

_FP8: ContextVar[bool] = ContextVar("hadal_fp8_training", default=False)


def is_fp8_training() -> bool:
    """Whether linear layers called here and now multiply in FP8."""
    return _FP8.get()


@contextmanager
def fp8_training(on: bool = True) -> Iterator[None]:
    """FP8 products of linear layers inside the block; `fp8_training(False)` is ordinary ones inside that."""
    token = _FP8.set(on)
    try:
        yield
    finally:
        _FP8.reset(token)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b with all three products in FP8; the last dimension of x is multiplied. Gradients have the
    dtypes of what they belong to."""
    y_TO = cast(Tensor, _Linear.apply(x_TI.reshape(-1, x_TI.shape[-1]), weight_OI))
    y_TO = y_TO.view(*x_TI.shape[:-1], weight_OI.shape[0])
    return y_TO if bias_O is None else y_TO + bias_O


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        code_TI, scale = quantise_activations(x_TI, power_of_two=True)
        blocks = quantise_blocks(weight_OI)
        ctx.save_for_backward(code_TI, scale, *blocks)
        ctx.dtypes = x_TI.dtype, weight_OI.dtype
        return (dequantise_activations(code_TI, scale) @ dequantise_blocks(*blocks).T).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy_TO,) = grads
        code_TI, scale, *blocks = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        dx_TI = dw_OI = None
        if ctx.needs_input_grad[0]:
            dx_TI = (_rounded(dy_TO) @ dequantise_blocks(*blocks)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            x_TI = dequantise_activations(code_TI, scale)
            dw_OI = (_rounded(dy_TO.T) @ _rounded(x_TI.T, power_of_two=True).T).to(weight_dtype)
        return dx_TI, dw_OI


def _rounded(x: Tensor, power_of_two: bool = False) -> Tensor:
    """x through FP8, in tiles of 128 along its last dimension; FP32."""
    return dequantise_activations(*quantise_activations(x, power_of_two=power_of_two))
