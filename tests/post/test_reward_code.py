"""Code judged by tests: HumanEval's form, asserts, input and output; what a program may not do to pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hadal.post.rewards import Rewards, read, sandbox
from hadal.post.rewards.code_tests import Code, program
from tests.post.helpers import children, said

if not sandbox.guarantees()["seccomp"]:
    pytest.skip("needs Linux with seccomp", allow_module_level=True)

HUMANEVAL = {
    "task_id": "Test/0",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ Sum.\n    """\n',
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n"
            "    assert candidate([]) == 0\n",
    "entry_point": "total",
}  # fmt: skip
WHOLE = HUMANEVAL["prompt"] + "    return sum(xs)\n"


def block(code: str) -> str:
    return f"<think>I count.</think>Here it is:\n\n```python\n{code}\n```\nDone."


@pytest.fixture(scope="module")
def rewards() -> Iterator[Rewards]:
    before = children()
    tables = [
        {"kind": "code", "seconds": 0.7, "tasks": ["block"], "name": "block"},
        {"kind": "code", "seconds": 1.5, "tasks": ["raw"], "name": "raw", "extract": "raw"},
    ]
    with Rewards(read(tables), workers=2) as made:
        yield made
        assert not made.failures
    assert set(children()) <= set(before)


CASES: list[tuple[str, dict[str, Any], str, float]] = [
    ("raw", HUMANEVAL, "    return sum(xs)\n", 1),
    ("raw", HUMANEVAL, "    return sum(xs)\n\n\ndef broken(:\n", 1),  # cut at the next definition
    ("raw", HUMANEVAL, "    return 3\n", 0),
    ("block", HUMANEVAL, block(WHOLE), 1),
    ("block", HUMANEVAL, block("def total(xs):\n    return sum(xs)"), 1),
    ("block", HUMANEVAL, block("    return sum(xs)"), 1),  # the body alone continues the prompt
    ("block", HUMANEVAL, block("def other(xs):\n    return sum(xs)"), 0),
    ("block", HUMANEVAL, block("wrong") + block(WHOLE), 1),  # the last block
    ("block", HUMANEVAL, WHOLE, 0),  # no block
    ("block", HUMANEVAL, f"<think>I count.\n```python\n{WHOLE}```\n", 0),  # never ended thinking
    ("block", HUMANEVAL, block("import sys\nsys.exit(0)"), 0),
    ("block", HUMANEVAL, block("import os\nos._exit(0)"), 0),
    ("block", HUMANEVAL, block("def total(xs):\n    while True: pass"), 0),
    ("block", {"tests": ["assert f(2) == 4", "assert f(0) == 0"]}, block("def f(x): return 2 * x"), 1),
    ("block", {"tests": ["assert f(2) == 4", "assert f(3) == 9"]}, block("def f(x): return 2 * x"), 0),
    ("block", {"io": [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}]},
     block("a, b = map(int, input().split())\nprint(a + b, '')"), 1),
    ("block", {"io": [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}]},
     block("print(3)"), 0),
    ("block", {"io": [{"input": "", "output": "3\n"}]}, block("print(3)\nraise SystemExit"), 1),
    ("block", {"io": [{"input": "", "output": "3\n"}]}, block("print(3)\nraise ValueError"), 0),
]  # fmt: skip


def test_all_forms_of_tests(rewards: Rewards) -> None:
    completions = [said(text, **{**record, "task": task}) for task, record, text, _ in CASES]
    totals = rewards.score(completions)
    wrong = [(case, total.parts) for case, total in zip(CASES, totals, strict=True) if total.value != case[3]]
    assert not wrong and not children_of_sandboxes()


def children_of_sandboxes() -> list[int]:
    """Processes of programs, which all must be gone: workers have no children between jobs."""
    import psutil

    return [
        grandchild.pid
        for child in psutil.Process().children()
        for grandchild in child.children(recursive=True)
    ]


def test_verdicts_say_why(rewards: Rewards) -> None:
    record = {"task": "block", "tests": ["assert f() == 1, 'one is wanted'"]}
    codes = ["def f(): return 2", "def f(): return 1 / 0", "def f(): open('x', 'w')", "def f(:"]
    totals = rewards.score([said(block(code), **record) for code in codes])
    told = [total.parts["block"].verdict["detail"] for total in totals]
    assert told[:3] == ["AssertionError: one is wanted", "ZeroDivisionError: division by zero",
                        "PermissionError: the sandbox forbids open"]  # fmt: skip
    assert told[3].startswith("SyntaxError")


def test_records_must_hold_tests() -> None:
    code = Code()
    assert code.check_record(HUMANEVAL) == code.check_record({"tests": []}) == ""
    assert "`io`" in code.check_record({"prompt": "x", "test": "y"})
    with pytest.raises(ValueError, match=r"entry_point is 'a\.b'"):
        program("x", {**HUMANEVAL, "entry_point": "a.b"})
    with pytest.raises(ValueError, match="the record's tests are empty"):
        program("x", {"tests": []})
