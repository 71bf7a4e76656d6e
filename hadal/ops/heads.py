"""From projections to what attention takes: rotated queries, complete keys, and values as they lie.

    MLA   q_h = [q_nope,h; RoPE(q_rope,h)]   k_h = [k_nope,h; k_rope]   v_h beside k_nope,h   (V2 §2.1.2)
    GQA   q, k rotated, v as projected; k and v also to the cache
Inference on a GPU rotates in the projection's output itself and copies no values. Legend: T query tokens, N
keys, H heads, G key/value heads, C head width, n nope, R rope, w = n + value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hadal.ops.dispatch import train_triton, use_triton
from hadal.ops.rope import rotate_half, rotate_interleaved


def mla_heads(
    q_THC: Tensor, rotation_T2r: Tensor, kv_NHw: Tensor, rope_NR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(q [T, H, C], k [N, H, C], v [N, H, w − n]) of unrotated queries, the latents' projection and the rope
    keys (rotated). `q_THC` is overwritten where nothing is differentiated."""
    R = rope_NR.shape[1]
    nope = q_THC.shape[2] - R
    v_NHv = kv_NHw[..., nope:]
    if use_triton(q_THC, kv_NHw, rope_NR):
        from hadal.ops.triton.heads import mla_heads as fast

        return q_THC, fast(q_THC, rotation_T2r, kv_NHw, rope_NR), v_NHv
    q_THC = rotate_queries(q_THC, rotation_T2r, nope)
    k_rope_NHR = rope_NR.unsqueeze(1).expand(-1, kv_NHw.shape[1], -1)
    return q_THC, torch.cat([kv_NHw[..., :nope], k_rope_NHR], -1), v_NHv


def rotate_queries(q_THC: Tensor, rotation_T2r: Tensor, nope: int) -> Tensor:
    """Queries with their columns from `nope` on rotated, in place where nothing is differentiated."""
    if use_triton(q_THC):
        from hadal.ops.triton.heads import rotate_queries as fast

        fast(q_THC, rotation_T2r, nope)
        return q_THC
    if train_triton(q_THC):
        from hadal.ops.triton.train_heads import turned

        return turned(q_THC, rotation_T2r, nope)
    return torch.cat([q_THC[..., :nope], rotate_interleaved(q_THC[..., nope:], rotation_T2r)], -1)


def keys_and_values(
    kv_THw: Tensor, rope_TR: Tensor, nope: int, value_width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Keys [T, H, nope + R] and values [T, H, w − nope] of MLA, as training wants them; zeros behind the
    values up to `value_width`."""
    wide = kv_THw.shape[2] - nope if value_width is None else value_width
    if train_triton(kv_THw, rope_TR):
        from hadal.ops.triton.train_heads import keys_and_values as fast

        return fast(kv_THw, rope_TR, nope, wide)
    k_THn, v_THv = kv_THw[..., :nope], kv_THw[..., nope:]
    if wide > v_THv.shape[2]:
        v_THv = pad(v_THv, (0, wide - v_THv.shape[2]))
    return torch.cat([k_THn, rope_TR.unsqueeze(1).expand(-1, kv_THw.shape[1], -1)], -1), v_THv


def narrow(x_THC: Tensor, width: int) -> Tensor:
    """The first columns of every head, [T, H, width], contiguous."""
    if width == x_THC.shape[2]:
        return x_THC
    if train_triton(x_THC):
        from hadal.ops.triton.train_heads import narrow as fast

        return fast(x_THC, width)
    return x_THC[..., :width].contiguous()


def gqa_heads(
    qkv_THC: Tensor,
    rotation_T2r: Tensor,
    groups: int,
    cache_PB2GC: Tensor | None = None,
    slot_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of stacked heads [T, H + 2G, C], q and k rotated; k and v also written to the cache at each
    token's slot. `qkv_THC` is overwritten where nothing is differentiated."""
    heads = qkv_THC.shape[1] - 2 * groups
    widths = [heads, groups, groups]
    if use_triton(qkv_THC):
        from hadal.ops.triton.heads import gqa_heads as fast

        q_THC, k_TGC, v_TGC = fast(qkv_THC, rotation_T2r, groups, cache_PB2GC, slot_T).split(widths, 1)
        return q_THC, k_TGC, v_TGC
    if train_triton(qkv_THC) and cache_PB2GC is None:
        from hadal.ops.triton.train_heads import gqa_heads as differentiable

        return differentiable(qkv_THC, rotation_T2r, groups)
    qk = rotate_half(qkv_THC[:, : heads + groups], rotation_T2r)
    q_THC, k_TGC, v_TGC = qk[:, :heads], qk[:, heads:], qkv_THC[:, heads + groups :]
    if cache_PB2GC is not None:
        assert slot_T is not None
        cache_PB2GC.flatten(0, 1).index_copy_(0, slot_T, torch.stack([k_TGC, v_TGC], 1))
    return q_THC, k_TGC, v_TGC
