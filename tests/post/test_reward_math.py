"""Mathematical answers by math-verify in locked workers; hostile ones neither hang nor escape nor score."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hadal.post.rewards import Rewards, read, sandbox
from tests.post.helpers import children, said

pytest.importorskip("math_verify", reason="needs the extra rl")
if not sandbox.guarantees()["seccomp"]:
    pytest.skip("needs Linux with seccomp, for locked workers", allow_module_level=True)


@pytest.fixture(scope="module")
def rewards() -> Iterator[Rewards]:
    before = children()
    with Rewards(read([{"kind": "math", "timeout": 1.2}]), workers=1) as made:
        yield made
    assert set(children()) <= set(before)


EQUAL = [
    ("0.5", "1/2"),
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    ("1,234", "1234"),
    ("x=5", "5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"(x+1)^2", "x^2+2x+1"),
    (r"\{2, 1\}", r"\{1,2\}"),
    (r"5\text{ cm}", "5"),
    ("B", "B"),
]
UNEQUAL = [
    ("1/3", "1/2"),
    ("x", "1/2"),
    ("", "1/2"),
    ("1 or 2", "2"),
    ("97^{98^{99}}", "5"),
    ("97**98**99", "5"),
    ("9^{99999}", "5"),
    ("((1000!)!)!", "5"),
    ("(" * 100 + "5" + ")" * 100, "5"),
    ("5" * 300, "5"),
    ("5+" * 400 + "5", "5"),
    ("10^{9999}", "5"),
    ("__import__('os').system('true')", "0"),
]


def test_equal_and_unequal_answers(rewards: Rewards) -> None:
    rows = EQUAL + UNEQUAL
    started = time.monotonic()
    totals = rewards.score([said(f"so \\boxed{{{answer}}}.", answer=gold) for answer, gold in rows])
    wrong = [(row, total) for row, total in zip(rows, totals, strict=True) if total.value != (row in EQUAL)]
    assert not wrong and not rewards.failures and time.monotonic() - started < 30


@pytest.mark.parametrize("gold", ["", "???", "\\frac{1}{", "97^{98^{99}}", "5" * 600])
def test_a_gold_that_cannot_be_read_never_scores(rewards: Rewards, gold: str) -> None:
    total = rewards.score([said(f"\\boxed{{{gold}}}", answer=gold)])[0]
    assert total.value == 0 and "the record's answer" in total.parts["math"].failed


def test_what_takes_too_long_is_killed_and_the_rest_goes_on(rewards: Rewards) -> None:
    slow = said(r"\boxed{\int_0^1 e^{-x^{x^{x}}} dx}", answer="5")
    totals = rewards.score([slow, said(r"\boxed{5}", answer="5")])
    assert totals[0].parts["math"].failed == "took too long" and totals[1].value == 1.0
    assert rewards.failures["math: took too long"] == 1


def test_any_of_several_golds_and_other_rules() -> None:
    table = {"kind": "math", "extract": ["boxed", "last-number"]}
    with Rewards(read([table]), workers=1) as mine:
        totals = mine.score(
            [
                said("it is 7", answer=["5", "7"]),
                said("no number", answer="7"),
                said("7</think>8", answer="7"),
            ]
        )
    assert [total.value for total in totals] == [1.0, 0.0, 0.0]


def test_a_locked_worker_has_no_way_out(rewards: Rewards, tmp_path: Path) -> None:
    """What a verifier that evaluates its input could be made to do; told by the worker itself."""
    from hadal.post.rewards.pool import Job, Plan, Pool

    names = ("opens_a_socket", "forks", "asks_a_program", "hangs")
    plan = Plan(
        tuple(("custom", {"function": f"tests.post.bad_rewards:{name}"}) for name in names), True, 4096
    )
    completion = said("x", folder=str(tmp_path))
    with Pool(plan, 1) as pool:
        scores = pool.run([Job(number, completion, 2.0) for number in range(len(names))])
    assert all("PermissionError" in score.failed for score in scores), scores  # `hangs` writes a file first
    assert not list(tmp_path.iterdir())
