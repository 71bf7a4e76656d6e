"""What a reward sees, what it gives, and what a table [[reward]] of a recipe may say.

A reward judges one completion of one prompt. It gives a number in its range [low, high] and a verdict: plain
data that says why, ready to be logged. The total of a completion is the sum of weight · value over the
recipe's rewards that apply to its prompt, as R1 adds its own up (DeepSeek-R1, §2.2.2, §2.3.2).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from hadal.data.strict import RecipeError

Verdict = dict[str, Any]  # JSON


class RewardError(RecipeError):
    """A reward that cannot be built, or a record that one cannot judge; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of one prompt.

    record: the prompt's record, JSON: `prompt` or `messages`, `task`, and what its rewards need (`answer`,
    `numbers` and `target`, `tests` …). text: what the model wrote after the prompt, think tags included, the
    end token not. tokens: their number. finish_reason: "stop", or "length" where it was cut off. opened: the
    template ended the prompt with `<think>`, so that it is absent from the text. token_ids: as sampled; a
    reward in another process sees none. meta: plain data of the caller, such as the step."""

    record: Mapping[str, Any]
    text: str
    tokens: int
    finish_reason: str = "stop"
    opened: bool = False
    token_ids: Sequence[int] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cut(self) -> bool:
        """Whether the completion was cut off at its limit."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Score:
    """value: in the reward's range. verdict: why, as JSON. A reward that failed has value 0 and says so in
    `verdict["failed"]`."""

    value: float
    verdict: Verdict = field(default_factory=dict)

    @property
    def failed(self) -> str:
        """The cause, where the reward itself failed; else empty."""
        return str(self.verdict.get("failed", ""))


@dataclass(frozen=True, slots=True)
class Total:
    """A completion's reward: the weighted sum, its parts by name, and the share of accuracy rewards' points
    (None if none applied)."""

    value: float
    parts: dict[str, Score]
    accuracy: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For a log of samples."""
        parts = {name: {"value": part.value, **part.verdict} for name, part in self.parts.items()}
        return {"reward": self.value, "accuracy": self.accuracy, "parts": parts}


@runtime_checkable
class Reward(Protocol):
    """Judges a completion. `others`: scores of the rewards before it that it may depend on (see `of`).

    kind, its name in recipes; needs, the fields that a record must have; low and high, the range of values;
    accuracy, whether it says that an answer is right; where, in which process it runs:
    "here": in the caller's, quick and bounded by construction; "worker": in a worker process, killed at its
    timeout; "locked": in a worker that, once ready, can open no file for writing, no socket and no process;
    "batch": in the caller's, all completions at once (see `BatchReward`).

    May have, too: `prepare()`, called in a worker before it is locked; `check_record(record)`, what a record
    lacks beside `needs`, or ""; `check_gold(record)`, called where the reward runs: why what is right by the
    record cannot be read, or ""."""

    kind: ClassVar[str]
    where: ClassVar[str]

    @property
    def accuracy(self) -> bool: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score: ...


@runtime_checkable
class BatchReward(Protocol):
    """A reward of a model: it judges many completions at once, in order. where = "batch"; `given`: what was
    passed to `Rewards` for its kind."""

    def many(self, completions: Sequence[Completion], given: Any) -> list[Score]: ...


def failure(cause: str) -> Score:
    """The score of a reward that failed: 0, and why."""
    return Score(0.0, {"failed": cause})


def in_range(score: Score, low: float, high: float) -> Score:
    """`score`, or a failure if its value is not a number in [low, high]."""
    value = score.value
    if isinstance(value, int | float) and abs(value) <= sys.float_info.max and low <= value <= high:
        return Score(float(value), score.verdict)
    return failure(f"gave what is not in [{low:g}, {high:g}]: {_short(value)}")


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write very long ones
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:80]
