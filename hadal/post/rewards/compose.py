"""All rewards of a recipe over a batch of completions: who judges where, the sum, the failures.

total = Σ weight · value, over the rewards that apply to the completion's prompt
"""

from __future__ import annotations

import json
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
            self._applying(f"record {number}", record)

    def check_set(self, placed: Iterable[tuple[str, Mapping[str, Any]]], *, golds: bool = True) -> None:
        """Hold a whole set against its rewards, before anything is sampled: `check`, and (golds) whether what
        is right by each record can be read. placed: (where the record stands, record). Raises RewardError,
        naming place and value."""
        asked: dict[tuple[str, str], tuple[str, RewardRecipe, Mapping[str, Any]]] = {}
        for place, record in placed:
            for one in self._applying(place, record):
                if golds and hasattr(one.reward, "check_gold"):
                    seen = {key: record[key] for key in one.reward.needs} or record
                    digest = json.dumps(seen, sort_keys=True, default=str)
                    asked.setdefault((one.name, digest), (place, one, seen))
        faults = [
            f"{place}: {why} (reward {one.name})"
            for (place, one, _), why in zip(asked.values(), self._gold_faults(asked.values()), strict=True)
            if why
        ]
        if faults:
            more = f", the first of {len(faults)}" if len(faults) > 1 else ""
            raise RewardError(f"{faults[0]}{more}; mend such lines, or leave them out")

    def _applying(self, place: str, record: Mapping[str, Any]) -> list[RewardRecipe]:
        """The rewards of a record, which has what they need. Raises RewardError."""
        applying = [one for one in self.recipes if one.applies(record, one.common.since)]
        if not applying:
            raise RewardError(f"{place} (task {record.get('task')!r}) has no reward")
        for one in applying:
            if missing := one.lacks(record):
                raise RewardError(f"{place} lacks {missing}, which the reward {one.name} needs")
        return applying

    def _gold_faults(self, asked: Iterable[tuple[str, RewardRecipe, Mapping[str, Any]]]) -> list[str]:
        """For each, why it cannot be read, or ""; told by the reward where it runs."""
        faults: dict[int, str] = {}
        jobs: dict[str, dict[int, Job]] = {where: {} for where in self._pools}
        for number, (_, one, record) in enumerate(asked):
            where = one.reward.where
            if where in jobs:
                place = self._at(where).index(one)
                jobs[where][number] = Job(place, Completion(record, "", 0), one.timeout, check=True)
            else:
                faults[number] = cast(Any, one.reward).check_gold(record)
        for where, mine in jobs.items():
            scores = self._pools[where].run(list(mine.values()))
            for (number, job), score in zip(mine.items(), scores, strict=True):
                shown = json.dumps(job.completion.record, default=str)[:120]
                faults[number] = f"{shown} {score.failed}" if score.failed else score.verdict["why"]
        return [faults[number] for number in sorted(faults)]

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
