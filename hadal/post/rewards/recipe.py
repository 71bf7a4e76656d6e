"""The [[reward]] tables of a recipe, read strictly.

[[reward]]
kind = "math"            # KINDS below
weight = 1.0
name = "math"            # in logs; the kind, unless another has it
tasks = ["gsm8k"]        # records of these tasks only; none: all
since = 0.0              # shares of the run between which it counts
until = 1.0
timeout = 10.0           # seconds for one completion, of rewards in workers
extract = ["boxed"]      # from here on: options of the kind
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from hadal.data.strict import RecipeError, build, require
from hadal.post.rewards.protocol import Reward, RewardError

KINDS = {
    "math": "math_answer:Math",
    "countdown": "rules:Countdown",
    "equation": "rules:Equation",
    "puzzle": "rules:Puzzle",
    "code": "code_tests:Code",
    "gym": "gym:Gym",
    "format": "rules:Format",
    "language": "language:Language",
    "overlong": "rules:Overlong",
    "cosine": "rules:Cosine",
    "judge": "judge:Judge",
    "model": "judge:Model",
    "custom": "custom:Custom",
}
DEFAULT_TIMEOUT = 10.0


@dataclass(frozen=True)
class Common:
    """What every table may say, whatever its kind. timeout 0: the kind's own."""

    kind: str
    name: str = ""
    weight: float = 1.0
    tasks: tuple[str, ...] = ()
    since: float = 0.0
    until: float = 1.0
    timeout: float = 0.0

    def __post_init__(self) -> None:
        require(-1000 <= self.weight <= 1000, "weight", self.weight, "from -1000 to 1000")
        ordered = 0 <= self.since < self.until <= 1
        require(ordered, "since, until", (self.since, self.until), "shares of the run, in order")
        require(0 <= self.timeout <= 3600, "timeout", self.timeout, "seconds, up to 3600")


@dataclass(frozen=True)
class RewardRecipe:
    """One table: what all kinds have in common, the kind's own options as given, and the reward."""

    common: Common
    options: Mapping[str, Any]
    reward: Reward

    @property
    def name(self) -> str:
        return self.common.name

    @property
    def timeout(self) -> float:
        return self.common.timeout or float(getattr(self.reward, "timeout", DEFAULT_TIMEOUT))

    def applies(self, record: Mapping[str, Any], progress: float) -> bool:
        """Whether it counts for a record, at this share of the run."""
        c = self.common
        on = c.since <= progress and (progress < c.until or c.until == 1.0)
        return on and (not c.tasks or record.get("task") in c.tasks)

    def lacks(self, record: Mapping[str, Any]) -> str:
        """The fields that a record must have and has not; empty if none."""
        missing = [f"`{key}`" for key in self.reward.needs if key not in record]
        if missing:
            return ", ".join(missing)
        return str(getattr(self.reward, "check_record", lambda record: "")(record))

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default of the table and of the kind written out; `read` reads it back."""
        return {**dataclasses.asdict(self.common), **dataclasses.asdict(cast(Any, self.reward))}


def _class_of(kind: str) -> type:
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(KINDS)}"
        raise RewardError(f"there is no reward {kind!r}; {hint}")
    module, _, name = KINDS[kind].partition(":")
    return cast(type, getattr(importlib.import_module(f"hadal.post.rewards.{module}"), name))


def make(kind: str, options: Mapping[str, Any]) -> Reward:
    """A reward from its options. Raises RewardError or RecipeError."""
    return cast(Reward, build(_class_of(kind), options))


def read(tables: Sequence[Mapping[str, Any]]) -> tuple[RewardRecipe, ...]:
    """The tables of a recipe. Raises RewardError, naming table, key, value and remedy."""
    found: list[RewardRecipe] = []
    for number, table in enumerate(tables):
        path = f"reward[{number}]"
        try:
            found.append(_read_one(dict(table), {one.name for one in found}))
        except RecipeError as error:
            raise RewardError(f"{path}: {error}") from None
    if not found:
        raise RewardError("the recipe has no [[reward]]; docs/rewards.md lists them")
    return tuple(found)


def _read_one(table: dict[str, Any], names: set[str]) -> RewardRecipe:
    if "kind" not in table:
        raise RewardError(f"it lacks 'kind'; kinds: {', '.join(KINDS)}")
    kind = table["kind"]
    common = [f.name for f in dataclasses.fields(Common)]
    known = [*common, *(f.name for f in dataclasses.fields(_class_of(kind)))]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise RewardError(f"unknown key {key!r} of the reward {kind}. {hint}")
    options = {key: value for key, value in table.items() if key not in common}
    head = build(Common, {key: value for key, value in table.items() if key in common})
    head = dataclasses.replace(head, name=head.name or kind)
    if head.name in names:
        raise RewardError(f"the name {head.name!r} is taken; give this table a `name` of its own")
    reward = make(kind, options)
    of = getattr(reward, "of", None)
    if of is not None and of not in names:
        raise RewardError(f"of is {of!r}; it must name a reward above: {', '.join(sorted(names)) or 'none'}")
    return RewardRecipe(head, options, reward)
