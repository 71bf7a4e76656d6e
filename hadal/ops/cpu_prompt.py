"""Prompts on CPU: products of many rows with plain weights (`csrc/prompt.cpp`, called through ctypes).

The references are torch's products (`linear`) and `experts_reference`. Weights are used as they lie in
memory; BF16 is widened a few rows at a time, so that processors without BF16 arithmetic lose nothing.
Intermediate values of a feed-forward network stay FP32.
Legend: T tokens, D hidden, I width, E experts, K per token, O outputs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from hadal.ops import cpu


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(cpu.status()[0], f"prompt_{name}_{'f32' if dtype == torch.float32 else 'bf16'}")
    p, i = ctypes.c_void_p, ctypes.c_int64
    function.restype = None
    function.argtypes = {"linear": [p] * 4 + [i] * 4, "networks": [p, p]}[name]
    return function


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b; [T, O] in x's dtype. Rows of x may be strided."""
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    weight_OI = weight_OI.contiguous()
    bias_O = None if bias_O is None else bias_O.to(x_TI.dtype).contiguous()
    (rows, width), outs = x_TI.shape, weight_OI.shape[0]
    out_TO = x_TI.new_empty(rows, outs)
    _function("linear", x_TI.dtype)(
        x_TI.data_ptr(), weight_OI.data_ptr(), None if bias_O is None else bias_O.data_ptr(),
        out_TO.data_ptr(), rows, outs, width, x_TI.stride(0),
    )  # fmt: skip
    return out_TO


def ffn(x_TD: Tensor, gate_up_2ID: Tensor, down_DI: Tensor, residual_TD: Tensor | None = None) -> Tensor:
    """down(silu(gate·x) ⊙ up·x) in one call, + residual where it is given."""
    tensors = (x_TD, None, None, None, None, gate_up_2ID, down_DI, residual_TD)
    return _networks([None if t is None else t.contiguous() for t in tensors], 0, 0, 0, down_DI.shape[1])


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared: tuple[Tensor, Tensor] | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The routed experts in one call for all of them, + the shared one's + residual where they are given."""
    tensors = (x_TD, expert_TK, weight_TK.float(), gate_up_E2ID, down_EDI, *(shared or (None, None)))
    together = [None if t is None else t.contiguous() for t in (*tensors, residual_TD)]
    E, _, width = down_EDI.shape
    return _networks(together, expert_TK.shape[1], E, width, shared[1].shape[1] if shared else 0)


def _networks(tensors: list[Tensor | None], K: int, E: int, width: int, dense: int) -> Tensor:
    x_TD = tensors[0]
    assert x_TD is not None
    out_TD = torch.empty_like(x_TD)
    addresses = [None if t is None else t.data_ptr() for t in (*tensors, out_TD)]
    sizes = (x_TD.shape[0], K, E, x_TD.shape[1], width, dense)
    _function("networks", x_TD.dtype)((ctypes.c_void_p * 9)(*addresses), (ctypes.c_int64 * 6)(*sizes))
    return out_TD
