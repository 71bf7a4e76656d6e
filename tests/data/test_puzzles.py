"""The puzzles: every step is true, right answers are accepted, wrong ones not, splits are disjoint."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from itertools import pairwise

import pytest

from hadal.data.puzzles import (
    LANGUAGES,
    TASKS,
    Problem,
    Sample,
    columns,
    conversation,
    is_held_out,
    sample,
    verify,
)
from hadal.data.puzzles.chat import OFF_TOPIC
from hadal.data.puzzles.countdown import LIMIT, check_countdown, makes, needs, search
from hadal.data.puzzles.expression import ExpressionError, evaluate
from hadal.data.puzzles.language import evidence, is_recognisable, words
from hadal.data.puzzles.mixture import task
from hadal.data.puzzles.phrases import (
    arithmetic,
    chains,
    common,
    compare,
    countdown,
    digits,
    equations,
    sequences,
)
from hadal.data.puzzles.phrases.arithmetic import NUMBER_WORDS
from hadal.data.puzzles.sequences import difference
from hadal.data.puzzles.task import bold_value, final_text, numbers_in
from hadal.data.puzzles.wording import readings, slips, without_accents, written

PER_TASK = 600

# A relation between expressions: `4+7+1=12`, `3×6+7=18+7=25`, `425<478`, `123=6×20+3`.
_SIDE = r"[-(]*\d[\d+×÷().-]*"
_RELATION = re.compile(rf"(?<![\w.,×÷+=])({_SIDE}(?:[=<>]{_SIDE})+)")


def relations(text: str) -> list[str]:
    """All relations in a trace, written without spaces (` = ` and ` > ` too)."""
    found = []
    for line in text.splitlines():
        equation = re.search(r"[a-z] [-+÷=]|[-+] \d?[a-z]", line)  # `3x + 7 = 25`, `x = 25 - 7`
        found += _RELATION.findall(line if equation else re.sub(r" ([=<>]) ", r"\1", line))
    return found


def is_true(relation: str) -> bool:
    parts = re.split(r"([=<>])", relation.rstrip(".:"))
    values = [evaluate(side.rstrip(":"))[0] if "." not in side else Fraction(side) for side in parts[::2]]
    compare = {"=": lambda a, b: a == b, "<": lambda a, b: a < b, ">": lambda a, b: a > b}
    return all(compare[sign](a, b) for sign, a, b in zip(parts[1::2], values, values[1:], strict=False))


def test_relations_are_found_and_judged() -> None:
    assert relations("5+8=13 → 3\n4+7+1=12 → 23") == ["5+8=13", "4+7+1=12"]
    assert relations("3×6+7=18+7=25\n-18+5=-(18-5)") == ["3×6+7=18+7=25", "-18+5=-(18-5)"]
    assert relations("425 ? 478: 4=4, 2<7\n425 < 478") == ["4=4", "2<7", "425<478"]
    assert relations("3x = 18\n=141 r 1") == []
    assert is_true("3×6+7=18+7=25") and not is_true("3×6+7=18+7=26") and not is_true("425>478")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Sample]]:
    return {name: [sample(i, 7, name=name) for i in range(PER_TASK)] for name in TASKS}


@pytest.mark.parametrize("name", list(TASKS))
def test_every_written_step_is_true(name: str, drawn: dict[str, list[Sample]]) -> None:
    found = 0
    for made in drawn[name]:
        if name == "comparison" and made.problem.args[2] == ",":
            continue  # decimal commas; the same traces are checked with points
        for relation in relations(made.think):
            found += 1
            assert is_true(relation), (relation, made)
    assert found >= {"chat": 0, "extreme": 0, "sorting": 0, "divisibility": 300}.get(name, PER_TASK // 2)


@pytest.mark.parametrize("name", list(TASKS))
def test_own_answers_pass_and_wrong_ones_fail(name: str, drawn: dict[str, list[Sample]]) -> None:
    for made in drawn[name]:
        assert verify(made, made.completion), made
        assert verify(made, f"<think>\n{made.completion}"), "also with the opening tag"
        assert not verify(made, f"<think>\n{made.think}"), "reasoning alone is no answer"
        assert not verify(made, "</think>\n\nI do not know.")
        value = bold_value(made.answer)
        if name == "chat":
            assert value is None
            assert not verify(made, f"</think>\n\n{made.answer} **42**"), "no value may be claimed"
            continue
        assert value is not None
        assert not verify(made, made.completion.replace("**", "")), "the value must be marked"
        assert not verify(made, f"{made.completion} **{value}**"), "one value only"
        spoiled = (
            re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), value)
            if re.search(r"\d", value)
            else "perhaps"
        )
        assert not verify(made, made.completion.replace(f"**{value}**", f"**{spoiled}**")), (made, spoiled)


@pytest.mark.parametrize("name", list(TASKS))
def test_gold_is_what_arithmetic_says(name: str, drawn: dict[str, list[Sample]]) -> None:
    """The gold values, computed again from the operands by other code."""
    for made in drawn[name]:
        expected = _expected(made.problem)
        if expected is not None:
            assert made.gold == expected, made


def _expected(problem: Problem) -> tuple[str, ...] | None:
    args, kind = problem.args, problem.kind
    match problem.task:
        case "addition":
            return (str(args[0] + args[1]),)
        case "subtraction":
            return (str(args[0] - args[1]),)
        case "multiplication":
            return (str(args[0] * args[1]),)
        case "division":
            q, r = divmod(*args)
            return (str(q), str(r)) if r else (str(q),)
        case "chain":
            return (str(evaluate("".join(args))[0]),)
        case "modular":
            *operands, m = args
            value = operands[0] if kind == "a" else evaluate(f"{operands[0]}{kind}{operands[1]}")[0]
            return (str(value % m),)
        case "comparison" if kind != "is":
            return (str((max if kind == "larger" else min)(args[:2], key=Fraction)),)
        case "comparison":
            larger = Fraction(args[0]) > Fraction(args[1])
            return ("yes", "oui", "sim") if larger else ("no", "non", "não")
        case "extreme":
            return (str((max if kind == "largest" else min)(args)),)
        case "sorting":
            return tuple(map(str, sorted(args, reverse=kind == "down")))
        case "equation":
            form, _, a, b, c, x = args
            left = {
                "x+a": x + a,
                "x-a": x - a,
                "a-x": a - x,
                "ax": a * x,
                "ax+b": a * x + b,
                "ax-b": a * x - b,
            }
            assert (Fraction(x, a) if form == "x/a" else left[form]) == c
            return (str(x),)
        case "digits":
            return (str(args[0])[::-1] if kind == "reverse" else str(sum(map(int, str(args[0])))),)
        case "divisibility":
            if kind == "parity":
                return ("odd", "impair", "ímpar") if args[0] % 2 else ("even", "pair", "par")
            return ("no", "non", "não") if args[0] % args[1] else ("yes", "oui", "sim")
    return None


def test_sequences_continue_by_their_rule(drawn: dict[str, list[Sample]]) -> None:
    for made in drawn["sequence"]:
        terms = [*made.problem.args, int(made.gold[0])]
        steps = [b - a for a, b in pairwise(terms)]
        ratios = {Fraction(b, a) if a else None for a, b in pairwise(terms)}
        rules = {
            "arithmetic": len(set(steps)) == 1,
            "geometric": len(ratios) == 1,
            "squares": len({b - a for a, b in pairwise(steps)}) == 1 and len(set(steps)) > 1,
            "alternating": steps[0] != steps[1] and steps[2:] == steps[:-2],
            "sum": all(a + b == c for a, b, c in zip(terms, terms[1:], terms[2:], strict=False)),
        }
        assert rules[made.problem.kind], made


def test_samples_are_a_pure_function_of_their_coordinates() -> None:
    once = [sample(i, 3, split) for i in range(60) for split in ("train", "held-out")]
    again = [sample(i, 3, split) for i in reversed(range(60)) for split in ("train", "held-out")]
    assert sorted(map(repr, once)) == sorted(map(repr, again))
    assert [conversation(i, 3) for i in range(50)] == [conversation(i, 3) for i in range(50)]
    assert sample(5, 3).prompt != sample(5, 4).prompt or sample(5, 3) != sample(5, 4)
    fixed = sample(0, 0, name="addition", language="en")
    assert (fixed.problem.args, fixed.prompt) == FIXED, (
        "the generators' output has changed: say so in CHANGELOG"
    )


FIXED = ((70554, 26653), "70554 + 26653")


def test_train_and_held_out_are_disjoint() -> None:
    for name in TASKS:
        train = {sample(i, s, "train", name=name).problem.key for i in range(250) for s in (0, 1)}
        held = {sample(i, s, "held-out", name=name).problem.key for i in range(150) for s in (0, 1)}
        assert not train & held
        assert all(map(is_held_out, held)) and not any(map(is_held_out, train))
    talks = [conversation(i, 0, "train") for i in range(800)]
    assert not any(is_held_out(turn.problem.key) for talk in talks for turn in talk.turns)


def test_the_split_does_not_depend_on_wording_or_order() -> None:
    assert sample(0, 0, name="addition", language="en").problem.key == _key_of_swapped(0)
    shares = [is_held_out(f"{a}+{b}") for a in range(200) for b in range(a, 200)]
    assert 0.045 < sum(shares) / len(shares) < 0.055
    assert not is_held_out("core:hello")


def _key_of_swapped(index: int) -> str:
    a, b = sample(index, 0, name="addition", language="en").problem.args
    return f"{min(a, b)}+{max(a, b)}"


def test_all_tasks_languages_and_levels_occur() -> None:
    talks = [conversation(i, 0) for i in range(4000)]
    turns = [turn for talk in talks for turn in talk.turns]
    count = len(turns)
    for name, entry in TASKS.items():
        share = sum(turn.task == name for turn in turns) / count
        assert entry.weight * 0.7 < share < entry.weight * 1.35, (name, share)
    for language, low, high in (("en", 0.35, 0.58), ("fr", 0.2, 0.33), ("pt", 0.2, 0.33)):
        assert low < sum(turn.language == language for turn in turns) / count < high
    levels = [sum(turn.difficulty == level for turn in turns) / count for level in range(3)]
    assert levels[0] > 0.35 and levels[2] > 0.05
    assert 0.09 < sum(len(talk.turns) > 1 for talk in talks) / len(talks) < 0.15
    assert sum(entry.weight for entry in TASKS.values()) == pytest.approx(1.0)


def test_questions_name_their_operands() -> None:
    """Whatever the wording and the slips, the numbers of the problem are all there, in order."""
    for name in ("addition", "multiplication", "division", "modular", "sorting", "sequence"):
        for i in range(300):
            made = sample(i, 11, name=name)
            asked = [int(n) for n in re.findall(r"\d+", made.prompt)]
            if not asked and max(made.problem.args) <= 20:  # in words
                told = [NUMBER_WORDS[made.language].index(word) for word in _number_words(made)]
                assert told == list(made.problem.args)
                continue
            wanted = [abs(a) for a in made.problem.args]
            if name in ("addition", "multiplication", "sorting", "sequence"):
                assert asked == wanted, made
            else:
                assert sorted(asked) == sorted(wanted), made


def _number_words(made: Sample) -> list[str]:
    known = {without_accents(word): word for word in NUMBER_WORDS[made.language]}
    said = re.findall(r"[a-z-]+", without_accents(made.prompt).lower())
    return [known[word] for word in said if word in known]


def test_no_prompt_or_trace_holds_a_control_token() -> None:
    for i in range(2000):
        for turn in conversation(i, 2).turns:
            assert "<" not in turn.prompt.replace("< ", "").replace("<3", "") or turn.task in (
                "comparison",
                "chat",
            )
            assert "｜" not in turn.prompt + turn.think + turn.answer
            assert "think>" not in turn.prompt + turn.think + turn.answer
            assert "[" not in turn.prompt or turn.task in ("sorting", "extreme", "countdown"), turn.prompt
            assert "{" not in turn.prompt + turn.answer and "}" not in turn.prompt + turn.answer


WORDINGS = [
    common.EXPRESSION, arithmetic.ADD, arithmetic.SUBTRACT, arithmetic.MULTIPLY, arithmetic.DIVIDE,
    chains.MODULAR,
    compare.LARGER, compare.SMALLER, compare.EXTREME, compare.SORT_UP, countdown.COUNTDOWN, digits.REVERSE,
    digits.DIGIT_SUM, digits.PARITY, digits.DIVISIBLE, equations.EQUATION, sequences.SEQUENCE, OFF_TOPIC,
]  # fmt: skip


def test_wording_is_wide() -> None:
    for wording in WORDINGS:
        assert set(wording) == set(LANGUAGES)
        for language, templates in wording.items():
            own = templates + (
                common.EXPRESSION[language] if "{a}" in templates[0] and "{b}" in templates[0] else ()
            )
            assert len(set(own)) >= 12, templates[0]
            assert len({reading for template in templates for reading in readings(template)}) >= 20
            for template in templates:
                assert template.count("[") == template.count("]") and template.count("{") == template.count(
                    "}"
                )


def test_the_language_of_an_answer_can_be_told_from_the_question() -> None:
    assert not {"compare", "plus", "max", "paris"} & set().union(*evidence().values())
    assert "what" in evidence()["en"] and "combien" in evidence()["fr"] and "quanto" in evidence()["pt"]
    assert is_recognisable("Quel est 3 + 4", "fr") and not is_recognisable("3 x 4 = ?", "fr")
    answered: dict[str, str] = {}
    for i in range(4000):
        made = sample(i, 1)
        assert answered.setdefault(" ".join(words(made.prompt)), made.language) == made.language, made
        assert made.language == "en" or is_recognisable(made.prompt, made.language)
    for language in LANGUAGES:
        for name in TASKS:
            made = sample(1, 1, name=name, language=language)
            assert made.language == language
    for i in range(1500):
        for before, turn in pairwise(conversation(i, 1).turns):
            bare = not any(is_recognisable(turn.prompt, language) for language in LANGUAGES)
            assert not bare or turn.language == before.language


def test_readings() -> None:
    assert readings("a[b|c]") == ("ab", "ac")
    assert readings("[Hi|] {e}") == ("Hi {e}", " {e}")
    assert without_accents("Ça fait 3 × 4 ÷ 2 ?") == "Ca fait 3 × 4 ÷ 2 ?"


def test_slips_never_touch_a_number() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        text = slips(rng, "What is 1234 + 567?", "en")
        assert re.findall(r"\d+", text) == ["1234", "567"]
        assert written(rng, ["12", "-", "30"]).replace(" ", "").replace("−", "-") == "12-30"


# ---- column arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_columns_end_in_the_result(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(700):
        a, b = rng.randrange(10 ** rng.randint(1, 6)), rng.randrange(10 ** rng.randint(1, 6))
        d = rng.randrange(1, 26)
        for lines, result in (
            (columns.add(a, b), f"{a + b}"),
            (columns.subtract(a, b), f"{a - b}"),
            (columns.multiply(a, b), f"{a * b}"),
            (columns.signed(-a, "+", b), f"{b - a}"),
            (columns.signed(-a, "-", b), f"{-a - b}"),
            (columns.signed(a, "-", b), f"{a - b}"),
        ):
            assert lines[-1].endswith(f"={result}"), lines
            assert all(is_true(r) for line in lines for r in relations(line)), lines
        assert columns.divide(a, d)[-1] == f"={a // d} r {a % d}"


def test_a_worked_addition() -> None:
    assert columns.add(345, 78) == ["345+078:", "5+8=13 → 3", "4+7+1=12 → 23", "3+0+1=4 → 423", "=423"]
    assert columns.subtract(423, 78) == [
        "423 ? 078: 4>0", "423-078:", "13-8=5 → 5", "12-7-1=4 → 45", "4-0-1=3 → 345", "=345",
    ]  # fmt: skip
    assert columns.times_digit(347, 6) == [
        "347×6:", "7×6=42 → 2", "4×6=24, 24+4=28 → 82", "3×6=18, 18+2=20 → 2082", "=2082",
    ]  # fmt: skip
    assert columns.divide(847, 6)[1:] == [
        "8: 1×6=6, 8-6=2 → 1", "24: 4×6=24, 24-24=0 → 14", "7: 1×6=6, 7-6=1 → 141", "=141 r 1",
    ]  # fmt: skip
    assert columns.compare(425, 478) == "425 ? 478: 4=4, 2<7"


# ---- verifiers ---------------------------------------------------------------------------------------


def test_expressions() -> None:
    assert evaluate("(6 × 4) + 7") == (Fraction(31), [6, 4, 7])
    assert evaluate("2+3*4-10/4") == (Fraction(23, 2), [2, 3, 4, 10, 4])
    assert evaluate("-(2-5)")[0] == 3
    for bad in (
        "",
        "2+",
        "2**3",
        "97**98**99",
        "(2",
        "2)",
        "1/0",
        "a+1",
        "2 3",
        "1" * 13,
        "1+" * 150 + "1",
        "(" * 30,
    ):
        with pytest.raises(ExpressionError):
            evaluate(bad)


def test_countdown_takes_any_right_expression() -> None:
    problem = Problem("countdown", "3", ((6, 4, 7), 31), "k", 0, ("31",))
    for good in ("**6 × 4 + 7**", "**7+4*6 = 31**", "**(6 × 4) + 7 = 31**"):
        assert check_countdown(problem, "en", good)
    for bad in (
        "6 × 4 + 7",  # not marked
        "**31**",  # 31 is none of the numbers
        "**6 × 4 + 6 + 1**",  # 6 twice, 1 unknown
        "**7 + 6 × 4 = 32**",  # says another target
        "**6 × 4**",  # misses the target
        "**6 ** 4**",
        "**6 × 4 + 7** or **7 + 24**",
    ):
        assert not check_countdown(problem, "en", bad), bad
    fewer = Problem("countdown", "3", ((6, 4, 7), 24), "k", 0, ("24",))
    assert check_countdown(fewer, "en", "**6 × 4 = 24**"), "a number may be left out"


def test_countdown_lists() -> None:
    assert makes(4, 6) == {10: "6+4", 2: "6-4", 24: "6×4"}
    assert makes(6, 3) == {9: "6+3", 3: "6-3", 18: "6×3", 2: "6÷3"}
    assert needs(31, 7) == {24: ("31-7", "{}+7"), 38: ("31+7", "{}-7")}
    assert needs(12, 3)[4] == ("12÷3", "{}×3") and needs(12, 3)[36] == ("12×3", "{}÷3")


def test_countdown_search_is_complete_for_three_numbers() -> None:
    """Every target that three numbers reach with whole, positive steps up to the limit is found."""
    rng = random.Random(1)
    for _ in range(60):
        numbers = tuple(rng.randint(1, 20) for _ in range(3))
        for target in set(range(2, 100)) - set(numbers):
            reachable = _reachable(numbers, target)
            _, found = search(numbers, target)
            assert (found is not None) == reachable, (numbers, target, found)
            if found:
                assert evaluate(found)[0] == target


def _reachable(numbers: tuple[int, ...], target: int) -> bool:
    """Brute force: two numbers make a positive whole value, the third is used with it."""
    for k in range(3):
        a, b = (n for i, n in enumerate(numbers) if i != k)
        c, big, small = numbers[k], max(a, b), min(a, b)
        made = {
            a + b,
            big - small,
            *([a * b] if a * b <= LIMIT else []),
            *([] if big % small else [big // small]),
        }
        for v in made - {0}:
            last = {v, v + c, abs(v - c), v * c}
            last |= ({v // c} if v % c == 0 and v <= LIMIT else set()) | ({c // v} if c % v == 0 else set())
            if target in last:
                return True
    return False


def test_reading_answers() -> None:
    assert final_text("a</think>b</think> c ") == "c"
    assert final_text("<think>\nnever ends") == ""
    assert final_text("plain") == "plain"
    assert bold_value("a **5** b") == "5" and bold_value("**5** **6**") is None and bold_value("5") is None
    assert numbers_in("−5, 3,14 and 2.5; 7, 8") == ("-5", "3.14", "2.5", "7", "8")


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'addition'"):
        task("additon")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        sample(0, 0, "test")
    with pytest.raises(ValueError, match="unknown language 'de'"):
        sample(0, 0, language="de")


def test_differences_are_worked_out_digit_by_digit() -> None:
    assert difference(69, 81) == "69 < 81: 11-9=2 8-6-1=1 → +12"
    assert difference(1024, 994) == "1024 > 994: 4-4=0 12-9=3 10-9-1=0 1-0-1=0 → -30"
    assert difference(3, 3) == "3 = 3: 3-3=0 → +0"
    for a in range(0, 1100, 7):
        for b in (0, 9, 99, 100, 101, 999, 1000, a):
            digits = re.findall(r"=(\d)", solved := difference(a, b))
            assert int("".join(reversed(digits))) == abs(a - b) and solved.endswith(f" {b - a:+d}")


def test_a_kind_of_a_task_can_be_asked_for() -> None:
    for i in range(40):
        assert conversation(i, 1, name="countdown/4").turns[0].problem.kind == "4"
        assert conversation(i, 1, name="divisibility").turns[0].task == "divisibility"
        assert sample(i, 1, "held-out", name="chat/off-topic").problem.kind == "off-topic"
    with pytest.raises(ValueError, match="did you mean 'countdown'"):
        sample(0, 0, name="countdwn/4")
