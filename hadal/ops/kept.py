"""Small tensors that depend on lengths alone are made once and kept (tables of blocks, offsets of sequences).

A CUDA graph goes on reading what it was recorded with, after such a cache has thrown it out: whoever records
one collects them, and holds on to them.

    with keeping(held):
        …
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_HELD: ContextVar[list[Tensor] | None] = ContextVar("hadal_kept", default=None)


@contextmanager
def keeping(held: list[Tensor]) -> Iterator[None]:
    """Appends to `held` what `kept` is given inside the block."""
    token = _HELD.set(held)
    try:
        yield
    finally:
        _HELD.reset(token)


def kept(tensor: Tensor) -> Tensor:
    """The tensor of a cache, with notice to whoever holds on to such."""
    held = _HELD.get()
    if held is not None:
        held.append(tensor)
    return tensor
