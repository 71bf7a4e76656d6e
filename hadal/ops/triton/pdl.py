"""Programmatic dependent launch (Hopper and later): a kernel begins while the one before it still ends.

A chain of short kernels loses a microsecond or two at every seam: the last programs of one end before the
first of the next are sent. A kernel launched with `**options(tensor)` may be sent as soon as every program
of its predecessor has called `begin`, or ended. Until `wait` returns it must touch nothing that an earlier
kernel writes, and must write nothing; it may read weights. After `wait` everything before is complete and
visible. Every kernel launched so calls `begin` first, and `wait` before it loads anything but weights.
One that calls `begin` after `wait` lets the next read, before its own `wait`, what came before them both.
CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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
