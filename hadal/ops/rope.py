"""Rotary position embedding: plain, YaRN (arXiv 2309.00071) and Llama-3's adjustment.

A pair (a, b) at position p turns by the angle p·f_i. DeepSeek's checkpoints interleave pairs, (2i, 2i+1);
Qwen2 and Llama split halves, (i, i + R/2). Rotation in FP32. Legend: T tokens, H heads, R rotary dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hadal.config import Rope
from hadal.ops import cpu, invariant
from hadal.ops.dispatch import use_cpu_kernels, use_triton
from hadal.ops.exact import is_exact


def frequencies(rope: Rope, dim: int) -> Tensor:
    """Angular frequencies f_i, float64 [dim/2]."""
    index = torch.arange(0, dim, 2, dtype=torch.float64)
    freq = rope.rope_theta ** (-index / dim)
    if rope.type == "yarn":
        return _yarn(freq, rope, dim)
    if rope.type == "llama3":
        return _llama3(freq, rope)
    return freq


def _yarn(freq: Tensor, rope: Rope, dim: int) -> Tensor:
    """f·(1 − r) + f/factor·r, r the ramp between the dimensions that turn beta_fast and beta_slow times."""

    def dimension(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq * (1 - ramp) + freq / rope.factor * ramp


def _llama3(freq: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    length = rope.original_max_position_embeddings
    turns = length * freq / (2 * math.pi)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return freq / rope.factor * (1 - blend) + freq * blend


def rotation_table(rope: Rope, dim: int, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """cos and sin of every angle, FP32 [positions, 2, dim/2]; YaRN's magnitude factor is in them."""
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies(rope, dim))
    table = torch.stack([angle.cos(), angle.sin()], 1) * rope.rotation_mscale()
    return table.float().to(device)


def rotate_interleaved(x_THR: Tensor, rotation_T2r: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i+1) of x [T, H, R] (or [T, R]) by rotation [T, 2, R/2]."""
    fast = _fast_rotate(x_THR, rotation_T2r, True)
    if fast is not None:
        return fast
    cos, sin = _broadcast(rotation_T2r, x_THR)
    a, b = x_THR.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x_THR.dtype)


def rotate_half(x_THR: Tensor, rotation_T2r: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of x [T, H, R] by rotation [T, 2, R/2]."""
    fast = _fast_rotate(x_THR, rotation_T2r, False)
    if fast is not None:
        return fast
    cos, sin = _broadcast(rotation_T2r, x_THR)
    a, b = x_THR.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_THR.dtype)


def _fast_rotate(x: Tensor, rotation_T2r: Tensor, interleaved: bool) -> Tensor | None:
    """One kernel on CUDA or CPU for inference; None where the differentiable form must run."""
    if is_exact():
        return invariant.rotate(x, rotation_T2r, interleaved)
    if use_triton(x):
        from hadal.ops.triton.rope import rotate

        return rotate(x, rotation_T2r, interleaved)
    if use_cpu_kernels(x):
        return cpu.rotate(x, rotation_T2r, interleaved)
    return None


def _broadcast(rotation_T2r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rotation_T2r.unbind(1)
    return (cos.unsqueeze(1), sin.unsqueeze(1)) if x.dim() == 3 else (cos, sin)
