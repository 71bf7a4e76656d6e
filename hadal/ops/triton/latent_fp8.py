"""Entries of the FP8 latent cache in one kernel: norm, rotation, quantisation, write to the cache.

Reference: `hadal.ops.latent_fp8`; the BF16 cache's kernel is in mla.py. One program a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton.fp8 import GROUP, _quantise


@triton.jit
def _entry_kernel(
    kv, weight, rotation, cache, slot, entry, half, kv_stride, eps,
    RANK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = RANK // GROUP
    token = tl.program_id(0).to(tl.int64)
    row = cache + tl.load(slot + token) * (RANK + 4 * GROUPS + 4 * half)
    to_entry = entry + token * (RANK + 2 * half)
    g = tl.arange(0, BLOCK_G)
    col = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = col < RANK
    latent = tl.load(kv + token * kv_stride + col, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(latent * latent, 1), 0) / RANK + eps)
    normed = (latent * factor).to(entry.dtype.element_ty) * tl.load(weight + col, mask=inside, other=0.0)
    tl.store(to_entry + col, normed, mask=inside)
    code, scale = _quantise(normed.to(tl.float32))
    tl.store(row.to(tl.pointer_type(tl.float8e4nv)) + col, code, mask=inside)
    tl.store((row + RANK).to(tl.pointer_type(tl.float32)) + g, scale, mask=g < GROUPS)
    pair = tl.arange(0, BLOCK_R)
    real = pair < half
    cos = tl.load(rotation + token * 2 * half + pair, mask=real, other=0.0)
    sin = tl.load(rotation + token * 2 * half + half + pair, mask=real, other=0.0)
    a = tl.load(kv + token * kv_stride + RANK + 2 * pair, mask=real, other=0.0).to(tl.float32)
    b = tl.load(kv + token * kv_stride + RANK + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
    first = (a * cos - b * sin).to(entry.dtype.element_ty)
    second = (b * cos + a * sin).to(entry.dtype.element_ty)
    tl.store(to_entry + RANK + 2 * pair, first, mask=real)
    tl.store(to_entry + RANK + 2 * pair + 1, second, mask=real)
    rope = (row + RANK + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16))
    tl.store(rope + 2 * pair, first.to(tl.bfloat16), mask=real)
    tl.store(rope + 2 * pair + 1, second.to(tl.bfloat16), mask=real)


def write_latent(
    kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, cache_PBB: Tensor, slot_T: Tensor
) -> Tensor:
    """Entries [T, C]; their bytes are stored in the cache uint8 [pages, page, B] at `slot_T`."""
    kv_TC = kv_TC if kv_TC.stride(1) == 1 else kv_TC.contiguous()
    (tokens, width), rank = kv_TC.shape, norm_L.shape[0]
    entry = torch.empty((tokens, width), dtype=kv_TC.dtype, device=kv_TC.device)
    half = (width - rank) // 2
    _entry_kernel[(tokens,)](
        kv_TC, norm_L, rotation_T2r.contiguous(), cache_PBB, slot_T, entry, half, kv_TC.stride(0), eps,
        RANK=rank, BLOCK_G=triton.next_power_of_2(rank // 128), BLOCK_R=triton.next_power_of_2(half),
        num_warps=2,
    )  # fmt: skip
    return entry
