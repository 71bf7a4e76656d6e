"""Grouped-query attention (Qwen2, Llama-3, DeepSeekMoE-16B): the dense architectures of the R1 distills.

Legend: T tokens, H heads, G key/value heads, C head width.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from hadal.config import Gqa, ModelConfig
from hadal.model.context import Context
from hadal.model.layers import Like, Linear
from hadal.ops import invariant
from hadal.ops.attention import attention, attention_maps, self_attention
from hadal.ops.exact import is_exact
from hadal.ops.heads import gqa_heads
from hadal.ops.linear import Norm
from hadal.ops.paged import gather_pages, gqa_decode


class GqaAttention(nn.Module):
    """Attention with fewer key/value heads than heads; q, k, v rows stacked in one projection."""

    def __init__(self, config: ModelConfig, layer: int, **like: Unpack[Like]) -> None:
        super().__init__()
        a = config.attention
        assert isinstance(a, Gqa)
        self.a, self.layer, self.heads = a, layer, config.num_attention_heads
        self.scale = config.softmax_scale
        rows = (self.heads + 2 * a.num_key_value_heads) * a.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, bias=a.qkv_bias, **like)
        self.o_proj = Linear(self.heads * a.head_dim, config.hidden_size, **like)

    def forward(
        self, x_TD: Tensor, ctx: Context, residual_TD: Tensor | None = None, norm: Norm | None = None
    ) -> Tensor:
        """Attention output [T, D] of normed hidden states, or of RMSNorm(x) where `norm` is given, plus the
        residual stream where that is."""
        assert ctx.rotation_T2r is not None
        G = self.a.num_key_value_heads
        qkv_THC = self.qkv_proj(x_TD, norm=norm).unflatten(-1, (-1, self.a.head_dim))
        if is_exact():
            q_THC, k_TGC, v_TGC = gqa_heads(qkv_THC, ctx.rotation_T2r, G)
            out = self._exact(q_THC, torch.stack([k_TGC, v_TGC], 1), ctx)
        elif ctx.cache is None:
            heads = gqa_heads(qkv_THC, ctx.rotation_T2r, G)
            if self.layer in ctx.capture_attention:
                ctx.attention[self.layer] = attention_maps(*heads[:2], ctx.lengths(), self.scale)
            out = self_attention(*heads, ctx.packed_lengths(), self.scale)
        else:
            heads = gqa_heads(qkv_THC, ctx.rotation_T2r, G, ctx.cache.layers[self.layer], ctx.slot_T)
            out = self._cached(*heads, ctx)
        return self.o_proj(out.flatten(1), residual_TD)

    def _exact(self, q_THC: Tensor, entries: Tensor, ctx: Context) -> Tensor:
        """One form for every token, cached or packed; entries [T, 2, G, C]."""
        if ctx.cache is not None:
            assert ctx.slot_T is not None
            ctx.cache.write(self.layer, ctx.slot_T, entries)
            entries = ctx.cache.layers[self.layer]
        return invariant.gqa_attention(q_THC, entries, ctx.stream(), self.scale)

    def _cached(self, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, ctx: Context) -> Tensor:
        assert ctx.cache is not None and ctx.block_table_SP is not None and ctx.context_len_S is not None
        d, T = ctx.num_decodes, ctx.num_tokens
        pages = ctx.cache.layers[self.layer]
        parts = []
        if d:
            parts.append(
                gqa_decode(q_THC[:d], pages, ctx.block_table_SP[:d], ctx.context_len_S[:d], self.scale)
            )
        if d < T:
            q_len, k_len = ctx.lengths(d), list(ctx.context_lens[d:])
            if q_len == k_len:
                k, v = k_TGC[d:], v_TGC[d:]
            else:
                k, v = self._prefix(ctx, d)
            parts.append(attention(q_THC[d:], k, v, q_len, k_len, self.scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prefix(self, ctx: Context, first: int) -> tuple[Tensor, Tensor]:
        assert ctx.cache is not None and ctx.block_table_SP is not None
        pages, size = ctx.cache.layers[self.layer], ctx.cache.page_size
        rows = []
        for s in range(first, len(ctx.context_lens)):
            length = ctx.context_lens[s]
            rows.append(gather_pages(pages, ctx.block_table_SP[s, : -(-length // size)], length))
        k, v = (rows[0] if len(rows) == 1 else torch.cat(rows)).unbind(1)
        return k, v
