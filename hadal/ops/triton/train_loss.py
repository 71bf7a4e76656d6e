"""Loss and gradient of a chunk of logits. Reference: `hadal.ops.cross_entropy.loss_and_gradient`.

A program takes one token and walks over its logits twice: a running log-sum-exp, then the gradient, written
in the model's dtype. `log_prob_and_entropy` (reference: `hadal.ops.log_probs`) walks once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton.sizes import power_of_2


@triton.jit
def _loss_kernel(
    logits, target, share, loss, grad, vocabulary, z_loss, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    logits += token * vocabulary
    grad += token * vocabulary
    column = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        v = start + column
        z = tl.load(logits + v, mask=v < vocabulary, other=float("-inf"))
        peak = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - peak) + tl.sum(tl.exp(z - peak), 0)
        top = peak
    lse = top + tl.log(total)
    wanted = tl.load(target + token)
    weight = tl.load(share + token)
    tl.store(loss + token, weight * (lse - tl.load(logits + wanted) + z_loss * lse * lse))
    if GRADIENT:
        scale = weight * (1.0 + 2.0 * z_loss * lse)
        for start in range(0, vocabulary, BLOCK):
            v = start + column
            z = tl.load(logits + v, mask=v < vocabulary, other=float("-inf"))
            g = scale * tl.exp(z - lse) - tl.where(v == wanted, weight, 0.0)
            tl.store(grad + v, g.to(grad.dtype.element_ty), mask=v < vocabulary)


def loss_and_gradient(
    logits_TV: Tensor, target_T: Tensor, share_T: Tensor, z_loss: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """(share·loss of each token, and the gradient of their sum [T, V] in `dtype` where one is given)."""
    tokens, vocabulary = logits_TV.shape
    loss_T = torch.empty_like(logits_TV[:, 0])
    grad_TV = None if dtype is None else torch.empty_like(logits_TV, dtype=dtype)
    block = min(4096, power_of_2(vocabulary))
    _loss_kernel[(tokens,)](
        logits_TV, target_T, share_T, loss_T, logits_TV if grad_TV is None else grad_TV, vocabulary, z_loss,
        GRADIENT=grad_TV is not None, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return loss_T, grad_TV


@triton.jit
def _log_prob_kernel(logits, token, log_prob, entropy, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    column = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0  # Σ exp(z − top)
    moment = 0.0  # Σ exp(z − top)·(z − top)
    for start in range(0, vocabulary, BLOCK):
        v = start + column
        z = tl.load(logits + v, mask=v < vocabulary, other=float("-inf"))
        peak = tl.maximum(top, tl.max(z, 0))
        fall = tl.where(total > 0.0, top - peak, 0.0)
        shrink = tl.exp(fall)
        below = tl.where(v < vocabulary, z - peak, 0.0)
        weight = tl.where(v < vocabulary, tl.exp(below), 0.0)
        moment = shrink * (moment + fall * total) + tl.sum(weight * below, 0)
        total = shrink * total + tl.sum(weight, 0)
        top = peak
    tl.store(log_prob + row, tl.load(logits + tl.load(token + row)) - (top + tl.log(total)))
    tl.store(entropy + row, tl.log(total) - moment / total)


def log_prob_and_entropy(logits_TV: Tensor, token_T: Tensor) -> tuple[Tensor, Tensor]:
    """(log softmax at each row's token, the row's entropy), FP32 [T]."""
    tokens, vocabulary = logits_TV.shape
    log_prob_T = torch.empty_like(logits_TV[:, 0])
    entropy_T = torch.empty_like(log_prob_T)
    block = min(4096, power_of_2(vocabulary))
    _log_prob_kernel[(tokens,)](
        logits_TV, token_T, log_prob_T, entropy_T, vocabulary,
        BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return log_prob_T, entropy_T
