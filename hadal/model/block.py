"""One transformer block: x += Attention(RMSNorm(x)); x += FFN(RMSNorm(x)) (V3 §2.1)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from hadal.config import Mla, ModelConfig
from hadal.model import fused
from hadal.model.context import Context
from hadal.model.gqa import GqaAttention
from hadal.model.layers import Ffn, Like, RMSNorm
from hadal.model.mla import MlaAttention
from hadal.model.moe import Moe
from hadal.ops.linear import takes_norm


class Block(nn.Module):
    """Block number `layer`; MTP blocks carry numbers from num_hidden_layers on."""

    def __init__(self, config: ModelConfig, layer: int, **like: Unpack[Like]) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.layer, self.is_moe, self.eps = layer, config.is_moe_layer(layer), eps
        self.fused_links: fused.Links | None = None
        self.input_layernorm = RMSNorm(hidden, eps, **like)
        attention = MlaAttention if isinstance(config.attention, Mla) else GqaAttention
        self.self_attn = attention(config, layer, **like)
        self.post_attention_layernorm = RMSNorm(hidden, eps, **like)
        self.mlp = (
            Moe(config, layer, **like) if self.is_moe else Ffn(hidden, config.intermediate_size, **like)
        )

    def forward(self, x_TD: Tensor, ctx: Context) -> Tensor:
        if (fast_TD := fused.block(self, x_TD, ctx)) is not None:
            return fast_TD
        if takes_norm(x_TD):  # one row on a GPU: norms and additions inside the products
            x_TD = self.self_attn(x_TD, ctx, x_TD, self.input_layernorm.late)
            late = self.post_attention_layernorm.late
            return self.mlp(x_TD, x_TD, ctx, late) if self.is_moe else self.mlp(x_TD, x_TD, late)
        x_TD, normed_TD = self.input_layernorm.beside(x_TD)
        attended_TD = self.self_attn(normed_TD, ctx)
        x_TD, normed_TD = self.post_attention_layernorm.after_add(x_TD, attended_TD)
        return self.mlp(normed_TD, x_TD, ctx) if self.is_moe else self.mlp(normed_TD, x_TD)
