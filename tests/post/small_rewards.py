"""Rewards of the tests of `hadal grpo`; workers import this file alone."""

from __future__ import annotations

from hadal.post.rewards import Completion


def early(completion: Completion) -> float:
    """The share of characters that are of the alphabet's beginning."""
    return sum(c in "abcdefghijABCDEFGHIJ" for c in completion.text) / max(1, len(completion.text))


def always(completion: Completion) -> float:
    return 0.5


def raises(completion: Completion) -> float:
    raise ValueError("no such luck")


def rare(completion: Completion) -> float:
    return float("e" in completion.text)
