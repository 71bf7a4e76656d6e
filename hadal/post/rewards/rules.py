"""Rewards by rule that are quick and bounded: Countdown, equations, the mini's puzzles, forms of an answer.

All run in the caller's process. Options are the fields of each class; a recipe's table gives them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from hadal.data.puzzles import LANGUAGES, TASKS, Problem, Sample, verify
from hadal.data.strict import require
from hadal.post.rewards.arithmetic import ArithmeticRefused, evaluate, letters, normal
from hadal.post.rewards.protocol import Completion, RewardError, Score
from hadal.post.rewards.text import CLOSE, OPEN, check_rules, extract, split


@dataclass(frozen=True)
class Countdown:
    """The answer reaches `target` from `numbers` with + - * / and brackets. uses: "all", each number exactly
    once; "some", each at most once (the mini's rule). `= value` may follow the expression, and must then be
    the target."""

    extract: tuple[str, ...] = ("tag", "boxed", "bold")
    uses: str = "all"

    kind: ClassVar[str] = "countdown"
    needs: ClassVar[tuple[str, ...]] = ("numbers", "target")
    accuracy: ClassVar[bool] = True
    where: ClassVar[str] = "here"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_rules(self.extract)
        require(self.uses in ("all", "some"), "uses", self.uses, '"all" or "some"')

    def check_gold(self, record: Mapping[str, Any]) -> str:
        """Why numbers and target cannot be read; empty if they can."""
        try:
            _countdown(record)
        except (ValueError, TypeError, ZeroDivisionError):
            return f"numbers {record['numbers']!r} and target {record['target']!r} are no numbers"
        return ""

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        found = extract(split(completion).answer, self.extract)
        if found is None:
            return Score(0.0, {"answer": None})
        text, rule = found
        verdict: dict[str, Any] = {"answer": text[:200], "rule": rule}
        left, equals, right = text.partition("=")
        try:
            made = evaluate(left)
            told = evaluate(right).value if equals else made.value
        except ArithmeticRefused as error:
            return Score(0.0, {**verdict, "why": str(error)})
        given, target = _countdown(completion.record)
        used = Counter(made.numbers)
        if used != given if self.uses == "all" else used - given:
            return Score(0.0, {**verdict, "why": "the numbers are not those given"})
        if made.value != target or told != target:
            return Score(0.0, {**verdict, "why": f"it makes {made.value}"})
        return Score(1.0, verdict)


def _countdown(record: Mapping[str, Any]) -> tuple[Counter[Fraction], Fraction]:
    """(numbers, target) of a record. Raises ValueError, TypeError, ZeroDivisionError."""
    return Counter(Fraction(str(n)) for n in record["numbers"]), Fraction(str(record["target"]))


@dataclass(frozen=True)
class Equation:
    """The answer solves `equation`, such as `3x + 5 = 20`: a number where it has one unknown, or `x = 5`, or
    `x = 5, y = 2`. Both sides are valued with it, exactly."""

    extract: tuple[str, ...] = ("tag", "boxed", "bold", "last-number")

    kind: ClassVar[str] = "equation"
    needs: ClassVar[tuple[str, ...]] = ("equation",)
    accuracy: ClassVar[bool] = True
    where: ClassVar[str] = "here"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_rules(self.extract)

    def check_gold(self, record: Mapping[str, Any]) -> str:
        """Why the equation cannot be read; empty if it can."""
        try:
            sides, unknowns = _equation(record)
            odd = {name: Fraction(7919 + n, 7907) for n, name in enumerate(unknowns)}  # no usual pole
            for side in sides:
                evaluate(side, odd)
        except RewardError as error:
            return str(error)
        except ArithmeticRefused as error:
            return f"the record's equation is {record['equation']!r}: {error}"
        return ""

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        sides, unknowns = _equation(completion.record)
        found = extract(split(completion).answer, self.extract)
        if found is None:
            return Score(0.0, {"answer": None})
        verdict: dict[str, Any] = {"answer": found[0][:200], "rule": found[1]}
        try:
            values = solution(found[0], unknowns)
            left, right = (evaluate(side, values).value for side in sides)
        except ArithmeticRefused as error:
            return Score(0.0, {**verdict, "why": str(error)})
        return Score(float(left == right), verdict)


def _equation(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(sides, unknowns) of a record. Raises RewardError."""
    sides = str(record["equation"]).split("=")
    unknowns = sorted(set().union(*map(letters, sides)))
    if len(sides) != 2 or not unknowns:
        raise RewardError(f"the record's equation is {record['equation']!r}; one = and an unknown")
    return sides, unknowns


def solution(text: str, unknowns: Sequence[str]) -> dict[str, Fraction]:
    """`5` or `x = 5, y = 2` as values of all the unknowns. Raises ArithmeticRefused."""
    if len(unknowns) == 1 and "=" not in text:
        return {unknowns[0]: evaluate(text).value}
    values: dict[str, Fraction] = {}
    for piece in re.split(r"[,;\n]|\band\b", text):
        name, equals, value = piece.partition("=")
        name = normal(name)
        if not equals or name not in unknowns or name in values:
            raise ArithmeticRefused(f"one value for each of {', '.join(unknowns)} is wanted")
        values[name] = evaluate(value).value
    if len(values) != len(unknowns):
        raise ArithmeticRefused(f"one value for each of {', '.join(unknowns)} is wanted")
    return values


@dataclass(frozen=True)
class Puzzle:
    """The answer check of the mini's puzzles (`hadal.data.puzzles.verify`). The record's `puzzle` is a
    problem as `as_record` writes it."""

    kind: ClassVar[str] = "puzzle"
    needs: ClassVar[tuple[str, ...]] = ("puzzle",)
    accuracy: ClassVar[bool] = True
    where: ClassVar[str] = "here"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def check_gold(self, record: Mapping[str, Any]) -> str:
        """Why the puzzle cannot be read; empty if it can."""
        try:
            from_record(record["puzzle"])
        except RewardError as error:
            return str(error)
        return ""

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        problem, language = from_record(completion.record["puzzle"])
        text = f"{OPEN}\n{completion.text}" if completion.opened else completion.text
        answer = split(completion).answer
        return Score(float(verify(problem, text, language)), {"answer": answer[:200]})


def as_record(sample: Sample) -> dict[str, Any]:
    """The `puzzle` of a record, JSON."""
    p = sample.problem
    return {"task": p.task, "kind": p.kind, "args": p.args, "key": p.key, "difficulty": p.difficulty,
            "gold": p.gold, "language": sample.language}  # fmt: skip


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples again, at any depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def from_record(puzzle: Mapping[str, Any]) -> tuple[Problem, str]:
    """The problem and its language. Raises RewardError."""
    try:
        problem = Problem(
            puzzle["task"], puzzle["kind"], _tuples(puzzle["args"]), puzzle["key"],
            puzzle["difficulty"], _tuples(puzzle["gold"]),
        )  # fmt: skip
        language = puzzle["language"]
    except (KeyError, TypeError) as error:
        raise RewardError(f"the record's puzzle lacks {error}") from None
    if problem.task not in TASKS or language not in LANGUAGES:
        raise RewardError(f"the record's puzzle is of task {problem.task!r} in language {language!r}")
    return problem, language


@dataclass(frozen=True)
class Format:
    """The form of R1 (report §2.2.2): reasoning between one `<think>` and one `</think>`, then an answer.

    style "think": any answer; "think-answer", R1-Zero's: exactly one <answer>…</answer> and nothing beside
    it. A `<think>` that the template has put into the prompt counts as the opening tag, and a second one in
    the completion is one too many. What was cut off has no form."""

    style: str = "think"
    min_reasoning: int = 1  # characters

    kind: ClassVar[str] = "format"
    needs: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[bool] = False
    where: ClassVar[str] = "here"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        require(self.style in ("think", "think-answer"), "style", self.style, '"think" or "think-answer"')
        require(self.min_reasoning >= 0, "min_reasoning", self.min_reasoning, "0 or more")

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        why = self.fault(completion)
        return Score(float(not why), {"why": why} if why else {})

    def fault(self, completion: Completion) -> str:
        """What is wrong with the form; empty if nothing."""
        text = f"{OPEN}{completion.text}" if completion.opened else completion.text.lstrip()
        if completion.cut:
            return "cut off"
        if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
            return f"{text.count(OPEN)} {OPEN} and {text.count(CLOSE)} {CLOSE}"
        if not text.startswith(OPEN) or text.index(OPEN) > text.index(CLOSE):
            return f"it does not begin with {OPEN}"
        reasoning, _, answer = text.removeprefix(OPEN).partition(CLOSE)
        if len(reasoning.strip()) < self.min_reasoning:
            return "no reasoning"
        if not answer.strip():
            return "no answer"
        return self._answer_fault(answer.strip()) if self.style == "think-answer" else ""

    @staticmethod
    def _answer_fault(answer: str) -> str:
        if answer.count("<answer>") != 1 or answer.count("</answer>") != 1:
            return "not one <answer> and one </answer>"
        if not (answer.startswith("<answer>") and answer.endswith("</answer>")):
            return "something beside <answer>…</answer>"
        return "" if answer.removeprefix("<answer>").removesuffix("</answer>").strip() else "no answer"


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment of long answers (arXiv 2503.14476, eq. 13), from -1 to 0: 0 up to
    `max_tokens - cache`, then linear, -1 at `max_tokens` and beyond."""

    max_tokens: int
    cache: int

    kind: ClassVar[str] = "overlong"
    needs: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[bool] = False
    where: ClassVar[str] = "here"
    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, "max_tokens", self.max_tokens, "above 0")
        fits = 0 < self.cache <= self.max_tokens
        require(fits, "cache", self.cache, f"in 1..{self.max_tokens} (max_tokens)")

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        value = (self.max_tokens - self.cache - completion.tokens) / self.cache
        return Score(min(0.0, max(-1.0, value)), {"tokens": completion.tokens})


@dataclass(frozen=True)
class Cosine:
    """A reward of length that depends on being right (arXiv 2502.03373, §4.2): along half a cosine from the
    value at 0 tokens to that at `max_tokens`, one pair for right answers, one for wrong; `exceeded` for what
    is longer or was cut off. `of` names the reward that says what is right (value at least 0.5)."""

    of: str
    max_tokens: int
    right: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (-1.0, -0.5)
    exceeded: float = -1.0

    kind: ClassVar[str] = "cosine"
    needs: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[bool] = False
    where: ClassVar[str] = "here"

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, "max_tokens", self.max_tokens, "above 0")
        require(bool(self.of), "of", self.of, "the name of a reward above this one")
        require(len(self.right) == len(self.wrong) == 2, "right, wrong", (self.right, self.wrong), "pairs")

    @property
    def low(self) -> float:
        return min(*self.right, *self.wrong, self.exceeded, 0.0)

    @property
    def high(self) -> float:
        return max(*self.right, *self.wrong, self.exceeded, 0.0)

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        if self.of not in others:  # it did not apply to this prompt
            return Score(0.0, {"why": f"{self.of} does not apply"})
        good = others[self.of].value >= 0.5
        if completion.cut or completion.tokens > self.max_tokens:
            return Score(self.exceeded, {"exceeded": True})
        first, last = self.right if good else self.wrong
        share = completion.tokens / self.max_tokens
        return Score(last + (first - last) * (1 + math.cos(math.pi * share)) / 2, {"right": good})
