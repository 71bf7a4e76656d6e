r"""Mathematical answers, compared by `math-verify` (extra `rl`): `\frac{1}{2}`, `0.5` and `1/2` are the same.

The answer is found first, by the rules of `text.py`; only it is parsed, never the completion. SymPy's parser
evaluates what it reads, and may take any time and memory: so this runs in a locked worker (it can open no
file for writing, no socket, no process), under a limit of memory, and is killed when its time is over. What
would surely take too long (towers of powers, deep brackets, long numbers) is refused before.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hadal.data.strict import require
from hadal.post.rewards.protocol import Completion, RewardError, Score
from hadal.post.rewards.text import check_rules, extract, split

MAX_CHARACTERS = 500
MAX_BRACKETS = 30
MAX_DIGITS = 200

_TOWER = re.compile(r"\d\s*(?:\^|\*\*)\s*[{(]*\s*-?\d+\s*(?:\^|\*\*)")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*[{(]*\s*-?\d{5,}")
_FACTORIAL = re.compile(r"\d{5,}\s*!|!\s*\)?\s*!|!\s*(?:\^|\*\*)")


@dataclass(frozen=True)
class Math:
    r"""1 if the answer equals the record's `answer` (a text, or several of which any will do). digits:
    decimals to which numbers are compared."""

    extract: tuple[str, ...] = ("boxed",)
    digits: int = 6

    kind: ClassVar[str] = "math"
    needs: ClassVar[tuple[str, ...]] = ("answer",)
    accuracy: ClassVar[bool] = True
    where: ClassVar[str] = "locked"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_rules(self.extract)
        require(1 <= self.digits <= 15, "digits", self.digits, "in 1..15")
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("the reward math needs math-verify: pip install 'hadal[rl]'")

    def prepare(self) -> None:
        """Import what is imported late, before the worker is locked."""
        _parse("1/2")
        _parse(r"\frac{x}{2}+\sqrt{3}")

    def check_gold(self, record: Mapping[str, Any]) -> str:
        """Why the record's answer cannot be read; empty if it can."""
        try:
            _golds(record)
        except RewardError as error:
            return str(error)
        return ""

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        golds = _golds(completion.record)
        found = extract(split(completion).answer, self.extract)
        if found is None:
            return Score(0.0, {"answer": None})
        text, rule = found
        verdict: dict[str, Any] = {"answer": text[:200], "rule": rule}
        why = refused(text)
        if why:
            return Score(0.0, {**verdict, "why": why})
        said = _parse(text)
        if not said:
            return Score(0.0, {**verdict, "why": "the answer cannot be parsed"})
        return Score(float(any(self._equal(one, said) for one in golds)), verdict)

    def _equal(self, gold: Sequence[Any], said: Sequence[Any]) -> bool:
        from math_verify import verify

        return bool(verify(list(gold), list(said), float_rounding=self.digits, timeout_seconds=None))


def refused(text: str) -> str:
    """Why an answer is not parsed at all; empty if it may be."""
    if len(text) > MAX_CHARACTERS:
        return f"{len(text)} characters; at most {MAX_CHARACTERS} are read"
    depth = deepest = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_BRACKETS:
        return f"brackets nested deeper than {MAX_BRACKETS}"
    if _TOWER.search(text) or _EXPONENT.search(text) or _FACTORIAL.search(text):
        return "a power or factorial too large"
    if re.search(rf"\d{{{MAX_DIGITS + 1},}}", text):
        return f"a number of more than {MAX_DIGITS} digits"
    return ""


def _golds(record: Mapping[str, Any]) -> list[list[Any]]:
    """The record's answers, parsed. Raises RewardError: nothing is ever equal to what was not read."""
    answer = record["answer"]
    return [_gold(str(one)) for one in (answer if isinstance(answer, list) else [answer])]


def _gold(text: str) -> list[Any]:
    why = refused(text)
    parsed = [] if why else _parse(text)
    if not parsed:
        raise RewardError(f"the record's answer {text[:80]!r} cannot be parsed{': ' * bool(why)}{why}")
    return parsed


def _parse(text: str) -> list[Any]:
    """SymPy's objects in a short text. Texts that were not understood, which math-verify compares letter by
    letter, are left out."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # the missing timeout, which the pool gives
    bare = text.strip().strip("$").strip()
    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]
    # The time is bounded by the pool, which kills this process.
    found = parse(f"${bare}$", kinds, fallback_mode="no_fallback", parsing_timeout=None)
    return [one for one in found if not isinstance(one, str)]
