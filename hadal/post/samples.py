"""Samples of a run, read back: what `hadal grpo` keeps in samples.jsonl, a group of completions a line.

Texts are a model's, and hostile where it likes: `harmless` is for terminals, hadal/post/samples_page.py for
browsers. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FILE = "samples.jsonl"
_STEPS = re.compile(r"(\d+)(?:-(\d+))?")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})?:({_NUMBER})?")


class SamplesError(ValueError):
    """No samples where some were asked for, or a filter that means nothing."""


@dataclass(frozen=True)
class Sampled:
    """One completion. `accuracy`: share of the accuracy rewards' points; None where none judged. `parts`: of
    each reward by name, its `value` and its verdict."""

    text: str
    tokens: int
    finish_reason: str
    reward: float
    advantage: float | None
    accuracy: float | None
    parts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool | None:
        """Full marks for accuracy; None where nothing judged it."""
        return None if self.accuracy is None else self.accuracy >= 1.0

    @property
    def cut(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class SampledGroup:
    """A prompt of a step with its completions, or with those of them that a filter has left."""

    step: int
    number: int
    task: str
    prompt: str
    record: Mapping[str, Any]
    completions: tuple[Sampled, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "step": self.step,
            "number": self.number,
            "task": self.task,
            "prompt": self.prompt,
            "completions": [
                {
                    "text": one.text, "tokens": one.tokens, "finish_reason": one.finish_reason,
                    "reward": one.reward, "advantage": one.advantage, "accuracy": one.accuracy,
                    "parts": dict(one.parts),
                }
                for one in self.completions
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """Which completions are wanted. `low`, `high`: of the reward; `right`: True, False, or None for all;
    `search`: in prompt or completion, whatever its case."""

    steps: tuple[int, int] | None = None
    task: str = ""
    low: float = float("-inf")
    high: float = float("inf")
    right: bool | None = None
    cut: bool = False
    search: str = ""

    def takes(self, group: SampledGroup, one: Sampled) -> bool:
        """Whether a completion is among those that are wanted."""
        wanted = self.search.casefold()
        return (
            (self.steps is None or self.steps[0] <= group.step <= self.steps[1])
            and self.task in ("", group.task)
            and self.low <= one.reward <= self.high
            and (self.right is None or one.right is self.right)
            and (one.cut or not self.cut)
            and (not wanted or wanted in group.prompt.casefold() or wanted in one.text.casefold())
        )

    def apply(self, groups: Sequence[SampledGroup]) -> list[SampledGroup]:
        """The groups with the completions that are wanted; without those that have none."""
        found = []
        for group in groups:
            kept = tuple(one for one in group.completions if self.takes(group, one))
            if kept:
                found.append(replace(group, completions=kept))
        return found


def steps_of(text: str, groups: Sequence[SampledGroup]) -> tuple[int, int] | None:
    """The steps that "7", "7-20", "last" or "all" (None) mean. Raises SamplesError."""
    if text == "all":
        return None
    if text == "last":
        last = max(group.step for group in groups)
        return last, last
    found = _STEPS.fullmatch(text)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise SamplesError(f"steps are {text!r}; a step is meant, or 10-20, last, all")
    return int(found[1]), int(found[2] or found[1])


def range_of(text: str) -> tuple[float, float]:
    """The rewards that "0.5:", ":0", "0:1" or "1" mean, ends included. Raises SamplesError."""
    if re.fullmatch(_NUMBER, text):
        return float(text), float(text)
    found = _RANGE.fullmatch(text)
    if found is None:
        raise SamplesError(f"the range of rewards is {text!r}; 0.5:, :0, 0:1 or 1 is meant")
    return float(found[1] or "-inf"), float(found[2] or "inf")


def read(run: Path) -> list[SampledGroup]:
    """All groups of a run's folder, or of a file of samples, by step and number. A line that a dying
    process left half is skipped. Raises SamplesError."""
    path = run / FILE if run.is_dir() else run
    if not path.is_file():
        raise SamplesError(f"{run} holds no samples (no {FILE}); `hadal grpo RECIPE` keeps them")
    found = [group for line in _lines(path) if (group := _group(line)) is not None]
    if not found:
        raise SamplesError(f"{path} holds no sample; log.samples of the recipe says how many a step are kept")
    return sorted(found, key=lambda group: (group.step, group.number))


def harmless(text: str) -> str:
    """`text` with characters that steer a terminal shown as what they are: ESC as ␛, others by number."""
    return "".join(map(_shown, text))


def _shown(c: str) -> str:
    code = ord(c)
    if c in "\n\t":
        return c
    if code < 32:
        return chr(0x2400 + code)
    unseen = code == 127 or 128 <= code < 160 or code in _STEERING or 0xD800 <= code < 0xE000
    return f"⟨{code:X}⟩" if unseen else c


_STEERING = {*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF}
"""Without width, or turning the direction of writing: they hide what is there."""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def _group(line: Mapping[str, Any]) -> SampledGroup | None:
    """A line as a group; None for one of another kind."""
    try:
        record = dict(line["record"])
        completions = tuple(_sampled(one) for one in line["completions"])
        return SampledGroup(
            int(line["step"]),
            int(line["number"]),
            str(record.get("task", "")),
            _prompt(record),
            record,
            completions,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _sampled(one: Mapping[str, Any]) -> Sampled:
    advantage, accuracy = (None if one[key] is None else float(one[key]) for key in ("advantage", "accuracy"))
    return Sampled(
        str(one["text"]), int(one["tokens"]), str(one["finish_reason"]), float(one["reward"]), advantage,
        accuracy, dict(one["parts"]),
    )  # fmt: skip


def _prompt(record: Mapping[str, Any]) -> str:
    """What was asked: the prompt, or the messages under their roles."""
    if "messages" not in record:
        return str(record.get("prompt", ""))
    parts = [f"{message.get('role')}: {message.get('content')}" for message in record["messages"]]
    return "\n\n".join(parts) if len(parts) > 1 else str(record["messages"][0].get("content", ""))
