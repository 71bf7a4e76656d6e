"""Answers to tasks of `reasoning-gym` (extra `rl`), scored by the task's own function.

The record names data set, settings, seed and number, and carries the task where that is JSON without loss.
Where it is not (tuples, dates), the worker makes the same task again, and holds its question against the
record's: a few data sets depend on the order of a set, which differs from process to process.

Some scorers hand the answer to SymPy's parser, which runs what it reads: so this works in a locked worker
alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from hadal.post.rewards.protocol import Completion, RewardError, Score
from hadal.post.rewards.text import check_rules, extract, split

MAX_CHARACTERS = 4000


def available() -> None:
    """Raises RewardError where reasoning-gym is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise RewardError("tasks of reasoning-gym need it: pip install 'hadal[rl]'")


@dataclass(frozen=True)
class Gym:
    """The score that the task gives, from 0 to 1. threshold: scores below count as 0, for tasks that reward
    an attempt (Countdown gives 0.01 for any answer)."""

    extract: tuple[str, ...] = ("tag", "boxed", "bold", "all")
    threshold: float = 0.0

    kind: ClassVar[str] = "gym"
    needs: ClassVar[tuple[str, ...]] = ("gym",)
    accuracy: ClassVar[bool] = True
    where: ClassVar[str] = "locked"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_rules(self.extract)
        available()

    def prepare(self) -> None:
        """Import the library before the worker is locked."""
        importlib.import_module("reasoning_gym")

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        found = extract(split(completion).answer, self.extract)
        if found is None or len(found[0]) > MAX_CHARACTERS:
            return Score(0.0, {"answer": None})
        at = completion.record["gym"]
        tasks = dataset(at["dataset"], at["size"], at["seed"], json.dumps(at["config"], sort_keys=True))
        entry = at.get("entry") or tasks[at["index"]]
        if entry["question"] != at["question"]:
            raise RewardError(f"task {at['index']} of {at['dataset']} cannot be made a second time")
        value = float(tasks.score_answer(answer=found[0], entry=entry))
        return Score(value if value >= self.threshold else 0.0, {"answer": found[0][:200], "given": value})


def as_record(name: str, size: int, seed: int, config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A task as a record: `prompt`, `answer`, `gym`. Raises RewardError."""
    entry = dataset(name, size, seed, json.dumps(dict(config), sort_keys=True))[index]
    gym = {"dataset": name, "size": size, "seed": seed, "config": dict(config), "index": index,
           "question": entry["question"]}  # fmt: skip
    plain = {**entry, "metadata": {k: v for k, v in entry["metadata"].items() if k != "difficulty"}}
    try:
        if json.loads(text := json.dumps(plain)) == plain:  # lists for tuples would be unequal
            gym["entry"] = json.loads(text)
    except (TypeError, ValueError):
        pass
    answer = entry["answer"]
    return {"prompt": entry["question"], "answer": None if answer is None else str(answer), "gym": gym}


@lru_cache(maxsize=64)
def dataset(name: str, size: int, seed: int, config: str = "{}") -> Any:
    """A procedural data set: task i is a function of (name, config, seed, i). config: its settings, JSON.
    Raises RewardError."""
    available()
    import difflib

    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {len(DATASETS)}, such as countdown"
        raise RewardError(f"reasoning-gym has no task {name!r}; {hint}")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **json.loads(config))
    except (TypeError, ValueError, AssertionError) as error:
        raise RewardError(f"reasoning-gym's {name} refuses its settings: {error}") from None
