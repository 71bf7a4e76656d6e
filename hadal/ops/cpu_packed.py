"""Products with packed weights (hadal/ops/packed.py) on CPU."""

from __future__ import annotations

from torch import Tensor

from hadal.ops.packed import Packed


def wants_linear(x_TI: Tensor, weight_OI: Packed) -> bool:
    """Whether `linear` takes these."""
    return False


def wants_experts(x_TD: Tensor, gate_up_E2ID: Packed, down_EDI: Packed) -> bool:
    """Whether `experts` takes these."""
    return False


def pack(packed: Packed) -> None:
    """Bring the codes into the order that the kernels read."""


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """(codes, scale) in the plain layout."""
    return packed.codes, packed.scale
