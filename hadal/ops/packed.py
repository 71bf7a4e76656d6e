"""Weights in fewer bits, kept so in memory: FP8 blocks, INT8 and INT4 groups.

    fp8    w ≈ float(q) · s of its block        q E4M3, blocks of 128 × 128 (V3 §3.3), s FP32
    int8   w ≈ q · s of its row and group       q in −127 … 127, groups of 128 input channels, s BF16
    int4   w ≈ q · s of its row and group       q in −8 … 7, groups of 32 input channels, s BF16

A group at the right edge may be partial. `Packed` stands where the model has a weight [.., O, I]; `linear`
and `experts` below multiply with it. The reference dequantises; the fast paths (hadal/ops/cpu_packed.py,
hadal/ops/triton/packed.py) read the codes as they are. For inference: no gradient goes into a packed weight.
Legend: T tokens, I input channels, O outputs, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, gcd
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hadal.config.packing import BITS, FP8_ROWS, GROUP, KINDS, Kind
from hadal.ops.fp8 import dequantise_blocks, quantise_blocks

__all__ = [
    "BITS",
    "FP8_ROWS",
    "GROUP",
    "KINDS",
    "Kind",
    "Packed",
    "block_rows",
    "dequantise",
    "experts",
    "from_words",
    "linear",
    "pack",
    "quantise",
    "to_words",
]

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # INT4 scales that are tried, as shares of the one that fits all


class Packed(nn.Module):
    """A quantised weight of logical shape [.., O, I], a matrix or a stack of them.

    codes   fp8: float8_e4m3fn [.., O, I]; int8: int8 [.., O, I];
            int4: uint8 [.., O, ceil(I/2)], channel 2j in the low nibble, 2j+1 in the high one, each q + 8
    scale   fp8: FP32 [.., ceil(O/rows), ceil(I/group)]; else BF16 [.., O, ceil(I/group)]
    rows    fp8: rows of a block, 128 or the part of it that divides what is stacked in one matrix; else 1

    `layout` names how `codes` and `scale` lie in memory: "plain" is the above. A kernel that wants another
    order replaces them once (`prepare`) and names it; `plain()` gives the plain ones back.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        kind: Kind,
        shape: tuple[int, ...],
        *,
        group: int | None = None,
        rows: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"quantisation {kind!r} is unknown; use one of {', '.join(KINDS)}")
        if len(shape) < 2:
            raise ValueError(f"quantisation needs a matrix, got shape {list(shape)}")
        self.kind, self.shape, self.layout = kind, tuple(shape), "plain"
        self.group = group or GROUP[kind]
        self.rows = (rows or FP8_ROWS) if kind == "fp8" else 1
        *lead, outs, width = shape
        dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[kind]
        columns = ceil(width / 2) if kind == "int4" else width
        scales = (*lead, ceil(outs / self.rows), ceil(width / self.group))
        kept = torch.float32 if kind == "fp8" else torch.bfloat16
        self.register_buffer("codes", torch.empty((*lead, outs, columns), dtype=dtype, device=device))
        self.register_buffer("scale", torch.empty(scales, dtype=kept, device=device))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales included."""
        return self.codes.nbytes + self.scale.nbytes

    def extra_repr(self) -> str:
        return f"{self.kind}, {list(self.shape)}, group={self.group}, layout={self.layout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Moves like any module; casts to another dtype leave codes and scales as they are."""
        for name in ("codes", "scale"):
            old = cast(Tensor, getattr(self, name))
            new = fn(old)
            setattr(self, name, new if new.dtype == old.dtype else old.to(new.device))
        return self

    # --- writing ---

    def write(self, weight_OI: Tensor, index: int | None = None, row: int = 0) -> None:
        """Quantise rows `row …` (of matrix `index` of a stack) from a float matrix; plain layout only.

        For fp8 `row` must begin a block, and so must whatever is written after these rows.
        """
        codes, scale = quantise(weight_OI.to(self.device), self.kind, self.group, self.rows)
        self.write_codes(codes, scale, index, row)

    def write_codes(self, codes: Tensor, scale: Tensor, index: int | None = None, row: int = 0) -> None:
        """Put quantised rows in their place. ValueError when they begin inside a block."""
        if self.layout != "plain":
            raise ValueError(f"weights in layout {self.layout!r} cannot be written to")
        if row % self.rows:
            raise ValueError(f"row {row} is inside a block of {self.rows} rows")
        into, scales = (self.codes, self.scale) if index is None else (self.codes[index], self.scale[index])
        into[row : row + codes.shape[-2]] = codes.to(into.device)
        first = row // self.rows
        scales[first : first + scale.shape[-2]] = scale.to(into.device)

    # --- reading ---

    def plain(self) -> tuple[Tensor, Tensor]:
        """(codes, scale) in the plain layout, copied where the layout is another."""
        if self.layout == "plain":
            return self.codes, self.scale
        from hadal.ops import cpu_packed

        return cpu_packed.unpack(self)

    def dequantise(self, dtype: torch.dtype = torch.float32, index: int | None = None) -> Tensor:
        """The weight [.., O, I] (or matrix `index` of a stack), computed in FP32, then cast."""
        codes, scale = self.plain()
        if index is not None:
            codes, scale = codes[index], scale[index]
        return dequantise(codes, scale, self.kind, self.shape[-1], self.group, self.rows, dtype)

    def prepare(self) -> Packed:
        """Bring the codes into the order that this device's kernel reads; once, after all is written."""
        if self.layout == "plain" and self.device.type == "cpu" and _cpu_kernels() is not None:
            _cpu_kernels().pack(self)
        return self


def pack(weight: Tensor, kind: Kind, group: int | None = None, rows: int | None = None) -> Packed:
    """A float weight [.., O, I], quantised, in the plain layout."""
    packed = Packed(kind, tuple(weight.shape), group=group, rows=rows, device=weight.device)
    codes, scale = quantise(weight, kind, packed.group, packed.rows)
    packed.codes, packed.scale = codes.contiguous(), scale.contiguous()
    return packed


def block_rows(heights: list[int]) -> int:
    """Rows of a block that divides 128 and every height but the last of matrices stacked in one weight."""
    return gcd(FP8_ROWS, *heights[:-1])


# --- the formulas ---


def quantise(weight: Tensor, kind: Kind, group: int, rows: int = FP8_ROWS) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a float weight [.., O, I] as `Packed` describes them.

    fp8: s = max|w|/448. int8: s = max|w|/127. int4: the extreme of a group becomes −8, so that all sixteen
    values are used, and of five scales from there down the one with the least squared error is taken.
    A NaN or infinity makes its group's scale non-finite: it is never hidden.
    """
    if kind == "fp8":
        return quantise_blocks(weight, (rows, group))
    width = weight.shape[-1]
    w_OGi = pad(weight.float(), (0, -width % group)).unflatten(-1, (-1, group))
    extreme = w_OGi.gather(-1, w_OGi.abs().argmax(-1, keepdim=True))
    if kind == "int8":
        scale = _usable(extreme.abs() / 127)
        codes = (w_OGi / scale.float()).round().clamp(-127, 127)
        return codes.flatten(-2)[..., :width].to(torch.int8), scale.squeeze(-1)
    scale, codes = _best_int4(w_OGi, extreme)
    codes = codes.flatten(-2)[..., :width]
    codes = pad(codes + 8, (0, width % 2), value=8).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale.squeeze(-1)


def _usable(scale: Tensor) -> Tensor:
    """In BF16, as it will be stored; 1 where a group is all zero."""
    return torch.where(scale == 0, torch.ones_like(scale), scale).to(torch.bfloat16)


def _best_int4(w_OGi: Tensor, extreme: Tensor) -> tuple[Tensor, Tensor]:
    best_scale = best_codes = best_error = torch.empty(0)
    for share in SHRINK:
        scale = _usable(extreme / -8 * share)
        codes = (w_OGi / scale.float()).round().clamp(-8, 7)
        error = (codes * scale.float() - w_OGi).square().sum(-1, keepdim=True)
        if share == SHRINK[0]:
            best_scale, best_codes, best_error = scale, codes, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_codes


def dequantise(
    codes: Tensor, scale: Tensor, kind: Kind, width: int, group: int, rows: int, dtype: torch.dtype
) -> Tensor:
    """w = float(q) · s, in FP32, then cast to `dtype`: [.., O, I]."""
    if kind == "fp8":
        return dequantise_blocks(codes, scale, (rows, group), dtype)
    if kind == "int4":
        low, high = (codes & 15).to(torch.int8) - 8, (codes >> 4).to(torch.int8) - 8
        codes = torch.stack([low, high], -1).flatten(-2)[..., :width]
    wide = scale.float().repeat_interleave(group, -1)[..., :width]
    return (codes.float() * wide).to(dtype)


def to_words(codes: Tensor, kind: Kind) -> Tensor:
    """Integer codes [O, I or I/2] as little-endian 32-bit words [O, W], each code plus 2^(bits−1): how
    compressed-tensors stores them (`weight_packed`). Rows are filled up with zeros."""
    unsigned = codes if kind == "int4" else codes.view(torch.uint8) ^ 0x80
    return pad(unsigned, (0, -unsigned.shape[-1] % 4)).contiguous().view(torch.int32)


def from_words(words: Tensor, kind: Kind, width: int) -> Tensor:
    """The inverse: codes as `Packed` keeps them."""
    unsigned = words.contiguous().view(torch.uint8)[..., : ceil(width * BITS[kind] / 8)]
    return unsigned if kind == "int4" else (unsigned ^ 0x80).view(torch.int8)


# --- products ---


def linear(
    x_TI: Tensor, weight_OI: Packed, bias_O: Tensor | None = None, residual_TO: Tensor | None = None
) -> Tensor:
    """x·Wᵀ + b with a packed weight, plus the residual stream where it is given; [.., O] in x's dtype."""
    fast = _kernels(x_TI)
    if fast is not None and fast.wants_linear(x_TI, weight_OI):
        if x_TI.is_cuda:
            return cast(Tensor, fast.linear(x_TI, weight_OI, bias_O, residual_TO))
        y_TO = cast(Tensor, fast.linear(x_TI, weight_OI, bias_O))
    else:
        y_TO = linear_reference(x_TI, weight_OI, bias_O)
    return y_TO if residual_TO is None else residual_TO + y_TO


def few_rows(x: Tensor, *weights: Tensor | Packed) -> Any:
    """The module of CUDA kernels for so few rows and these packed weights (its `linear` has SwiGLU and FP32
    behind the product, its `linear_pair` takes two weights), or None."""
    packed = [w for w in weights if isinstance(w, Packed)]
    fast = _kernels(x) if x.is_cuda and len(packed) == len(weights) else None
    if fast is None or not fast.wants_few(x, *packed):
        return None
    from hadal.ops.triton import packed_gemv

    return packed_gemv


def linear_reference(x_TI: Tensor, weight_OI: Packed, bias_O: Tensor | None = None) -> Tensor:
    """Dequantise, then the ordinary product."""
    return torch.nn.functional.linear(x_TI, weight_OI.dequantise(x_TI.dtype), bias_O)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Packed, down_EDI: Packed,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None,
    shared: tuple[Packed, Packed] | None = None,
) -> Tensor:  # fmt: skip
    """The routed experts (hadal/ops/experts.py) with packed weights; + shared + residual where given.
    `shared`: the weights of the shared expert, where `takes_shared`."""
    args = (x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI)
    fast = _kernels(x_TD)
    if fast is not None and fast.wants_experts(x_TD, gate_up_E2ID, down_EDI):
        if x_TD.is_cuda:
            return cast(Tensor, fast.experts(*args, shared_TD, residual_TD, shared))
        out_TD = cast(Tensor, fast.experts(*args))
    else:
        out_TD = experts_reference(*args)
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    return out_TD if residual_TD is None else residual_TD + out_TD


def takes_shared(
    x_TD: Tensor, gate_up: Tensor | Packed, down: Tensor | Packed,
    shared: tuple[Tensor | Packed, Tensor | Packed] | None,
) -> bool:  # fmt: skip
    """Whether `experts` runs this shared expert in the launches of the routed ones."""
    weights = [w for w in (gate_up, down, *(shared or ())) if isinstance(w, Packed)]
    fast = _kernels(x_TD) if x_TD.is_cuda and len(weights) == 4 else None
    return fast is not None and bool(fast.takes_shared(x_TD, *weights[:2], tuple(weights[2:])))


def experts_reference(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Packed, down_EDI: Packed
) -> Tensor:
    """Every expert that was chosen, dequantised in turn; sums in FP32 (FP64 for FP64)."""
    out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for e in expert_TK.unique().tolist():
        token, slot = (expert_TK == e).nonzero(as_tuple=True)
        gate, up = (x_TD[token] @ gate_up_E2ID.dequantise(x_TD.dtype, e).T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ down_EDI.dequantise(x_TD.dtype, e).T
        out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype) * weight_TK[token, slot].unsqueeze(-1))
    return out_TD.to(x_TD.dtype)


def _kernels(x: Tensor) -> Any:
    """The module whose kernels run where x is, or None."""
    from hadal.ops.dispatch import use_cpu_kernels, use_triton

    if use_cpu_kernels(x):
        return _cpu_kernels()
    if use_triton(x):
        from hadal.ops.triton import packed as fast

        return fast
    return None


def _cpu_kernels() -> Any:
    from hadal.ops.dispatch import use_cpu_kernels

    if not use_cpu_kernels(torch.empty(0)):
        return None
    from hadal.ops import cpu_packed

    return cpu_packed
