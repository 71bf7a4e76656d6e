"""Code that a model wrote, judged by tests in the sandbox.

Three forms of tests, by what the record holds:

    test, entry_point, prompt    HumanEval's: `test` defines check(candidate), called with the function
    tests                        a list of Python statements, such as MBPP's asserts
    io                           a list of {"input": …, "output": …}: a program's stdin and stdout, compared
                                 outside of the sandbox line by line, white space at line ends left out

The code is the last fenced block of the answer (`extract = "block"`), or the completion itself, continuing
the prompt (`"raw"`, HumanEval's own form). In HumanEval's form a block that does not define `entry_point`
continues the prompt too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hadal.data.strict import require
from hadal.post.rewards import sandbox
from hadal.post.rewards.protocol import Completion, RewardError, Score
from hadal.post.rewards.text import split

MAX_CODE = 100_000  # characters

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE
)
_NAME = re.compile(r"[A-Za-z_]\w*")
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ")  # HumanEval's, of raw text


@dataclass(frozen=True)
class Code:
    """1 if all tests pass. seconds and memory_mib are for each program run; max_runs: of `io`."""

    extract: str = "block"
    isolation: str = "seccomp"
    seconds: float = 5.0
    memory_mib: int = 512
    max_runs: int = 20

    kind: ClassVar[str] = "code"
    needs: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[bool] = True
    where: ClassVar[str] = "worker"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        require(self.extract in ("block", "raw"), "extract", self.extract, '"block" or "raw"')
        known = " or ".join(f'"{name}"' for name in sandbox.ISOLATIONS)
        require(self.isolation in sandbox.ISOLATIONS, "isolation", self.isolation, known)
        require(0 < self.seconds <= 600, "seconds", self.seconds, "above 0, up to 600")
        require(self.memory_mib >= 64, "memory_mib", self.memory_mib, "at least 64")
        require(self.max_runs >= 1, "max_runs", self.max_runs, "at least 1")

    @property
    def timeout(self) -> float:
        """Seconds that the worker may take for one completion."""
        return (self.seconds + 2) * self.max_runs

    def prepare(self) -> None:
        """Hold the sandbox against what it promises, before any program is run."""
        if self.isolation == "seccomp":
            sandbox.check()

    def check_record(self, record: Mapping[str, Any]) -> str:
        """What a record lacks; empty if nothing."""
        forms = [("test", "entry_point", "prompt"), ("tests",), ("io",)]
        if any(all(key in record for key in form) for form in forms):
            return ""
        return "`tests`, or `io`, or `prompt`, `test` and `entry_point`"

    def check_gold(self, record: Mapping[str, Any]) -> str:
        """Why the tests cannot be run; empty if they can."""
        if "io" in record:
            sound = isinstance(record["io"], list) and record["io"] and all(
                isinstance(one, dict) and isinstance(one.get("input"), str)
                and isinstance(one.get("output"), str)
                for one in record["io"]
            )  # fmt: skip
            return "" if sound else f"the record's io is {record['io']!r}; objects of `input` and `output`"
        try:
            program("", record)
        except RewardError as error:
            return str(error)
        return ""

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        code = self.code(completion)
        if code is None:
            return Score(0.0, {"why": "no block of code"})
        if len(code) > MAX_CODE:
            return Score(0.0, {"why": f"{len(code)} characters of code; at most {MAX_CODE} are run"})
        record = completion.record
        if "io" in record:
            return self._by_output(code, record["io"])
        return self._verdict(self._run(program(code, record)))

    def code(self, completion: Completion) -> str | None:
        """The code in a completion."""
        if self.extract == "raw":
            text = completion.text
            ends = [at for stop in _STOPS if (at := text.find(stop)) >= 0]
            return text[: min(ends)] if ends else text
        blocks = _BLOCK.findall(split(completion).answer + "\n")
        return str(blocks[-1]) if blocks else None

    def _run(self, text: str, stdin: str = "") -> sandbox.Outcome:
        limits = sandbox.Limits(self.seconds, self.memory_mib)
        return sandbox.run(text, stdin=stdin, limits=limits, isolation=self.isolation)

    @staticmethod
    def _verdict(outcome: sandbox.Outcome) -> Score:
        return Score(float(outcome.passed), {"status": outcome.status, "detail": outcome.detail,
                                             "seconds": round(outcome.seconds, 3)})  # fmt: skip

    def _by_output(self, code: str, tests: Sequence[Mapping[str, str]]) -> Score:
        if not tests:
            raise RewardError("the record's io holds no test")
        for number, test in enumerate(tests[: self.max_runs]):
            outcome = self._run(code, test["input"])
            ended = outcome.passed or (outcome.status == "left" and outcome.detail in ("None", "0"))
            if not ended or lines(outcome.stdout) != lines(test["output"]):
                status = "wrong output" if ended else outcome.status
                return Score(0.0, {"status": status, "detail": outcome.detail, "test": number})
        return Score(1.0, {"status": "passed", "tests": len(tests[: self.max_runs])})


def lines(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty ones at the end of all."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def program(code: str, record: Mapping[str, Any]) -> str:
    """The code with the record's tests behind it. Raises RewardError."""
    if "tests" in record:
        tests = record["tests"]
        if not tests:
            raise RewardError("the record's tests are empty")
        return "\n".join([str(record.get("setup", "")), code, *map(str, tests), ""])
    name = str(record["entry_point"])
    if not _NAME.fullmatch(name):
        raise RewardError(f"the record's entry_point is {name!r}; a function's name is wanted")
    whole = re.search(rf"^(?:async )?def {name}\b|^{name}\s*=|^class {name}\b", code, re.MULTILINE)
    glue = "\n\n" if whole else ""
    return f"{record['prompt']}{glue}{code}\n\n{record['test']}\n\ncheck({name})\n"
