"""Cross-entropy of a linear head, without ever holding all of its logits.

    loss_t = lse_t − z_t[y_t] + ζ·lse_t²,   z_t = W h_t,   lse_t = log Σ_v exp z_t[v]

ζ is the z-loss of PaLM (arXiv 2204.02311 §5), 0 by default; DeepSeek-V3 uses none.

The T×V logits of a long stream are the largest tensor of a training step: at V = 129,280 a stream of 32,768
tokens needs 17 GB of them in FP32. Here they exist a chunk of tokens at a time, in FP32.

    linear_cross_entropy     loss_t of every token, for a caller that weighs them later; the backward pass
                             computes the logits again: 4 matrix products, no memory kept but lse_t
    weighted_cross_entropy   Σ_t share_t·loss_t with shares known beforehand, as pre-training has them: the
                             gradient is made with the loss (3 products) and kept until the backward pass,
                             which only scales it

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hadal.ops import invariant
from hadal.ops.dispatch import forced_reference, has_triton
from hadal.ops.exact import is_exact

CHUNK_BYTES = 512 * 2**20
"""Most memory that one chunk of FP32 logits may take."""
CHUNK_STEP = 256
"""Chunks are multiples of so many tokens, for whole tiles of products (128 tokens where that is too much)."""


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
    chunk = _checked_chunk(hidden_TD, weight_VD, target_T, chunk_tokens)
    loss_T: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, target_T, z_loss, chunk)
    return loss_T


def weighted_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    share_T: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Σ_t share_t·loss_t, a scalar in FP32, differentiable once in hidden and weight (not in the shares).

    Arguments and errors as in `linear_cross_entropy`; `share_T` in FP32."""
    chunk = _checked_chunk(hidden_TD, weight_VD, target_T, chunk_tokens)
    if is_exact():
        return (linear_cross_entropy(hidden_TD, weight_VD, target_T, z_loss=z_loss) * share_T).sum()
    loss: Tensor = _WeightedCrossEntropy.apply(hidden_TD, weight_VD, target_T, share_T, z_loss, chunk)
    return loss


def _checked_chunk(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, chunk_tokens: int | None) -> int:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden [T, D] and weight [V, D] are wanted, got {tuple(hidden_TD.shape)} and "
                         f"{tuple(weight_VD.shape)}")  # fmt: skip
    if target_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"one target per token is wanted: {hidden_TD.shape[0]} tokens, "
                         f"targets of shape {tuple(target_T.shape)}")  # fmt: skip
    if chunk_tokens is None:
        return max(128, CHUNK_BYTES // (4 * weight_VD.shape[0]) // CHUNK_STEP * CHUNK_STEP)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    return chunk_tokens


def loss_and_gradient(
    logits_TV: Tensor, target_T: Tensor, share_T: Tensor, z_loss: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """(share·loss of each token, and the gradient of their sum [T, V] in `dtype` where one is given). The
    logits may be overwritten."""
    if logits_TV.is_cuda and logits_TV.dtype == torch.float32 and has_triton() and not forced_reference():
        from hadal.ops.triton.train_loss import loss_and_gradient as fast

        return fast(logits_TV, target_T, share_T, z_loss, dtype)
    lse_T = logits_TV.logsumexp(-1)
    loss_T = share_T * (lse_T - logits_TV.gather(1, target_T[:, None])[:, 0] + z_loss * lse_T.square())
    if dtype is None:
        return loss_T, None
    # d loss / d logit_v = p_v·(1 + 2ζ·lse) − [v = target]
    grad_TV = logits_TV.sub_(lse_T[:, None]).exp_().mul_((share_T * (1.0 + 2.0 * z_loss * lse_T))[:, None])
    grad_TV.scatter_add_(1, target_T[:, None], -share_T[:, None])
    return loss_T, grad_TV.to(dtype)


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, share_T: Tensor, z_loss: float,
        chunk: int,
    ) -> Tensor:  # fmt: skip
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        share_T, losses = share_T.to(_wide(hidden_TD)), []
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight_VD: Tensor | None = None
        dtype = hidden_TD.dtype if wants_hidden or wants_weight else None
        for part in _chunks(hidden_TD.shape[0], chunk):
            logits_TV = matmul_wide(hidden_TD[part], weight_VD.T)
            loss_T, grad_TV = loss_and_gradient(logits_TV, target_T[part], share_T[part], z_loss, dtype)
            del logits_TV
            losses.append(loss_T)
            if grad_TV is not None and grad_hidden_TD is not None:
                torch.mm(grad_TV, weight_VD, out=grad_hidden_TD[part])
            if grad_TV is not None and wants_weight:
                grad_weight_VD = _add_product(grad_weight_VD, grad_TV.T, hidden_TD[part])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """In place: torch refuses a second backward pass by itself."""
        hidden, weight = (None if g is None else g.mul_(grads[0]) for g in ctx.saved_tensors)
        return hidden, weight, None, None, None, None


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
                logits_TV = matmul_wide(hidden_TD[part], weight_VD.T)
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
            grad_TV = matmul_wide(hidden_TD[part], weight_VD.T)
            grad_TV.sub_(lse_T[part, None]).exp_().mul_(softmax_scale_T[part, None])
            grad_TV.scatter_add_(1, target_T[part, None], -grad_T[part, None])
            grad_TV = grad_TV.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                torch.mm(grad_TV, weight_VD, out=grad_hidden_TD[part])
            if grad_weight_VD is not None:
                grad_weight_VD += matmul_wide(grad_TV.T, hidden_TD[part])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, summed as `matmul_wide` does; in place, and in the product itself where torch can."""
    if total is None:
        return matmul_wide(a, b)
    if a.is_cuda and a.dtype not in (torch.float32, torch.float64):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(matmul_wide(a, b))


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an FP32 (or wider) result: the products of low-precision inputs are never rounded back."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
