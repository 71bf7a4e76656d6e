"""Cross-entropy of a linear head, without ever holding all of its logits.

    loss_t = lse_t − z_t[y_t] + ζ·lse_t²,   z_t = W h_t,   lse_t = log Σ_v exp z_t[v]

ζ is the z-loss of PaLM (arXiv 2204.02311 §5), 0 by default; DeepSeek-V3 uses none.

The T×V logits of a long stream are the largest tensor of a training step: at V = 129,280 a stream of 32,768
tokens needs 17 GB of them in FP32. Here they exist a chunk of tokens at a time, in FP32, both in the forward
and in the backward pass, which computes them again (one matrix product more, no memory kept but `lse_T`).
The loss stays *per token*, so that a caller may weigh tokens as it likes: packed rows with masks, MTP, or
log-probabilities for reinforcement learning, all with exact gradients.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hadal.ops import invariant
from hadal.ops.exact import is_exact

CHUNK_BYTES = 256 * 2**20
"""Most memory that one chunk of FP32 logits may take."""


def cross_entropy_reference(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_loss: float = 0.0
) -> Tensor:
    """The oracle: every logit at once, in the inputs' dtype promoted to FP32 at least. Returns loss_T."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).T
    lse_T = logits_TV.logsumexp(-1)
    return lse_T - logits_TV.gather(1, target_T[:, None])[:, 0] + z_loss * lse_T.square()


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each target in nats, loss_T in FP32, differentiable in hidden and weight.

    `target_T` holds ids in [0, V) everywhere; a position that must not count gets weight 0 from the caller.
    `chunk_tokens` defaults to what keeps a chunk's logits within `CHUNK_BYTES`. Raises ValueError on shapes
    that do not fit together.
    """
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden [T, D] and weight [V, D] are wanted, got {tuple(hidden_TD.shape)} and "
                         f"{tuple(weight_VD.shape)}")  # fmt: skip
    if target_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"one target per token is wanted: {hidden_TD.shape[0]} tokens, "
                         f"targets of shape {tuple(target_T.shape)}")  # fmt: skip
    if chunk_tokens is None:
        chunk_tokens = max(128, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    loss_T: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, target_T, z_loss, chunk_tokens)
    return loss_T


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_loss: float, chunk: int
    ) -> Tensor:
        loss_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=_wide(hidden_TD))
        lse_T = torch.empty_like(loss_T)
        for part in _chunks(hidden_TD.shape[0], chunk):
            if is_exact():  # the bits that `Transformer.logits` and the sampler's log-probabilities have
                logits_TV = invariant.linear(hidden_TD[part], weight_VD, wide=True)
                lse_T[part] = invariant.logsumexp(logits_TV)
            else:
                logits_TV = _matmul_wide(hidden_TD[part], weight_VD.T)
                lse_T[part] = logits_TV.logsumexp(-1)
            loss_T[part] = lse_T[part] - logits_TV.gather(1, target_T[part, None])[:, 0]
        if z_loss:
            loss_T += z_loss * lse_T.square()
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, lse_T)
        ctx.z_loss, ctx.chunk = z_loss, chunk
        return loss_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_T = grads[0]
        hidden_TD, weight_VD, target_T, lse_T = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=lse_T.dtype) if wants_weight else None
        # d loss / d logit_v = p_v·(1 + 2ζ·lse) − [v = target]
        softmax_scale_T = grad_T * (1.0 + 2.0 * ctx.z_loss * lse_T) if ctx.z_loss else grad_T
        for part in _chunks(hidden_TD.shape[0], ctx.chunk):
            grad_TV = _matmul_wide(hidden_TD[part], weight_VD.T)
            grad_TV.sub_(lse_T[part, None]).exp_().mul_(softmax_scale_T[part, None])
            grad_TV.scatter_add_(1, target_T[part, None], -grad_T[part, None])
            grad_TV = grad_TV.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                torch.mm(grad_TV, weight_VD, out=grad_hidden_TD[part])
            if grad_weight_VD is not None:
                grad_weight_VD += _matmul_wide(grad_TV.T, hidden_TD[part])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an FP32 (or wider) result: the products of low-precision inputs are never rounded back."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
