"""The whole network on one flat stream of tokens: embedding, blocks, final norm, head, MTP modules.

`forward(tokens, context)` serves packed training, batched prefill, decode and verification alike; the context
says where sequences begin and which cache pages they own. Legend: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from hadal.config import ConfigError, Mla, ModelConfig
from hadal.model.block import Block
from hadal.model.context import Context
from hadal.model.gqa import GqaAttention
from hadal.model.layers import Like, Linear, RMSNorm
from hadal.model.mla import MlaAttention
from hadal.model.mtp import Mtp
from hadal.ops import invariant
from hadal.ops.exact import is_exact
from hadal.ops.linear import linear_wide
from hadal.ops.rope import rotation_table


class Transformer(nn.Module):
    """One definition for DeepSeek-V3/R1, V2, V2-Lite, DeepSeekMoE, Qwen2 and Llama-3.

    Parameters are allocated uninitialised on `device` (`"meta"` is free); then load, or call `init_weights`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        if config.dsa is not None:
            raise ConfigError(
                "V3.2's sparse attention (index_topk) is not implemented; use V3.1-Terminus, its base"
            )
        like: Like = {"dtype": dtype, "device": device}
        self.config = config
        self.max_positions = max_positions or config.max_position_embeddings
        self.embed_tokens = Linear(config.hidden_size, config.vocab_size, **like)
        self.layers = nn.ModuleList(Block(config, i, **like) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **like)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, **like)
        )
        self.mtp = nn.ModuleList(Mtp(config, k, **like) for k in range(config.num_nextn_predict_layers))
        self._rotation: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.matrix.dtype

    # --- forward --------------------------------------------------------------------------------------------
    def forward(self, token_T: Tensor, context: Context) -> Tensor:
        """Hidden states [T, D] *before* the final norm; `logits` takes them from there."""
        self.prepare(context)
        x_TD = self.embed(token_T)
        wanted, last = context.capture_layers, self.config.num_hidden_layers
        if 0 in wanted:
            context.captured[0] = x_TD
        for block in cast(Iterable[Block], self.layers):
            x_TD = block(x_TD, context)
            if block.layer + 1 in wanted:
                context.captured[block.layer + 1] = x_TD
        if last in wanted:
            context.captured[last] = self.norm(x_TD)
        return x_TD

    def embed(self, token_T: Tensor) -> Tensor:
        """Token embeddings [T, D]."""
        return embedding(token_T, self.embed_tokens.matrix)

    def prepare(self, context: Context) -> None:
        """Look up the rotations of the context's positions, once for all layers."""
        if context.rotation_T2r is None:
            context.rotation_T2r = self.rotation_table()[context.position_T]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """FP32 logits [T, V]: final norm, then the head."""
        return self.head(self.norm(hidden_TD))

    def head(self, normed_TD: Tensor) -> Tensor:
        """FP32 logits of hidden states that are normed already."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if is_exact():  # never rounded to BF16: the trainer's losses see the same numbers
            return invariant.linear(normed_TD, weight, wide=True)
        return linear_wide(normed_TD, weight)

    def mtp_forward(
        self, hidden_TD: Tensor, next_token_T: Tensor, context: Context, depth: int = 0
    ) -> Tensor:
        """Output [T, D] of MTP block `depth`. `hidden`: what the main model (or the depth before) returned,
        before its norm; the final norm is applied here for depth 0 where `mtp_after_norm` says so (as Hugging
        Face and Megatron-Core do; DeepSeek published no MTP code)."""
        self.prepare(context)
        if depth == 0 and self.config.mtp_after_norm:
            hidden_TD = self.norm(hidden_TD)
        return cast(Mtp, self.mtp[depth])(hidden_TD, self.embed(next_token_T), context)

    def mtp_logits(self, hidden_TD: Tensor, depth: int = 0) -> Tensor:
        """FP32 logits of an MTP block's output: its own norm, the shared head."""
        return self.head(cast(Mtp, self.mtp[depth]).norm(hidden_TD))

    def rotation_table(self) -> Tensor:
        """cos and sin for every position, FP32 [positions, 2, R/2] on the model's device; built once."""
        if self._rotation is None or self._rotation.device != self.device:
            a = self.config.attention
            dim = a.qk_rope_head_dim if isinstance(a, Mla) else a.head_dim
            self._rotation = rotation_table(self.config.rope, dim, self.max_positions, self.device)
        return self._rotation

    def set_rope(self, config: ModelConfig) -> None:
        """Go on under `config`, which may differ in rotary embedding and positions alone: tables and softmax
        scales become those of it, weights stay. Raises ConfigError."""
        old = replace(self.config, rope=config.rope, max_position_embeddings=config.max_position_embeddings)
        if old != config:
            raise ConfigError(
                "set_rope changes rope and max_position_embeddings; build another model instead"
            )
        self.config, self._rotation = config, None
        self.max_positions = config.max_position_embeddings
        for module in self.modules():
            if isinstance(module, MlaAttention | GqaAttention):
                module.scale = config.softmax_scale

    # --- weights --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float | None = None) -> Transformer:
        """Normal(0, std) matrices (default: initializer_range), unit norms, zero biases; reproducible."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std or self.config.initializer_range, generator=generator)
        for buffer in self.buffers():
            buffer.zero_()
        return self
