"""RMSNorm (Zhang & Sennrich 2019): y = w · cast(x / sqrt(mean(x²) + eps)), the mean in FP32.

The weight multiplies after the cast back, as in the published DeepSeek and Llama code.
Shapes: x [..., D], w [D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.ops import cpu, invariant
from hadal.ops.dispatch import train_triton, use_cpu_kernels, use_triton
from hadal.ops.exact import is_exact


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition; differentiable."""
    x = x.view_as(x)  # a node of its own: its gradients add up here first, whether recomputed or not
    x_f = x.float() if x.dtype != torch.float64 else x
    normed = x_f * torch.rsqrt(x_f.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension of x [..., D] with weight [D]."""
    if is_exact():
        return invariant.rms_norm(x, weight, eps)
    if use_triton(x, weight):
        from hadal.ops.triton.norm import rms_norm as fast

        return fast(x, weight, eps)
    if use_cpu_kernels(x, weight):
        return cpu.rms_norm(x, weight, eps)
    if train_triton(x, weight):
        from hadal.ops.triton.train_norm import rms_norm as differentiable

        return differentiable(x, weight, eps)
    if x.is_cuda:  # one fused, differentiable kernel; it rounds once, after the weight
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, RMSNorm(x + delta)): the residual addition fused with the norm that follows it."""
    if use_triton(x, delta, weight):
        from hadal.ops.triton.norm import add_rms_norm as fast

        return fast(x, delta, weight, eps)
    if use_cpu_kernels(x, delta, weight) and x.dim() == 2:
        return cpu.add_rms_norm(x, delta, weight, eps)
    total = x + delta
    return total, rms_norm(total, weight, eps)
