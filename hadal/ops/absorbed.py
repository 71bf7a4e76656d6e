"""A decode step of MLA around one cache of either format: queries in, cached attention, head outputs.

    q̃_h = [W_UK,hᵀ·q_nope,h; RoPE(q_rope,h)],   z_h = attention of q̃_h over the entries,   o_h = W_UV,h·z_h

On a GPU a step of few rows takes two kernels around attention instead of six. Everywhere else, and with more
rows, these are the operations of hadal/ops/mla.py, paged.py and latent_fp8.py one after the other.
Legend: T tokens, S sequences, H heads, n nope, L latent, R rope, C = L + R, v value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.ops import latent_fp8, paged
from hadal.ops import mla as plain
from hadal.ops.dispatch import use_triton
from hadal.ops.linear import per_head

# up to which the fused kernels are faster, on an H100 (benchmarks/kernels_gpu.py, part mla)
FEW_QUERIES = 32  # tokens
FEW_VALUES = 16  # tokens · heads; V2-Lite at batch 1, where it is as fast as two


def _fuses(q: Tensor, up: Tensor, few: bool) -> bool:
    """Whether the fused kernels are for these queries and matrices."""
    return few and use_triton(q, up) and up.stride()[1:] == (up.shape[2], 1)


def queries(
    q_THw: Tensor, kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, up_HnL: Tensor,
    cache: Tensor, slot_T: Tensor,
) -> Tensor:  # fmt: skip
    """Absorbed queries [T, H, C] of q [T, H, n + R], unrotated; the tokens' entries are stored in the cache.

    kv [T, C] is the down-projected input, before its norm. Both may be strided views of one product.
    """
    if _fuses(q_THw, up_HnL, q_THw.shape[0] <= FEW_QUERIES):
        from hadal.ops.triton.mla import queries as fast

        return fast(q_THw, kv_TC, norm_L, eps, rotation_T2r, up_HnL, cache, slot_T)
    store = latent_fp8.write_latent if cache.dtype == torch.uint8 else plain.write_latent
    store(kv_TC, norm_L, eps, rotation_T2r, cache, slot_T)
    q_nope_THn, q_rope_THR = q_THw.split([up_HnL.shape[1], q_THw.shape[2] - up_HnL.shape[1]], -1)
    return plain.absorbed_query(q_nope_THn, q_rope_THR, rotation_T2r, up_HnL)


def attend(
    q_SHC: Tensor, cache: Tensor, block_table_SP: Tensor, context_len_S: Tensor, up_HvL: Tensor, scale: float
) -> Tensor:
    """Head outputs [S, H·v] of absorbed queries over the paged cache."""
    rank = up_HvL.shape[2]
    arguments = (q_SHC, cache, block_table_SP, context_len_S, rank, scale)
    if _fuses(q_SHC, up_HvL, q_SHC.shape[0] * q_SHC.shape[1] <= FEW_VALUES):
        from hadal.ops.triton.latent import attend as unmerged
        from hadal.ops.triton.mla import values

        return values(unmerged(*arguments), up_HvL)
    decode = latent_fp8.decode if cache.dtype == torch.uint8 else paged.mla_decode
    z_SHL = decode(*arguments)
    if use_triton(z_SHL, up_HvL):  # written where it is wanted: a product by head would have to be copied
        out_SHv = z_SHL.new_empty(*z_SHL.shape[:2], up_HvL.shape[1])
        torch.bmm(z_SHL.transpose(0, 1), up_HvL.transpose(1, 2), out=out_SHv.transpose(0, 1))
        return out_SHv.flatten(1)
    return per_head(z_SHL, up_HvL, across=False).flatten(1)
