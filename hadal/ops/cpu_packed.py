"""Products with packed weights (hadal/ops/packed.py) on CPU: the kernels of csrc/packed.cpp through ctypes.

`pack` cuts a weight into tiles of 32 outputs that are read from front to end (layout "tile32"). With integer
weights the activations are quantised, too (`quantise_activations`), so that products are integer dot products
(VNNI where the processor has it); with FP8 weights they stay FP32. Sums between groups are FP32.

A weight with an unusual group, or with a NaN among its FP8 codes, stays plain, and the reference takes it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import weakref
from math import ceil
from typing import Any

import torch
from torch import Tensor

from hadal.ops import cpu
from hadal.ops.packed import FP8_ROWS, GROUP, Packed

LAYOUT = "tile32"
TILE = 32  # outputs of a tile
ACTIVATION_GROUP = 128  # channels of a row that share a scale
SMALLEST = 1e-35  # a group of activations whose largest magnitude is below this counts as zeros

_plain: weakref.WeakSet[Packed] = weakref.WeakSet()  # those that have been looked at and stay plain


def quantise_activations(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels make of activations: (q int8 [T, I], s FP32 [T, ceil(I/128)]); the tests' oracle.

    s = max|x| / 127 of a row's group of 128 channels, q = round(x · (127 / max|x|)), half to even. A group
    with NaN or infinity has the scale NaN.
    """
    width = x_TI.shape[1]
    x_TGi = torch.nn.functional.pad(x_TI.float(), (0, -width % ACTIVATION_GROUP))
    x_TGi = x_TGi.unflatten(1, (-1, ACTIVATION_GROUP))
    peak = x_TGi.abs().amax(-1, keepdim=True)  # NaN wins
    # a true division: `127 / peak` is a product with the rounded reciprocal
    inverse = torch.where(peak > SMALLEST, torch.full_like(peak, 127) / peak, 0)
    finite = peak.isfinite()
    q = (torch.where(finite, x_TGi, 0) * torch.where(finite, inverse, 0)).round()
    scale = torch.where(finite, peak / 127, torch.nan).squeeze(-1)
    return q.flatten(1)[:, :width].to(torch.int8), scale


# --- the layout ---


def pack(packed: Packed) -> None:
    """Bring the codes into tiles, in place; a weight that the kernels do not take stays as it is."""
    if packed.layout != "plain" or packed in _plain:
        return
    if not _supported(packed):
        _plain.add(packed)
        return
    count, outs, width = _sizes(packed)
    tiles = _buffer(count * _bytes(packed.kind, outs, width))
    codes, scale = packed.codes.contiguous(), packed.scale.contiguous()
    _move("pack_tiles", packed, codes, scale, tiles)
    packed.codes, packed.scale, packed.layout = tiles, torch.empty(0, dtype=scale.dtype), LAYOUT


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """(codes, scale) in the plain layout, exactly as they were before `pack`."""
    if packed.layout != LAYOUT:
        raise ValueError(f"weights in layout {packed.layout!r} are not the CPU kernels'; expected {LAYOUT!r}")
    like = Packed(packed.kind, packed.shape, group=packed.group, rows=packed.rows)
    _move("unpack_tiles", packed, like.codes, like.scale, packed.codes)
    return like.codes, like.scale


def _supported(packed: Packed) -> bool:
    """The usual groups, and no NaN among FP8 codes: shifted to FP16 they would become a number."""
    if packed.device.type != "cpu" or packed.group != GROUP[packed.kind] or not packed.codes.numel():
        return False
    if packed.kind != "fp8":
        return True
    return packed.rows <= FP8_ROWS and bool((packed.codes.contiguous().view(torch.int8) & 0x7F).max() < 0x7F)


def _sizes(packed: Packed) -> tuple[int, int, int]:
    *lead, outs, width = packed.shape
    return functools.reduce(int.__mul__, lead, 1), outs, width


@functools.cache
def _bytes(kind: str, outs: int, width: int) -> int:
    """Bytes of one matrix in tiles."""
    channels, scale = (8, 64) if kind == "int4" else (4, 64 if kind == "int8" else 128)
    groups = ceil(width / GROUP[kind])  # type: ignore[index]
    return ceil(outs / TILE) * (groups * scale + ceil(width / channels) * 4 * TILE)


HUGE_PAGE = 1 << 21


def _buffer(size: int) -> Tensor:
    """Uninitialised bytes, in huge pages where Linux gives them: a tenth more bandwidth."""
    buffer = torch.empty(size, dtype=torch.uint8)
    first = -(-buffer.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    whole = (buffer.data_ptr() + size - first) // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and whole > 0:
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        advise(first, whole, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return buffer


def _move(name: str, packed: Packed, codes: Tensor, scale: Tensor, tiles: Tensor) -> None:
    count, outs, width = _sizes(packed)
    function = getattr(cpu.status()[0], name)
    p, i = ctypes.c_void_p, ctypes.c_int64
    function.restype, function.argtypes = None, [i, p, p, p, i, i, i, i]
    pointers = (codes.data_ptr(), scale.data_ptr(), tiles.data_ptr())
    function(cpu.KIND[packed.kind], *pointers, count, outs, width, packed.rows)


# --- products ---


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(cpu.status()[0], f"{name}_{'f32' if dtype == torch.float32 else 'bf16'}")
    p, i = ctypes.c_void_p, ctypes.c_int64
    function.restype = None
    function.argtypes = {"packed_linear": [p] * 4 + [i] * 5, "packed_experts": [p, p]}[name]
    return function


def ready(*weights: Packed) -> bool:
    """Whether these are in tiles, now or already; plain ones are brought into them."""
    for weight in weights:
        if weight.layout == "plain":
            pack(weight)
        if weight.layout != LAYOUT:
            return False
    return True


def wants_linear(x_TI: Tensor, weight_OI: Packed) -> bool:
    """Whether `linear` takes these."""
    return x_TI.numel() > 0 and len(weight_OI.shape) == 2 and ready(weight_OI)


def linear(x: Tensor, weight_OI: Packed, bias_O: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b; [.., O] in x's dtype. Rows of a matrix may be strided."""
    outs, width = weight_OI.shape
    rows = x if x.dim() == 2 else x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    bias = None if bias_O is None else bias_O.to(x.dtype).contiguous()
    out = torch.empty((*x.shape[:-1], outs), dtype=x.dtype)
    _function("packed_linear", x.dtype)(
        rows.data_ptr(), weight_OI.codes.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), cpu.KIND[weight_OI.kind], rows.shape[0], outs, width, rows.stride(0),
    )  # fmt: skip
    return out


def wants_experts(x_TD: Tensor, gate_up_E2ID: Packed, down_EDI: Packed) -> bool:
    """Whether `experts` takes these."""
    same = (gate_up_E2ID.kind == "fp8") == (down_EDI.kind == "fp8")
    return same and ready(gate_up_E2ID, down_EDI)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Packed, down_EDI: Packed
) -> Tensor:
    """The routed experts; only the chosen ones are read."""
    x_TD, expert_TK, weight_TK = x_TD.contiguous(), expert_TK.contiguous(), weight_TK.float().contiguous()
    (T, K), (E, D, width), out = expert_TK.shape, down_EDI.shape, torch.empty_like(x_TD)
    tensors = (x_TD, expert_TK, weight_TK, gate_up_E2ID.codes, down_EDI.codes, None, None, None, out)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    kinds = (cpu.KIND[gate_up_E2ID.kind], cpu.KIND[down_EDI.kind], 0, 0)
    numbers = (T, K, E, D, width, 0, *kinds)
    _function("packed_experts", x_TD.dtype)((ctypes.c_void_p * 9)(*pointers), (ctypes.c_int64 * 10)(*numbers))
    return out
