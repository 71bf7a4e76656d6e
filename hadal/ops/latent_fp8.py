"""The latent cache of MLA in FP8: 656 bytes a token instead of 1,152, in the layout that FlashMLA reads.

    bytes 0 … 511      512 latent values, E4M3
    bytes 512 … 527    4 FP32 scales, one for each 128 values:  s = max(max|c|, 1e-4) / 448,  c ≈ float(q) · s
    bytes 528 … 655    64 rope values, BF16, as they are

In general L latent values (a multiple of 128) and R rope values take L + 4·L/128 + 2·R bytes. The rope key
stays in BF16: it carries position, and its few values are the more sensitive ones (V3.2, FlashMLA). The cache
is uint8 [pages, page, bytes]. Legend: T tokens, S sequences, H heads, L latent, R rope, C = L + R, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.ops.dispatch import use_triton
from hadal.ops.fp8 import dequantise_activations, quantise_activations
from hadal.ops.mla import latent_entry
from hadal.ops.paged import mla_decode_reference

GROUP = 128


def entry_bytes(rank: int, rope: int) -> int:
    """Bytes of an entry of `rank` latent and `rope` rope values. ValueError unless groups come out even."""
    if rank % GROUP:
        raise ValueError(f"an FP8 latent cache needs a latent rank in multiples of {GROUP}, got {rank}")
    return rank + 4 * (rank // GROUP) + 2 * rope


def quantise_entries(entry_TC: Tensor, rank: int) -> Tensor:
    """Entries [.., C] as bytes [.., B]."""
    q_TL, scale_TG = quantise_activations(entry_TC[..., :rank], GROUP)
    parts = (q_TL, scale_TG.float(), entry_TC[..., rank:].to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def dequantise_entries(entry_TB: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes [.., B] as entries [.., C], latents computed in FP32, then cast."""
    scales = rank + 4 * (rank // GROUP)
    q_TL = entry_TB[..., :rank].contiguous().view(torch.float8_e4m3fn)
    scale_TG = entry_TB[..., rank:scales].contiguous().view(torch.float32)
    rope_TR = entry_TB[..., scales:].contiguous().view(torch.bfloat16)
    return torch.cat([dequantise_activations(q_TL, scale_TG, GROUP, dtype), rope_TR.to(dtype)], -1)


def write_latent(
    kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, cache_PBB: Tensor, slot_T: Tensor
) -> Tensor:
    """`hadal.ops.mla.write_latent` for this cache: stores the entries, returns them unquantised [T, C]."""
    if use_triton(kv_TC, norm_L):
        from hadal.ops.triton.mla import write_latent as fast

        return fast(kv_TC, norm_L, eps, rotation_T2r, cache_PBB, slot_T)
    entry_TC = latent_entry(kv_TC, norm_L, eps, rotation_T2r)
    cache_PBB.flatten(0, 1).index_copy_(0, slot_T, quantise_entries(entry_TC, norm_L.shape[0]))
    return entry_TC


def gather_entries(cache_PBB: Tensor, pages_P: Tensor, length: int, rank: int, dtype: torch.dtype) -> Tensor:
    """The first `length` cached entries of one sequence, [length, C], for a prefill with a prefix."""
    rows = cache_PBB.index_select(0, pages_P).flatten(0, 1)[:length]
    return dequantise_entries(rows, rank, dtype)


def decode_reference(
    q_SHC: Tensor, cache_PBB: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float
) -> Tensor:
    """`hadal.ops.paged.mla_decode_reference` over the named pages, dequantised in q's dtype."""
    pages, table_SP = block_table_SP.unique(return_inverse=True)
    cache_PBC = dequantise_entries(cache_PBB[pages.long()], rank, q_SHC.dtype)
    return mla_decode_reference(q_SHC, cache_PBC, table_SP, context_len_S, rank, scale)


def decode(
    q_SHC: Tensor, cache_PBB: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float,
    queries: int = 1,
) -> Tensor:  # fmt: skip
    """z [S, H, L] of absorbed queries over this cache; groups of `queries` rows share their pages."""
    if use_triton(q_SHC):
        from hadal.ops.triton.latent import mla_decode as fast

        return fast(q_SHC, cache_PBB, block_table_SP, context_len_S, rank, scale, queries)
    return decode_reference(q_SHC, cache_PBB, block_table_SP, context_len_S, rank, scale)
