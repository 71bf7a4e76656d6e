"""The leaves: linear layers, norms, and the dense feed-forward network, as parameters around `hadal.ops`.

Parameters are allocated uninitialised; weights are loaded, or `Transformer.init_weights` draws them.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from hadal.ops.dispatch import needs_grad, train_triton
from hadal.ops.experts import ffn
from hadal.ops.linear import Norm, linear
from hadal.ops.packed import Packed
from hadal.ops.recompute import recomputed
from hadal.ops.rms_norm import add_rms_norm, rms_norm


class Like(TypedDict):
    """How parameters are allocated."""

    dtype: torch.dtype
    device: torch.device | str


class Linear(nn.Module):
    """y = x·Wᵀ (+ b); weight [out, in], or packed (hadal/ops/packed.py)."""

    weight: nn.Parameter | Packed

    def __init__(self, inputs: int, outputs: int, bias: bool = False, **like: Unpack[Like]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **like))
        self.bias = nn.Parameter(torch.empty(outputs, **like)) if bias else None

    @property
    def matrix(self) -> nn.Parameter:
        """The weight where it is never packed: looked up by rows, viewed by heads, or trained."""
        assert isinstance(self.weight, nn.Parameter), "this weight is packed"
        return self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        """The product, of RMSNorm(x) where `norm` is given, plus the residual stream where that is."""
        return linear(x, self.weight, self.bias, residual, norm)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight [D]."""

    def __init__(self, width: int, eps: float, **like: Unpack[Like]) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, **like))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = recomputed("norm", rms_norm, x, self.weight, self.eps)
        return normed

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, its norm), of a stream that goes on as well: on a GPU its two gradients are joined in the
        norm's kernel."""
        if not train_triton(x, self.weight):
            return x, self(x)
        from hadal.ops.triton.train_norm import forked

        stream, normed = recomputed("norm", forked, x, self.weight, self.eps)
        return stream, normed

    @property
    def late(self) -> Norm:
        """Itself, to be taken by the product that follows."""
        return self.weight, self.eps

    def after_add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm)."""
        if needs_grad(x, delta, self.weight):
            return self.beside(x + delta)
        return add_rms_norm(x, delta, self.weight, self.eps)


class Ffn(nn.Module):
    """Dense SwiGLU: gate rows stacked above up rows in `gate_up_proj`."""

    def __init__(self, hidden: int, width: int, **like: Unpack[Like]) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * width, **like)
        self.down_proj = Linear(width, hidden, **like)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        """ffn(x), of RMSNorm(x) where `norm` is given, plus the residual stream where that is."""
        return ffn(x_TD, self.gate_up_proj.weight, self.down_proj.weight, residual_TD, norm)
