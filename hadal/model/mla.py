"""Multi-head latent attention (V2 §2.1, V3 §2.1.1), in both of its forms.

Expanded (training, prefill): keys and values of every head are projected up from the latent; ordinary attention.
Absorbed (decode): W_UK moves into the query and W_UV behind the attention, which then runs as multi-query
attention over the cache of one latent (after its norm) and one rotated key a token: 512 + 64 = 576 values in V3.
Legend: T tokens, N keys, H heads, L latent, R rope, n nope, v value width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hadal.config import Mla, ModelConfig
from hadal.model.context import Context
from hadal.model.layers import Linear, RMSNorm
from hadal.ops.attention import attention
from hadal.ops.linear import per_head
from hadal.ops.paged import gather_pages, mla_decode
from hadal.ops.rope import rotate_interleaved


class MlaAttention(nn.Module):
    """MLA with (V2, V3) or without (V2-Lite) the query latent."""

    def __init__(self, config: ModelConfig, layer: int, **like: object) -> None:
        super().__init__()
        a = config.attention
        assert isinstance(a, Mla)
        self.a, self.layer, self.heads = a, layer, config.num_attention_heads
        self.scale = config.softmax_scale
        hidden, eps = config.hidden_size, config.rms_norm_eps
        if a.q_lora_rank is None:
            self.q_proj = Linear(hidden, self.heads * a.qk_head_dim, **like)
        else:
            self.q_a_proj = Linear(hidden, a.q_lora_rank, **like)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, eps, **like)
            self.q_b_proj = Linear(a.q_lora_rank, self.heads * a.qk_head_dim, **like)
        self.kv_a_proj_with_mqa = Linear(hidden, a.kv_lora_rank + a.qk_rope_head_dim, **like)
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank, eps, **like)
        self.kv_b_proj = Linear(a.kv_lora_rank, self.heads * (a.qk_nope_head_dim + a.v_head_dim), **like)
        self.o_proj = Linear(self.heads * a.v_head_dim, hidden, **like)

    def forward(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """Attention output [T, D] of normed hidden states."""
        assert ctx.rotation_T2r is not None
        q_nope_THn, q_rope_THR = self._queries(x_TD)
        latent_TL, k_rope_TR = self.kv_a_proj_with_mqa(x_TD).split([self.a.kv_lora_rank, self.a.qk_rope_head_dim], -1)
        latent_TL = self.kv_a_layernorm(latent_TL)
        q_rope_THR = rotate_interleaved(q_rope_THR, ctx.rotation_T2r)
        k_rope_TR = rotate_interleaved(k_rope_TR, ctx.rotation_T2r)
        if ctx.cache is None:
            lengths = ctx.lengths()
            out = self._expanded(q_nope_THn, q_rope_THR, latent_TL, k_rope_TR, lengths, lengths)
        else:
            assert ctx.slot_T is not None
            ctx.cache.write(self.layer, ctx.slot_T, torch.cat([latent_TL, k_rope_TR], -1))
            out = self._cached(q_nope_THn, q_rope_THR, latent_TL, k_rope_TR, ctx)
        return self.o_proj(out)  # type: ignore[no-any-return]

    def _queries(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q_proj(x_TD) if self.a.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.a.qk_nope_head_dim, self.a.qk_rope_head_dim], -1)
        return q_nope, q_rope

    def _expanded(
        self,
        q_nope_THn: Tensor,
        q_rope_THR: Tensor,
        latent_NL: Tensor,
        k_rope_NR: Tensor,
        q_len: list[int],
        k_len: list[int],
    ) -> Tensor:
        """Keys and values of every head from the latent, then ordinary causal attention; [T, H·v]."""
        kv_NHw = self.kv_b_proj(latent_NL).unflatten(-1, (self.heads, -1))
        k_nope_NHn, v_NHv = kv_NHw.split([self.a.qk_nope_head_dim, self.a.v_head_dim], -1)
        k = torch.cat([k_nope_NHn, k_rope_NR.unsqueeze(1).expand(-1, self.heads, -1)], -1)
        q = torch.cat([q_nope_THn, q_rope_THR], -1)
        return attention(q, k, v_NHv, q_len, k_len, self.scale).flatten(1)

    def _cached(
        self, q_nope_THn: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, ctx: Context
    ) -> Tensor:
        """Decodes through the absorbed form, prefill chunks through the expanded one."""
        d, T = ctx.num_decodes, ctx.num_tokens
        parts = []
        if d:
            parts.append(self._absorbed(q_nope_THn[:d], q_rope_THR[:d], ctx))
        if d < T:
            q_len, k_len = ctx.lengths(d), list(ctx.context_lens[d:])
            if q_len == k_len:  # nothing cached before: the stream itself holds all keys
                latent, rope = latent_TL[d:], k_rope_TR[d:]
            else:
                latent, rope = self._prefix(ctx, d)
            parts.append(self._expanded(q_nope_THn[d:], q_rope_THR[d:], latent, rope, q_len, k_len))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prefix(self, ctx: Context, first: int) -> tuple[Tensor, Tensor]:
        """Latents and rope keys of all visible tokens of sequences `first` …, out of their pages."""
        assert ctx.cache is not None and ctx.block_table_SP is not None
        pages, size = ctx.cache.layers[self.layer], ctx.cache.page_size
        rows = []
        for s in range(first, len(ctx.context_lens)):
            length = ctx.context_lens[s]
            rows.append(gather_pages(pages, ctx.block_table_SP[s, : -(-length // size)], length))
        latent, rope = torch.cat(rows).split([self.a.kv_lora_rank, self.a.qk_rope_head_dim], -1)
        return latent, rope

    def _absorbed(self, q_nope_SHn: Tensor, q_rope_SHR: Tensor, ctx: Context) -> Tensor:
        """One query token a sequence over the latent cache; [S, H·v]."""
        assert ctx.cache is not None and ctx.block_table_SP is not None and ctx.context_len_S is not None
        d, n = ctx.num_decodes, self.a.qk_nope_head_dim
        w_HwL = self.kv_b_proj.weight.view(self.heads, n + self.a.v_head_dim, self.a.kv_lora_rank)
        q_SHL = per_head(q_nope_SHn, w_HwL[:, :n], across=True)
        z_SHL = mla_decode(
            torch.cat([q_SHL, q_rope_SHR], -1),
            ctx.cache.layers[self.layer],
            ctx.block_table_SP[:d],
            ctx.context_len_S[:d],
            self.a.kv_lora_rank,
            self.scale,
        )
        return per_head(z_SHL, w_HwL[:, n:], across=False).flatten(1)
