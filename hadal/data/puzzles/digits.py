"""Puzzles on the digits of a number: reverse it, add its digits, even or odd, divisible by k."""

from __future__ import annotations

import random

from hadal.data.puzzles.columns import divide
from hadal.data.puzzles.phrases.digits import DIGIT_SUM, DIVISIBLE, PARITY, REVERSE
from hadal.data.puzzles.task import LANGUAGES, Problem, Solution, pick, size
from hadal.data.puzzles.wording import phrase, slips

Words = dict[str, str]


def draw_digits(rng: random.Random) -> Problem:
    kind = rng.choice(("reverse", "sum"))
    digits = rng.randint(2, 8) if kind == "reverse" else rng.randint(2, 7)
    n = size(rng, digits)
    if kind == "reverse" and n % 10 == 0:
        n += rng.randint(1, 9)
    gold = str(n)[::-1] if kind == "reverse" else str(sum(map(int, str(n))))
    return Problem("digits", kind, (n,), f"{kind}:{n}", 0 if digits < 5 else 1, (gold,))


_ONE_BY_ONE = {
    "reverse": {
        "en": "Digit by digit, from the end.",
        "fr": "Chiffre par chiffre, depuis la fin.",
        "pt": "Dígito por dígito, do fim.",
    },
    "sum": {
        "en": "I add the digits one by one.",
        "fr": "J'additionne les chiffres un à un.",
        "pt": "Somo os dígitos um a um.",
    },
}
_DIGITS_ANSWER = {
    "reverse": {
        "en": "{n} reversed is **{v}**",
        "fr": "{n} à l'envers : **{v}**",
        "pt": "{n} ao contrário: **{v}**",
    },
    "sum": {
        "en": "The digits of {n} sum to **{v}**",
        "fr": "La somme des chiffres de {n} est **{v}**",
        "pt": "A soma dos dígitos de {n} é **{v}**",
    },
}


def digit_sum_lines(n: int) -> list[str]:
    """`4 7 1 2`, `4+7=11`, `11+1=12`, `12+2=14`."""
    digits = [int(d) for d in str(n)]
    lines, total = [" ".join(map(str, digits))], digits[0]
    for digit in digits[1:]:
        lines.append(f"{total}+{digit}={total + digit}")
        total += digit
    return lines


def solve_digits(problem: Problem, language: str) -> Solution:
    n = problem.args[0]
    text = str(n)
    lines = [_ONE_BY_ONE[problem.kind][language]]
    lines += (
        [f"{' '.join(text)} → {' '.join(text[::-1])}"] if problem.kind == "reverse" else digit_sum_lines(n)
    )
    answer = _DIGITS_ANSWER[problem.kind][language].format(n=n, v=problem.gold[0])
    return Solution("\n".join(lines), answer)


def ask_digits(problem: Problem, language: str, rng: random.Random) -> str:
    table = REVERSE if problem.kind == "reverse" else DIGIT_SUM
    return slips(rng, phrase(rng, table[language], n=problem.args[0]), language)


# ---- even or odd, divisible or not ------------------------------------------------------------------

EVEN, ODD = ("even", "pair", "par"), ("odd", "impair", "ímpar")
YES, NO = ("yes", "oui", "sim"), ("no", "non", "não")
_LAST_DIGIT = {"en": "Last digit", "fr": "Dernier chiffre", "pt": "Último dígito"}
_DIGIT_SUM = {"en": "Sum of the digits:", "fr": "Somme des chiffres :", "pt": "Soma dos dígitos:"}
_DIVIDE = {"en": "I look for a remainder.", "fr": "Je cherche un reste.", "pt": "Procuro um resto."}


def draw_divisibility(rng: random.Random) -> Problem:
    if rng.random() < 0.4:
        n = size(rng, rng.randint(1, 6))
        return Problem("divisibility", "parity", (n, 2), f"parity:{n}", 0, EVEN if n % 2 == 0 else ODD)
    k = pick(
        rng,
        ((2, 0.08), (3, 0.2), (4, 0.12), (5, 0.12), (6, 0.12), (7, 0.14), (8, 0.08), (9, 0.1), (10, 0.04)),
    )
    n = size(rng, pick(rng, ((2, 0.5), (3, 0.4), (4, 0.1))))
    if rng.random() < 0.45:
        n -= n % k
    n = max(n, k)
    return Problem("divisibility", "by", (n, k), f"{n}|{k}", 0 if n < 100 else 1, YES if n % k == 0 else NO)


def solve_divisibility(problem: Problem, language: str) -> Solution:
    n, k = problem.args
    word = problem.gold[LANGUAGES.index(language)]
    if problem.kind == "parity" or k in (2, 5, 10):
        lines = [f"{_LAST_DIGIT[language]}: {n % 10}"]
    elif k in (3, 9):
        total = sum(map(int, str(n)))
        lines = [_DIGIT_SUM[language], *digit_sum_lines(n), f"{total} = {total // k}×{k}+{total % k}"]
    else:
        lines = [_DIVIDE[language], *divide(n, k)]
    shown = _PARITY_ANSWER if problem.kind == "parity" else _DIVISIBLE_ANSWER
    return Solution("\n".join(lines), shown[language].format(n=n, k=k, v=word))


_PARITY_ANSWER: Words = {"en": "{n} is **{v}**", "fr": "{n} est **{v}**", "pt": "{n} é **{v}**"}
_DIVISIBLE_ANSWER: Words = {
    "en": "Is {n} divisible by {k}? **{v}**",
    "fr": "{n} est-il divisible par {k} ? **{v}**",
    "pt": "{n} é divisível por {k}? **{v}**",
}


def ask_divisibility(problem: Problem, language: str, rng: random.Random) -> str:
    n, k = problem.args
    table = PARITY if problem.kind == "parity" else DIVISIBLE
    return slips(rng, phrase(rng, table[language], n=n, k=k), language)
