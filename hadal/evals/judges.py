"""Completions judged: right or wrong, the answer that was found, and which answers are the same.

The verdict is that of the rewards of reinforcement learning (docs/rewards.md): mathematics by `math-verify`
in a locked process, code in the sandbox. For the majority's vote answers are brought into a normal form:
numbers by their value, to six decimals as in the reward; other mathematics by `math-verify`, one answer
against another; all else as text, case and white space apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from hadal.evals.sets import Problem
from hadal.post.rewards import Completion, Rewards, read
from hadal.post.rewards.text import extract, split

EXTRACT = ("boxed", "bold", "last-number")  # rules of docs/rewards.md, in this order
DIGITS = 6  # decimals to which numbers are compared
_BATCH = 64
_JUDGED, _SAME = "judged", "same"  # tasks of records, which choose one of the two rewards of mathematics
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Judging:
    """How completions are judged. extract: where the answer of kinds math and text stands; code: "block" or
    "raw"; seconds and isolation: of programs; workers: processes, 0 as many as cores."""

    extract: tuple[str, ...] = EXTRACT
    code: str = "block"
    seconds: float = 5.0
    isolation: str = "seccomp"
    workers: int = 0

    def tables(self, kind: str) -> list[dict[str, Any]]:
        """The [[reward]] tables of a kind; of mathematics a second one, which compares two answers."""
        if kind == "math":
            judged = {"kind": kind, "tasks": [_JUDGED], "extract": list(self.extract), "digits": DIGITS}
            same = {"kind": kind, "name": _SAME, "tasks": [_SAME], "extract": ["boxed"], "digits": DIGITS}
            return [judged, same]
        if kind == "code":
            options = {"seconds": self.seconds, "isolation": self.isolation}
            return [{"kind": kind, "extract": self.code, **options}]
        return [{"kind": kind}]


@dataclass(frozen=True)
class Verdict:
    """answer: as found, None where none was (code has none). details: the reward's, JSON."""

    right: bool
    answer: str | None
    details: Mapping[str, Any] = field(default_factory=dict)


class Judge:
    """Judges completions of problems of the given kinds. Starts worker processes; use as a context."""

    def __init__(self, kinds: Sequence[str], judging: Judging) -> None:
        """Raises RewardError for what is not installed or an extraction rule that there is not."""
        self.judging = judging
        self._rewards: dict[str, Rewards] = {}
        try:
            for kind in dict.fromkeys(kinds):
                if kind != "text":
                    self._rewards[kind] = Rewards(read(judging.tables(kind)), workers=judging.workers)
        except BaseException:
            self.close()
            raise

    def check(self, problems: Sequence[Problem], *, golds: bool = True) -> None:
        """Hold the problems against what their rewards need and (golds) can read. Raises RewardError, naming
        place and value."""
        for kind, rewards in self._rewards.items():
            mine = ((problem.place, _record(problem)) for problem in problems if problem.kind == kind)
            rewards.check_set(mine, golds=golds)

    def judge(
        self, asked: Sequence[Problem], completions: Sequence[Completion], progress: Progress | None = None
    ) -> list[Verdict]:
        """A verdict for each completion, in order. A verifier that fails says so in the details, and the
        completion counts as wrong."""
        found: dict[int, Verdict] = {}
        for kind in dict.fromkeys(problem.kind for problem in asked):
            mine = [index for index, problem in enumerate(asked) if problem.kind == kind]
            for first in range(0, len(mine), _BATCH):
                part = mine[first : first + _BATCH]
                said = [replace(completions[index], record=_record(asked[index])) for index in part]
                verdicts = self._judge(kind, said)
                found.update(zip(part, verdicts, strict=True))
                if progress is not None:
                    progress(len(found), len(asked))
        return [found[index] for index in range(len(asked))]

    def _judge(self, kind: str, completions: Sequence[Completion]) -> list[Verdict]:
        if kind == "text":
            return [self._text(one) for one in completions]
        verdicts = []
        for completion, total in zip(completions, self._rewards[kind].score(completions), strict=True):
            (score,) = total.parts.values()
            answer = None if kind == "code" else score.verdict.get("answer")
            if kind == "puzzle":
                answer = self._puzzle_answer(completion)
            verdicts.append(Verdict(score.value >= 1.0, answer or None, score.verdict))
        return verdicts

    def _text(self, completion: Completion) -> Verdict:
        found = extract(split(completion).answer, (*self.judging.extract, "last-line"))
        if found is None:
            return Verdict(False, None)
        golds = {plain(str(one)) for one in completion.record["answer"]}
        return Verdict(plain(found[0]) in golds, found[0], {"rule": found[1]})

    @staticmethod
    def _puzzle_answer(completion: Completion) -> str | None:
        found = extract(split(completion).answer, ("bold", "all"))
        return None if found is None else found[0][:200]

    def groups(self, kind: str, answers: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """For each problem of a kind, the number of each sample's answer: equal answers have equal numbers,
        and None is none."""
        if kind != "math":
            return [_numbered([None if a is None else plain(a) for a in mine]) for mine in answers]
        return [_numbered(mine) for mine in self._merged(answers)]

    def _merged(self, answers: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
        """Normal forms of mathematical answers, those that math-verify finds equal made one. Two numbers
        need no verifier: they differ, since their forms do."""
        forms = [[None if answer is None else normal_form(answer) for answer in mine] for mine in answers]
        texts = [dict(zip(f, a, strict=True)) for f, a in zip(forms, answers, strict=True)]
        queues = [list(dict.fromkeys(form for form in mine if form is not None)) for mine in forms]
        leaders: list[list[str]] = [[] for _ in forms]
        same: list[dict[str, str]] = [{} for _ in forms]
        for place in range(max(map(len, queues), default=0)):
            pairs = [
                (problem, queue[place], leader)
                for problem, queue in enumerate(queues)
                if place < len(queue)
                for leader in leaders[problem]
                if not (_is_number(queue[place]) and _is_number(leader))
            ]
            equal = self._equal([(texts[p][form], texts[p][leader]) for p, form, leader in pairs])
            for (problem, form, leader), so in zip(pairs, equal, strict=True):
                if so:
                    same[problem].setdefault(form, leader)
            for problem, queue in enumerate(queues):
                if place < len(queue) and queue[place] not in same[problem]:
                    leaders[problem].append(queue[place])
        return [
            [None if form is None else same[problem].get(form, form) for form in mine]
            for problem, mine in enumerate(forms)
        ]

    def _equal(self, pairs: Sequence[tuple[str | None, str | None]]) -> list[bool]:
        """Whether two answers are the same; what cannot be read equals nothing."""
        asked = [Completion({"answer": other, "task": _SAME}, f"\\boxed{{{one}}}", 0) for one, other in pairs]
        return [total.value >= 1.0 for total in self._rewards["math"].score(asked)] if asked else []

    def close(self) -> None:
        """End the worker processes."""
        for rewards in self._rewards.values():
            rewards.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _record(problem: Problem) -> Mapping[str, Any]:
    """What the reward sees."""
    return {**problem.record, "task": _JUDGED} if problem.kind == "math" else problem.record


def plain(text: str) -> str:
    """A text's normal form: compatibility characters as their plain ones, case and white space apart."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normal_form(answer: str) -> str:
    """`=VALUE` of a plain number, to DIGITS decimals; else the text without white space and dollar signs."""
    bare = "".join(answer.split()).strip("$").replace("−", "-")
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare)
    if _NUMBER.fullmatch(bare) and len(bare) <= 100:
        above, _, below = bare.partition("/")
        if not below or int(below):
            value = round(Fraction(above) / int(below or 1), DIGITS)
            return f"={value}"
    return bare


def _is_number(form: str) -> bool:
    return form.startswith("=")


def _numbered(forms: Sequence[str | None]) -> list[int | None]:
    """Forms as numbers, in the order in which they first come."""
    numbers: dict[str, int] = {}
    return [None if form is None else numbers.setdefault(form, len(numbers)) for form in forms]
