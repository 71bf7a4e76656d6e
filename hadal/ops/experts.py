"""Feed-forward networks: SwiGLU, and the routed experts of DeepSeekMoE.

    ffn(x) = down(silu(gate·x) ⊙ up·x)        moe(x) = Σ_k w_k · ffn_{e_k}(x)

`gate_up` stacks the gate rows above the up rows. Legend: T tokens, D hidden, I width, E experts, K per token.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from hadal.ops import cpu, cpu_prompt, fp8_training, invariant, packed
from hadal.ops.dispatch import needs_grad, train_triton, use_cpu_kernels, use_triton
from hadal.ops.exact import is_exact
from hadal.ops.fp8_training import is_fp8_training
from hadal.ops.linear import FEW_ROWS, SMALL_M, Norm, linear, native_bf16, takes_norm
from hadal.ops.packed import Packed
from hadal.ops.recompute import recomputed
from hadal.ops.rms_norm import rms_norm

FEW_TOKENS = 256  # on a GPU: up to here programs find their rows themselves; beyond, rows are sorted
MANY_ROWS = 8  # of an expert, on CPU: from here on panels of tokens beat one weight row after the other


def swiglu(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up of the stacked product [T, 2I] → [T, I]."""
    if is_exact():
        return invariant.swiglu(gate_up_T2I)
    if use_triton(gate_up_T2I):
        from hadal.ops.triton.experts import swiglu as fast

        return fast(gate_up_T2I)
    if use_cpu_kernels(gate_up_T2I) and gate_up_T2I.numel() <= 1 << 16:
        return cpu.swiglu(gate_up_T2I)
    differentiable = swiglu_reference
    if train_triton(gate_up_T2I):
        from hadal.ops.triton import train_experts

        differentiable = train_experts.swiglu
    out_TI: Tensor = recomputed("swiglu", differentiable, gate_up_T2I)
    return out_TI


def swiglu_reference(gate_up_T2I: Tensor) -> Tensor:
    """The definition; differentiable."""
    gate, up = gate_up_T2I.chunk(2, -1)
    return silu(gate) * up


def ffn(
    x_TD: Tensor, gate_up_2ID: Tensor | Packed, down_DI: Tensor | Packed, residual_TD: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """Dense SwiGLU feed-forward network, of RMSNorm(x) where `norm` is given, plus the residual stream where
    that is."""
    if norm is not None:
        if takes_norm(x_TD, gate_up_2ID, down_DI):
            from hadal.ops.triton import gemv
            from hadal.ops.triton import linear as fast

            hidden_TI = fast.linear(x_TD, cast(Tensor, gate_up_2ID), swiglu=True, norm=gemv.Norm(*norm))
            return linear(hidden_TI, down_DI, residual_TO=residual_TD)
        x_TD = rms_norm(x_TD, *norm)
    matrices = isinstance(gate_up_2ID, Tensor) and isinstance(down_DI, Tensor)
    if is_fp8_training() and matrices and needs_grad(x_TD, gate_up_2ID, down_DI):  # type: ignore[arg-type]
        return _plus(fp8_training.ffn(x_TD, gate_up_2ID, down_DI), None, residual_TD)  # type: ignore[arg-type]
    if use_triton(x_TD, gate_up_2ID, down_DI) and isinstance(gate_up_2ID, Tensor):
        from hadal.ops.triton import linear as fast

        if fast.wants(x_TD, gate_up_2ID):
            return linear(fast.linear(x_TD, gate_up_2ID, swiglu=True), down_DI, residual_TO=residual_TD)
    packed_fast = packed.few_rows(x_TD, gate_up_2ID)
    if packed_fast is not None:
        return linear(packed_fast.linear(x_TD, gate_up_2ID, swiglu=True), down_DI, residual_TO=residual_TD)
    plain = isinstance(gate_up_2ID, Tensor) and isinstance(down_DI, Tensor) and x_TD.dim() == 2
    if plain and _prompt(x_TD, gate_up_2ID, down_DI) and not needs_grad(residual_TD):
        return cpu_prompt.ffn(x_TD, cast(Tensor, gate_up_2ID), cast(Tensor, down_DI), residual_TD)
    return linear(swiglu(linear(x_TD, gate_up_2ID)), down_DI, residual_TO=residual_TD)


def _prompt(x_TD: Tensor, *weights: Tensor | Packed) -> bool:
    """Whether a whole network in one call (cpu_prompt) is the faster way."""
    own = x_TD.dtype != torch.bfloat16 or not native_bf16()
    return own and x_TD.shape[0] > FEW_ROWS and use_cpu_kernels(x_TD, *weights)


def experts_reference(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """Every expert in turn on the tokens that chose it; sums in FP32 (FP64 for FP64). Differentiable."""
    out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for e in range(gate_up_E2ID.shape[0]):
        token, slot = (expert_TK == e).nonzero(as_tuple=True)
        if token.numel():
            gate, up = (x_TD[token] @ gate_up_E2ID[e].T).chunk(2, -1)
            y = (silu(gate) * up) @ down_EDI[e].T
            out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype) * weight_TK[token, slot].unsqueeze(-1))
    return out_TD.to(x_TD.dtype)


def dispatch(x_TD: Tensor, expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, stably: (x of every row [T·K, D], row [T·K] of each flat (t, k) pair, end [E] of
    each expert's rows, int32). The seam where an all-to-all goes once experts live on several devices."""
    if use_triton(x_TD):
        from hadal.ops.triton import route

        place, end_E = route.places(expert_TK, n_experts)
        return route.spread(x_TD, place, expert_TK.shape[1]), place, end_E
    if train_triton(x_TD):
        from hadal.ops.triton import route, train_experts

        place, end_E = route.places(expert_TK, n_experts)
        return recomputed("rows", train_experts.spread, x_TD, place, expert_TK.shape[1]), place, end_E
    flat = expert_TK.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    counts_E = torch.zeros(n_experts, dtype=torch.int32, device=x_TD.device)
    counts_E.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    row_ND = recomputed("rows", torch.index_select, x_TD, 0, order // expert_TK.shape[1])
    return row_ND, place, counts_E.cumsum(0, dtype=torch.int32)


def combine(
    row_ND: Tensor,
    place: Tensor,
    weight_TK: Tensor,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each token's K rows, FP32 inside, undoing `dispatch`; then + shared + residual."""
    if use_triton(row_ND, weight_TK) and not needs_grad(shared_TD, residual_TD):
        from hadal.ops.triton.experts import combine as fast

        return fast(row_ND, place, weight_TK, shared_TD, residual_TD)
    if train_triton(row_ND, weight_TK, shared_TD, residual_TD):
        from hadal.ops.triton.train_experts import combine as differentiable

        return differentiable(row_ND, place, weight_TK, shared_TD, residual_TD)
    wide = torch.promote_types(row_ND.dtype, weight_TK.dtype)
    row_TKD = recomputed("rows", _by_token, row_ND, place, weight_TK.shape[1], wide)
    out_TD = torch.einsum("tkd,tk->td", row_TKD, weight_TK.to(wide)).to(row_ND.dtype)
    return _plus(out_TD, shared_TD, residual_TD)


def _by_token(row_ND: Tensor, place: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """Rows sorted by expert → [T, K, D] in `dtype`."""
    return row_ND.index_select(0, place).unflatten(0, (-1, top_k)).to(dtype)


def _plus(out_TD: Tensor, shared_TD: Tensor | None, residual_TD: Tensor | None) -> Tensor:
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    return out_TD if residual_TD is None else residual_TD + out_TD


def experts_grouped(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows sorted by expert, then grouped matrix products (BF16 on CUDA). Differentiable."""
    row_ND, place, end_E = dispatch(x_TD, expert_TK, gate_up_E2ID.shape[0])
    hidden = swiglu(torch._grouped_mm(row_ND, gate_up_E2ID.transpose(1, 2), offs=end_E))
    row_ND = torch._grouped_mm(hidden, down_EDI.transpose(1, 2), offs=end_E)
    return combine(row_ND, place, weight_TK, shared_TD, residual_TD)


def experts_by_segment(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows sorted by expert, then one dense product an expert that has rows (CPU). Differentiable."""
    row_ND, place, end_E = dispatch(x_TD, expert_TK, gate_up_E2ID.shape[0])
    parts = []
    # Unbound at once: the gradient of an index is as large as the whole stack, and E of them would be added.
    stacks = zip(
        row_ND.tensor_split(end_E[:-1].tolist()), gate_up_E2ID.unbind(), down_EDI.unbind(), strict=True
    )
    for rows, gate_up_2ID, down_DI in stacks:
        if rows.shape[0]:
            parts.append(ffn(rows, gate_up_2ID, down_DI))
    return combine(torch.cat(parts), place, weight_TK, shared_TD, residual_TD)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor,
    gate_up_E2ID: Tensor | Packed, down_EDI: Tensor | Packed,
    shared: tuple[Tensor | Packed, Tensor | Packed] | Tensor | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The experts on x [T, D]: expert [T, K] int64, weight [T, K] FP32 → [T, D]. No token is dropped.

    `shared`: gate_up and down of the expert that all tokens use, or what it gave [T, D]. The residual stream
    is added where given.
    """
    if isinstance(shared, Tensor):
        return _routed(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared, residual_TD)
    plain = isinstance(gate_up_E2ID, Tensor) and not needs_grad(x_TD, weight_TK, gate_up_E2ID, residual_TD)
    if plain and use_triton(x_TD, *(shared or ())) and 0 < x_TD.shape[0] <= FEW_TOKENS:
        from hadal.ops.triton.experts import experts as fast

        return fast(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared, residual_TD)  # type: ignore[arg-type]
    if plain and _many(expert_TK, gate_up_E2ID) and _prompt(x_TD, gate_up_E2ID, down_EDI, *(shared or ())):
        both = cast("tuple[Tensor, Tensor] | None", shared)
        stacks = cast(Tensor, gate_up_E2ID), cast(Tensor, down_EDI)
        return cpu_prompt.experts(x_TD, expert_TK, weight_TK, *stacks, both, residual_TD)
    if packed.takes_shared(x_TD, gate_up_E2ID, down_EDI, shared) and not needs_grad(weight_TK, residual_TD):
        return packed.experts(
            x_TD, expert_TK, weight_TK, cast(Packed, gate_up_E2ID), cast(Packed, down_EDI), None, residual_TD,
            cast("tuple[Packed, Packed]", shared),
        )  # fmt: skip
    shared_TD = None if shared is None else ffn(x_TD, *shared)
    return _routed(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared_TD, residual_TD)


def _many(expert_TK: Tensor, gate_up_E2ID: Tensor | Packed) -> bool:
    """Whether there are many rows for each expert, on average."""
    return expert_TK.numel() >= MANY_ROWS * gate_up_E2ID.shape[0]


def _routed(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor,
    gate_up_E2ID: Tensor | Packed, down_EDI: Tensor | Packed, shared_TD: Tensor | None,
    residual_TD: Tensor | None,
) -> Tensor:  # fmt: skip
    """The routed experts, with the shared one's output known."""
    if is_exact():
        return invariant.experts(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared_TD, residual_TD)
    if isinstance(gate_up_E2ID, Packed) or isinstance(down_EDI, Packed):
        assert isinstance(gate_up_E2ID, Packed) and isinstance(down_EDI, Packed)
        return packed.experts(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared_TD, residual_TD)
    args = (x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI, shared_TD, residual_TD)
    frozen = not needs_grad(*args)
    if is_fp8_training() and not frozen:
        return fp8_training.experts(*args)
    few = x_TD.shape[0] <= SMALL_M or not _many(expert_TK, gate_up_E2ID)
    if x_TD.is_cuda and x_TD.dtype == torch.bfloat16:
        return experts_grouped(*args)
    if frozen and few and use_cpu_kernels(x_TD, gate_up_E2ID):
        return _plus(cpu.experts(*args[:5]), shared_TD, residual_TD)
    return experts_by_segment(*args)
