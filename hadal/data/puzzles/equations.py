"""Linear equations in one unknown, solved by undoing one operation at a time, then checked."""

from __future__ import annotations

import random

from hadal.data.puzzles.columns import divide_exact, multiply, signed
from hadal.data.puzzles.phrases.equations import EQUATION
from hadal.data.puzzles.task import Problem, Solution, pick, size
from hadal.data.puzzles.wording import phrase, slips

_KINDS = (
    ("x+a", 0.16),
    ("x-a", 0.12),
    ("a-x", 0.08),
    ("ax", 0.14),
    ("x/a", 0.08),
    ("ax+b", 0.24),
    ("ax-b", 0.18),
)


def draw_equation(rng: random.Random) -> Problem:
    """`args` = (form, letter, a, b, c, x): the numbers of a·x ± b = c, x ± a = c, a − x = c, x ÷ a = c."""
    form = pick(rng, _KINDS)
    letter = "x" if rng.random() < 0.85 else rng.choice("ynabtz")
    if form in ("x+a", "x-a", "a-x"):
        digits = pick(rng, ((1, 0.3), (2, 0.5), (3, 0.2)))
        a, x = size(rng, rng.randint(1, digits)) + 1, size(rng, digits)
        if form == "x-a" and x < a:
            x, a = a, max(1, x)
        c = x + a if form == "x+a" else x - a if form == "x-a" else a - x
        if form == "x+a" and rng.random() < 0.12:  # a negative solution
            a, c = c, a
            x = c - a
        return _equation(form, letter, a, 0, c, x, digits - 1)
    a = rng.randint(2, 9 if rng.random() < 0.8 else 12)
    x = size(rng, pick(rng, ((1, 0.5), (2, 0.5))))
    if form == "x/a":
        return _equation(form, letter, a, 0, x, a * x, 0 if x < 10 else 1)
    if rng.random() < 0.1:
        x = -rng.randint(1, 12)
    b = 0 if form == "ax" else rng.randint(1, 50)
    c = a * x + (b if form == "ax+b" else -b)
    return _equation(form, letter, a, b, c, x, 0 if form == "ax" and 0 <= x < 10 else 1 if 0 <= x < 20 else 2)


def _equation(form: str, letter: str, a: int, b: int, c: int, x: int, level: int) -> Problem:
    return Problem("equation", form, (form, letter, a, b, c, x), f"{form}:{a},{b},{c}", level, (str(x),))


_SIDES = {
    "x+a": ("{x}", "+", "{a}"),
    "x-a": ("{x}", "-", "{a}"),
    "a-x": ("{a}", "-", "{x}"),
    "ax": ("{a}{x}",),
    "x/a": ("{x}", "÷", "{a}"),
    "ax+b": ("{a}{x}", "+", "{b}"),
    "ax-b": ("{a}{x}", "-", "{b}"),
}


def _left(form: str, letter: str, a: int, b: int) -> list[str]:
    return [part.format(x=letter, a=a, b=b) for part in _SIDES[form]]


_UNDO = {
    "en": "I undo each operation.",
    "fr": "Je défais chaque opération.",
    "pt": "Desfaço cada operação.",
}
_CHECK = {"en": "Check", "fr": "Vérification", "pt": "Verificação"}


def solve_equation(problem: Problem, language: str) -> Solution:
    form, letter, a, b, c, x = problem.args
    lines = [_UNDO[language], f"{' '.join(_left(form, letter, a, b))} = {c}"]
    if form == "a-x":
        lines += [f"{letter} = {a} - {c}" if c >= 0 else f"{letter} = {a} + {-c}"]
        lines += signed(a, "-" if c >= 0 else "+", abs(c))
    elif form in ("x+a", "x-a"):
        sign = "-" if form == "x+a" else "+"
        lines += [f"{letter} = {c} {sign} {a}", *signed(c, sign, a)]
    elif form == "x/a":
        lines += [f"{letter} = {c} × {a}", *multiply(c, a)]
    else:
        lines += _undo_product(form, letter, a, b, c)
    lines.append(f"{letter} = {x}")
    if abs(x) < 100 and abs(c) < 100:
        lines.append(f"{_CHECK[language]}: {_checked(form, a, b, c, x)}")
    return Solution("\n".join(lines), f"**{letter} = {x}**")


def _undo_product(form: str, letter: str, a: int, b: int, c: int) -> list[str]:
    """a·x ± b = c: take b away (or add it), then divide by a; a negative sign is set aside."""
    lines, right = [], c
    if form != "ax":
        sign = "-" if form == "ax+b" else "+"
        lines += [f"{a}{letter} = {c} {sign} {b}", *signed(c, sign, b)]
        right = c - b if sign == "-" else c + b
    lines.append(f"{letter} = {right} ÷ {a}")
    if right < 0:
        lines.append(f"{right}÷{a}=-({-right}÷{a})")
    return [*lines, *divide_exact(abs(right), a)]


def _checked(form: str, a: int, b: int, c: int, x: int) -> str:
    """The equation with the solution in it: `3×6+7=18+7=25`."""
    if form == "x+a":
        return f"{x}+{a}={c}"
    if form == "x-a":
        return f"{x}-{a}={c}"
    if form == "a-x":
        return f"{a}-{x}={c}"
    if form == "x/a":
        return f"{x}÷{a}={c}"
    tail = {"ax": "", "ax+b": f"+{b}", "ax-b": f"-{b}"}[form]
    shown = f"{a}×{x}" if x >= 0 else f"{a}×({x})"
    return f"{shown}{tail}={a * x}{tail}={c}" if tail else f"{shown}={c}"


def ask_equation(problem: Problem, language: str, rng: random.Random) -> str:
    form, letter, a, b, c, _ = problem.args
    parts = _left(form, letter, a, b)
    if form.startswith("ax") and rng.random() < 0.3:
        parts[0] = f"{a}{rng.choice(('*', '×', '·', ' * ', ' '))}{letter}"
    if form == "x/a":
        parts[1] = rng.choice("÷//:")
    sides = [*parts, "=", str(c)]
    if rng.random() < 0.06:
        sides = [str(c), "=", *parts]
    if form in ("x+a", "ax+b") and rng.random() < 0.06:
        sides = [parts[2], "+", parts[0], "=", str(c)]
    q = (" " if rng.random() < 0.65 else "").join(sides)
    return slips(rng, phrase(rng, EQUATION[language], q=q, x=letter), language)
