"""Next term of a sequence: the differences first, each by its digits, then what they say.

    69 < 81: 11-9=2 8-6-1=1 → +12

Constant differences: arithmetic. Differences that grow by a constant: squares and their kin.
Two differences in turn: alternating. Otherwise a constant ratio, or each term the sum of the two before.
"""

from __future__ import annotations

import itertools
import random

from hadal.data.puzzles.columns import multiply, pad, signed
from hadal.data.puzzles.phrases.sequences import SEQUENCE
from hadal.data.puzzles.task import Problem, Solution, pick, size
from hadal.data.puzzles.wording import phrase, slips


def draw_sequence(rng: random.Random) -> Problem:
    kind = pick(
        rng,
        (("arithmetic", 0.42), ("geometric", 0.20), ("squares", 0.14), ("alternating", 0.14), ("sum", 0.10)),
    )
    terms = _TERMS[kind](rng)
    *shown, following = terms
    key = " ".join(map(str, shown))
    level = 0 if kind == "arithmetic" and max(terms) < 100 else 1 if max(terms) < 200 else 2
    return Problem("sequence", kind, tuple(shown), key, level, (str(following),))


def _arithmetic(rng: random.Random) -> list[int]:
    step, count = rng.randint(1, 12 if rng.random() < 0.7 else 30), rng.randint(3, 5)
    start = size(rng, pick(rng, ((1, 0.4), (2, 0.45), (3, 0.15))))
    if rng.random() < 0.25:
        return [start + step * (count - i) for i in range(count + 1)]
    return [start + step * i for i in range(count + 1)]


def _geometric(rng: random.Random) -> list[int]:
    ratio = rng.choice((2, 2, 2, 3, 3, 4, 5, 10))
    start = rng.randint(1, {2: 25, 3: 20, 4: 12, 5: 12, 10: 12}[ratio])
    count = rng.randint(3, 5) if ratio <= 3 else rng.randint(3, 4)
    return [start * ratio**i for i in range(count + 1)]


def _squares(rng: random.Random) -> list[int]:
    """n² + shift (pure squares half of the time), or any quadratic with small growth of the differences."""
    count = rng.randint(4, 5)
    if rng.random() < 0.5:
        first = rng.randint(1, 10)
        shift = 0 if rng.random() < 0.5 else rng.randint(1, 20)
        return [(first + i) ** 2 + shift for i in range(count + 1)]
    terms, step, growth = [rng.randint(0, 40)], rng.randint(1, 12), rng.randint(1, 6)
    for _ in range(count):
        terms.append(terms[-1] + step)
        step += growth
    return terms


def _alternating(rng: random.Random) -> list[int]:
    """Two steps in turn, such as +7 −3."""
    up, down, count = rng.randint(2, 12), rng.randint(1, 9), rng.randint(5, 6)
    steps = (up, -down) if rng.random() < 0.6 else (up, down)
    terms = [rng.randint(5, 60) + (10 if steps[1] < 0 else 0)]
    while steps[0] == steps[1]:
        steps = (steps[0], rng.randint(1, 9))
    for i in range(count):
        terms.append(terms[-1] + steps[i % 2])
    return terms


def _sum_of_two(rng: random.Random) -> list[int]:
    terms = [rng.randint(1, 12), rng.randint(1, 12)]
    while len(terms) < rng.randint(6, 7):
        terms.append(terms[-1] + terms[-2])
    if _constant([b - a for a, b in itertools.pairwise(terms)]):
        return _sum_of_two(rng)
    return terms


_TERMS = {
    "arithmetic": _arithmetic,
    "geometric": _geometric,
    "squares": _squares,
    "alternating": _alternating,
    "sum": _sum_of_two,
}


def _constant(values: list[int]) -> bool:
    return len(set(values)) == 1


_DIFFERENCES = {"en": "Differences:", "fr": "Différences :", "pt": "Diferenças:"}
_RATIO = {"en": "Ratio", "fr": "Raison", "pt": "Razão"}
_IN_TURN = {"en": "In turn", "fr": "En alternance", "pt": "Alternando"}
_GROWTH = {"en": "They grow by", "fr": "Elles changent de", "pt": "Elas crescem"}
_TWO_BEFORE = {
    "en": "Each is the sum of the two before.",
    "fr": "Chacun est la somme des deux précédents.",
    "pt": "Cada um é a soma dos dois anteriores.",
}


def _plus(step: int) -> str:
    return f"+{step}" if step >= 0 else str(step)


def difference(a: int, b: int) -> str:
    """b − a for two neighbours: the smaller off the larger, digit by digit from the right, borrowing as in
    `columns.subtract`.

    In one go, a small model writes the tens before it knows whether the units borrow.
    """
    steps, borrow = [], 0
    for upper, lower in zip(*map(reversed, pad(max(a, b), min(a, b))), strict=True):
        top, low = int(upper), int(lower)
        left, short = f"{lower}-1" if borrow else lower, top < low + borrow
        top += 10 * short
        steps.append(f"{top}-{left}={top - low - borrow}")
        borrow = int(short)
    sign = "<" if a < b else ">" if a > b else "="
    return f"{a} {sign} {b}: {' '.join(steps)} → {_plus(b - a)}"


def solve_sequence(problem: Problem, language: str) -> Solution:
    terms = list(problem.args)
    steps = [b - a for a, b in itertools.pairwise(terms)]
    listed = steps[:2] if problem.kind == "geometric" else steps
    lines = [difference(a, b) for a, b in itertools.pairwise(terms[: len(listed) + 1])]
    lines.append(f"{_DIFFERENCES[language]} {' '.join(_plus(s) for s in listed)}")
    last = terms[-1]
    if problem.kind == "geometric":
        ratio = terms[1] // terms[0]
        lines.append(
            f"{_RATIO[language]}: {' '.join(f'{a}×{ratio}={b}' for a, b in itertools.pairwise(terms))}"
        )
        lines += multiply(last, ratio)
    elif problem.kind == "sum":
        lines.append(_TWO_BEFORE[language])
        lines += [f"{a}+{b}={a + b}" for a, b in itertools.pairwise(terms)]
        lines += signed(terms[-2], "+", last)
    else:
        if problem.kind == "squares":
            growth = steps[1] - steps[0]
            lines.append(f"{_GROWTH[language]} {growth}: {steps[-1]}+{growth}={steps[-1] + growth}")
            step = steps[-1] + growth
        elif problem.kind == "alternating":
            step = steps[-2]
            lines.append(f"{_IN_TURN[language]}: {_plus(step)}")
        else:
            step = steps[0]
        lines += signed(last, "+" if step >= 0 else "-", abs(step))
    shown = ", ".join(map(str, terms))
    return Solution("\n".join(lines), f"{shown}, **{problem.gold[0]}**")


def ask_sequence(problem: Problem, language: str, rng: random.Random) -> str:
    draw = rng.random()
    glue = ", " if draw < 0.75 else " " if draw < 0.9 else ","
    t = glue.join(map(str, problem.args))
    return slips(rng, phrase(rng, SEQUENCE[language], t=t), language)
