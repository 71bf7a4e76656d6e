"""DeepSeekMoE: out = Σ_k w_k · expert_k(x) + shared(x), the shared expert unweighted (V3 §2.1.2).

Experts are stored under their global index, stacked: gate_up_proj [E, 2I, D], down_proj [E, D, I].
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from hadal.config import ModelConfig
from hadal.model import fused
from hadal.model.context import Context, Routing
from hadal.model.layers import Ffn, Like
from hadal.model.offload import OffloadedExperts
from hadal.ops import cpu
from hadal.ops.dispatch import use_cpu_kernels
from hadal.ops.exact import is_exact
from hadal.ops.experts import experts
from hadal.ops.gate import gate, gate_normed, gate_with_scores
from hadal.ops.linear import SMALL_M, Norm
from hadal.ops.packed import Packed
from hadal.ops.rms_norm import rms_norm


class Gate(nn.Module):
    """The router's weight [E, D] and, for `noaux_tc`, the FP32 correction bias [E] that balances the load."""

    def __init__(self, config: ModelConfig, **like: Unpack[Like]) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.weight = nn.Parameter(torch.empty(self.moe.n_routed_experts, config.hidden_size, **like))
        self.e_score_correction_bias: Tensor | None
        bias = None
        if self.moe.topk_method == "noaux_tc":
            bias = torch.empty(self.moe.n_routed_experts, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return gate(x_TD, self.weight, self.e_score_correction_bias, self.moe)

    def normed(self, x_TD: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """(RMSNorm(x), and its experts and weights)."""
        return gate_normed(x_TD, norm, self.weight, self.e_score_correction_bias, self.moe)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves and casts like any module, but the correction bias stays FP32."""
        super()._apply(fn, recurse)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.float()
        return self


class Experts(nn.Module):
    """The routed experts, stacked by global index; packed or not."""

    gate_up_proj: nn.Parameter | Packed
    down_proj: nn.Parameter | Packed

    def __init__(self, config: ModelConfig, **like: Unpack[Like]) -> None:
        super().__init__()
        m, hidden = config.moe, config.hidden_size
        assert m is not None
        E, width = m.n_routed_experts, m.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, hidden, **like))
        self.down_proj = nn.Parameter(torch.empty(E, hidden, width, **like))

    def forward(
        self,
        x_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        shared: Ffn | None,
        residual_TD: Tensor,
    ) -> Tensor:
        given: Tensor | tuple[Tensor | Packed, Tensor | Packed] | None = None
        if shared is not None:  # a module of its own where somebody may watch it, else in the same kernels
            watched = torch.is_grad_enabled()
            given = shared(x_TD) if watched else (shared.gate_up_proj.weight, shared.down_proj.weight)
        return experts(x_TD, expert_TK, weight_TK, self.gate_up_proj, self.down_proj, given, residual_TD)


class Moe(nn.Module):
    """Gate, routed experts and the shared expert (several shared experts are one wide network)."""

    def __init__(self, config: ModelConfig, layer: int, **like: Unpack[Like]) -> None:
        super().__init__()
        m = config.moe
        assert m is not None
        self.layer = layer
        self.gate = Gate(config, **like)
        self.experts: Experts | OffloadedExperts = Experts(config, **like)
        self.shared_experts = None
        if m.n_shared_experts:
            self.shared_experts = Ffn(
                config.hidden_size, m.n_shared_experts * m.moe_intermediate_size, **like
            )

    def forward(self, x_TD: Tensor, residual_TD: Tensor, ctx: Context, norm: Norm | None = None) -> Tensor:
        """residual + Σ_k w_k · expert_k(x) + shared(x), of RMSNorm(x) where `norm` is given."""
        if norm is not None:
            if not ctx.record_routing:
                x_TD, expert_TK, weight_TK = self.gate.normed(x_TD, norm)
                return self.experts(x_TD, expert_TK, weight_TK, self.shared_experts, residual_TD)
            x_TD = rms_norm(x_TD, *norm)
        here = self.experts
        few = x_TD.shape[0] <= SMALL_M and not ctx.record_routing and not torch.is_grad_enabled()
        if few and isinstance(here, Experts) and use_cpu_kernels(x_TD, self.gate.weight):
            arguments = fused.experts(self)
            if arguments is not None:
                return cpu.moe_block(x_TD, residual_TD, arguments)
        if ctx.record_routing:
            expert_TK, weight_TK, score_TE = self._recorded(x_TD)
            ctx.routing.append(Routing(self.layer, self.gate, expert_TK, score_TE))
        else:
            expert_TK, weight_TK, _ = self.gate(x_TD)
        return self.experts(x_TD, expert_TK, weight_TK, self.shared_experts, residual_TD)

    def _recorded(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if is_exact():
            expert_TK, weight_TK, score_TE = self.gate(x_TD)
            assert score_TE is not None
            return expert_TK, weight_TK, score_TE
        return gate_with_scores(x_TD, self.gate.weight, self.gate.e_score_correction_bias, self.gate.moe)
