"""What changes during a run, as pure functions of the tokens seen (DeepSeek-V3 report §4.2).

    learning rate   warm-up │ constant │ cosine │ final constant 1 │ final constant 2
    bias speed γ    0.001 ───────────────────────┤ 0
    MTP weight λ    0.3 ─────────────┤ 0.1
    batch           3072 ╱ 15360 rows ──────────

V3: 0 → 2.2e-4 in 2K steps, constant to 10T tokens, cosine to 2.2e-5 over 4.3T, 2.2e-5 for 333B, 7.3e-6 for
167B; γ = 0.001 for 14.3T then 0; λ = 0.3 for 10T then 0.1; the batch grows over the first 469B tokens.

A step uses the value at the number of tokens seen *once the step is done*: the first step of a warm-up then
learns something, and the last step stands at the end of the schedule. The batch size alone is that of the
tokens seen *before* the step, which it decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class LearningRate:
    """V3's shape. Every `*_until` is a number of tokens; `finals` are (value, until) pairs in order.

    peak                 the constant rate, reached at `warmup_until`
    constant_until       where the cosine begins
    cosine_until         where the cosine reaches `floor`
    finals               constant rates afterwards; the last one holds for ever
    """

    peak: float
    floor: float
    warmup_until: float
    constant_until: float
    cosine_until: float
    finals: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        marks = [0.0, self.warmup_until, self.constant_until, self.cosine_until, *(u for _, u in self.finals)]
        if any(a > b for a, b in pairwise(marks)):
            raise ValueError(f"the marks of a learning-rate schedule must not go back: {marks}")


def learning_rate(tokens: float, shape: LearningRate) -> float:
    """The rate after `tokens` tokens."""
    if tokens < shape.warmup_until:
        return shape.peak * tokens / shape.warmup_until
    if tokens <= shape.constant_until:
        return shape.peak
    if tokens < shape.cosine_until:
        share = (tokens - shape.constant_until) / (shape.cosine_until - shape.constant_until)
        return shape.floor + (shape.peak - shape.floor) * 0.5 * (1.0 + math.cos(math.pi * share))
    for value, until in shape.finals:
        if tokens <= until:
            return value
    return shape.finals[-1][0] if shape.finals else shape.floor


def stepwise(tokens: float, first: float, second: float, switch: float) -> float:
    """`first` up to and including `switch` tokens, `second` afterwards: the shape of γ and of λ."""
    return first if tokens <= switch else second


@dataclass(frozen=True)
class BatchRamp:
    """The batch grows linearly in tokens seen, from `first` to `last` rows at `until` tokens, in whole
    multiples of `granule` rows (a micro-batch)."""

    first: int
    last: int
    until: float
    granule: int = 1

    def __post_init__(self) -> None:
        sizes = (self.first, self.last)
        if self.granule < 1 or any(size < 1 or size % self.granule for size in sizes):
            raise ValueError(f"batches of {self.first} to {self.last} rows are not whole multiples of "
                             f"{self.granule}")  # fmt: skip
        if self.first > self.last:
            raise ValueError(f"a batch ramp must not go down: {self.first} to {self.last} rows")

    def rows(self, tokens: float) -> int:
        """Rows of the batch that begins after `tokens` tokens."""
        if tokens >= self.until:
            return self.last
        wanted = self.first + (self.last - self.first) * tokens / self.until
        return max(self.first, int(wanted // self.granule) * self.granule)

    def steps(self, tokens: int, context: int) -> tuple[int, int]:
        """(steps, tokens) of a run whose last step reaches or passes `tokens`, in rows of `context`."""
        step = seen = 0
        while seen < min(tokens, self.until):
            step, seen = step + 1, seen + self.rows(seen) * context
        rest = -(-max(0, tokens - seen) // (self.last * context))
        return step + rest, seen + rest * self.last * context


@dataclass(frozen=True)
class PhaseKnobs:
    """A phase after the main pre-training (hadal/train/phases.py): constant values beyond `begin` tokens; the
    learning rate first comes up from 0 over `warmup` tokens."""

    begin: float
    warmup: float
    learning_rate: float
    bias_speed: float
    mtp_weight: float

    def at(self, tokens: float) -> Knobs:
        share = min(1.0, (tokens - self.begin) / self.warmup) if self.warmup else 1.0
        return Knobs(self.learning_rate * share, self.bias_speed, self.mtp_weight)


@dataclass(frozen=True)
class Schedule:
    """All of a run's schedules; `at(tokens)` gives the values of one step."""

    learning_rate: LearningRate
    bias_speed: float
    bias_until: float
    mtp_weight: float
    mtp_weight_late: float
    mtp_switch: float
    phases: tuple[PhaseKnobs, ...] = ()  # in order

    def at(self, tokens: float) -> Knobs:
        for phase in reversed(self.phases):
            if tokens > phase.begin:
                return phase.at(tokens)
        return Knobs(
            learning_rate=learning_rate(tokens, self.learning_rate),
            bias_speed=stepwise(tokens, self.bias_speed, 0.0, self.bias_until),
            mtp_weight=stepwise(tokens, self.mtp_weight, self.mtp_weight_late, self.mtp_switch),
        )


@dataclass(frozen=True)
class Knobs:
    """The scheduled values of one optimizer step."""

    learning_rate: float
    bias_speed: float
    mtp_weight: float
