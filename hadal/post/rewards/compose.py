"""All rewards of a recipe over a batch of completions: who judges where, the sum, the failures.

total = Σ weight · value, over the rewards that apply to the completion's prompt
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from hadal.post.rewards.pool import Job, Plan, Pool
from hadal.post.rewards.protocol import (
    BatchReward,
    Completion,
    RewardError,
    Score,
    Total,
    failure,
    in_range,
)
from hadal.post.rewards.recipe import RewardRecipe

MAX_WORKERS = 8


class Rewards:
    """Judges completions by a recipe's rewards. Use as a context, or `close`.

    judge: answers of a model to a list of chats, for kind "judge" (`judge.engine_judge` makes one of an
    engine). model: raw scores of a list of completions, for kind "model" (`RewardModel.scorer`). workers: of
    each kind of process; 0: as many as there are cores, up to 8. memory_mib: address space of a worker, 0: no
    limit. environment: variables that workers see beside a few harmless ones."""

    def __init__(
        self,
        recipes: Sequence[RewardRecipe],
        *,
        judge: Any = None,
        model: Any = None,
        workers: int = 0,
        memory_mib: int = 4096,
        environment: Sequence[str] = (),
    ) -> None:
        self.recipes = tuple(recipes)
        self.failures: Counter[str] = Counter()
        self.scored = 0
        given = {"judge": judge, "model": model}
        for one in self.recipes:
            kind = one.common.kind
            if kind in given and given[kind] is None:
                raise RewardError(f"the reward {one.name} needs a {kind}; pass one: Rewards(…, {kind}=…)")
        self._given = given
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pools: dict[str, Pool] = {}
        try:
            for where in ("locked", "worker"):
                mine = tuple((one.common.kind, one.options) for one in self._at(where))
                if mine:
                    plan = Plan(mine, where == "locked", memory_mib, tuple(environment))
                    self._pools[where] = Pool(plan, workers or min(cores, MAX_WORKERS))
        except BaseException:
            self.close()
            raise

    def _at(self, where: str) -> list[RewardRecipe]:
        return [one for one in self.recipes if one.reward.where == where]

    @property
    def restarts(self) -> int:
        """Workers that were replaced so far."""
        return sum(pool.restarts for pool in self._pools.values())

    def check(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Hold prompts against what their rewards need of them. Raises RewardError, naming the record."""
        for number, record in enumerate(records):
            applying = [one for one in self.recipes if one.applies(record, one.common.since)]
            if not applying:
                raise RewardError(f"record {number} (task {record.get('task')!r}) has no reward")
            for one in applying:
                missing = one.lacks(record)
                if missing:
                    raise RewardError(f"record {number} lacks {missing}, which the reward {one.name} needs")

    def score(self, completions: Sequence[Completion], progress: float = 1.0) -> list[Total]:
        """A total for each completion, in order. progress: the share of the run that is over."""
        parts: list[dict[str, Score]] = [{} for _ in completions]
        for where in ("locked", "worker", "batch", "here"):
            for name, index, score in self._judge(where, completions, parts, progress):
                parts[index][name] = score
        return [self._total(part) for part in parts]

    def _judge(
        self, where: str, completions: Sequence[Completion], parts: list[dict[str, Score]], progress: float
    ) -> Iterable[tuple[str, int, Score]]:
        """(name, index, score) of all rewards of one place."""
        jobs: list[Job] = []
        places: list[tuple[RewardRecipe, int]] = []
        for number, one in enumerate(self._at(where)):
            sound: list[int] = []
            for index, completion in enumerate(completions):
                if not one.applies(completion.record, progress):
                    continue
                missing = one.lacks(completion.record)
                if missing:
                    yield one.name, index, failure(f"the record lacks {missing}")
                elif where == "here":  # at once: a later reward may ask for it
                    yield one.name, index, self._here(one, completion, parts[index])
                elif where == "batch":
                    sound.append(index)
                else:
                    jobs.append(Job(number, completion, one.timeout))
                    places.append((one, index))
            if sound:
                scores = self._batch(one, [completions[index] for index in sound])
                yield from ((one.name, index, score) for index, score in zip(sound, scores, strict=True))
        if jobs:
            for (one, index), score in zip(places, self._pools[where].run(jobs), strict=True):
                yield one.name, index, score

    @staticmethod
    def _here(one: RewardRecipe, completion: Completion, others: Mapping[str, Score]) -> Score:
        try:
            return one.reward(completion, others)
        except Exception as error:
            return failure(f"raised {type(error).__name__}: {str(error)[:300]}")

    def _batch(self, one: RewardRecipe, completions: Sequence[Completion]) -> list[Score]:
        try:
            scores = cast(BatchReward, one.reward).many(completions, self._given[one.common.kind])
        except Exception as error:
            return [failure(f"raised {type(error).__name__}: {str(error)[:300]}")] * len(completions)
        if len(scores) != len(completions):
            return [failure(f"gave {len(scores)} scores for {len(completions)}")] * len(completions)
        return scores

    def _total(self, parts: Mapping[str, Score]) -> Total:
        """Sum up, hold values against their ranges, count failures."""
        value, right, ordered = 0.0, [], {}
        for one in self.recipes:
            if one.name not in parts:
                continue
            score = parts[one.name]
            if not score.failed:
                score = in_range(score, one.reward.low, one.reward.high)
            if score.failed:
                self.failures[f"{one.name}: {score.failed.partition(':')[0]}"] += 1
            ordered[one.name] = score
            value += one.common.weight * score.value
            if one.reward.accuracy:
                right.append(score.value)
        self.scored += 1
        return Total(value, ordered, sum(right) / len(right) if right else None)

    def close(self) -> None:
        """End the worker processes."""
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
