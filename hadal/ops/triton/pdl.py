"""Programmatic dependent launch (Hopper and later): a kernel begins while the one before it still ends.

A chain of short kernels loses a microsecond or two at every seam: the last programs of one end before the
first of the next are sent. A kernel launched with `**options(tensor)` may be sent as soon as every program
of its predecessor has called `begin`, or ended. Until `wait` returns it must touch nothing that an earlier
kernel writes, and must write nothing; it may read weights, so `prefetch` brings its own into the L2 cache
while the predecessor is still at work. After `wait` everything before is complete and visible.
Every kernel launched so calls `begin` first and `wait` before its first load of anything but weights.
CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = tl.constexpr(64)  # elements of two bytes in a cache line


@triton.jit
def begin(PDL: tl.constexpr):
    """Lets the next kernel be sent."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Returns when all earlier kernels are complete."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointer, PDL: tl.constexpr):
    """Ask for the cache lines at these addresses (a tensor of pointers, all valid) to be brought into L2."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer.to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the device and this Triton can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return hasattr(tl.extra.cuda, "gdc_wait")


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Whether Gluon's kernels run there: they use Hopper's own instructions, gone again since."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def options(x: Tensor) -> dict[str, Any]:
    """Arguments of a launch: the kernel's constant PDL, and the driver's attribute where it is on."""
    return {"PDL": True, "launch_pdl": True} if available(x.device) else {"PDL": False}
