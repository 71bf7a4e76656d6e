"""Sizes of grids and blocks in plain Python: Triton's own `cdiv` and `next_power_of_2`, made to be callable
from kernels as well, take 3 µs a call on the host, a launch's tenth."""

from __future__ import annotations


def ceil_div(number: int, parts: int) -> int:
    return -(-number // parts)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number` (at least 1)."""
    return 1 << max(number - 1, 0).bit_length()
