"""Batch-invariant operations: what every operation of the network becomes in exact mode (`hadal.ops.exact`).

A row of the result depends on its own data and length alone, so that a sequence gets the same bits alone or
in any batch, in chunks, from the cache, token by token, or in one packed pass with gradients. Attention has
one form: MLA runs absorbed over latent entries and GQA over keys and values, cached or packed alike, in
blocks of 64 keys from position 0. The kernels: csrc/exact.cpp on CPU, triton/exact.py on CUDA.

With gradients on, the forward pass is the same kernel and gives the same bits; the backward pass
differentiates the ordinary operation of the same name, computed again from the saved inputs.
Legend: T tokens, S sequences, H heads, G key/value heads, E experts, K experts per token, D hidden, I width,
L latent, R rope, n nope, v values, C width of a head or an entry, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hadal.config import Moe
from hadal.ops.dispatch import needs_grad
from hadal.ops.exact import ExactError, exact, require
from hadal.ops.packed import Packed


def _kernels(x: Tensor) -> ModuleType:
    """The exact kernels of a tensor's device; ExactError where there are none."""
    require(x.device, x.dtype)
    if x.is_cuda:
        from hadal.ops.triton import exact as kernels

        return kernels
    from hadal.ops import exact_cpu

    return exact_cpu


def _plain(weight: Tensor | Packed) -> Tensor:
    if isinstance(weight, Packed):
        raise ExactError(f"exact mode has no operations on {weight.kind} weights; load float32 or bfloat16")
    return weight


# --- gradients --------------------------------------------------------------------------------------------


class _Again(torch.autograd.Function):
    """forward: `run`; backward: the gradient of `ordinary` at the same inputs."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Tensor], ordinary: Callable[..., Tensor], *inputs: Tensor | None
    ) -> Tensor:
        ctx.ordinary = ordinary
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        inputs = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        with torch.enable_grad(), exact(False):
            out = ctx.ordinary(*inputs)
            found = iter(torch.autograd.grad(out, leaves, grads[0], allow_unused=True))
        return (None, None, *(next(found) if want else None for want in wanted))


def _differentiable(
    run: Callable[..., Tensor], ordinary: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """run(*inputs), with the gradient of ordinary(*inputs)."""
    if not needs_grad(*inputs):
        return run(*inputs)
    out: Tensor = _Again.apply(run, ordinary, *inputs)
    return out


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b with its gradient in closed form: nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, wide: bool) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _kernels(x).linear(x, weight_OI, bias_O, wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad = grads[0].to(x.dtype)
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        return (
            grad @ weight_OI if wants_x else None,
            grad_rows.T @ rows if wants_weight else None,
            grad_rows.sum(0) if wants_bias else None,
            None,
        )


# --- the operations ---------------------------------------------------------------------------------------


def linear(x: Tensor, weight_OI: Tensor | Packed, bias_O: Tensor | None = None, wide: bool = False) -> Tensor:
    """x·Wᵀ + b. `wide`: the result stays in FP32 whatever x is (logits)."""
    weight_OI = _plain(weight_OI)
    if needs_grad(x, weight_OI, bias_O):
        out: Tensor = _Linear.apply(x, weight_OI, bias_O, wide)
        return out
    return _kernels(x).linear(x, weight_OI, bias_O, wide)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension."""
    from hadal.ops.rms_norm import rms_norm_reference

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return _kernels(x).rms_norm(x, weight, eps)

    return _differentiable(run, lambda x, w: rms_norm_reference(x, w, eps), x, weight)


def rotate(x: Tensor, rotation_T2r: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x [T, H, R] or [T, R]."""
    from hadal.ops import rope

    ordinary = rope.rotate_interleaved if interleaved else rope.rotate_half

    def run(x: Tensor) -> Tensor:
        return _kernels(x).rotate(x, rotation_T2r, interleaved)

    return _differentiable(run, lambda x: ordinary(x, rotation_T2r), x)


def latent_entry(kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor) -> Tensor:
    """MLA's cache entries [T, C]."""
    from hadal.ops import mla

    def run(kv_TC: Tensor, norm_L: Tensor) -> Tensor:
        return _kernels(kv_TC).latent_entry(kv_TC, norm_L, rotation_T2r, eps)

    return _differentiable(run, lambda kv, norm: mla.latent_entry(kv, norm, eps, rotation_T2r), kv_TC, norm_L)


def swiglu(x_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    from hadal.ops import experts

    return _differentiable(lambda x: _kernels(x).swiglu(x), experts.swiglu, x_T2I)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe
    ) -> tuple[Tensor, Tensor, Tensor]:
        expert_TK, weight_TK, score_TE = _kernels(x_TD).gate(x_TD, weight_ED, bias_E, moe)
        ctx.moe = moe
        ctx.save_for_backward(x_TD, weight_ED, expert_TK)
        ctx.mark_non_differentiable(expert_TK)
        return expert_TK, weight_TK, score_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from hadal.ops.gate import scores, weigh

        x_TD, weight_ED, expert_TK = ctx.saved_tensors
        leaves = [x_TD.detach().requires_grad_(), weight_ED.detach().requires_grad_()]
        with torch.enable_grad(), exact(False):
            score_TE = scores(leaves[0], leaves[1], ctx.moe)
            outs = (weigh(score_TE, expert_TK, ctx.moe), score_TE)
            grad_x, grad_weight = torch.autograd.grad(outs, leaves, grads[1:])
        return grad_x, grad_weight, None, None


def gate(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor, Tensor]:
    """(experts int64 [T, K], weights FP32 [T, K], scores FP32 [T, E]); of equal scores the first expert."""
    if needs_grad(x_TD, weight_ED):
        out: tuple[Tensor, Tensor, Tensor] = _Gate.apply(x_TD, weight_ED, bias_E, moe)
        return out
    return _kernels(x_TD).gate(x_TD, weight_ED, bias_E, moe)


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor,
    gate_up_E2ID: Tensor | Packed, down_EDI: Tensor | Packed,
    shared_TD: Tensor | None = None, residual_TD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The routed experts; each token's K rows are added in the order in which the gate names them."""
    from hadal.ops.experts import _plus
    from hadal.ops.experts import experts as ordinary

    def run(x_TD: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
        return _kernels(x_TD).experts(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI)

    def again(x_TD: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
        return ordinary(x_TD, expert_TK, weight_TK, gate_up_E2ID, down_EDI)

    out_TD = _differentiable(run, again, x_TD, weight_TK, _plain(gate_up_E2ID), _plain(down_EDI))
    return _plus(out_TD, shared_TD, residual_TD)


# --- attention --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Where the sequences of a flat stream lie: `where` as the kernels take it."""

    lengths: tuple[int, ...]  # tokens of each sequence in the stream
    start: Tensor  # int64 [S + 1]: offsets into the stream
    begin: Tensor  # int64 [S]: positions of the first tokens
    row: Tensor  # int32 [T]: which sequence a token belongs to
    position: Tensor  # int64 [T]
    table: Tensor | None  # int32 [S, P]: pages; None where entries are packed like the tokens
    page_size: int = 0

    @classmethod
    def build(
        cls, position_T: Tensor, cu_seqlens: Sequence[int], table_SP: Tensor | None, page_size: int
    ) -> Stream:
        """On the positions' device; on CUDA without a wait, and inside a graph where lengths are equal."""
        starts = list(cu_seqlens)
        lengths = tuple(b - a for a, b in pairwise(starts))
        device, S, T = position_T.device, len(lengths), position_T.shape[0]
        if len(set(lengths)) == 1:
            start = torch.arange(0, T + 1, lengths[0], device=device)
            row = torch.arange(S, device=device, dtype=torch.int32).repeat_interleave(
                lengths[0], output_size=T
            )
        else:
            start = _to(torch.tensor(starts), device)
            row = _to(
                torch.arange(S, dtype=torch.int32).repeat_interleave(torch.tensor(lengths), output_size=T),
                device,
            )
        if table_SP is not None:
            table_SP = table_SP.to(torch.int32)
            table_SP = table_SP if table_SP.stride(-1) == 1 else table_SP.contiguous()
        return cls(lengths, start, position_T[start[:-1]], row, position_T, table_SP, page_size)


def _to(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def mla_attention(
    q_THw: Tensor,
    rotation_T2r: Tensor,
    entries: Tensor,
    kv_b: Tensor,
    stream: Stream,
    rank: int,
    scale: float,
) -> Tensor:
    """Absorbed MLA, [T, H·v]: unrotated queries [T, H, n + R] over latent entries, the stream's own
    [T, L + R] or a layer's pages. `kv_b` [H·(n + v), L]. Only the packed form has a gradient."""
    kv_b = _plain(kv_b)

    def run(q_THw: Tensor, entries: Tensor, kv_b: Tensor) -> Tensor:
        return _kernels(q_THw).mla(q_THw, rotation_T2r, entries, kv_b, stream, rank, scale)

    def expanded(q_THw: Tensor, entries: Tensor, kv_b: Tensor) -> Tensor:
        return _mla_expanded(q_THw, rotation_T2r, entries, kv_b, stream.lengths, rank, scale)

    _check_gradient(stream, q_THw, entries, kv_b)
    return _differentiable(run, expanded, q_THw, entries, kv_b)


def _mla_expanded(
    q_THw: Tensor,
    rotation_T2r: Tensor,
    entry_TC: Tensor,
    kv_b: Tensor,
    lengths: Sequence[int],
    rank: int,
    scale: float,
) -> Tensor:
    """The ordinary form on packed sequences, for its gradient: keys and values of every head."""
    from hadal.ops.attention import attention
    from hadal.ops.rope import rotate_interleaved

    (_, H, width), rope = q_THw.shape, 2 * rotation_T2r.shape[2]
    nope = width - rope
    latent_TL, rope_TR = entry_TC.split([rank, rope], -1)
    kv_THw = torch.nn.functional.linear(latent_TL, kv_b).unflatten(-1, (H, -1))
    k_nope, v = kv_THw.split([nope, kv_THw.shape[-1] - nope], -1)
    k = torch.cat([k_nope, rope_TR.unsqueeze(1).expand(-1, H, -1)], -1)
    q_nope, q_rope = q_THw.split([nope, rope], -1)
    q = torch.cat([q_nope, rotate_interleaved(q_rope, rotation_T2r)], -1)
    return attention(q, k, v, lengths, lengths, scale).flatten(1)


def gqa_attention(q_THC: Tensor, entries: Tensor, stream: Stream, scale: float) -> Tensor:
    """Causal attention [T, H, C] of rotated queries over entries [.., 2, G, C] (keys, values): the stream's
    own or a layer's pages. Only the packed form has a gradient."""
    groups = entries.shape[-2]

    def run(q_THC: Tensor, entries: Tensor) -> Tensor:
        return _kernels(q_THC).gqa(q_THC, entries, stream, groups, scale)

    def ordinary(q_THC: Tensor, entries: Tensor) -> Tensor:
        from hadal.ops.attention import attention

        k_TGC, v_TGC = entries.unbind(1)
        return attention(q_THC, k_TGC, v_TGC, stream.lengths, stream.lengths, scale)

    _check_gradient(stream, q_THC, entries)
    return _differentiable(run, ordinary, q_THC, entries.contiguous())


def _check_gradient(stream: Stream, *tensors: Tensor) -> None:
    if stream.table is not None and needs_grad(*tensors):
        raise ExactError("exact attention over a cache has no gradient; train on packed sequences (no cache)")


# --- logits -----------------------------------------------------------------------------------------------


def logsumexp(logits_BV: Tensor) -> Tensor:
    """log Σ exp of each row of FP32 logits, [B]; no gradient."""
    if needs_grad(logits_BV):
        raise ExactError("the exact logsumexp has no gradient; use hadal.ops.cross_entropy on hidden states")
    return _kernels(logits_BV).logsumexp(logits_BV)


def token_logprobs(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """log softmax at each row's token, FP32 [B]: what the sampler reports and what the trainer computes."""
    return logits_BV.gather(1, token_B.unsqueeze(1)).squeeze(1) - logsumexp(logits_BV)
