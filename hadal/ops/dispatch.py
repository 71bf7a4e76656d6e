"""Which path an operation takes: Triton on CUDA, the C kernels on CPU, or the torch reference.

`HADAL_OPS=reference` forces the references everywhere (slow, for comparison). Fast paths are for inference,
where they have no backward: a tensor that needs a gradient goes through the differentiable path, which on
CUDA has kernels of its own (`hadal/ops/triton/train_*.py`), both directions.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hadal.ops.exact import is_exact

if TYPE_CHECKING:
    from hadal.ops.packed import Packed


@functools.cache
def forced_reference() -> bool:
    """True when HADAL_OPS=reference; any other value than 'auto' or 'reference' is refused."""
    value = os.environ.get("HADAL_OPS", "auto")
    if value not in ("auto", "reference"):
        raise ValueError(f"HADAL_OPS is {value!r}; use 'auto' or 'reference'")
    return value == "reference"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether any of them is in a graph that is being recorded: then no kernel without a backward may run."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def use_triton(first: Tensor, *others: Tensor | Packed) -> bool:
    """Inference on CUDA with Triton present; packed weights have kernels of their own, and so has exact
    mode."""
    if is_exact() or not first.is_cuda or not has_triton() or forced_reference():
        return False
    tensors = [first, *(t for t in others if isinstance(t, Tensor))]
    return len(tensors) == 1 + len(others) and not needs_grad(*tensors)


def train_triton(first: Tensor, *others: Tensor | None) -> bool:
    """Training on CUDA with Triton present: something needs a gradient, and no mode forbids the kernels.
    Inside `torch.compile` the compiler makes its own from the references."""
    if is_exact() or not first.is_cuda or first.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    return has_triton() and not forced_reference() and needs_grad(first, *others)


_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def use_cpu_kernels(first: Tensor, *others: Tensor | Packed) -> bool:
    """Inference on CPU with the C++ library built, FP32 or BF16 throughout; packed weights have kernels of
    their own, and so has exact mode."""
    if is_exact() or not first.is_cpu or first.dtype not in _KERNEL_DTYPES:
        return False
    tensors = [first, *(t for t in others if isinstance(t, Tensor))]
    if len(tensors) <= len(others) or needs_grad(*tensors):
        return False
    return _kernels_ready() and all(t.dtype == first.dtype for t in tensors)


@functools.cache
def _kernels_ready() -> bool:
    from hadal.ops import cpu

    return cpu.available() and not forced_reference()
