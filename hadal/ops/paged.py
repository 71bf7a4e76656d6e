"""Attention of one query token a sequence over the paged cache (decode).

MLA in absorbed form (V2 §2.1.2): q̃ = q_nope·W_UK makes attention MQA over the cached latent c and rope key,
    score = (q̃·c + q_rope·k_rope) · scale,   z = softmax(score)·c,   head output = W_UV·z
GQA: the plain formula on cached keys and values.
Pages: cache [pages, page_size, …]; block_table [S, P] lists a sequence's pages in order; context_len [S]
counts its visible keys. Legend: S sequences, H heads, G key/value heads, L latent, R rope, C = L + R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.ops import cpu
from hadal.ops.dispatch import use_cpu_kernels, use_triton


def gather_pages(cache: Tensor, pages_P: Tensor, length: int) -> Tensor:
    """The first `length` cached rows of one sequence, [length, …]."""
    return cache.index_select(0, pages_P).flatten(0, 1)[:length]


def mla_decode_reference(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float
) -> Tensor:
    """Latent-space output z [S, H, L] of absorbed queries q [S, H, L + R]; softmax in FP32."""
    gathered_SNC = cache_PBC[block_table_SP.long()].flatten(1, 2)
    score = torch.bmm(q_SHC, gathered_SNC.transpose(1, 2)).to(torch.promote_types(q_SHC.dtype, torch.float32))
    hidden = torch.arange(gathered_SNC.shape[1], device=q_SHC.device) >= context_len_S.unsqueeze(1)
    score = (score * scale).masked_fill(hidden.unsqueeze(1), float("-inf"))
    latent = gathered_SNC[..., :rank].masked_fill(hidden.unsqueeze(-1), 0)
    return torch.bmm(score.softmax(-1).to(latent.dtype), latent)


def mla_decode(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float
) -> Tensor:
    """Paged absorbed MLA decode; see `mla_decode_reference`."""
    args = (q_SHC, cache_PBC, block_table_SP, context_len_S, rank, scale)
    if use_triton(q_SHC):
        from hadal.ops.triton.latent import mla_decode as fast

        return fast(*args)
    if use_cpu_kernels(q_SHC, cache_PBC):
        return cpu.mla_decode(*args)
    return mla_decode_reference(*args)


def gqa_decode_reference(
    q_SHC: Tensor, cache_PB2GC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, scale: float
) -> Tensor:
    """Output [S, H, C] of queries [S, H, C] over cached keys and values [pages, page, 2, G, C]."""
    gathered = cache_PB2GC[block_table_SP.long()].flatten(1, 2)
    k_SGNC, v_SGNC = (gathered[:, :, i].transpose(1, 2) for i in (0, 1))
    hidden = torch.arange(gathered.shape[1], device=q_SHC.device) >= context_len_S.unsqueeze(1)
    v_SGNC = v_SGNC.masked_fill(hidden[:, None, :, None], 0)
    q_SGhC = q_SHC.unflatten(1, (k_SGNC.shape[1], -1))
    score = (q_SGhC @ k_SGNC.transpose(2, 3)).to(torch.promote_types(q_SHC.dtype, torch.float32)) * scale
    score = score.masked_fill(hidden[:, None, None], float("-inf"))
    return (score.softmax(-1).to(v_SGNC.dtype) @ v_SGNC).flatten(1, 2)


def gqa_decode(
    q_SHC: Tensor, cache_PB2GC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, scale: float
) -> Tensor:
    """Paged GQA decode; see `gqa_decode_reference`."""
    args = (q_SHC, cache_PB2GC, block_table_SP, context_len_S, scale)
    if use_triton(q_SHC):
        from hadal.ops.triton.decode import gqa_decode as fast

        return fast(*args)
    if use_cpu_kernels(q_SHC, cache_PB2GC):
        return cpu.gqa_decode(*args)
    return gqa_decode_reference(*args)
