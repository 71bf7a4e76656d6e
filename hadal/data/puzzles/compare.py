"""Comparison of two numbers, the largest or smallest of several, sorting.

Numbers are padded to one length; then digits decide from the left. The largest of several is found by
striking out: best first digit, who has it, best second digit among those. Sorting takes the smallest
(or largest) again and again, and writes what remains.
"""

from __future__ import annotations

import random

from hadal.data.puzzles.columns import digits_until_different
from hadal.data.puzzles.phrases.compare import (
    EXTREME,
    IS_LARGER,
    LARGER,
    SMALLER,
    SORT_DOWN,
    SORT_UP,
    SUPERLATIVE,
)
from hadal.data.puzzles.task import Problem, Solution, pick, size
from hadal.data.puzzles.wording import listed, phrase, slips

Words = dict[str, str]

# ---- two numbers ------------------------------------------------------------------------------------


def draw_comparison(rng: random.Random) -> Problem:
    """Kinds: `larger`, `smaller`, and the question `is a larger than b`. Whole, negative or decimal."""
    kind = pick(rng, (("larger", 0.45), ("smaller", 0.25), ("is", 0.30)))
    form = pick(rng, (("whole", 0.65), ("decimal", 0.23), ("negative", 0.12)))
    a, b = _pair(rng, form)
    while a == b:
        a, b = _pair(rng, form)
    point = "," if form == "decimal" and rng.random() < 0.5 else "."
    bigger = _is_larger(a, b)
    if kind == "is":
        gold: tuple[str, ...] = ("yes", "oui", "sim") if bigger else ("no", "non", "não")
    else:
        gold = (a if bigger == (kind == "larger") else b,)
    key = f"{kind}:{a}?{b}" if kind == "is" else f"{kind}:{min(a, b)}?{max(a, b)}"
    level = 0 if form == "whole" and max(len(a), len(b)) <= 3 else 1
    return Problem("comparison", kind, (a, b, point), key, level, gold)


def _pair(rng: random.Random, form: str) -> tuple[str, str]:
    if form == "whole":
        digits = rng.randint(1, 6)
        a = size(rng, digits)
        b = size(rng, digits if rng.random() < 0.75 else rng.randint(1, 6))
        if digits > 1 and rng.random() < 0.3:  # nearly equal numbers
            b = max(0, a + rng.choice((-20, -9, -2, -1, 1, 2, 9, 20)))
        return str(a), str(b)
    if form == "negative":
        a, b = size(rng, rng.randint(1, 3)), size(rng, rng.randint(1, 3))
        return str(-a), str(-b if rng.random() < 0.5 else b)
    whole = size(rng, rng.randint(1, 2))
    other = whole if rng.random() < 0.7 else size(rng, rng.randint(1, 2))
    return f"{whole}.{_fraction(rng)}", f"{other}.{_fraction(rng)}"


def _fraction(rng: random.Random) -> str:
    digits = rng.randint(1, 3)
    return f"{rng.randrange(10**digits):0{digits}d}"[:-1] + str(rng.randint(1, 9))


def _padded(a: str, b: str) -> tuple[str, str]:
    """Same number of digits before and after the point, signs dropped: `3.9, 12.14` → `03.90, 12.14`."""
    (wa, _, fa), (wb, _, fb) = a.lstrip("-").partition("."), b.lstrip("-").partition(".")
    before, after = max(len(wa), len(wb)), max(len(fa), len(fb))
    x, y = wa.zfill(before), wb.zfill(before)
    return (f"{x}.{fa.ljust(after, '0')}", f"{y}.{fb.ljust(after, '0')}") if after else (x, y)


def _is_larger(a: str, b: str) -> bool:
    if a.startswith("-") != b.startswith("-"):
        return b.startswith("-")
    x, y = _padded(a, b)
    return (x > y) != a.startswith("-")


_DIGIT_BY_DIGIT: Words = {
    "en": "I compare digit by digit.",
    "fr": "Je compare chiffre par chiffre.",
    "pt": "Comparo dígito por dígito.",
}
_SIGNS: Words = {
    "en": "A negative number is smaller.",
    "fr": "Un nombre négatif est plus petit.",
    "pt": "Um número negativo é menor.",
}
_BOTH_NEGATIVE: Words = {
    "en": "Both negative: the order turns round.",
    "fr": "Deux négatifs : l'ordre s'inverse.",
    "pt": "Dois negativos: a ordem inverte-se.",
}
_ANSWER: dict[str, Words] = {
    "larger": {"en": "The larger is **{v}**", "fr": "Le plus grand est **{v}**", "pt": "O maior é **{v}**"},
    "smaller": {"en": "The smaller is **{v}**", "fr": "Le plus petit est **{v}**", "pt": "O menor é **{v}**"},
    "is": {
        "en": "Is {a} larger than {b}? **{v}**",
        "fr": "{a} est-il plus grand que {b} ? **{v}**",
        "pt": "{a} é maior que {b}? **{v}**",
    },
}


def solve_comparison(problem: Problem, language: str) -> Solution:
    a, b, point = problem.args
    relation = f"{a} > {b}" if _is_larger(a, b) else f"{a} < {b}"
    lines = []
    if a.startswith("-") != b.startswith("-"):
        lines.append(_SIGNS[language])
    else:
        x, y = _padded(a, b)
        lines += [_DIGIT_BY_DIGIT[language], f"{x} ? {y}: {digits_until_different(x, y)}"]
        if a.startswith("-"):
            lines.append(_BOTH_NEGATIVE[language])
    lines.append(relation)
    value = problem.gold[("en", "fr", "pt").index(language)] if problem.kind == "is" else problem.gold[0]
    answer = _ANSWER[problem.kind][language].format(a=a, b=b, v=value)
    text = "\n".join(lines)
    if point == ",":
        text, answer = _comma(text, a, b), _comma(answer, a, b)
    return Solution(text, answer)


def _comma(text: str, a: str, b: str) -> str:
    for number in {a, b, *_padded(a, b)}:
        text = text.replace(number, number.replace(".", ","))
    return text


def ask_comparison(problem: Problem, language: str, rng: random.Random) -> str:
    a, b, point = problem.args
    if point == ",":
        a, b = a.replace(".", ","), b.replace(".", ",")
    table = {"larger": LARGER, "smaller": SMALLER, "is": IS_LARGER}[problem.kind]
    return slips(rng, phrase(rng, table[language], a=a, b=b), language)


# ---- several numbers --------------------------------------------------------------------------------


def _several(rng: random.Random, low: int, high: int) -> list[int]:
    count, digits = rng.randint(low, high), pick(rng, ((1, 0.15), (2, 0.5), (3, 0.35)))
    numbers = [size(rng, digits if rng.random() < 0.8 else rng.randint(1, digits)) for _ in range(count)]
    if digits > 1 and rng.random() < 0.3:  # share a first digit, so that the next ones decide
        i, j = rng.sample(range(count), 2)
        numbers[i] = int(str(numbers[j])[0] + str(numbers[i])[1:])
    return numbers


def draw_extreme(rng: random.Random) -> Problem:
    kind = rng.choice(("largest", "smallest"))
    numbers = _several(rng, 3, 6)
    gold = max(numbers) if kind == "largest" else min(numbers)
    key = f"{kind}:{sorted(numbers)}"
    return Problem("extreme", kind, tuple(numbers), key, 0 if len(numbers) < 5 else 1, (str(gold),))


def extreme_lines(numbers: list[int], largest: bool) -> list[str]:
    """Strike out by digits from the left: `352 021 311`, `3: 352 311`, `5: 352`."""
    width = max(len(str(n)) for n in numbers)
    left = [str(n).zfill(width) for n in numbers]
    lines = [" ".join(left)]
    for column in range(width):
        best = (max if largest else min)(text[column] for text in left)
        left = [text for text in left if text[column] == best]
        lines.append(f"{best}: {' '.join(left)}")
        if len(left) == 1:
            break
    return lines


_EXTREME: dict[str, Words] = {
    "largest": {
        "en": "I keep the largest digits, from the left.",
        "fr": "Je garde les plus grands chiffres, depuis la gauche.",
        "pt": "Fico com os maiores dígitos, a partir da esquerda.",
    },
    "smallest": {
        "en": "I keep the smallest digits, from the left.",
        "fr": "Je garde les plus petits chiffres, depuis la gauche.",
        "pt": "Fico com os menores dígitos, a partir da esquerda.",
    },
}
_EXTREME_ANSWER: dict[str, Words] = {
    "largest": {"en": "The largest is **{v}**", "fr": "Le plus grand est **{v}**", "pt": "O maior é **{v}**"},
    "smallest": {
        "en": "The smallest is **{v}**",
        "fr": "Le plus petit est **{v}**",
        "pt": "O menor é **{v}**",
    },
}


def solve_extreme(problem: Problem, language: str) -> Solution:
    lines = [_EXTREME[problem.kind][language], *extreme_lines(list(problem.args), problem.kind == "largest")]
    return Solution("\n".join(lines), _EXTREME_ANSWER[problem.kind][language].format(v=problem.gold[0]))


def ask_extreme(problem: Problem, language: str, rng: random.Random) -> str:
    n = listed(rng, [str(n) for n in problem.args], language)
    return slips(
        rng, phrase(rng, EXTREME[language], s=rng.choice(SUPERLATIVE[language][problem.kind]), n=n), language
    )


# ---- sorting ----------------------------------------------------------------------------------------


def draw_sorting(rng: random.Random) -> Problem:
    kind = "up" if rng.random() < 0.7 else "down"
    numbers = _several(rng, 3, 7)
    ordered = sorted(numbers, reverse=kind == "down")
    level = 0 if len(numbers) < 5 and max(numbers) < 100 else 1 if len(numbers) < 6 else 2
    gold = tuple(str(n) for n in ordered)
    return Problem("sorting", kind, tuple(numbers), f"{kind}:{sorted(numbers)}", level, gold)


_SORT: dict[str, Words] = {
    "up": {
        "en": "I take the smallest each time.",
        "fr": "Je prends le plus petit à chaque fois.",
        "pt": "Tiro o menor de cada vez.",
    },
    "down": {
        "en": "I take the largest each time.",
        "fr": "Je prends le plus grand à chaque fois.",
        "pt": "Tiro o maior de cada vez.",
    },
}


def solve_sorting(problem: Problem, language: str) -> Solution:
    """`034 087 005` / `005 | 034 087` / `034 | 087` / `087`: what is taken, then what remains."""
    width = max(len(str(n)) for n in problem.args)
    left = [str(n).zfill(width) for n in problem.args]
    lines = [_SORT[problem.kind][language], " ".join(left)]
    while left:
        taken = (min if problem.kind == "up" else max)(left)
        left.remove(taken)
        lines.append(f"{taken} | {' '.join(left)}" if left else taken)
    return Solution("\n".join(lines), f"**{', '.join(problem.gold)}**")


def ask_sorting(problem: Problem, language: str, rng: random.Random) -> str:
    table = SORT_UP if problem.kind == "up" else SORT_DOWN
    n = listed(rng, [str(n) for n in problem.args], language)
    return slips(rng, phrase(rng, table[language], n=n), language)
