"""The two ends of MLA around attention: what goes into the latent cache, and the absorbed query.

    entry_t = [RMSNorm(latent_t); RoPE(k_rope_t)]      written to the cache, 512 + 64 values in V3 (V2 §2.1.2)
    q̃_h    = [W_UK,hᵀ·q_nope,h; RoPE(q_rope,h)]       a query over cached entries
Legend: T tokens, S sequences, H heads, n nope, L latent, R rope, C = L + R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.ops import cpu, invariant
from hadal.ops.dispatch import train_triton, use_cpu_kernels, use_triton
from hadal.ops.exact import is_exact
from hadal.ops.linear import SMALL_M, per_head
from hadal.ops.rms_norm import rms_norm
from hadal.ops.rope import rotate_interleaved


def latent_entry(kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor) -> Tensor:
    """Cache entries [T, C] of the down-projected [T, C]: latent normed, rope key rotated. Differentiable."""
    if is_exact():
        return invariant.latent_entry(kv_TC, norm_L, eps, rotation_T2r)
    if train_triton(kv_TC, norm_L):
        from hadal.ops.triton.train_norm import latent_entry as differentiable

        return differentiable(kv_TC, norm_L, eps, rotation_T2r)
    latent_TL, rope_TR = kv_TC.split([norm_L.shape[0], kv_TC.shape[1] - norm_L.shape[0]], -1)
    return torch.cat([rms_norm(latent_TL, norm_L, eps), rotate_interleaved(rope_TR, rotation_T2r)], -1)


def write_latent(
    kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, cache_PBC: Tensor, slot_T: Tensor
) -> Tensor:
    """`latent_entry`, stored in the cache at each token's slot (page · page_size + offset); returns them."""
    if use_triton(kv_TC, norm_L):
        from hadal.ops.triton.mla import write_latent as fast

        return fast(kv_TC, norm_L, eps, rotation_T2r, cache_PBC, slot_T)
    if use_cpu_kernels(kv_TC, norm_L, cache_PBC):
        return cpu.write_latent(kv_TC, norm_L, eps, rotation_T2r, cache_PBC, slot_T)
    entry_TC = latent_entry(kv_TC, norm_L, eps, rotation_T2r)
    cache_PBC.flatten(0, 1).index_copy_(0, slot_T, entry_TC)
    return entry_TC


def absorbed_query(q_nope_SHn: Tensor, q_rope_SHR: Tensor, rotation_S2r: Tensor, up_HnL: Tensor) -> Tensor:
    """Queries over cached entries, [S, H, C]: W_UK absorbed into the nope part, the rope part rotated."""
    if use_triton(q_nope_SHn, q_rope_SHR, up_HnL):
        from hadal.ops.triton.rope import rotate_into

        (S, H, _), rank = q_nope_SHn.shape, up_HnL.shape[2]
        q_SHC = q_nope_SHn.new_empty(S, H, rank + q_rope_SHR.shape[2])
        torch.bmm(q_nope_SHn.transpose(0, 1), up_HnL, out=q_SHC[..., :rank].transpose(0, 1))
        rotate_into(q_rope_SHR, rotation_S2r, q_SHC[..., rank:], interleaved=True)
        return q_SHC
    if use_cpu_kernels(q_nope_SHn, q_rope_SHR, up_HnL) and q_nope_SHn.shape[0] <= SMALL_M:
        return cpu.absorbed_query(q_nope_SHn, q_rope_SHR, rotation_S2r, up_HnL)
    return torch.cat(
        [per_head(q_nope_SHn, up_HnL, across=True), rotate_interleaved(q_rope_SHR, rotation_S2r)], -1
    )
