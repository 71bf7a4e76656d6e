"""Countdown: reach a target with + − × ÷, each number at most once.

The search is complete and short. For three numbers: what two of them make, against what the third would
need from them; equal entries are the solution.

    6,4: 6+4=10 6-4=2 6×4=24
    7 → 31: 31-7=24 31+7=38
    24 ✓

Three such tries settle it. For four numbers: what one pair makes, against what it needs from the other.
A list that holds the target itself is a solution too: numbers may be left out.
"""

from __future__ import annotations

import random
from collections import Counter

from hadal.data.puzzles.expression import ExpressionError, evaluate
from hadal.data.puzzles.phrases.countdown import COUNTDOWN
from hadal.data.puzzles.task import Problem, Solution, bold_value, pick
from hadal.data.puzzles.wording import listed, phrase, slips

LIMIT = 200  # no product beyond it is written down

Made = dict[int, str]  # value -> how it is made

PAIRS_OF_THREE = ((0, 1, 2), (0, 2, 1), (1, 2, 0))
PAIRS_OF_FOUR = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))


def makes(a: int, b: int) -> Made:
    """What two numbers give: sum, difference, product, whole quotient, larger number first."""
    a, b = max(a, b), min(a, b)
    made = {a + b: f"{a}+{b}"}
    if a > b:
        made.setdefault(a - b, f"{a}-{b}")
    if b > 1 and a * b <= LIMIT:
        made.setdefault(a * b, f"{a}×{b}")
    if b > 1 and a % b == 0:
        made.setdefault(a // b, f"{a}÷{b}")
    return made


def needs(target: int, n: int) -> dict[int, tuple[str, str]]:
    """Values v that reach the target with n: v -> (how v is found, the last step with `{}` for v)."""
    found: dict[int, tuple[str, str]] = {}
    if target > n:
        found[target - n] = (f"{target}-{n}", f"{{}}+{n}")
    elif n > target:
        found[n - target] = (f"{n}-{target}", f"{n}-{{}}")
    found.setdefault(target + n, (f"{target}+{n}", f"{{}}-{n}"))
    if n > 1 and target % n == 0:
        found.setdefault(target // n, (f"{target}÷{n}", f"{{}}×{n}"))
    if n > 1 and n % target == 0:
        found.setdefault(n // target, (f"{n}÷{target}", f"{n}÷{{}}"))
    if n > 1 and target * n <= LIMIT:
        found.setdefault(target * n, (f"{target}×{n}", f"{{}}÷{n}"))
    return found


def search(numbers: tuple[int, ...], target: int) -> tuple[list[str], str | None]:
    """All tries as lines, and the expression found (None if this search finds none)."""
    return _three(numbers, target) if len(numbers) == 3 else _four(numbers, target)


def _three(numbers: tuple[int, ...], target: int) -> tuple[list[str], str | None]:
    lines: list[str] = []
    for i, j, k in PAIRS_OF_THREE:
        made, needed = makes(numbers[i], numbers[j]), needs(target, numbers[k])
        lines.append(f"{numbers[i]},{numbers[j]}: {' '.join(f'{how}={v}' for v, how in made.items())}")
        if target in made:
            return [*lines, f"{target} ✓"], made[target]
        lines.append(f"{numbers[k]}: {' '.join(f'{how}={v}' for v, (how, _) in needed.items())}")
        common = [v for v in needed if v in made]
        if common:
            v = common[0]
            last = needed[v][1]
            lines += [f"{v} ✓", f"{made[v]}={v}", f"{last.format(v)}={target}"]
            return lines, last.format(f"({made[v]})")
        lines[-1] += " ✗"
    return lines, None


def _four(numbers: tuple[int, ...], target: int) -> tuple[list[str], str | None]:
    lines: list[str] = []
    for i, j, k, m in PAIRS_OF_FOUR:
        made, other = makes(numbers[i], numbers[j]), makes(numbers[k], numbers[m])
        lines.append(f"{numbers[i]},{numbers[j]}: {' '.join(f'{how}={v}' for v, how in made.items())}")
        if target in made:
            return [*lines, f"{target} ✓"], made[target]
        lines.append(f"{numbers[k]},{numbers[m]}: {' '.join(f'{how}={v}' for v, how in other.items())}")
        if target in other:
            return [*lines, f"{target} ✓"], other[target]
        for n, how in other.items():
            needed = needs(target, n)
            lines.append(f"{n}: {' '.join(f'{way}={v}' for v, (way, _) in needed.items())}")
            common = [v for v in needed if v in made]
            if common:
                v = common[0]
                last = needed[v][1]
                lines += [f"{v} ✓", f"{made[v]}={v}", f"{how}={n}", f"{last.format(v)}={target}"]
                return lines, _bracketed(last, made[v], how, n)
            lines[-1] += " ✗"
    return lines, None


def _bracketed(last: str, made: str, other: str, n: int) -> str:
    """`{}+7` with 7 = 3+4 → `(made)+(3+4)`; n stands first or last in the last step."""
    if last.startswith("{}"):
        return f"({made}){last[2]}({other})"
    return f"({other}){last[len(str(n))]}({made})"


def draw_countdown(rng: random.Random) -> Problem:
    """Numbers, then a target that the search reaches (at times with two of them) and that is none of them."""
    count = 3 if rng.random() < 0.8 else 4
    top = pick(rng, ((10, 0.45), (25, 0.35), (50, 0.20)))
    while True:
        numbers = tuple(rng.randint(1, top) for _ in range(count))
        pair = makes(numbers[0], numbers[1])
        rest = {numbers[2]: ""} if count == 3 else makes(numbers[2], numbers[3])
        targets = list(makes(rng.choice(list(pair)), rng.choice(list(rest))))
        target = rng.choice(targets if rng.random() < 0.93 else list(pair))
        if 1 < target <= 150 and target not in numbers:
            break
    order = list(numbers)
    rng.shuffle(order)
    key = f"{sorted(numbers)}>{target}"
    level = (0 if top == 10 else 1) if count == 3 else 2
    return Problem("countdown", str(count), (tuple(order), target), key, level, (str(target),))


_TRY = {"en": "I try the pairs.", "fr": "J'essaie les paires.", "pt": "Experimento os pares."}


def solve_countdown(problem: Problem, language: str) -> Solution:
    numbers, target = problem.args
    lines, found = search(numbers, target)
    assert found is not None, f"countdown {numbers} → {target} was drawn as reachable"
    shown = " ".join(map(str, numbers))
    for sign in "+-×÷":
        found = found.replace(sign, f" {sign} ")
    return Solution("\n".join([_TRY[language], f"{shown} → {target}", *lines]), f"**{found} = {target}**")


def check_countdown(problem: Problem, language: str, answer: str) -> bool:
    """Any expression that equals the target and uses each given number at most once (all need not be used).

    `= target` may follow; only the first side counts, and a wrong second side is a wrong answer.
    """
    numbers, target = problem.args
    value = bold_value(answer)
    if value is None:
        return False
    left, equals, right = value.partition("=")
    try:
        reached, used = evaluate(left)
    except ExpressionError:
        return False
    if equals and right.strip() != str(target):
        return False
    return reached == target and not Counter(used) - Counter(numbers)


def ask_countdown(problem: Problem, language: str, rng: random.Random) -> str:
    numbers, target = problem.args
    n = listed(rng, [str(n) for n in numbers], language)
    return slips(rng, phrase(rng, COUNTDOWN[language], n=n, t=target), language)
