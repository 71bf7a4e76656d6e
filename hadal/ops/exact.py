"""The switch of exact mode: batch-invariant operations, for inference and for training (docs/exact.md).

    with exact():
        hidden = model(tokens, context)     # every sequence gets the bits that it gets anywhere else

Inside, every operation of the network takes the form in hadal/ops/invariant.py, whose sums run in one order
that depends on a row's own data and length alone. The switch is a context variable: it holds for the thread
(or task) that set it, so that an exact engine and an ordinary one may run side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_EXACT: ContextVar[bool] = ContextVar("hadal_exact", default=False)


class ExactError(RuntimeError):
    """Exact mode was asked for where it cannot be kept; the message names the remedy."""


def is_exact() -> bool:
    """Whether operations called here and now must be exact."""
    return _EXACT.get()


@contextmanager
def exact(on: bool = True) -> Iterator[None]:
    """Exact operations inside the block; `exact(False)` is ordinary ones inside an exact block."""
    token = _EXACT.set(on)
    try:
        yield
    finally:
        _EXACT.reset(token)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine has no exact operations for tensors of this kind; None where it has."""
    from hadal.ops import dispatch

    if dtype not in (torch.float32, torch.bfloat16):
        return f"exact mode computes in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if dispatch.forced_reference():
        return "HADAL_OPS=reference forces the references, whose sums depend on the batch; unset it"
    if device.type == "cuda":
        return None if dispatch.has_triton() else "exact mode on CUDA needs triton: pip install triton"
    if device.type != "cpu":
        return f"exact mode runs on cpu and cuda, not on {device.type}"
    from hadal.ops import exact_cpu

    library, why = exact_cpu.status()
    return None if library is not None else f"exact mode on CPU needs its C++ kernels: {why}"


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ExactError where `unavailable` has a reason."""
    why = unavailable(device, dtype)
    if why is not None:
        raise ExactError(why)
