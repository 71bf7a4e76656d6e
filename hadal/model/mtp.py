"""Multi-token prediction (V3 §2.2): one more block that predicts the token after the next.

    h'_i = M·[enorm(Emb(t_{i+1})); hnorm(h_i)],   h^1 = Block(h'),   p(t_{i+2}) = Head(norm(h^1))
The checkpoint's `eh_proj` takes the embedding first. Embedding and head are those of the main model.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from hadal.config import ModelConfig
from hadal.model.block import Block
from hadal.model.context import Context
from hadal.model.layers import Like, Linear, RMSNorm
from hadal.ops.fp8_training import fp8_training


class Mtp(nn.Module):
    """MTP module of depth k (0-based), stored as layer num_hidden_layers + k."""

    def __init__(self, config: ModelConfig, depth: int, **like: Unpack[Like]) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, **like)
        self.hnorm = RMSNorm(hidden, eps, **like)
        self.eh_proj = Linear(2 * hidden, hidden, **like)
        self.block = Block(config, config.num_hidden_layers + depth, **like)
        self.norm = RMSNorm(hidden, eps, **like)

    def forward(self, hidden_TD: Tensor, embedding_TD: Tensor, ctx: Context) -> Tensor:
        """hidden [T, D] of position i and the embedding of token i + 1 → the block's output [T, D]."""
        joined_T2D = torch.cat([self.enorm(embedding_TD), self.hnorm(hidden_TD)], -1)
        with fp8_training(False):  # published in BF16
            x_TD = self.eh_proj(joined_T2D)
        return self.block(x_TD, ctx)
