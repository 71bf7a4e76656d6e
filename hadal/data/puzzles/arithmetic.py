"""Addition, subtraction, multiplication, division with remainder: two numbers, worked by columns."""

from __future__ import annotations

import random

from hadal.data.puzzles.columns import add, divide, multiply, subtract
from hadal.data.puzzles.phrases.arithmetic import (
    ADD,
    DIVIDE,
    MULTIPLY,
    NUMBER_WORDS,
    SPOKEN,
    SPOKEN_SIGN,
    SUBTRACT,
    THINGS,
)
from hadal.data.puzzles.phrases.common import EXPRESSION
from hadal.data.puzzles.task import Problem, Solution, pick, size
from hadal.data.puzzles.wording import phrase, slips, written

_DIGITS = ((1, 0.22), (2, 0.30), (3, 0.26), (4, 0.14), (5, 0.05), (6, 0.03))
_SHAPES = (  # digits of the two factors
    ((1, 1), 0.14),
    ((2, 1), 0.26),
    ((3, 1), 0.16),
    ((4, 1), 0.06),
    ((2, 2), 0.26),
    ((3, 2), 0.12),
)
_DIVISORS = (("small", 0.84), ("ten", 0.04), ("teens", 0.12))


def _level(digits: int, easy: int, medium: int) -> int:
    return 0 if digits <= easy else 1 if digits <= medium else 2


def draw_addition(rng: random.Random) -> Problem:
    digits = pick(rng, _DIGITS)
    a, b = size(rng, digits), size(rng, digits if rng.random() < 0.6 else rng.randint(1, digits))
    if rng.random() < 0.5:
        a, b = b, a
    key = f"{min(a, b)}+{max(a, b)}"
    return Problem("addition", "", (a, b), key, _level(digits, 2, 3), (str(a + b),))


def draw_subtraction(rng: random.Random) -> Problem:
    digits = pick(rng, _DIGITS)
    a, b = size(rng, digits), size(rng, digits if rng.random() < 0.6 else rng.randint(1, digits))
    if (a < b) != (rng.random() < 0.25):  # a quarter of the results are negative
        a, b = b, a
    return Problem("subtraction", "", (a, b), f"{a}-{b}", _level(digits, 2, 3), (str(a - b),))


def draw_multiplication(rng: random.Random) -> Problem:
    more, fewer = pick(rng, _SHAPES)
    a, b = size(rng, more), size(rng, fewer)
    if rng.random() < 0.05:
        a, b = a, 10 ** rng.randint(1, 2)
    if rng.random() < 0.4:
        a, b = b, a
    key = f"{min(a, b)}*{max(a, b)}"
    return Problem("multiplication", "", (a, b), key, _level(more + fewer, 3, 4), (str(a * b),))


def draw_division(rng: random.Random) -> Problem:
    which = pick(rng, _DIVISORS)
    b = (
        rng.randint(2, 9)
        if which == "small"
        else rng.randint(10, 12)
        if which == "ten"
        else rng.randint(11, 25)
    )
    digits = pick(rng, ((1, 0.06), (2, 0.44), (3, 0.35), (4, 0.15)))
    a = max(1, size(rng, digits))
    if rng.random() < 0.4:
        a = max(b, a - a % b)  # no remainder
    gold = (str(a // b), str(a % b)) if a % b else (str(a // b),)
    return Problem("division", "", (a, b), f"{a}/{b}", _level(digits + len(str(b)), 3, 4), gold)


_HOW = {
    "addition": {
        "en": "I add the columns from the right.",
        "fr": "J'additionne les colonnes depuis la droite.",
        "pt": "Somo as colunas a partir da direita.",
    },
    "subtraction": {
        "en": "I subtract the columns from the right.",
        "fr": "Je soustrais les colonnes depuis la droite.",
        "pt": "Subtraio as colunas a partir da direita.",
    },
    "multiplication": {
        "en": "I multiply digit by digit.",
        "fr": "Je multiplie chiffre par chiffre.",
        "pt": "Multiplico dígito por dígito.",
    },
    "division": {
        "en": "I divide digit by digit from the left.",
        "fr": "Je divise chiffre par chiffre depuis la gauche.",
        "pt": "Divido dígito por dígito a partir da esquerda.",
    },
}
REMAINDER = {"en": "remainder", "fr": "reste", "pt": "resto"}
_WORK = {"addition": add, "subtraction": subtract, "multiplication": multiply, "division": divide}
_SIGN = {"addition": "+", "subtraction": "-", "multiplication": "×", "division": "÷"}


def solve_binary(problem: Problem, language: str) -> Solution:
    """The four operations: one opening sentence, the operands, the columns."""
    a, b = problem.args
    sign = _SIGN[problem.task]
    lines = [_HOW[problem.task][language], f"{a} {sign} {b}", *_WORK[problem.task](a, b)]
    value = f" {REMAINDER[language]} ".join(problem.gold)
    return Solution("\n".join(lines), f"{a} {sign} {b} = **{value}**")


_WORDED = {"addition": ADD, "subtraction": SUBTRACT, "multiplication": MULTIPLY, "division": DIVIDE}


def ask_binary(problem: Problem, language: str, rng: random.Random) -> str:
    a, b = problem.args
    if max(a, b) <= 20 and rng.random() < 0.12:
        words = NUMBER_WORDS[language]
        sign = SPOKEN_SIGN[language][problem.task]
        text = phrase(rng, SPOKEN[language], a=words[a], b=words[b], op=sign)
        return (
            text.lower() if rng.random() < 0.5 else text[0].upper() + text[1:]
        )  # a slip may change a number
    if rng.random() < 0.65:
        text = phrase(rng, EXPRESSION[language], e=written(rng, [str(a), _SIGN[problem.task], str(b)]))
    else:
        thing = THINGS[language][int(rng.random() * len(THINGS[language]))]
        text = phrase(rng, _WORDED[problem.task][language], a=a, b=b, thing=thing)
    return slips(rng, text, language)
