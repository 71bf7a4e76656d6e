"""What a puzzle is: problem, solution, sample, task, and how an answer is checked.

A `Task` is a row of a table: draw a problem, ask it in a language, solve it with every step written
down, check any answer to it. The answer of a sample holds exactly one bold span, `**423**`: that is
the value a verifier reads, and it looks right in a chat.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LANGUAGES = ("en", "fr", "pt")
HELD_OUT_MODULUS = 20  # one problem in twenty is never trained on
ALWAYS_TRAIN = "core:"  # keys of the few fixed phrases ("hello") that have no held-out twin

_BOLD = re.compile(r"\*\*(.+?)\*\*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem without its wording. `key` is canonical: the same for every language and phrasing."""

    task: str
    kind: str
    args: tuple[Any, ...]
    key: str
    difficulty: int  # 0 easy, 1 medium, 2 hard
    gold: tuple[str, ...]  # values that the bold span must hold, in order


@dataclass(frozen=True, slots=True)
class Solution:
    """Reasoning (without the think tags) and the final answer."""

    think: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its worked answer."""

    problem: Problem
    language: str
    prompt: str
    think: str
    answer: str

    @property
    def task(self) -> str:
        return self.problem.task

    @property
    def difficulty(self) -> int:
        return self.problem.difficulty

    @property
    def gold(self) -> tuple[str, ...]:
        return self.problem.gold

    @property
    def completion(self) -> str:
        """What the model writes after a prompt that ends in `<think>\\n`."""
        return f"{self.think}\n</think>\n\n{self.answer}"


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table of tasks. `check(problem, language, answer_text)` judges the final answer."""

    name: str
    weight: float
    draw: Callable[[random.Random], Problem]
    ask: Callable[[Problem, str, random.Random], str]
    solve: Callable[[Problem, str], Solution]
    check: Callable[[Problem, str, str], bool]


def is_held_out(key: str) -> bool:
    """True for the twentieth of all problems that training never sees; depends on the key alone."""
    if key.startswith(ALWAYS_TRAIN):
        return False
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_MODULUS == 0


def final_text(completion: str) -> str:
    """The part of a completion after the reasoning. A reasoning that never ends leaves nothing."""
    head, tag, tail = completion.rpartition("</think>")
    if tag:
        return tail.strip()
    return "" if "<think>" in head + tail else tail.strip()


def bold_value(answer: str) -> str | None:
    """The one bold span of an answer; None if there is none or more than one."""
    spans = _BOLD.findall(answer)
    return spans[0].strip() if len(spans) == 1 else None


def numbers_in(text: str) -> tuple[str, ...]:
    """The numbers of a text as canonical strings: `−5` → `-5`, `3,14` (a decimal comma) → `3.14`."""
    text = re.sub(r"(?<=\d),(?=\d)", ".", text.replace("−", "-"))
    return tuple(_NUMBER.findall(text))


def check_numbers(problem: Problem, language: str, answer: str) -> bool:
    """The bold span holds the gold numbers, in order, and no others."""
    value = bold_value(answer)
    return value is not None and numbers_in(value) == problem.gold


def check_words(problem: Problem, language: str, answer: str) -> bool:
    """The bold span is the gold word, in the question's language. `gold` lists one word per language."""
    value = bold_value(answer)
    return value is not None and value.lower() == problem.gold[LANGUAGES.index(language)]


def size(rng: random.Random, digits: int) -> int:
    """A uniformly drawn number of exactly `digits` digits (one digit: 0–9)."""
    return rng.randrange(10) if digits == 1 else rng.randrange(10 ** (digits - 1), 10**digits)


def pick(rng: random.Random, weights: tuple[tuple[Any, float], ...]) -> Any:
    """Draw from a short table of (value, weight), whose weights sum to 1."""
    at = rng.random()
    for value, weight in weights:
        at -= weight
        if at < 0:
            return value
    return weights[-1][0]
