"""AdamW over flat buffers in one pass: 12 bytes read and 10 written a parameter. Reference:
`hadal.train.optimizer.AdamW._update`.

A dead step (`alive` 0) ends every program before it reads or writes anything else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton.sizes import ceil_div

BLOCK = 2048


class Numbers(NamedTuple):
    """What a step multiplies with. `rate` and `root` hold the bias corrections η/(1−β₁ᵗ) and √(1−β₂ᵗ);
    `shrink` is η·wd."""

    beta1: float
    beta2: float
    eps: float
    rate: float
    root: float
    shrink: float
    clip: float


@triton.jit
def _adamw_kernel(
    grad, master, exp_avg, exp_avg_sq, parameter, norm, alive, size, decayed, rest1, rest2, eps, rate, root,
    shrink, clip, CLIPS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(alive) != 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0)
        if CLIPS:
            g *= tl.minimum(clip / (tl.load(norm) + 1e-6), 1.0)
        m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(master + at, mask=inside, other=0.0)
        m += rest1 * (g - m)
        v += rest2 * (g * g - v)
        tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
        w = tl.where(at < decayed, w * (1.0 - shrink), w)
        w -= rate * m / (tl.sqrt(v) / root + eps)
        tl.store(master + at, w, mask=inside)
        if WRITES:
            tl.store(parameter + at, w.to(parameter.dtype.element_ty), mask=inside)


def update(
    grad_N: Tensor, master_N: Tensor, exp_avg_N: Tensor, exp_avg_sq_N: Tensor, parameter_N: Tensor | None,
    norm: Tensor, alive: Tensor, decayed: int, numbers: Numbers,
) -> None:  # fmt: skip
    """One step in place; the first `decayed` elements are matrices. `parameter_N`: the model's own weights in
    the same order, written too where given."""
    n = numbers
    _adamw_kernel[(ceil_div(master_N.numel(), BLOCK),)](
        grad_N, master_N, exp_avg_N, exp_avg_sq_N, master_N if parameter_N is None else parameter_N,
        norm.to(torch.float32), alive, master_N.numel(), decayed, 1.0 - n.beta1, 1.0 - n.beta2, n.eps, n.rate,
        n.root, n.shrink, n.clip, CLIPS=n.clip > 0, WRITES=parameter_N is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
