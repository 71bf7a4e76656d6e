"""Linear layer y = x·Wᵀ + b. Shapes: x [T, I], W [O, I], b [O] → y [T, O]."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from hadal.ops import cpu, cpu_prompt, fp8_training, invariant, packed
from hadal.ops.dispatch import needs_grad, use_cpu_kernels, use_triton
from hadal.ops.exact import is_exact
from hadal.ops.fp8_training import is_fp8_training
from hadal.ops.packed import Packed
from hadal.ops.recompute import recomputed
from hadal.ops.rms_norm import rms_norm

SMALL_M = 32  # rows up to which the weight-streaming CPU kernel beats a general matrix product
FEW_ROWS = 12  # rows up to which the one beats the CPU kernel for prompts

Norm = tuple[Tensor, float]
"""An RMSNorm that is taken before a product: its weight and eps."""


@functools.cache
def native_bf16() -> bool:
    """Whether the processor multiplies BF16 matrices itself (AMX or AVX512-BF16)."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def linear(
    x_TI: Tensor, weight_OI: Tensor | Packed, bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None, norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """Matrix product with a weight stored [out, in], of RMSNorm(x) where `norm` is given, plus the residual
    stream where that is. Few rows go through a weight-streaming kernel."""
    if norm is not None:
        if residual_TO is None and not needs_grad(bias_O) and takes_norm(x_TI, weight_OI):
            from hadal.ops.triton import gemv
            from hadal.ops.triton import linear as fast

            return fast.linear(x_TI, cast(Tensor, weight_OI), bias_O, norm=gemv.Norm(*norm))
        x_TI = recomputed("norm", rms_norm, x_TI, *norm)
    if is_fp8_training() and isinstance(weight_OI, Tensor) and needs_grad(x_TI, weight_OI):
        y_TO = fp8_training.linear(x_TI, weight_OI, bias_O)
        return y_TO if residual_TO is None else residual_TO + y_TO
    if residual_TO is not None:
        if not needs_grad(bias_O, residual_TO) and _few_on_gpu(x_TI, weight_OI, residual_TO):
            from hadal.ops.triton import linear as fast

            return fast.linear(x_TI, cast(Tensor, weight_OI), bias_O, residual_TO)
        if isinstance(weight_OI, Packed) and not is_exact() and not needs_grad(bias_O, residual_TO):
            return packed.linear(x_TI, weight_OI, bias_O, residual_TO)
        return residual_TO + linear(x_TI, weight_OI, bias_O)
    if is_exact():
        return invariant.linear(x_TI, weight_OI, bias_O)
    if isinstance(weight_OI, Packed):
        return packed.linear(x_TI, weight_OI, bias_O)
    if use_cpu_kernels(x_TI, weight_OI) and not needs_grad(bias_O):
        native = x_TI.dtype == torch.bfloat16 and native_bf16()
        if x_TI.dim() == 2 and x_TI.shape[0] <= (SMALL_M if native else FEW_ROWS):
            return cpu.linear(x_TI, weight_OI, bias_O)
        if x_TI.dim() == 2 and not native:
            return cpu_prompt.linear(x_TI, weight_OI, bias_O)
    if not needs_grad(bias_O) and _few_on_gpu(x_TI, weight_OI):
        from hadal.ops.triton import linear as fast

        return fast.linear(x_TI, weight_OI, bias_O)
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


def _few_on_gpu(x: Tensor, *others: Tensor | Packed) -> bool:
    """Whether the kernels of hadal/ops/triton/linear.py take these."""
    if not use_triton(x, *others):
        return False
    from hadal.ops.triton import linear as fast

    return fast.wants(x, *(t for t in others if isinstance(t, Tensor)))


def takes_norm(x: Tensor, *others: Tensor | Packed) -> bool:
    """Whether a product with these weights has the RMSNorm before it in its own kernel: a row on a GPU."""
    if not use_triton(x, *others):
        return False
    from hadal.ops.triton import linear as fast

    return fast.takes_norm(x, *(t for t in others if isinstance(t, Tensor)))


def linear_pair(
    x_TI: Tensor, first_OI: Tensor | Packed, second_PI: Tensor | Packed, norm: Norm | None = None
) -> tuple[Tensor, Tensor]:
    """Two products over the same input, or its RMSNorm, [T, O] and [T, P]; one launch for few rows on a
    GPU."""
    if norm is not None and takes_norm(x_TI, first_OI, second_PI):
        from hadal.ops.triton import gemv
        from hadal.ops.triton import linear as fast

        weights = cast(Tensor, first_OI), cast(Tensor, second_PI)
        return fast.linear_pair(x_TI, *weights, norm=gemv.Norm(*norm))
    x_TI = x_TI if norm is None else recomputed("norm", rms_norm, x_TI, *norm)
    if _few_on_gpu(x_TI, first_OI, second_PI):
        from hadal.ops.triton import linear as fast

        return fast.linear_pair(x_TI, cast(Tensor, first_OI), cast(Tensor, second_PI))
    packed_fast = packed.few_rows(x_TI, first_OI, second_PI)
    if packed_fast is not None:
        return cast("tuple[Tensor, Tensor]", packed_fast.linear_pair(x_TI, first_OI, second_PI))
    return linear(x_TI, first_OI), linear(x_TI, second_PI)


def linear_wide(x_TI: Tensor, weight_OI: Tensor | Packed) -> Tensor:
    """The product in FP32 (FP64 for FP64): on a GPU never rounded to BF16 on its way."""
    if _few_on_gpu(x_TI, weight_OI):
        from hadal.ops.triton import linear as fast

        return fast.linear(x_TI, cast(Tensor, weight_OI), dtype=torch.float32)
    packed_fast = packed.few_rows(x_TI, weight_OI)
    if packed_fast is not None:
        return cast(Tensor, packed_fast.linear(x_TI, weight_OI, dtype=torch.float32))
    if use_triton(x_TI, weight_OI) and x_TI.dtype == torch.bfloat16:
        return torch.mm(x_TI, cast(Tensor, weight_OI).t(), out_dtype=torch.float32)
    with fp8_training.fp8_training(False):
        y_TO = linear(x_TI, weight_OI)
    return y_TO if y_TO.dtype == torch.float64 else y_TO.float()


def per_head(x_SHI: Tensor, weight: Tensor, across: bool) -> Tensor:
    """Each head's rows times its own matrix [H, I, O] (`across`) or [H, O, I]: MLA's absorption.

    The matrix's inner two dimensions must be contiguous. Returns [S, H, O].
    """
    if not across and use_cpu_kernels(x_SHI, weight) and x_SHI.shape[0] <= SMALL_M:
        return cpu.per_head(x_SHI, weight)
    matrix = weight if across else weight.transpose(1, 2)
    return torch.bmm(x_SHI.transpose(0, 1), matrix).transpose(0, 1)
