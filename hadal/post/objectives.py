"""The objectives of reinforcement learning, each a small pure function of per-token tensors.

    GRPO      Shao et al., arXiv 2402.03300 (DeepSeekMath) §4.1; DeepSeek-R1, arXiv 2501.12948 §2.2.1
    Dr. GRPO  Liu et al., arXiv 2503.20783 §3.2
    DAPO      Yu et al., arXiv 2503.14476 §3
    GSPO      Zheng et al., arXiv 2507.18071 §4
    RLOO      Ahmadian et al., arXiv 2402.14740 §2.2
    k1, k2, k3  Schulman, "Approximating KL Divergence" (2020)

Completions lie end to end, as everywhere in this package: a tensor over N tokens and the completions'
`lengths` on the host, B of them; groups are runs of completions, G of them with `sizes`. What a token counts
follows from lengths alone, so `token_weights` is made once for a whole optimizer step: the loss is
Σ_t weight_t · loss_t, and the sum over micro-batches is the large batch's loss whatever they are cut into.
A sequence must not be cut across micro-batches where ratios are the sequence's (GSPO).

Nothing here writes into its arguments. Numbers are minimised: losses are minus the papers' J.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["std", "none"]
Baseline = Literal["mean", "leave-one-out"]
Kl = Literal["k1", "k2", "k3"]
Ratio = Literal["token", "sequence"]
Aggregation = Literal["sequence", "token", "constant"]

MAX_LOG_RATIO = 20.0
"""|log π/π_old| beyond which the ratio stays put (and has no gradient): e^20 is no statement about a policy,
and an infinity would end the run."""
SAME = 1e-9
"""Rewards of a group that differ by less, relative to the largest, are one reward: what is left of equal
numbers after rounding must not be divided by a standard deviation made of the same rounding."""


# --- advantages -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Advantages:
    """`value_B`: FP32. `informative_G`: False for groups whose advantages are all 0, of one completion or of
    equal rewards: nothing is learnt from their surrogate, though a KL term still acts on their tokens."""

    value_B: Tensor
    informative_G: Tensor

    @property
    def zero_variance(self) -> int:
        """How many groups say nothing."""
        return int((~self.informative_G).sum())


def group_advantages(
    reward_B: Tensor,
    sizes: Sequence[int],
    *,
    scale: Scale = "std",
    baseline: Baseline = "mean",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Advantages:
    """Rewards of each group against the group (DeepSeekMath §4.1.2; R1 eq. 3):

        A_i = (r_i − mean(r)) / (std(r) + eps)      scale "std": GRPO, DAPO, GSPO
        A_i = r_i − mean(r)                         scale "none": Dr. GRPO eq. 3
        A_i = r_i − mean(r without r_i)             baseline "leave-one-out": RLOO; = n/(n−1)·(r_i − mean(r))

    The papers do not say which std: `ddof` 1 divides squares by n − 1 (as public implementations do), 0 by
    n. Sums are in FP64. A group of one, and one of equal rewards, has advantages of exactly 0. Raises
    ValueError where sizes do not add up or a reward is not finite.
    """
    _check_lengths(reward_B, sizes, "groups")
    if not bool(reward_B.isfinite().all()):
        raise ValueError("a reward is NaN or infinite; give 0 to what cannot be judged")
    values, informative = [], []
    for reward_n in reward_B.double().split(list(sizes)):
        n = reward_n.numel()
        spread = reward_n.max() - reward_n.min()
        tells = n > 1 and bool(spread > SAME * reward_n.abs().max())
        value_n = reward_n - reward_n.mean()
        if baseline == "leave-one-out" and n > 1:
            value_n = value_n * (n / (n - 1))
        if scale == "std" and n > ddof:
            value_n = value_n / (reward_n.std(correction=ddof) + eps)
        values.append(value_n if tells else torch.zeros_like(reward_n))
        informative.append(tells)
    return Advantages(torch.cat(values).float(), torch.tensor(informative, device=reward_B.device))


# --- masks and weights ------------------------------------------------------------------------------------
def length_mask(lengths: Sequence[int], width: int) -> Tensor:
    """bool [B, width]: True for the tokens that a completion of a padded batch has. Never told from ids: a
    padding id may be a token that was sampled."""
    return torch.arange(width) < torch.tensor(list(lengths))[:, None]


def length_to_end(token_BW: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """int64 [B]: tokens of each row up to its first end-of-sequence token, that one included; the whole row
    where there is none."""
    is_end_BW = torch.isin(token_BW, torch.tensor(list(eos_ids), device=token_BW.device))
    first_B = torch.where(is_end_BW.any(1), is_end_BW.int().argmax(1) + 1, token_BW.shape[1])
    return first_B.long()


def token_weights(
    lengths: Sequence[int],
    aggregation: Aggregation,
    *,
    constant: int | None = None,
    keep: Sequence[bool] | None = None,
) -> Tensor:
    """What each token counts, weight_N on the CPU in FP32; Σ_t weight_t · loss_t is the loss of the step.

        "sequence"   1/B Σ_i 1/|o_i| Σ_t     GRPO: a mean of means (DeepSeekMath eq. 3, R1 eq. 1)
        "token"      1/Σ_i|o_i| Σ_i Σ_t      DAPO eq. 8: every token of the step counts the same
        "constant"   1/(B·L) Σ_i Σ_t         Dr. GRPO §3.2, L = `constant`: the most tokens that a
                                             completion may have

    `keep` False takes a completion out of numerator and denominator alike (B and Σ|o_i| count those that
    are kept). All weights are 0 where none is. Raises ValueError on "constant" without a constant.
    """
    kept = [True] * len(lengths) if keep is None else list(keep)
    if len(kept) != len(lengths):
        raise ValueError(f"{len(lengths)} completions, but keep has {len(kept)} entries")
    used = [n for n, k in zip(lengths, kept, strict=True) if k and n]
    if aggregation == "sequence":
        each = [1.0 / (len(used) * n) if k and n else 0.0 for n, k in zip(lengths, kept, strict=True)]
    elif aggregation == "token":
        each = [1.0 / sum(used) if k and n else 0.0 for n, k in zip(lengths, kept, strict=True)]
    elif constant is None or constant < 1:
        raise ValueError(f'aggregation "constant" needs constant ≥ 1, got {constant}')
    else:
        each = [1.0 / (len(used) * constant) if k and n else 0.0 for n, k in zip(lengths, kept, strict=True)]
    per_B = torch.tensor(each, dtype=torch.float64)
    return per_B.repeat_interleave(torch.tensor(list(lengths))).float()


def overlong_penalty(lengths: Sequence[int], longest: int, cache: int) -> Tensor:
    """DAPO's soft punishment, to be added to rewards (eq. 13), FP32 [B]; L_max = `longest`, L_cache =
    `cache`:

        0                               |y| ≤ L_max − L_cache
        ((L_max − L_cache) − |y|)/L_cache   up to L_max
        −1                              beyond
    """
    if not 0 < cache <= longest:
        raise ValueError(
            f"the stretch of the penalty is {cache} of {longest} tokens; from 1 to all are meant"
        )
    over_B = (longest - cache - torch.tensor(list(lengths), dtype=torch.float64)) / cache
    return over_B.clamp(-1.0, 0.0).float()


# --- ratios, surrogate, KL --------------------------------------------------------------------------------
def log_ratios(logprob_N: Tensor, old_N: Tensor) -> Tensor:
    """log π_θ(o_t)/π_old(o_t), within ±MAX_LOG_RATIO. `old_N` are the *sampler's* numbers."""
    return (logprob_N - old_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_log_ratios(logprob_N: Tensor, old_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """GSPO eq. 7: log s_i = 1/|y_i| Σ_t log π_θ/π_old, repeated for each of the sequence's tokens; the
    gradient goes to all of them."""
    _check_lengths(logprob_N, lengths, "completions")
    parts = [piece.mean().expand_as(piece) for piece in (logprob_N - old_N).split(list(lengths))]
    return torch.cat(parts).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    log_ratio_N: Tensor, advantage_N: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """(loss_N, clipped_N): −min(ρA, clip(ρ, 1 − low, 1 + high)·A), and where the clip took the gradient away
    (PPO; GRPO: low = high = ε; DAPO eq. 10: ε_low < ε_high; R1's first RL stage: ε = 10, of which only the
    upper end, ρ ≤ 11, can ever be reached)."""
    ratio_N = log_ratio_N.exp()
    plain_N = ratio_N * advantage_N
    bounded_N = ratio_N.clamp(1.0 - low, 1.0 + high) * advantage_N
    return -torch.minimum(plain_N, bounded_N), (bounded_N < plain_N).detach()


def kl_estimate(logprob_N: Tensor, reference_N: Tensor, kind: Kl = "k3") -> Tensor:
    """Per-token estimates of KL(π_θ ‖ π_ref) from samples of π_θ, with d = log π_ref − log π_θ:

        k1   −d                 unbiased, large variance; its gradient as a loss has mean 0
        k2   d²/2               biased, small variance; its gradient is that of the KL
        k3   e^d − d − 1        unbiased and never negative (DeepSeekMath eq. 4, R1 eq. 2)

    k3 is unbiased in *value*: differentiated as a loss term, as GRPO does, its mean is the gradient of
    KL(π_ref ‖ π_θ), which pulls with a force that grows without bound where π_θ falls below π_ref.
    """
    d_N = reference_N - logprob_N
    if kind == "k1":
        return -d_N
    if kind == "k2":
        return 0.5 * d_N.square()
    d_N = d_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return d_N.expm1() - d_N


# --- put together -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PolicyObjective:
    """Which GRPO. `constant`: L of "constant"; the loop sets it to its longest completion."""

    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Aggregation = "sequence"
    constant: int | None = None
    scale: Scale = "std"
    baseline: Baseline = "mean"
    ddof: int = 1
    eps: float = 1e-6
    kl: Kl = "k3"
    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        if min(self.clip_low, self.clip_high, self.kl_weight, self.eps) < 0 or self.ddof not in (0, 1):
            raise ValueError(f"clips, kl_weight and eps are 0 or more, ddof is 0 or 1: {self}")

    def advantages(self, reward_B: Tensor, sizes: Sequence[int]) -> Advantages:
        """`group_advantages` as this variant has them."""
        return group_advantages(
            reward_B, sizes, scale=self.scale, baseline=self.baseline, ddof=self.ddof, eps=self.eps
        )

    def weights(self, lengths: Sequence[int], keep: Sequence[bool] | None = None) -> Tensor:
        """`token_weights` as this variant has them."""
        return token_weights(lengths, self.aggregation, constant=self.constant, keep=keep)


VARIANTS: dict[str, PolicyObjective] = {
    "grpo": PolicyObjective(kl_weight=0.04),  # DeepSeekMath §4.2
    "r1-zero": PolicyObjective(clip_low=10.0, clip_high=10.0, kl_weight=0.001),  # R1: ε 10, β 0.001
    "dr-grpo": PolicyObjective(scale="none", aggregation="constant"),
    "dapo": PolicyObjective(clip_high=0.28, aggregation="token"),  # no KL
    "gspo": PolicyObjective(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "rloo": PolicyObjective(  # sums over tokens, as REINFORCE has them
        scale="none", baseline="leave-one-out", aggregation="constant", constant=1
    ),
}
"""The published settings, by name. A recipe may change any of them."""


@dataclass
class PolicyLoss:
    """`total`, the scalar to differentiate, and what to log of it: sums that add up over the micro-batches of
    a step, detached. `tokens`: those with a weight."""

    total: Tensor
    surrogate: Tensor
    kl: Tensor  # weighted mean of the estimate, without β; 0 without a reference
    clipped: Tensor  # tokens whose gradient the clip took away
    tokens: Tensor
    ratio_max: Tensor


def policy_loss(
    logprob_N: Tensor,
    old_N: Tensor,
    advantage_B: Tensor,
    lengths: Sequence[int],
    weight_N: Tensor,
    objective: PolicyObjective,
    reference_N: Tensor | None = None,
) -> PolicyLoss:
    """The loss of one micro-batch: Σ_t weight_t (−min(ρA, clip(ρ)A) + β·KL_t).

    All tensors on one device. `advantage_B` and `lengths` are of this micro-batch's completions; `weight_N`
    is cut out of the step's weights. `reference_N` may be None where `kl_weight` is 0; ValueError otherwise.
    """
    _check_lengths(logprob_N, lengths, "completions")
    if objective.kl_weight and reference_N is None:
        raise ValueError(f"kl_weight is {objective.kl_weight}, and there are no reference log-probabilities")
    if old_N.requires_grad or advantage_B.requires_grad:
        raise ValueError("old log-probabilities and advantages are constants; detach them")
    count_B = torch.tensor(list(lengths), device=logprob_N.device)
    advantage_N = advantage_B.repeat_interleave(count_B, output_size=logprob_N.shape[0])
    if objective.ratio == "sequence":
        log_ratio_N = sequence_log_ratios(logprob_N, old_N, lengths)
    else:
        log_ratio_N = log_ratios(logprob_N, old_N)
    loss_N, clipped_N = clipped_surrogate(log_ratio_N, advantage_N, objective.clip_low, objective.clip_high)
    surrogate = (loss_N * weight_N).sum()
    total, kl = surrogate, torch.zeros_like(surrogate)
    if reference_N is not None:
        kl = (kl_estimate(logprob_N, reference_N, objective.kl) * weight_N).sum()
        total = total + objective.kl_weight * kl if objective.kl_weight else total
    counted_N = weight_N > 0
    return PolicyLoss(
        total=total,
        surrogate=surrogate.detach(),
        kl=kl.detach(),
        clipped=(clipped_N & counted_N).sum(),
        tokens=counted_N.sum(),
        ratio_max=log_ratio_N.detach().max().exp() if log_ratio_N.numel() else torch.ones_like(kl),
    )


def spans(lengths: Sequence[int]) -> list[slice]:
    """Where each completion lies among the tokens."""
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    return [slice(a, b) for a, b in pairwise(ends)]


def _check_lengths(x: Tensor, lengths: Sequence[int], what: str) -> None:
    if sum(lengths) != x.shape[0] or min(lengths, default=1) < 1:
        raise ValueError(
            f"{what} of {list(lengths)[:8]}… tokens or completions, each at least 1, must add up to "
            f"{x.shape[0]}; they are {sum(lengths)}"
        )
