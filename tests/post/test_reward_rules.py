"""Rewards by rule: Countdown, equations, puzzles, form, length; extraction; strict tables; the sum."""

from __future__ import annotations

import json
import math
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.data.puzzles import TASKS, sample
from hadal.data.puzzles.expression import evaluate as evaluate_puzzle
from hadal.post.rewards import Completion, RewardError, Rewards, read
from hadal.post.rewards.arithmetic import ArithmeticRefused, evaluate
from hadal.post.rewards.custom import Custom
from hadal.post.rewards.protocol import Score, in_range
from hadal.post.rewards.rules import as_record, from_record
from hadal.post.rewards.text import extract, split
from tests.post.helpers import one, said

# ---- text ----


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer", "closed"),
    [
        ("<think>a</think>b", False, "a", "b", True),
        ("a</think>b", True, "a", "b", True),
        ("a</think>b</think>c", True, "a</think>b", "c", True),
        ("never ends", True, "never ends", "", False),
        ("<think>never ends", False, "never ends", "", False),
        ("just an answer", False, "", "just an answer", False),
        ("", True, "", "", False),
    ],
)
def test_split(text: str, opened: bool, reasoning: str, answer: str, closed: bool) -> None:
    parts = split(said(text, opened=opened))
    assert (parts.reasoning, parts.answer, parts.closed) == (reasoning, answer, closed)


@pytest.mark.parametrize(
    ("rule", "text", "value"),
    [
        ("boxed", r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} then \boxed{2", "1"),
        ("boxed", r"\fbox{7}", "7"),
        ("boxed", r"\boxed{a \boxed{b}} }", "b"),
        ("boxed", "boxed{7}", None),
        ("bold", "so **12 + 3 = 15**.", "12 + 3 = 15"),
        ("bold", "**1** or **2**", None),
        ("tag", "<answer> 5\n</answer>", "5"),
        ("tag", "<answer>5</answer><answer>6</answer>", None),
        ("hashes", "2 and 2\n#### 1,234", "1234"),
        ("last-number", "3 apples, -1,234.5 pears", "-1234.5"),
        ("last-number", "it is 3/4", "3/4"),
        ("last-number", "none", None),
        ("last-line", "a\nb\n", "b"),
        ("all", " x ", "x"),
    ],
)
def test_rules_of_extraction(rule: str, text: str, value: str | None) -> None:
    found = extract(text, [rule])
    assert (found and found[0]) == value


def test_the_first_rule_that_finds_counts() -> None:
    assert extract("**3**, so 4", ["boxed", "bold", "last-number"]) == ("3", "bold")


def test_extraction_is_quick_on_hostile_text() -> None:
    started = time.thread_time()
    for text in ("\\boxed{" * 5000, "{" * 20000, "*" * 20000, "<answer>" * 5000, "1," * 10000, "#" * 20000):
        extract(text, ["boxed", "bold", "tag", "hashes", "last-number"])
    assert time.thread_time() - started < 5


# ---- arithmetic ----

_SUM = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/×÷"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
    max_leaves=8,
)


@given(_SUM)
def test_the_walker_agrees_with_the_puzzles_parser(text: str) -> None:
    """Two readers that share nothing: Python's tree here, a parser by hand there."""
    try:
        wanted = evaluate_puzzle(text)
    except ValueError:
        with pytest.raises(ArithmeticRefused):
            evaluate(text)
        return
    got = evaluate(text)
    assert (got.value, got.numbers) == (wanted[0], [Fraction(n) for n in wanted[1]])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("97**98**99", "Pow"),
        ("9//2", "FloorDiv"),
        ("2^9", "a character"),
        ("1e9", "not decimal"),
        ("1e999999", "not decimal"),
        ("0x10", "not decimal"),
        ("2j", "Constant"),
        ("__import__('os')", "a character"),
        ("(1).real", "Attribute|no expression"),
        ("print(1)", "Call"),
        ("3(4)", "Call"),
        ("x", "Name"),
        ("1 if 1 else 2", "IfExp"),
        ("lambda", "no expression"),
        ("1, 2", "a character"),
        ("", "no expression"),
        ("1/(2-2)", "divides by zero"),
        ("007", "no expression"),
        ("9" * 16, "more than 15 digits"),
        ("(" * 140 + "1" + ")" * 140 + "+", "no expression"),
        ("-" * 250 + "1", "nested deeper than 100"),
        ("1+" * 140 + "1", "nested deeper than 100"),
        ("1" * 301, "301 characters"),
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str, why: str) -> None:
    started = time.thread_time()
    with pytest.raises(ArithmeticRefused, match=why):
        evaluate(text)
    assert time.thread_time() - started < 1


def test_print_and_latex() -> None:
    assert evaluate(r"$3 \times \frac{1}{4} − 0.5$").value == Fraction(1, 4)
    assert evaluate("[2 + 3] · 4 ÷ 2").value == 10


# ---- Countdown ----


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("<answer>(25 - 5) * 4</answer>", 1),
        ("**(25 − 5) × 4 = 80**", 1),
        (r"\boxed{4*25-5*4}", 0),  # 4 twice
        ("<answer>80</answer>", 0),
        ("<answer>(25-5)*4 = 81</answer>", 0),
        ("<answer>25*4-20</answer>", 0),
        ("<answer>25*4</answer>", 0),
        ("<answer>(25-5)*4+0</answer>", 0),
        ("(25-5)*4", 0),  # not where an answer belongs
        ("<answer>(25-5)**4</answer>", 0),
        ("<answer>4*(25-5.0)</answer>", 1),  # the same number
    ],
)
def test_countdown(answer: str, value: float) -> None:
    completion = said(f"try</think>{answer}", opened=True, numbers=[4, 5, 25], target=80)
    assert one({"kind": "countdown"}, completion).value == value


def test_countdown_may_leave_numbers_out_where_the_recipe_says_so() -> None:
    completion = said("**5 × 4 = 20**", numbers=[4, 5, 25], target=20)
    assert one({"kind": "countdown"}, completion).value == 0
    assert one({"kind": "countdown", "uses": "some"}, completion).value == 1
    twice = said("**5 × 5 = 25**", numbers=[4, 5, 25], target=25)
    assert one({"kind": "countdown", "uses": "some"}, twice).value == 0


# ---- equations ----


@pytest.mark.parametrize(
    ("equation", "answer", "value"),
    [
        ("3x + 5 = 20", "**x = 5**", 1),
        ("3x + 5 = 20", "**5**", 1),
        ("3x + 5 = 20", r"\boxed{10/2}", 1),
        ("3x + 5 = 21", r"\boxed{\frac{16}{3}}", 1),
        ("3x + 5 = 21", "**5.333333**", 0),
        ("2(x + 1) = x/2 + 5", "**x = 2**", 1),
        ("x + y = 7", "**x = 3, y = 4**", 1),
        ("x + y = 7", "**x = 3**", 0),
        ("x + y = 7", "**x = 3, x = 4**", 0),
        ("1/x = 2", "**0**", 0),
        ("x = 4", "**x = x**", 0),
        ("x = 4", "so it is 4", 1),
    ],
)
def test_equations(equation: str, answer: str, value: float) -> None:
    assert one({"kind": "equation"}, said(answer, equation=equation)).value == value


def test_an_equation_that_is_none_is_the_records_fault() -> None:
    with Rewards(read([{"kind": "equation"}])) as rewards:
        total = rewards.score([said("**5**", equation="3 + 5")])[0]
        assert total.value == 0 and rewards.failures == {"equation: raised RewardError": 1}


# ---- the mini's puzzles ----


def test_puzzles_survive_json_and_are_judged_alike() -> None:
    with Rewards(read([{"kind": "puzzle"}])) as rewards:
        for name in TASKS:
            for index in range(12):
                made = sample(index, 3, name=name)
                record = json.loads(json.dumps({"puzzle": as_record(made)}))
                assert from_record(record["puzzle"]) == (made.problem, made.language)
                right = Completion(record, made.completion, 1, opened=True)
                wrong = Completion(record, made.completion.replace("**", ""), 1, opened=True)
                endless = Completion(record, made.completion.replace("</think>", ""), 1, opened=True)
                values = [total.value for total in rewards.score([right, wrong, endless])]
                assert values == ([1, 1, 0] if name == "chat" else [1, 0, 0]), (name, made)
        assert not rewards.failures


# ---- form ----


@pytest.mark.parametrize(
    ("text", "opened", "style", "value"),
    [
        ("<think>a</think>b", False, "think", 1),
        ("  <think>\na\n</think>\n\nb", False, "think", 1),
        ("a</think>b", True, "think", 1),  # the template has put the opening tag there
        ("a</think>b", False, "think", 0),
        ("<think>a</think>b", True, "think", 0),  # one too many
        ("<think>a</think>", False, "think", 0),
        ("<think> </think>b", False, "think", 0),
        ("<think>a", False, "think", 0),
        ("b", False, "think", 0),
        ("b <think>a</think>", False, "think", 0),
        ("</think>a<think>", False, "think", 0),
        ("<think>a</think>b</think>c", False, "think", 0),
        ("a</think> <answer>b</answer>\n", True, "think-answer", 1),
        ("a</think> so <answer>b</answer>", True, "think-answer", 0),
        ("a</think><answer>b</answer><answer>c</answer>", True, "think-answer", 0),
        ("a</think><answer> </answer>", True, "think-answer", 0),
        ("a</think>b", True, "think-answer", 0),
    ],
)
def test_form(text: str, opened: bool, style: str, value: float) -> None:
    assert one({"kind": "format", "style": style}, said(text, opened=opened)).value == value


def test_what_was_cut_off_has_no_form() -> None:
    total = one({"kind": "format"}, said("<think>a</think>b", cut=True))
    assert total.value == 0 and total.parts["format"].verdict == {"why": "cut off"}


# ---- length ----


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0), (16, 0), (17, -0.25), (18, -0.5), (20, -1), (21, -1), (99, -1)]
)
def test_overlong_is_dapos_formula(tokens: int, value: float) -> None:
    """R(y) = 0 | ((L_max − L_cache) − |y|) / L_cache | −1, with L_max 20 and L_cache 4."""
    assert one({"kind": "overlong", "max_tokens": 20, "cache": 4}, said("x", tokens=tokens)).value == value


def test_cosine_depends_on_being_right() -> None:
    tables = [
        {"kind": "equation", "weight": 0.0},
        {"kind": "cosine", "of": "equation", "max_tokens": 100, "right": [2.0, 1.0], "wrong": [-10.0, 0.0],
         "exceeded": -10.0},
    ]  # fmt: skip

    def value(answer: str, tokens: int, cut: bool = False) -> float:
        with Rewards(read(tables)) as rewards:
            return rewards.score([said(answer, tokens=tokens, cut=cut, equation="x = 4")])[0].value

    assert [value("**4**", n) for n in (0, 50, 100)] == pytest.approx([2.0, 1.5, 1.0])
    assert [value("**5**", n) for n in (0, 50, 100)] == pytest.approx([-10.0, -5.0, 0.0])
    assert value("**4**", 25) == pytest.approx(1 + (1 + math.cos(math.pi / 4)) / 2)
    assert value("**4**", 101) == value("**4**", 100, cut=True) == -10.0


# ---- tables and sums ----


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"reward\[0\]: it lacks 'kind'; kinds: math, "),
        ({"kind": "cowntdown"}, "there is no reward 'cowntdown'; did you mean 'countdown'"),
        ({"kind": "format", "wieght": 2}, "unknown key 'wieght' of the reward format. Did you mean 'weight'"),
        ({"kind": "format", "styl": "x"}, "Did you mean 'style'"),
        ({"kind": "format", "style": "x"}, "reward.0.: style is 'x'; it must be \"think\" or"),
        ({"kind": "format", "weight": "2"}, "weight is '2'; float is wanted"),
        ({"kind": "countdown", "extract": ["bald"]}, "extract names 'bald'; rules: boxed, bold"),
        ({"kind": "countdown", "extract": []}, "extract is empty"),
        ({"kind": "overlong", "max_tokens": 10}, "lacks 'cache'"),
        ({"kind": "overlong", "max_tokens": 10, "cache": 11}, r"cache is 11; it must be in 1\.\.10"),
        (
            {"kind": "cosine", "of": "math", "max_tokens": 9},
            "of is 'math'; it must name a reward above: none",
        ),
        ({"kind": "format", "since": 0.5, "until": 0.5}, "shares of the run, in order"),
        ({"kind": "language", "target": "de"}, "target is 'de'; it must be one of record, prompt, en"),
        ({"kind": "custom", "function": "os.system"}, 'of the form "package.module:name"'),
        ({"kind": "code", "isolation": "none"}, 'isolation is \'none\'; it must be "seccomp" or "limits"'),
    ],
)
def test_errors_of_tables_teach(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        read([table])


def test_values_outside_of_the_range_are_failures() -> None:
    for value in (math.nan, math.inf, -1e-9, 1.1, 10**400, 10**9999, "x" * 999):
        failed = in_range(Score(value), 0.0, 1.0).failed  # type: ignore[arg-type]
        assert failed.startswith("gave what is not in [0, 1]: ") and len(failed) < 120
    assert in_range(Score(True), 0.0, 1.0) == Score(1.0)


def test_a_function_of_ones_own_is_held_to_its_form() -> None:
    with pytest.raises(RewardError, match="the verdict is 'because'; a dict is wanted"):
        Custom("tests.post.bad_rewards:gives_words")(said("x"), {})
    with pytest.raises(RewardError, match="No module named 'nowhere_at_all'; modules are looked for in"):
        Custom("nowhere_at_all:f").prepare()


def test_no_table_and_equal_names() -> None:
    with pytest.raises(RewardError, match=r"no \[\[reward\]\]"):
        read([])
    with pytest.raises(RewardError, match=r"reward\[1\]: the name 'format' is taken"):
        read([{"kind": "format"}, {"kind": "format"}])


def test_tables_go_round() -> None:
    tables = [
        {"kind": "countdown", "weight": 2, "tasks": ["a"]},
        {"kind": "overlong", "max_tokens": 8, "cache": 4},
    ]
    recipes = read(tables)
    again = read(json.loads(json.dumps([one.to_dict() for one in recipes])))
    assert [one.to_dict() for one in again] == [one.to_dict() for one in recipes]


def test_the_sum_is_weighted_and_follows_tasks_and_progress() -> None:
    tables = [
        {"kind": "countdown", "weight": 2.0, "tasks": ["count"]},
        {"kind": "equation", "tasks": ["solve"]},
        {"kind": "format", "weight": 0.5},
        {"kind": "overlong", "max_tokens": 10, "cache": 10, "weight": 0.1, "since": 0.5},
    ]
    count = said("a</think>**1 + 2**", tokens=5, opened=True, task="count", numbers=[1, 2], target=3)
    solve = said("a</think>**4**", tokens=5, opened=True, task="solve", equation="x = 5")
    with Rewards(read(tables)) as rewards:
        early = rewards.score([count, solve], progress=0.4)
        late = rewards.score([count, solve], progress=0.5)
    assert [total.value for total in early] == [2.5, 0.5]
    assert [total.value for total in late] == pytest.approx([2.45, 0.45])
    assert [total.accuracy for total in late] == [1.0, 0.0]
    assert list(late[0].parts) == ["countdown", "format", "overlong"]  # the recipe's order
    assert "overlong" not in early[0].parts


def test_records_are_held_against_their_rewards() -> None:
    with Rewards(read([{"kind": "countdown", "tasks": ["count"]}])) as rewards:
        rewards.check([{"task": "count", "numbers": [1], "target": 1}])
        with pytest.raises(RewardError, match="record 1 lacks `target`, which the reward countdown needs"):
            rewards.check([{"task": "count", "numbers": [1], "target": 1}, {"task": "count", "numbers": []}])
        with pytest.raises(RewardError, match="record 0 \\(task 'other'\\) has no reward"):
            rewards.check([{"task": "other"}])
        total = rewards.score([said("x", task="count")])[0]
        assert total.parts["countdown"].failed == "the record lacks `numbers`, `target`"
    with pytest.raises(RewardError, match="lacks `tests`, or `io`, or"):
        read([{"kind": "code"}])[0].reward and _check_code()


@pytest.mark.parametrize(
    ("kind", "record", "why"),
    [
        ("countdown", {"numbers": [1, "two"], "target": 3}, "numbers [1, 'two'] and target 3 are no numbers"),
        ("countdown", {"numbers": 12, "target": 3}, "numbers 12 and target 3 are no numbers"),
        ("equation", {"equation": "3x + 5"}, "the record's equation is '3x + 5'; one = and an unknown"),
        ("equation", {"equation": "f(x) ? 2 = 5"}, "it holds a character that arithmetic has no use for"),
        ("puzzle", {"puzzle": {"task": "addition"}}, "the record's puzzle lacks 'kind'"),
        ("code", {"io": [{"input": 1, "output": "1"}]}, "the record's io is [{'input': 1, 'output': '1'}]"),
        ("code", {"tests": []}, "the record's tests are empty"),
    ],
)
def test_what_cannot_be_read_is_told_before_anything_is_judged(
    kind: str, record: dict[str, Any], why: str
) -> None:
    (one,) = read([{"kind": kind}])
    found = one.reward.check_gold(record)  # type: ignore[attr-defined]
    assert why in found
    if one.reward.where == "here":
        with Rewards([one]) as rewards, pytest.raises(RewardError) as caught:
            rewards.check_set([("a.jsonl, line 7", record)])
        where = f"a.jsonl, line 7: {found} (reward {kind})"
        assert str(caught.value) == f"{where}; mend such lines, or leave them out"


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("countdown", {"numbers": ["1/2", 3], "target": "1.5"}),
        ("equation", {"equation": "1/(x - 1) = 2"}),
        ("code", {"io": [{"input": "", "output": "1"}]}),
        ("code", {"tests": ["assert f() == 1"]}),
    ],
)
def test_what_can_be_read_is_taken(kind: str, record: dict[str, Any]) -> None:
    assert not read([{"kind": kind}])[0].reward.check_gold(record)  # type: ignore[attr-defined]


def _check_code() -> None:
    recipe = read([{"kind": "code"}])[0]
    missing = recipe.lacks({"prompt": "x"})
    raise RewardError(f"lacks {missing}")


def test_a_broken_rule_is_a_failure_and_no_crash() -> None:
    with Rewards(read([{"kind": "countdown"}])) as rewards:
        total = rewards.score([said("**1**", numbers=["one"], target=1)])[0]
    assert total.parts["countdown"].failed.startswith("raised ValueError")
