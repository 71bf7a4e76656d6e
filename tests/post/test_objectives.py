"""Objectives against literal transcriptions of their formulas, and every trap that has been met elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hadal.post.objectives import (
    VARIANTS,
    PolicyObjective,
    clipped_surrogate,
    group_advantages,
    kl_estimate,
    length_mask,
    length_to_end,
    log_ratios,
    overlong_penalty,
    policy_loss,
    sequence_log_ratios,
    spans,
    token_weights,
)

LENGTHS = [2, 4, 1, 3]  # two groups of two completions
LOGPROB = [-1.0, -2.0, -0.5, -1.5, -3.0, -1.0, -2.0, -0.25, -0.75, -1.25]
OLD = [-1.5, -1.0, -0.5, -2.0, -2.5, -1.5, -1.0, -0.5, -0.5, -2.25]
REFERENCE = [-1.25, -1.5, -1.0, -1.0, -3.5, -1.0, -2.5, -0.5, -1.0, -1.0]
REWARD = [1.0, 0.0, 3.0, 1.0]
GROUPS = [[0, 1], [2, 3]]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    x = [torch.tensor(v, dtype=torch.float64) for v in (LOGPROB, OLD, REFERENCE)]
    return x[0].requires_grad_(), x[1], x[2]


def literal(advantage: list[float], name: str, low: float, high: float, beta: float, longest: int) -> float:
    """−J of a published objective, in loops over groups, completions and tokens, as it is printed."""
    at = spans(LENGTHS)
    groups = []
    for group in GROUPS:
        outputs = []
        for i in group:
            tokens = range(at[i].start, at[i].stop)
            terms = []
            sequence = math.exp(sum(LOGPROB[t] - OLD[t] for t in tokens) / len(tokens))
            for t in tokens:
                rho = sequence if name == "gspo" else math.exp(LOGPROB[t] - OLD[t])
                clipped = min(max(rho, 1 - low), 1 + high)
                term = min(rho * advantage[i], clipped * advantage[i])
                quotient = math.exp(REFERENCE[t] - LOGPROB[t])
                terms.append(term - beta * (quotient - math.log(quotient) - 1))
            outputs.append(terms)
        groups.append(outputs)
    everything = [term for outputs in groups for terms in outputs for term in terms]
    if name == "dapo":
        return -sum(everything) / len(everything)
    if name == "dr-grpo":
        return -sum(sum(terms) / longest for outputs in groups for terms in outputs) / 4
    per_group = [sum(sum(terms) / len(terms) for terms in outputs) / len(outputs) for outputs in groups]
    return -sum(per_group) / len(per_group)


def literal_advantages(scale: str) -> list[float]:
    found = []
    for group in GROUPS:
        r = [REWARD[i] for i in group]
        mean = sum(r) / len(r)
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - 1)) if scale == "std" else 1.0
        found += [(x - mean) / std for x in r]
    return found


@pytest.mark.parametrize("name", ["grpo", "r1-zero", "dr-grpo", "dapo", "gspo"])
def test_each_variant_is_its_formula(name: str) -> None:
    longest = 6
    objective = replace(VARIANTS[name], eps=0.0, constant=longest)
    logprob, old, reference = tensors()
    advantage = objective.advantages(torch.tensor(REWARD), [2, 2]).value_B.double()
    want = literal_advantages(objective.scale)
    torch.testing.assert_close(advantage, torch.tensor(want).double())
    weights = objective.weights(LENGTHS).double()
    found = policy_loss(logprob, old, advantage, LENGTHS, weights, objective, reference)
    low, high, beta = objective.clip_low, objective.clip_high, objective.kl_weight
    assert found.total.item() == pytest.approx(literal(want, name, low, high, beta, longest), rel=1e-6)
    assert found.tokens == 10
    found.total.backward()
    assert logprob.grad is not None and logprob.grad.isfinite().all()


def test_published_settings() -> None:
    assert (VARIANTS["dapo"].clip_low, VARIANTS["dapo"].clip_high, VARIANTS["dapo"].kl_weight) == (
        0.2,
        0.28,
        0,
    )
    assert (VARIANTS["r1-zero"].clip_high, VARIANTS["r1-zero"].kl_weight) == (10.0, 0.001)
    assert (VARIANTS["gspo"].clip_low, VARIANTS["gspo"].clip_high) == (3e-4, 4e-4)
    assert VARIANTS["grpo"].kl_weight == 0.04


# --- advantages ---
def test_advantages_by_hand() -> None:
    """Rewards 0, 1, 5: mean 2; squares 4 + 1 + 9 = 14, so std √7 (n − 1) or √(14/3) (n)."""
    reward = torch.tensor([0.0, 1.0, 5.0])
    for ddof, std in ((1, math.sqrt(7)), (0, math.sqrt(14 / 3))):
        found = group_advantages(reward, [3], ddof=ddof, eps=0.0).value_B
        torch.testing.assert_close(found, torch.tensor([-2 / std, -1 / std, 3 / std]))
    found = group_advantages(reward, [3], ddof=1, eps=1.0).value_B
    torch.testing.assert_close(found, torch.tensor([-2.0, -1.0, 3.0]) / (math.sqrt(7) + 1))
    assert group_advantages(reward, [3], scale="none").value_B.tolist() == [-2, -1, 3]
    alone = group_advantages(reward, [3], scale="none", baseline="leave-one-out")
    assert alone.value_B.tolist() == [0 - 3, 1 - 2.5, 5 - 0.5]


def test_a_group_of_one_has_advantage_zero() -> None:
    for scale in ("std", "none"):
        for baseline in ("mean", "leave-one-out"):
            found = group_advantages(torch.tensor([7.0, 1.0, 3.0]), [1, 2], scale=scale, baseline=baseline)  # type: ignore[arg-type]
            assert found.value_B[0] == 0
            assert found.informative_G.tolist() == [False, True]


@pytest.mark.parametrize("reward", [0.1, 1.0, 0.1 + 0.2, 1e6 / 3])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6])
def test_zero_variance_groups_are_zero_and_flagged(reward: float, eps: float) -> None:
    """Rounding of equal rewards, divided by itself, gave advantages of thousands elsewhere."""
    rewards = torch.full((7,), reward, dtype=torch.float32)
    rewards = rewards.double() if reward > 1 else rewards
    rewards = torch.cat([rewards, torch.tensor([0.0, 1.0])])
    found = group_advantages(rewards, [7, 2], eps=eps)
    assert not found.value_B[:7].any()
    assert found.informative_G.tolist() == [False, True] and found.zero_variance == 1


def test_rewards_that_differ_by_rounding_are_equal() -> None:
    found = group_advantages(torch.tensor([0.3, 0.1 + 0.2, 0.3], dtype=torch.float64), [3], eps=0.0)
    assert not found.value_B.any() and found.zero_variance == 1


def test_the_kl_term_still_acts_on_zero_variance_groups() -> None:
    logprob, old, reference = tensors()
    objective = replace(VARIANTS["grpo"], kl_weight=0.5)
    advantage = objective.advantages(torch.ones(4), [2, 2])
    assert advantage.zero_variance == 2
    weights = objective.weights(LENGTHS)
    found = policy_loss(logprob, old, advantage.value_B, LENGTHS, weights, objective, reference)
    assert found.surrogate == 0 and found.kl > 0
    (grad,) = torch.autograd.grad(found.total, logprob)
    assert grad.abs().max() > 0.01


def test_a_reward_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        group_advantages(torch.tensor([1.0, math.nan]), [2])
    with pytest.raises(ValueError, match="must add up"):
        group_advantages(torch.tensor([1.0, 2.0]), [3])


# --- normalisation ---
def test_loss_normalisation_per_sequence_global_constant() -> None:
    assert token_weights([1, 4], "sequence").tolist() == [1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8]
    assert token_weights([1, 4], "token").tolist() == pytest.approx([1 / 5] * 5)
    assert token_weights([1, 4], "constant", constant=8).tolist() == [1 / 16] * 5
    with pytest.raises(ValueError, match="needs constant"):
        token_weights([1, 4], "constant")


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr-grpo", "gspo"])
def test_micro_batches_of_any_cut_are_the_large_batch(name: str) -> None:
    """Means per micro-batch would depend on how the step is cut."""
    objective = replace(VARIANTS[name], constant=6, kl_weight=0.1)
    logprob, old, reference = tensors()
    advantage = objective.advantages(torch.tensor(REWARD), [2, 2]).value_B
    weights = objective.weights(LENGTHS)
    whole = policy_loss(logprob, old, advantage, LENGTHS, weights, objective, reference)
    (want,) = torch.autograd.grad(whole.total, logprob)
    at, totals = spans(LENGTHS), []
    for members in ([0], [1, 2], [3]):
        cut = slice(at[members[0]].start, at[members[-1]].stop)
        totals.append(
            policy_loss(
                logprob[cut], old[cut], advantage[members], [LENGTHS[m] for m in members], weights[cut],
                objective, reference[cut],
            ).total
        )  # fmt: skip
    (got,) = torch.autograd.grad(sum(totals), logprob)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want)


def test_truncated_samples_leave_numerator_and_denominator() -> None:
    assert token_weights([2, 4, 1], "sequence", keep=[True, False, True]).tolist() == [
        *[1 / 4] * 2, *[0.0] * 4, 1 / 2,
    ]  # fmt: skip
    assert token_weights([2, 4, 2], "token", keep=[True, False, True]).tolist() == [
        *[1 / 4] * 2, *[0.0] * 4, *[1 / 4] * 2,
    ]  # fmt: skip
    kept = token_weights([2, 4, 2], "constant", constant=4, keep=[True, False, True])
    assert kept.tolist() == [*[1 / 8] * 2, *[0.0] * 4, *[1 / 8] * 2]
    assert not token_weights([2, 4], "token", keep=[False, False]).any()
    logprob, old, reference = tensors()
    objective = replace(VARIANTS["dapo"], kl_weight=0.3)
    weights = objective.weights(LENGTHS, [True, False, True, True])
    loss = policy_loss(logprob, old, torch.tensor(REWARD), LENGTHS, weights, objective, reference)
    (grad,) = torch.autograd.grad(loss.total, logprob)
    assert not grad[2:6].any() and grad[:2].all() and loss.tokens == 6


# --- masks ---
def test_masks_go_by_length_or_eos_and_never_by_padding_ids() -> None:
    pad = eos = 9
    token = torch.tensor([[4, pad, 5, eos, pad], [1, 2, 3, 4, 5]])
    assert length_mask([4, 5], 5).tolist() == [[True] * 4 + [False], [True] * 5]
    assert length_to_end(token, [7]).tolist() == [5, 5]
    assert length_to_end(torch.tensor([[4, 0, 5, 9, 0], [1, 2, 8, 9, 5]]), [8, 9]).tolist() == [4, 3]
    assert (token != pad)[0].sum() == 2  # what a mask by padding would have kept


def test_arguments_are_never_written_into() -> None:
    logprob, old, reference = tensors()
    advantage, weights = torch.tensor(REWARD), token_weights(LENGTHS, "token")
    before = [x.detach().clone() for x in (logprob, old, reference, advantage, weights)]
    for name in VARIANTS:
        objective = replace(VARIANTS[name], constant=4)
        policy_loss(logprob, old, advantage, LENGTHS, weights, objective, reference).total.backward()
        objective.advantages(advantage, [2, 2])
    after = [x.detach() for x in (logprob, old, reference, advantage, weights)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- surrogate and ratios ---
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (2.0, 3.0, -3.6, True),  # min(6, 1.2·3)
        (2.0, -3.0, 6.0, False),  # min(−6, −3.6): a bad token that became likelier is pushed down in full
        (0.5, 3.0, -1.5, False),
        (0.5, -3.0, 2.4, True),  # min(−1.5, −0.8·3)
        (1.1, 5.0, -5.5, False),
    ],
)
def test_the_clip_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    found, hit = clipped_surrogate(log_ratio, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.2)
    assert found.item() == pytest.approx(loss) and hit.item() is clipped
    (grad,) = torch.autograd.grad(found.sum(), log_ratio)
    assert grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio)


def test_clip_higher_lets_unlikely_tokens_grow() -> None:
    log_ratio, one = torch.tensor([math.log(1.25), math.log(0.78)]), torch.tensor([1.0, -1.0])
    assert clipped_surrogate(log_ratio, one, 0.2, 0.28)[1].tolist() == [False, True]
    assert clipped_surrogate(log_ratio, one, 0.2, 0.2)[1].tolist() == [True, True]


def test_r1s_epsilon_of_ten_only_has_an_upper_end() -> None:
    log_ratio = torch.tensor([12.0, 10.9, 1e-6]).log()
    for sign in (1.0, -1.0):
        hit = clipped_surrogate(log_ratio, torch.full((3,), sign), 10.0, 10.0)[1]
        assert hit.tolist() == [sign > 0, False, False]


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    logprob, _, _ = tensors()
    weights = token_weights(LENGTHS, "sequence")
    advantage = torch.tensor(REWARD)
    for name in ("grpo", "gspo"):
        objective = replace(VARIANTS[name], kl_weight=0.0)
        loss = policy_loss(logprob, logprob.detach(), advantage, LENGTHS, weights, objective)
        (grad,) = torch.autograd.grad(loss.total, logprob)
        want = -weights * advantage.repeat_interleave(torch.tensor(LENGTHS))
        torch.testing.assert_close(grad.float(), want)


def test_a_ratio_that_has_lost_all_bounds_ends_no_run() -> None:
    logprob = torch.tensor([0.0, -200.0], requires_grad=True)
    loss, _ = clipped_surrogate(log_ratios(logprob, torch.tensor([-200.0, 0.0])), -torch.ones(2), 0.2, 0.2)
    loss.sum().backward()
    assert loss.isfinite().all() and logprob.grad is not None and logprob.grad.isfinite().all()


def test_the_sequence_ratio_by_hand() -> None:
    """Ratios e², e⁴ in one sequence of two: mean 3; e⁻³ in one of one."""
    logprob = torch.tensor([-1.0, -1.0, -4.0], requires_grad=True)
    found = sequence_log_ratios(logprob, torch.tensor([-3.0, -5.0, -1.0]), [2, 1])
    assert found.tolist() == [3.0, 3.0, -3.0]
    (grad,) = torch.autograd.grad(found.sum(), logprob)
    assert grad.tolist() == [1.0, 1.0, 1.0]


def test_old_log_probabilities_must_be_constants() -> None:
    logprob, old, _ = tensors()
    weights = token_weights(LENGTHS, "token")
    with pytest.raises(ValueError, match="constants"):
        policy_loss(logprob, logprob, torch.tensor(REWARD), LENGTHS, weights, PolicyObjective())
    with pytest.raises(ValueError, match="no reference"):
        policy_loss(logprob, old, torch.tensor(REWARD), LENGTHS, weights, VARIANTS["grpo"])


# --- KL ---
def test_kl_estimators_by_hand() -> None:
    """π_ref/π = 2 and 1/2: k3 = 2 − ln 2 − 1 and 1/2 + ln 2 − 1."""
    logprob, reference = torch.tensor([0.0, 0.0]), torch.tensor([math.log(2), -math.log(2)])
    ln2 = math.log(2)
    assert kl_estimate(logprob, reference, "k1").tolist() == pytest.approx([-ln2, ln2])
    assert kl_estimate(logprob, reference, "k2").tolist() == pytest.approx([ln2**2 / 2] * 2)
    assert kl_estimate(logprob, reference, "k3").tolist() == pytest.approx([1 - ln2, ln2 - 0.5])


def test_k3_is_unbiased_in_value_not_in_gradient() -> None:
    """Exact expectations over five tokens: values of k1 and k3 are KL(π‖ref); the gradient of k2 is KL's,
    that of k1 is 0, and that of k3 is the reverse KL's."""
    z = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.2, -0.5, 0.3, 0.0], dtype=torch.float64).log_softmax(-1)
    log_p = z.log_softmax(-1)
    p = log_p.exp().detach()
    forward = (log_p.exp() * (log_p - reference)).sum()
    (want,) = torch.autograd.grad(forward, z, retain_graph=True)
    (reverse,) = torch.autograd.grad((reference.exp() * (reference - log_p)).sum(), z, retain_graph=True)
    for kind, gradient in (("k1", torch.zeros(5).double()), ("k2", want), ("k3", reverse)):
        value = (p * kl_estimate(log_p, reference, kind)).sum()  # type: ignore[arg-type]
        if kind != "k2":
            assert value.item() == pytest.approx(forward.item())
        (got,) = torch.autograd.grad(value, z, retain_graph=True)
        torch.testing.assert_close(got, gradient)
    assert (want - reverse).abs().max() > 0.1


# --- length ---
def test_the_soft_overlong_penalty_by_hand() -> None:
    """L_max 20, L_cache 4: nothing up to 16, then a quarter a token, −1 from 20 on."""
    assert overlong_penalty([1, 16, 17, 18, 20, 21, 99], 20, 4).tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]
    with pytest.raises(ValueError, match="from 1 to all"):
        overlong_penalty([1], 20, 21)


def test_what_is_logged() -> None:
    logprob, old, reference = tensors()
    objective = replace(VARIANTS["grpo"], eps=0.0)
    advantage = torch.tensor(literal_advantages("std"))
    weights = objective.weights(LENGTHS)
    found = policy_loss(logprob, old, advantage, LENGTHS, weights, objective, reference)
    rho = [math.exp(a - b) for a, b in zip(LOGPROB, OLD, strict=True)]
    assert found.ratio_max.item() == pytest.approx(max(rho))
    signs = [s for s, n in zip((1, -1, 1, -1), LENGTHS, strict=True) for _ in range(n)]
    hits = [(s > 0 and r > 1.2) or (s < 0 and r < 0.8) for s, r in zip(signs, rho, strict=True)]
    assert found.clipped == sum(hits) > 0
    total = found.surrogate + objective.kl_weight * found.kl
    assert total.item() == pytest.approx(found.total.item())
