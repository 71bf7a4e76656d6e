"""Multi-head latent attention (V2 §2.1, V3 §2.1.1), in both of its forms.

Expanded (training, prefill): keys and values of every head are projected up from the latent; ordinary
attention.
Absorbed (decode): W_UK moves into the query and W_UV behind the attention, which then runs as multi-query
attention over the cache of one latent (after its norm) and one rotated key a token: 576 values in V3.
Legend: T tokens, N keys, H heads, L latent, R rope, n nope, v value width.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from hadal.config import Mla, ModelConfig
from hadal.model.context import Context
from hadal.model.layers import Like, Linear, RMSNorm
from hadal.ops import absorbed, invariant, latent_fp8
from hadal.ops.attention import attention_maps, mla_attention, self_attention, value_width
from hadal.ops.dispatch import needs_grad
from hadal.ops.exact import is_exact
from hadal.ops.heads import keys_and_values, mla_heads, narrow, rotate_queries
from hadal.ops.linear import Norm, linear, linear_pair
from hadal.ops.mla import absorbed_query, latent_entry, write_latent
from hadal.ops.paged import gather_pages
from hadal.ops.recompute import recomputed


class MlaAttention(nn.Module):
    """MLA with (V2, V3) or without (V2-Lite) the query latent."""

    def __init__(self, config: ModelConfig, layer: int, **like: Unpack[Like]) -> None:
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

    def forward(
        self, x_TD: Tensor, ctx: Context, residual_TD: Tensor | None = None, norm: Norm | None = None
    ) -> Tensor:
        """Attention output [T, D] of normed hidden states, or of RMSNorm(x) where `norm` is given, plus the
        residual stream where that is (both for inference alone)."""
        assert ctx.rotation_T2r is not None
        if is_exact():
            return self._exact(x_TD, ctx)
        if ctx.cache is None and needs_grad(x_TD, *self.parameters()):  # with adapters x alone may need none
            return self._trained(x_TD, ctx)
        q_THC, kv_TC = self._project(x_TD, norm)
        inner = self.kv_a_layernorm
        if ctx.cache is None:
            entry_TC, lengths = latent_entry(kv_TC, *inner.late, ctx.rotation_T2r), ctx.lengths()
            if self.layer in ctx.capture_attention:
                ctx.attention[self.layer] = self._maps(q_THC, entry_TC, ctx.rotation_T2r, lengths)
            out = self._expanded(q_THC, ctx.rotation_T2r, entry_TC, lengths, lengths)
        elif ctx.num_decodes == ctx.num_tokens:
            out = self._decoded(q_THC, kv_TC, ctx)
        else:
            assert ctx.slot_T is not None
            pages = ctx.cache.layers[self.layer]
            store = latent_fp8.write_latent if pages.dtype == torch.uint8 else write_latent
            entry_TC = store(kv_TC, *inner.late, ctx.rotation_T2r, pages, ctx.slot_T)
            out = self._cached(q_THC, entry_TC, ctx)
        return self.o_proj(out, residual_TD)

    def _exact(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """The absorbed form for every token, cached or packed: one form for scoring and sampling."""
        assert ctx.rotation_T2r is not None
        norm = self.kv_a_layernorm
        q_THC, kv_TC = self._project(x_TD)
        entries = latent_entry(kv_TC, norm.weight, norm.eps, ctx.rotation_T2r)
        if ctx.cache is not None:
            assert ctx.slot_T is not None
            ctx.cache.write(self.layer, ctx.slot_T, entries)
            entries = ctx.cache.layers[self.layer]
        out = invariant.mla_attention(
            q_THC, ctx.rotation_T2r, entries, self.kv_b_proj.matrix, ctx.stream(),
            self.a.kv_lora_rank, self.scale,
        )  # fmt: skip
        return self.o_proj(out)

    def _trained(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """The expanded form in steps of which each can be made again in the backward pass, so that all that
        must be kept are latents (hadal/ops/recompute.py)."""
        norm, rotation_T2r = self.kv_a_layernorm, ctx.rotation_T2r
        if self.a.q_lora_rank is None:
            q_in, up = x_TD, self.q_proj.matrix
        else:
            q_in, up = self.q_a_layernorm(self.q_a_proj(x_TD)), self.q_b_proj.matrix
        q_THC = recomputed("up", self._queries, q_in, up, rotation_T2r)
        kv_TC = self.kv_a_proj_with_mqa(x_TD)
        entry_TC = recomputed("norm", latent_entry, kv_TC, norm.weight, norm.eps, rotation_T2r)
        spans, v = ctx.packed_lengths(), self.a.v_head_dim
        wide = value_width(q_THC, spans, v)
        k_THC, v_THv = recomputed("up", self._keys_and_values, entry_TC, self.kv_b_proj.matrix, wide)
        out_THv = narrow(self_attention(q_THC, k_THC, v_THv, spans, self.scale), v)
        return self.o_proj(out_THv.flatten(1))

    def _queries(self, latent_TL: Tensor, up_OL: Tensor, rotation_T2r: Tensor) -> Tensor:
        """Rotated queries of all heads [T, H, n + R]."""
        q_THC = linear(latent_TL, up_OL).unflatten(-1, (self.heads, -1))
        return rotate_queries(q_THC, rotation_T2r, self.a.qk_nope_head_dim)

    def _keys_and_values(self, entry_TC: Tensor, up_OL: Tensor, wide: int) -> tuple[Tensor, Tensor]:
        """Keys [T, H, n + R] and values [T, H, v] of all heads, zeros behind these up to `wide`."""
        latent_TL, rope_TR = entry_TC.split([self.a.kv_lora_rank, self.a.qk_rope_head_dim], -1)
        kv_THw = linear(latent_TL, up_OL).unflatten(-1, (self.heads, -1))
        return keys_and_values(kv_THw, rope_TR, self.a.qk_nope_head_dim, wide)

    def _project(self, x_TD: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
        """Queries [T, H, n + R], not rotated, and what the cache entries are made of [T, C]."""
        down = self.kv_a_proj_with_mqa.weight
        if self.a.q_lora_rank is None:
            q, kv_TC = linear_pair(x_TD, self.q_proj.weight, down, norm)
        else:
            q_latent, kv_TC = linear_pair(x_TD, self.q_a_proj.weight, down, norm)
            q = self.q_b_proj(q_latent, norm=self.q_a_layernorm.late)
        return q.unflatten(-1, (self.heads, -1)), kv_TC

    def _maps(
        self, q_THC: Tensor, entry_TC: Tensor, rotation_T2r: Tensor, lengths: list[int]
    ) -> list[Tensor]:
        """Attention maps of the expanded form, for those who look at them; the queries stay as they are."""
        latent_TL, rope_TR = entry_TC.split([self.a.kv_lora_rank, self.a.qk_rope_head_dim], -1)
        kv_THw = self.kv_b_proj(latent_TL).unflatten(-1, (self.heads, -1))
        q_THC, k_THC, _ = mla_heads(q_THC.clone(), rotation_T2r, kv_THw, rope_TR)
        return attention_maps(q_THC, k_THC, lengths, self.scale)

    def _expanded(
        self, q_THC: Tensor, rotation_T2r: Tensor, entry_NC: Tensor, q_len: list[int], k_len: list[int]
    ) -> Tensor:
        """Keys and values of every head from the latent, then ordinary causal attention; [T, H·v]. The
        queries come unrotated, and may be overwritten."""
        latent_NL, k_rope_NR = entry_NC.split([self.a.kv_lora_rank, self.a.qk_rope_head_dim], -1)
        kv_NHw = self.kv_b_proj(latent_NL).unflatten(-1, (self.heads, -1))
        return mla_attention(q_THC, rotation_T2r, kv_NHw, k_rope_NR, q_len, k_len, self.scale).flatten(1)

    def _cached(self, q_THC: Tensor, entry_TC: Tensor, ctx: Context) -> Tensor:
        """Decodes through the absorbed form, prefill chunks through the expanded one."""
        assert ctx.rotation_T2r is not None
        d, T = ctx.num_decodes, ctx.num_tokens
        parts = []
        if d:
            parts.append(self._absorbed(q_THC[:d], ctx))
        if d < T:
            q_len, k_len = ctx.lengths(d), list(ctx.context_lens[d:])
            # with nothing cached before, the stream itself holds all keys; from an FP8 cache they are always
            # read back, so that chunks and prefix hits see what a whole prompt sees
            fresh = q_len == k_len and not self._in_fp8(ctx)
            entry_NC = entry_TC[d:] if fresh else self._visible_entries(ctx, d, entry_TC.dtype)
            parts.append(self._expanded(q_THC[d:], ctx.rotation_T2r[d:], entry_NC, q_len, k_len))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_fp8(self, ctx: Context) -> bool:
        return ctx.cache is not None and ctx.cache.layers[self.layer].dtype == torch.uint8

    def _visible_entries(self, ctx: Context, first: int, dtype: torch.dtype) -> Tensor:
        """Cached entries of all visible tokens of sequences `first` …, out of their pages."""
        assert ctx.cache is not None and ctx.block_table_SP is not None
        pages, size = ctx.cache.layers[self.layer], ctx.cache.page_size
        rows = []
        for s in range(first, len(ctx.context_lens)):
            length = ctx.context_lens[s]
            page_P = ctx.block_table_SP[s, : -(-length // size)]
            if self._in_fp8(ctx):
                rows.append(latent_fp8.gather_entries(pages, page_P, length, self.a.kv_lora_rank, dtype))
            else:
                rows.append(gather_pages(pages, page_P, length))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _ups(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, n, L] and W_UV [H, v, L], views of one matrix."""
        widths = [self.a.qk_nope_head_dim, self.a.v_head_dim]
        w_HwL = self.kv_b_proj.matrix.view(self.heads, sum(widths), self.a.kv_lora_rank)
        up_HnL, up_HvL = w_HwL.split(widths, 1)
        return up_HnL, up_HvL

    def _decoded(self, q_THC: Tensor, kv_TC: Tensor, ctx: Context) -> Tensor:
        """A step of decodes alone, from entries stored with the queries' absorption; [T, H·v]."""
        assert ctx.cache is not None and ctx.block_table_SP is not None and ctx.context_len_S is not None
        assert ctx.slot_T is not None and ctx.rotation_T2r is not None
        norm, pages = self.kv_a_layernorm, ctx.cache.layers[self.layer]
        up_HnL, up_HvL = self._ups()
        q_SHC = absorbed.queries(
            q_THC, kv_TC, norm.weight, norm.eps, ctx.rotation_T2r, up_HnL, pages, ctx.slot_T
        )
        table_SP, context_len_S = ctx.block_table_SP, ctx.context_len_S
        return absorbed.attend(q_SHC, pages, table_SP, context_len_S, up_HvL, self.scale)

    def _absorbed(self, q_SHC: Tensor, ctx: Context) -> Tensor:
        """One query token a sequence over the latent cache, beside chunks of prompts; [S, H·v]."""
        assert ctx.cache is not None and ctx.block_table_SP is not None and ctx.context_len_S is not None
        assert ctx.rotation_T2r is not None
        d, pages = ctx.num_decodes, ctx.cache.layers[self.layer]
        up_HnL, up_HvL = self._ups()
        q_nope_SHn, q_rope_SHR = q_SHC.split([self.a.qk_nope_head_dim, self.a.qk_rope_head_dim], -1)
        q_SHC = absorbed_query(q_nope_SHn, q_rope_SHR, ctx.rotation_T2r[:d], up_HnL)
        return absorbed.attend(
            q_SHC, pages, ctx.block_table_SP[:d], ctx.context_len_S[:d], up_HvL, self.scale
        )
