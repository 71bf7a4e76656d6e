"""The step of group-relative policy optimisation: sample → score → advantages → loss → update.

One model: the engine samples from the tensors that the optimizer writes. Old log-probabilities are those that
the sampler reported; in exact mode the first scores of a step are the same numbers, bit for bit. Gates'
correction biases stay as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hadal.ops.exact import exact
from hadal.post.grpo_recipe import GrpoRecipe
from hadal.post.objectives import PolicyObjective, policy_loss
from hadal.post.reference import Reference
from hadal.post.rollout import Drawn, Group, Sampler
from hadal.post.score import Pack, Sample, Scores, pack, score, score_all, share_out
from hadal.train.nonfinite import NonFiniteError
from hadal.train.trainer import Trainer


@dataclass
class Rollout:
    """The completions of a step, end to end over its groups: B of them."""

    drawn: Drawn
    samples: list[Sample]
    old: list[Tensor]  # the sampler's log-probabilities, FP32, of each
    reward_B: Tensor
    advantage_B: Tensor
    informative: list[bool]  # of each group
    keep: list[bool]  # whether it has a part in the loss
    reference: list[Tensor] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        return self.drawn.groups


@dataclass
class Sums:
    """What the passes of a step add up, on the device, in FP64."""

    values: Tensor  # loss, kl, clipped, tokens, entropy, mtp, gap
    gap_max: Tensor
    ratio_max: Tensor
    updates: int = 0
    gap_tokens: int = 0
    norms: list[float] = field(default_factory=list)
    fed_tokens: int = 0
    fed_pairs: int = 0

    @classmethod
    def on(cls, device: torch.device) -> Sums:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.zeros(7, dtype=torch.float64, device=device), zero, zero)


@dataclass(frozen=True)
class GrpoStats:
    """What a step measured; None where there was nothing to measure. Lengths and times in tokens, seconds."""

    step: int
    tokens: int  # sampled since the start
    loss: float
    reward: float
    reward_std: float
    accuracy: float | None  # share of completions that the accuracy rewards call right
    length: float
    length_max: int
    truncated: float  # share of completions
    failed: int  # rewards of completions, which count 0
    zero_variance: int  # groups
    replaced: int  # groups that a refill has left out
    too_long: int  # prompts passed over
    entropy: float | None  # nats a token
    kl: float | None  # to the reference, as the loss weighs it
    clipped: float  # share of tokens
    ratio_max: float
    gap_max: float | None  # |log p of the trainer − log p of the sampler|, before the first update
    gap_mean: float | None
    mtp_loss: float | None
    grad_norm: float | None  # before clipping, mean over updates
    updates: int
    learning_rate: float
    sample_seconds: float  # rewards included
    train_seconds: float
    sample_tokens_per_second: float
    tokens_per_second: float  # of training: prompts and completions fed
    fed_tokens: int
    fed_pairs: int


class Policy:
    """A trainer's model, and what samples from it. `trainer.progress`: updates, sampled tokens, prompts."""

    def __init__(
        self, trainer: Trainer, sampler: Sampler, reference: Reference | None, recipe: GrpoRecipe
    ) -> None:
        self.trainer, self.sampler, self.reference, self.recipe = trainer, sampler, reference, recipe
        self.model, self.optimizer = trainer.model, trainer.optimizer
        self.steps = 0
        self.mtp = recipe.mtp.weight > 0 and len(self.model.mtp) > 0

    def step(self) -> tuple[Rollout, GrpoStats]:
        """One roll-out and its updates. Raises NonFiniteError with the update not applied, RolloutError."""
        progress = self.steps / self.recipe.train.steps
        objective = self._objective(progress)
        begun = time.perf_counter()
        drawn = self.sampler.draw(self.trainer.progress.position, progress, self._tells(objective))
        sampled = time.perf_counter()
        rollout = self._rollout(drawn, objective)  # advantages
        every = self.recipe.objective.reference_every
        if self.reference is not None:
            if every and self.steps and self.steps % every == 0:
                self.reference.refresh()
            rollout.reference = self._reference_scores(rollout)
        sums = Sums.on(self.model.device)
        for members in self._mini_batches(len(rollout.samples)):
            self._update(rollout, members, objective, sums)  # loss, update
        self.sampler.weights_changed()
        self.steps += 1
        last = self.trainer.progress
        self.trainer.progress = replace(last, tokens=last.tokens + drawn.tokens, position=drawn.position)
        return rollout, self._stats(rollout, sums, sampled - begun, time.perf_counter() - sampled)

    # --- before the loss ---
    def _objective(self, progress: float) -> PolicyObjective:
        found = self.recipe.objective.resolve()
        if found.aggregation == "constant" and found.constant is None:
            return replace(found, constant=self.recipe.sample.limit(progress))
        return found

    def _tells(self, objective: PolicyObjective) -> Callable[[Group], bool]:
        def tells(group: Group) -> bool:
            reward_B = torch.tensor(group.rewards, dtype=torch.float64)
            return objective.advantages(reward_B, [len(group.rewards)]).zero_variance == 0

        return tells

    def _rollout(self, drawn: Drawn, objective: PolicyObjective) -> Rollout:
        pairs = [(group, answer) for group in drawn.groups for answer in group.answers]
        reward_B = torch.tensor([r for group in drawn.groups for r in group.rewards], dtype=torch.float64)
        found = objective.advantages(reward_B, [len(group.answers) for group in drawn.groups])
        masked = self.recipe.sample.truncated == "mask"
        return Rollout(
            drawn,
            [Sample(group.prompt, answer.token_ids) for group, answer in pairs],
            [torch.tensor([one.logprob for one in answer.logprobs or ()]) for _, answer in pairs],
            reward_B,
            found.value_B,
            found.informative_G.tolist(),
            [not (masked and answer.finish_reason == "length") for _, answer in pairs],
        )

    def _reference_scores(self, rollout: Rollout) -> list[Tensor]:
        assert self.reference is not None
        train = self.recipe.train
        with self.reference.in_model(), exact(train.exact):
            return score_all(self.model, rollout.samples, self.sampler.law, max_tokens=train.max_pack_tokens)

    def _mini_batches(self, count: int) -> list[range]:
        """The completions of each update, whole groups together."""
        train, size = self.recipe.train, self.recipe.sample.group
        groups, parts = count // size, train.mini_batches
        edges = [round(i * groups / parts) * size for i in range(parts + 1)]
        return [range(edges[i], edges[i + 1]) for i in range(parts)] * train.epochs

    # --- an update ---
    def _update(
        self, rollout: Rollout, members: Sequence[int], objective: PolicyObjective, sums: Sums
    ) -> None:
        """Passes over a mini-batch, and one update. Groups that say nothing count in the weights, but are not
        fed, unless a KL term acts on them; without any other there is no update."""
        size, first = self.recipe.sample.group, sums.updates == 0
        lengths = [len(rollout.samples[i].completion) for i in members]
        weight_N = objective.weights(lengths, [rollout.keep[i] for i in members])
        weight = dict(zip(members, weight_N.split(lengths), strict=True))
        chosen = [
            i for i in members
            if rollout.keep[i] and (rollout.informative[i // size] or objective.kl_weight)
        ]  # fmt: skip
        if not chosen:
            return
        samples = [rollout.samples[i] for i in chosen]
        packs = [
            pack(samples, members=one, depths=len(self.model.mtp) if self.mtp else 0)
            for one in share_out(samples, self.recipe.train.max_pack_tokens)
        ]
        drafted = max(1, sum(target.numel() for one in packs for target in one.mtp_target))
        before = sums.values.clone()
        for one in packs:
            one.members = [chosen[m] for m in one.members]
            self._pass(rollout, one, weight, objective, self.recipe.mtp.weight / drafted, sums, first)
        self._apply(sums, before)

    def _pass(
        self, rollout: Rollout, packed: Pack, weight: dict[int, Tensor], objective: PolicyObjective,
        mtp_weight: float, sums: Sums, first: bool,
    ) -> None:  # fmt: skip
        """Forward, backward, and the gradient into the optimizer."""
        device, members, train = self.model.device, packed.members, self.recipe.train
        old_N = torch.cat([rollout.old[i] for i in members]).to(device)
        reference = [rollout.reference[i] for i in members] if rollout.reference else None
        with exact(train.exact):
            scores = score(
                self.model, packed.to(device), self.sampler.law, entropy=True, mtp=self.mtp,
                recomputed=train.recompute,
            )  # fmt: skip
        loss = policy_loss(
            scores.logprob_N, old_N, rollout.advantage_B[members].to(device), packed.lengths,
            torch.cat([weight[i] for i in members]).to(device), objective,
            None if reference is None else torch.cat(reference),
        )  # fmt: skip
        mtp = sum((nll.sum() for nll in scores.mtp_nll), start=torch.zeros_like(loss.total))
        with self.optimizer.collecting():
            (loss.total + mtp_weight * mtp).backward()
        self.optimizer.accumulate()
        gap_N = (scores.logprob_N.detach() - old_N).abs()
        sums.values += torch.stack([
            loss.total.detach().double(), loss.kl.double(), loss.clipped.double(), loss.tokens.double(),
            _entropy(scores), (mtp_weight / max(self.recipe.mtp.weight, 1e-30) * mtp.detach()).double(),
            gap_N.double().sum() * first,
        ])  # fmt: skip
        sums.ratio_max = torch.maximum(sums.ratio_max, loss.ratio_max.double())
        sums.fed_tokens += packed.tokens
        sums.fed_pairs += sum(n * n for n in packed.fed)
        if first:  # the weights are still the sampler's
            sums.gap_max = torch.maximum(sums.gap_max, gap_N.max().double())
            sums.gap_tokens += gap_N.numel()

    def _apply(self, sums: Sums, before: Tensor) -> None:
        """The update. Raises NonFiniteError where loss or gradient are not finite: nothing has changed."""
        trainer, last = self.trainer, self.trainer.progress
        norm, parts = self.optimizer.grad_norm(), sums.values - before
        trainer.alive = trainer.alive * (parts.isfinite().all() & norm.isfinite())
        rate = trainer.schedule.at(last.step + 1).learning_rate
        self.optimizer.step(rate, norm, trainer.alive)
        values, length = parts.tolist(), float(norm)
        if not trainer.alive:
            where = f"update {last.step + 1}, on completions of prompts from {last.position} on"
            raise NonFiniteError(self.steps + 1, last.tokens, values[0], values[5], length, where)
        trainer.progress = replace(last, step=last.step + 1)
        sums.updates += 1
        sums.norms.append(length)

    # --- after it ---
    def _stats(self, rollout: Rollout, sums: Sums, sample_seconds: float, seconds: float) -> GrpoStats:
        answers = [answer for group in rollout.groups for answer in group.answers]
        lengths = [len(answer.token_ids) for answer in answers]
        right = [t.accuracy for g in rollout.groups for t in g.totals if t.accuracy is not None]
        loss, kl, clipped, tokens, entropy, mtp, gap = sums.values.tolist()
        n, updates, drawn = max(1, tokens), max(1, sums.updates), rollout.drawn
        fed = tokens > 0
        return GrpoStats(
            step=self.steps, tokens=self.trainer.progress.tokens, loss=loss / updates,
            reward=float(rollout.reward_B.mean()), reward_std=float(rollout.reward_B.std()),
            accuracy=sum(share >= 1.0 for share in right) / len(right) if right else None,
            length=sum(lengths) / len(lengths), length_max=max(lengths),
            truncated=sum(a.finish_reason == "length" for a in answers) / len(answers),
            failed=sum(bool(s.failed) for g in rollout.groups for t in g.totals for s in t.parts.values()),
            zero_variance=rollout.informative.count(False), replaced=drawn.replaced, too_long=drawn.too_long,
            entropy=entropy / n if fed else None, kl=kl / updates if rollout.reference else None,
            clipped=clipped / n, ratio_max=float(sums.ratio_max),
            gap_max=float(sums.gap_max) if sums.gap_tokens else None,
            gap_mean=gap / sums.gap_tokens if sums.gap_tokens else None,
            mtp_loss=mtp / updates if self.mtp and fed else None,
            grad_norm=math.fsum(sums.norms) / len(sums.norms) if sums.norms else None,
            updates=sums.updates,
            learning_rate=self.trainer.schedule.at(max(1, self.trainer.progress.step)).learning_rate,
            sample_seconds=sample_seconds, train_seconds=seconds,
            sample_tokens_per_second=drawn.tokens / max(sample_seconds, 1e-9),
            tokens_per_second=sums.fed_tokens / max(seconds, 1e-9),
            fed_tokens=sums.fed_tokens, fed_pairs=sums.fed_pairs,
        )  # fmt: skip


def _entropy(scores: Scores) -> Tensor:
    assert scores.entropy_N is not None
    return scores.entropy_N.double().sum()
