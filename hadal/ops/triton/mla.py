"""Latent cache entries in one kernel: norm of the latent, rotation of the rope key, write to the cache.

Reference: `hadal.ops.mla.latent_entry`. One program a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _entry_kernel(
    kv,
    weight,
    rotation,
    cache,
    slot,
    entry,
    rank,
    half,
    kv_stride,
    eps,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    width = rank + 2 * half
    to_cache = cache + tl.load(slot + token) * width
    to_entry = entry + token * width
    col = tl.arange(0, BLOCK_L)
    inside = col < rank
    latent = tl.load(kv + token * kv_stride + col, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(latent * latent) / rank + eps)
    normed = (latent * scale).to(entry.dtype.element_ty) * tl.load(weight + col, mask=inside, other=0.0)
    tl.store(to_cache + col, normed, mask=inside)
    tl.store(to_entry + col, normed, mask=inside)
    pair = tl.arange(0, BLOCK_R)
    real = pair < half
    cos = tl.load(rotation + token * 2 * half + pair, mask=real, other=0.0)
    sin = tl.load(rotation + token * 2 * half + half + pair, mask=real, other=0.0)
    a = tl.load(kv + token * kv_stride + rank + 2 * pair, mask=real, other=0.0).to(tl.float32)
    b = tl.load(kv + token * kv_stride + rank + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
    first = (a * cos - b * sin).to(entry.dtype.element_ty)
    second = (b * cos + a * sin).to(entry.dtype.element_ty)
    tl.store(to_cache + rank + 2 * pair, first, mask=real)
    tl.store(to_cache + rank + 2 * pair + 1, second, mask=real)
    tl.store(to_entry + rank + 2 * pair, first, mask=real)
    tl.store(to_entry + rank + 2 * pair + 1, second, mask=real)


def write_latent(
    kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, cache_PBC: Tensor, slot_T: Tensor
) -> Tensor:
    """Entries [T, C], also stored in the cache [pages, page, C] at `slot_T`."""
    kv_TC = kv_TC if kv_TC.stride(1) == 1 else kv_TC.contiguous()
    (tokens, width), rank = kv_TC.shape, norm_L.shape[0]
    entry = torch.empty((tokens, width), dtype=kv_TC.dtype, device=kv_TC.device)
    half = (width - rank) // 2
    _entry_kernel[(tokens,)](
        kv_TC, norm_L, rotation_T2r.contiguous(), cache_PBC, slot_T, entry, rank, half, kv_TC.stride(0), eps,
        BLOCK_L=triton.next_power_of_2(rank), BLOCK_R=triton.next_power_of_2(half), num_warps=2,
    )  # fmt: skip
    return entry
