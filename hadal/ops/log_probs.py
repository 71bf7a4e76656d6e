"""Log-probabilities of given tokens under a linear head, and the entropy there, without ever holding all of
its logits.

    l = W h,   z_v = (l_v + b_v) / T for v below the vocabulary's end,   log p(y) = z_y − lse(z)
    H = lse(z) − Σ_v p_v z_v

This is the distribution that the sampler draws from (hadal/ops/sampling.py) with temperature T and a logit
bias b, and without its filters: in exact mode its bits are the sampler's. Reinforcement learning needs it
for every token that was sampled, with gradients. Logits exist a chunk of tokens at a time, in FP32; the
backward pass computes them again.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hadal.ops import invariant
from hadal.ops.cross_entropy import _checked_chunk, _chunks, _wide, loss_and_gradient, matmul_wide
from hadal.ops.dispatch import forced_reference, has_triton
from hadal.ops.exact import is_exact


@dataclass(frozen=True)
class Law:
    """How logits become the distribution that tokens are drawn from. `vocab_size`: ids from there on, unused
    rows of the head, are never drawn (None: the head has none). `bias`: (id, value) pairs; −100 bans."""

    temperature: float = 1.0
    vocab_size: int | None = None
    bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; a distribution needs one above 0")

    def apply(self, logits_TV: Tensor) -> Tensor:
        """z of logits that end with the vocabulary; in place. The operations, in this order, are the
        sampler's, so that their bits are."""
        for index, value in self.bias:
            logits_TV[:, index] += value
        return scaled(logits_TV, self.temperature)


def scaled(logits_TV: Tensor, temperature: float) -> Tensor:
    """logits / T in place. Divided by a tensor: torch makes a product out of a division by a number."""
    if temperature == 1.0:
        return logits_TV
    divisor = torch.full((1,), temperature, dtype=torch.float32, device=logits_TV.device)
    return logits_TV.div_(divisor.to(logits_TV.dtype))


def log_probs_reference(
    hidden_TD: Tensor, weight_VD: Tensor, token_T: Tensor, law: Law | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle, (log p_T, entropy_T): every logit at once. Differentiable."""
    law, dtype = law or Law(), torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = hidden_TD.to(dtype) @ weight_VD[: law.vocab_size].to(dtype).T
    for index, value in law.bias:
        logits_TV = logits_TV + value * torch.nn.functional.one_hot(
            torch.tensor(index, device=logits_TV.device), logits_TV.shape[1]
        )
    log_p_TV = (logits_TV / law.temperature).log_softmax(-1)
    return log_p_TV.gather(1, token_T[:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)


def linear_log_probs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_T: Tensor,
    law: Law | None = None,
    *,
    entropy: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log p of each token in nats, FP32 [T]; the distribution's entropy [T] where it is asked for).

    The former is differentiable in hidden states and weight, the entropy is a number to look at. `token_T`
    holds ids below the vocabulary's end. Raises ValueError on shapes that do not fit together.
    """
    law = law or Law()
    if law.vocab_size is not None and not 0 < law.vocab_size <= weight_VD.shape[0]:
        raise ValueError(f"vocab_size is {law.vocab_size}; the head has {weight_VD.shape[0]} rows")
    chunk = _checked_chunk(hidden_TD, weight_VD, token_T, chunk_tokens)
    found: tuple[Tensor, Tensor] = _LinearLogProbs.apply(hidden_TD, weight_VD, token_T, law, entropy, chunk)
    return found[0], found[1] if entropy else None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, token_T: Tensor, law: Law, entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        log_p_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=_wide(hidden_TD))
        entropy_T = torch.empty_like(log_p_T) if entropy else log_p_T.new_empty(0)
        head_VD = weight_VD[: law.vocab_size]
        for part in _chunks(hidden_TD.shape[0], chunk):
            logits_TV = law.apply(_logits(hidden_TD[part], head_VD))
            log_p_T[part], found_T = _statistics(logits_TV, token_T[part], entropy)
            if entropy:
                entropy_T[part] = found_T
        ctx.save_for_backward(hidden_TD, weight_VD, token_T)
        ctx.law, ctx.chunk = law, chunk
        ctx.mark_non_differentiable(entropy_T)
        return log_p_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d Σ g log p / d l_v = g/T·([v = y] − p_v): the cross-entropy's gradient with shares −g/T."""
        hidden_TD, weight_VD, token_T = ctx.saved_tensors
        law: Law = ctx.law
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        head_VD = weight_VD[: law.vocab_size]
        share_T = grads[0] * (-1.0 / law.temperature)
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(hidden_TD)) if wants_weight else None
        for part in _chunks(hidden_TD.shape[0], ctx.chunk):
            logits_TV = law.apply(matmul_wide(hidden_TD[part], head_VD.T))
            _, grad_TV = loss_and_gradient(logits_TV, token_T[part], share_T[part], 0.0, hidden_TD.dtype)
            assert grad_TV is not None
            if grad_hidden_TD is not None:
                torch.mm(grad_TV, head_VD, out=grad_hidden_TD[part])
            if grad_weight_VD is not None:
                grad_weight_VD[: head_VD.shape[0]] += matmul_wide(grad_TV.T, hidden_TD[part])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


def _logits(hidden_TD: Tensor, head_VD: Tensor) -> Tensor:
    if is_exact():  # the bits that `Transformer.logits` has
        return invariant.linear(hidden_TD, head_VD, wide=True)
    return matmul_wide(hidden_TD, head_VD.T)


def _statistics(logits_TV: Tensor, token_T: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """(log p of the tokens, entropies or a placeholder); the logits may be overwritten."""
    fast = logits_TV.is_cuda and logits_TV.dtype == torch.float32 and has_triton() and not forced_reference()
    if fast and not is_exact():
        from hadal.ops.triton.train_loss import log_prob_and_entropy

        return log_prob_and_entropy(logits_TV, token_T)
    lse_T = invariant.logsumexp(logits_TV) if is_exact() else logits_TV.logsumexp(-1)
    log_p_T = logits_TV.gather(1, token_T[:, None])[:, 0] - lse_T
    if not entropy:
        return log_p_T, lse_T
    log_p_TV = logits_TV.sub_(lse_T[:, None])
    return log_p_T, -(log_p_TV.exp() * log_p_TV).sum(-1)
