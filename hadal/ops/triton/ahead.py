"""Weights on their way into the L2 cache while kernels run that leave the memory idle.

At batch 1 the small kernels of attention wait for each other, not for memory: a third of a layer's time, in
which an H100's memory could move 30 MB. A kernel on a second stream reads the weights that come next, at a
pace that leaves room for attention's own reads. It computes nothing, and nothing waits for it but the end of
the step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl

MAX_ROWS = 4  # with more rows experts fill the memory's time
MOST_BYTES = 32 << 20  # of an H100's 50 MB
PROGRAMS = 66  # that read at a time, each _CHUNK bytes: the pace
_CHUNK = 8192


@triton.jit
def _read_kernel(data, size, CHUNK: tl.constexpr):
    """Read [0, size) of int32, one chunk of every program at a time; `volatile`, or it would not be read."""
    at = tl.arange(0, CHUNK)
    for start in range(tl.program_id(0) * CHUNK, size, tl.num_programs(0) * CHUNK):
        tl.load(data + start + at, mask=start + at < size, other=0, volatile=True)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def wants(x_TD: Tensor) -> bool:
    """Whether reading ahead pays for so many rows, on this device."""
    few = 0 < x_TD.shape[0] <= MAX_ROWS and not torch.is_grad_enabled()
    return few and x_TD.is_cuda and pdl.available(x_TD.device)


def start(weights: Sequence[Tensor]) -> None:
    """Begin to read these, in order, as far as MOST_BYTES go; `finish` must follow before the step ends."""
    side = _stream(weights[0].device)
    side.wait_stream(torch.cuda.current_stream())
    left = MOST_BYTES
    with torch.cuda.stream(side):
        for weight in weights:
            words = min(weight.nbytes, left) // 4
            if words:
                _read_kernel[(PROGRAMS,)](weight.view(torch.int32), words, CHUNK=_CHUNK // 4, num_warps=4)
            left -= 4 * words


def finish(device: torch.device) -> None:
    """Join what `start` began: a recorded graph must hold no open ends."""
    torch.cuda.current_stream().wait_stream(_stream(device))
