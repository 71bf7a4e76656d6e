"""FP8 products in training (DeepSeek-V3 report §3.3): the three products of a linear layer, E4M3 everywhere.

    Fprop  y  = x·Wᵀ     x in tiles of 1 token × 128 inputs, W in blocks of 128 × 128
    Dgrad  dx = dy·W     dy in tiles of 1 token × 128 outputs, W's blocks as they are
    Wgrad  dW = dyᵀ·x    dy and x in tiles of 128 tokens × 1 channel

Scales are found online, from the largest value of each tile; sums are FP32, each 128 products scaled apart,
as if both sides were dequantised. By default all scales are powers of two ("power_of_two"); with "float32"
only those of tensors that are cut anew are, as in V3. What is kept for the backward pass are codes, one byte
an element:

    linear    x, cut anew along tokens in the backward pass
    network   x, and gate and up, from which SwiGLU's product is made again; experts' rows are sorted as codes
              (x and dy are quantised once a token, before they are dispatched)

The gate's weight of a (token, expert) pair is put on the hidden values, not on the output: the sum is the
same, but the gradient of every pair's row is the token's own, and the weight's needs no output to be kept.
Embedding, head, gates, norms, attention, and MTP's joining projection stay in the model's dtype.

    with fp8_training():
        with constant_weights():      # quantised once, for as many micro-batches as there are
            …
Numerics, and the path of any device: hadal/ops/fp8_tiles.py; kernels: hadal/ops/triton/fp8_train.py.
Legend: T tokens, R sorted rows, D hidden, I inputs or width, O outputs, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from hadal.ops import fp8_tiles
from hadal.ops.dispatch import forced_reference, has_triton
from hadal.ops.fp8_tiles import Codes, Rows, Weight

Scales = Literal["power_of_two", "float32"]
SCALES: tuple[Scales, ...] = ("power_of_two", "float32")


class _Recipe(NamedTuple):
    """What is on, here and now: whether scales are powers of two."""

    power: bool


_RECIPE: ContextVar[_Recipe | None] = ContextVar("hadal_fp8_training", default=None)
_CONSTANT: ContextVar[dict[tuple[Any, ...], _Quantised] | None] = ContextVar(
    "hadal_fp8_weights", default=None
)


class Sums(Protocol):
    """Where gradients of weights are summed."""

    def place(self, weight: Tensor) -> tuple[Tensor, bool] | None:
        """The sum for this weight, FP32 and contiguous, and whether anything is in it yet: the caller brings
        the gradient there, and autograd gets none. None where autograd is to have it."""


_SUMS: ContextVar[Sums | None] = ContextVar("hadal_fp8_sums", default=None)


def is_fp8_training() -> bool:
    """Whether linear layers called here and now multiply in FP8."""
    return _RECIPE.get() is not None


@contextmanager
def fp8_training(on: bool = True, scales: Scales = "power_of_two") -> Iterator[None]:
    """FP8 products of linear layers inside the block; `fp8_training(False)` is ordinary ones inside that."""
    if scales not in SCALES:
        raise ValueError(f"scales {scales!r} are unknown; use one of {', '.join(SCALES)}")
    token = _RECIPE.set(_Recipe(scales == "power_of_two") if on else None)
    try:
        yield
    finally:
        _RECIPE.reset(token)


@contextmanager
def summing(sums: Sums) -> Iterator[None]:
    """Gradients of experts' weights of forward passes inside the block are summed where `sums` says: in FP32,
    by the kernel that makes them."""
    token = _SUMS.set(sums)
    try:
        yield
    finally:
        _SUMS.reset(token)


def _power() -> bool:
    recipe = _RECIPE.get()
    return recipe is None or recipe.power


# --- weights ------------------------------------------------------------------------------------------------
class _Quantised:
    """A weight's codes, and those of its transpose once a backward pass has asked for them."""

    def __init__(self, weight: Tensor, ops: ModuleType) -> None:
        self.source, self.version, self.ops = weight.detach(), weight._version, ops
        self.fprop: Weight = ops.quantise_weight(self.source, _power())
        self._dgrad: Weight | None = None
        self.keep = False

    @property
    def dgrad(self) -> Weight:
        if self._dgrad is not None:
            return self._dgrad
        made: Weight = self.ops.transposed(self.fprop)
        if self.keep:
            self._dgrad = made
        return made


WeightCodes = dict[tuple[Any, ...], _Quantised]
"""Codes of weights, by where these lie."""


@contextmanager
def constant_weights(on: bool = True, codes: WeightCodes | None = None) -> Iterator[None]:
    """Weights do not change inside the block: each is quantised once, and both its forms are kept till the
    end, or as long as `codes`, which says what is quantised already. Raises RuntimeError where a weight is
    seen to have changed."""
    for known in (codes or {}).values():
        known.version = known.source._version
    token = _CONSTANT.set(({} if codes is None else codes) if on else None)
    try:
        yield
    finally:
        _CONSTANT.reset(token)


def _quantised(weight: Tensor, ops: ModuleType) -> _Quantised:
    """The codes of a weight; a storage that is known keeps its address, so that it means one weight."""
    known = _CONSTANT.get()
    if known is None:
        return _Quantised(weight, ops)
    key = weight.data_ptr(), tuple(weight.shape), tuple(weight.stride()), weight.dtype, _power(), ops.__name__
    found = known.get(key)
    if found is None:
        found = known[key] = _Quantised(weight, ops)
        found.keep = True
    elif found.source._version != found.version:
        raise RuntimeError(
            f"a weight of shape {list(weight.shape)} changed inside constant_weights(); "
            "end the block before the optimizer's update"
        )
    return found


def _kernels(x: Tensor, *weights: Tensor) -> ModuleType:
    """Who quantises and multiplies: Triton for BF16 on CUDA, by the size of a layer's weights, else the
    reference."""
    if x.is_cuda and x.dtype == torch.bfloat16 and has_triton() and not forced_reference():
        from hadal.ops.triton import fp8_train, fp8_train_small

        small = _power() and all(min(w.shape[-2:]) < fp8_train_small.WORTH for w in weights)
        return fp8_train_small if small else fp8_train
    return fp8_tiles


# --- a linear layer -----------------------------------------------------------------------------------------
def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b with all three products in FP8; the last dimension of x is multiplied. Gradients have the
    dtypes of what they belong to."""
    y_TO = cast(Tensor, _Linear.apply(x_TI.reshape(-1, x_TI.shape[-1]), weight_OI))
    y_TO = y_TO.view(*x_TI.shape[:-1], weight_OI.shape[0])
    return y_TO if bias_O is None else y_TO + bias_O


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.ops = ops = _kernels(x_TI, weight_OI)
        ctx.weight, ctx.power = _quantised(weight_OI, ops), _power()
        x: Codes = ops.quantise(x_TI, True)
        ctx.save_for_backward(x.q, x.scale)
        ctx.dtypes = x_TI.dtype, weight_OI.dtype
        return cast(Tensor, ops.matmul(x, ctx.weight.fprop, x_TI.dtype, None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        ops, (q, scale) = ctx.ops, ctx.saved_tensors
        dy, dy_columns = ops.quantise_both(grads[0], ctx.power)
        dx_TI = dw_OI = None
        if ctx.needs_input_grad[0]:
            dx_TI = ops.matmul(dy, ctx.weight.dgrad, ctx.dtypes[0], None)
        if ctx.needs_input_grad[1]:
            dw_OI = ops.outer(dy_columns, ops.columns(Codes(q, scale, True), None), ctx.dtypes[1], None)
        return dx_TI, dw_OI


# --- feed-forward networks ----------------------------------------------------------------------------------
def ffn(x_TD: Tensor, gate_up_2ID: Tensor, down_DI: Tensor) -> Tensor:
    """down(silu(gate·x) ⊙ up·x), its products in FP8."""
    y_TD = _Network.apply(x_TD.reshape(-1, x_TD.shape[-1]), None, gate_up_2ID, down_DI, None, None, None)
    return cast(Tensor, y_TD).view(x_TD.shape)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ_k w_k · ffn_{e_k}(x) + shared + residual [T, D], products in FP8, grouped by expert. Reference of the
    sum, in the model's dtype: `hadal.ops.experts.experts_reference`."""
    if not x_TD.shape[0]:
        return x_TD.clone()
    rows: Rows = _kernels(x_TD, gate_up_E2ID, down_EDI).sort_rows(expert_TK, gate_up_E2ID.shape[0])
    args = x_TD, weight_TK, gate_up_E2ID, down_EDI, shared_TD, residual_TD, rows
    return cast(Tensor, _Network.apply(*args))


class _Network(torch.autograd.Function):
    """A SwiGLU network, or many of them with a token's rows gathered, weighted and summed, and what else is
    added to the sum."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor | None, gate_up: Tensor, down: Tensor,
        shared_TD: Tensor | None, residual_TD: Tensor | None, rows: Rows | None,
    ) -> Tensor:  # fmt: skip
        ops, dtype = _kernels(x_TD, gate_up, down), x_TD.dtype
        ctx.ops, ctx.power, ctx.weights = ops, _power(), tuple(_quantised(w, ops) for w in (gate_up, down))
        ctx.sums = None if rows is None else _SUMS.get()
        x: Codes = ops.quantise(x_TD, True)
        inputs = x if rows is None else ops.gather(x, rows)
        gate_up_R2I = ops.matmul(inputs, ctx.weights[0].fprop, dtype, rows)
        weight_R = None if rows is None else _by_row(cast(Tensor, weight_TK), rows)
        hidden, kept = ops.swiglu(gate_up_R2I, weight_R, ctx.power, rows)
        del inputs, gate_up_R2I
        y = ops.matmul(hidden, ctx.weights[1].fprop, dtype, rows)
        ctx.save_for_backward(x.q, x.scale, kept.q, kept.scale, weight_R, *(rows or ()))
        ctx.dtypes = dtype, gate_up.dtype, down.dtype, None if weight_TK is None else weight_TK.dtype
        return cast(Tensor, y if rows is None else ops.sum_rows(y, rows, shared_TD, residual_TD))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, scale, kept_q, kept_scale, weight_R, *where = ctx.saved_tensors
        rows = Rows(*where) if where else None
        ops, dtype, (gate_up, down) = ctx.ops, grads[0].dtype, ctx.weights
        if rows is None:
            dy, dy_columns = ops.quantise_both(grads[0], ctx.power)
        else:
            token = ops.quantise(grads[0], True)
            dy, dy_columns = ops.gather(token, rows), ops.columns(token, rows)
        dh_RI = ops.matmul(dy, down.dgrad, dtype, rows)
        kept = Codes(kept_q, kept_scale, True)
        d, d_columns, hidden_columns, dweight_R = ops.swiglu_backward(kept, dh_RI, weight_R, ctx.power, rows)
        del dy, dh_RI
        ddown = _summed(ctx, 1, dy_columns, hidden_columns, rows)
        del dy_columns, hidden_columns
        dx = ops.matmul(d, gate_up.dgrad, dtype, rows)
        del d
        dgate_up = _summed(ctx, 0, d_columns, ops.columns(Codes(q, scale, True), rows), rows)
        if rows is None:
            return dx, None, dgate_up, ddown, None, None, None
        dweight_TK = dweight_R[rows.place_TK].to(ctx.dtypes[3])
        added = (grads[0] if needed else None for needed in ctx.needs_input_grad[4:6])
        return ops.sum_rows(dx, rows), dweight_TK, dgate_up, ddown, *added, None


def _summed(ctx: Any, which: int, dy_columns: Codes, x_columns: Codes, rows: Rows | None) -> Tensor | None:
    """The gradient of a weight of a network; None where it has been brought to its sum."""
    place = None if ctx.sums is None else ctx.sums.place(ctx.weights[which].source)
    if place is None:
        return cast(Tensor, ctx.ops.outer(dy_columns, x_columns, ctx.dtypes[1 + which], rows))
    ctx.ops.outer_into(dy_columns, x_columns, rows, *place)
    return None


def _by_row(weight_TK: Tensor, rows: Rows) -> Tensor:
    """The weight of each row, FP32; 0 in gaps."""
    weight_R = torch.zeros(rows.token_R.shape[0], device=weight_TK.device)
    return weight_R.scatter_(0, rows.place_TK.flatten(), weight_TK.detach().flatten().float())
