"""Chains of + − × with precedence and brackets, and remainders of sums and products (a mod m).

A chain is rewritten one operation a line, as a person would cross it out: `3×4=12 → 12+12-5`.
"""

from __future__ import annotations

import random

from hadal.data.puzzles.columns import add, divide, multiply, signed, subtract
from hadal.data.puzzles.expression import evaluate
from hadal.data.puzzles.phrases.chains import MODULAR
from hadal.data.puzzles.phrases.common import EXPRESSION
from hadal.data.puzzles.task import Problem, Solution, pick, size
from hadal.data.puzzles.wording import phrase, slips, written

Tokens = list[str]


def draw_chain(rng: random.Random) -> Problem:
    shape = pick(rng, (("sum", 0.45), ("product", 0.40), ("brackets", 0.15)))
    if shape == "brackets":
        tokens = _brackets(rng)
        level = 1
    else:
        count = pick(rng, ((3, 0.55), (4, 0.30), (5, 0.15)))
        digits = pick(rng, ((1, 0.40), (2, 0.50), (3, 0.10)))
        tokens = [str(size(rng, rng.randint(1, digits)))]
        for _ in range(count - 1):
            tokens += [rng.choice("+-"), str(size(rng, rng.randint(1, digits)))]
        if shape == "product":
            _insert_product(rng, tokens, count)
        level = 0 if count == 3 and digits == 1 else 1 if count <= 4 and digits <= 2 else 2
    text = "".join(tokens)
    value = evaluate(text)[0]
    return Problem("chain", shape, tuple(tokens), text, level, (str(value),))


def _insert_product(rng: random.Random, tokens: Tokens, count: int) -> None:
    """Turn one operation (sometimes two) into a product of a number and a digit."""
    for place in {rng.randrange(1, count) for _ in range(1 if rng.random() < 0.8 else 2)}:
        at = 2 * place - 1
        if "×" in tokens[max(0, at - 2) : at + 3]:
            continue
        left, right = size(rng, 1 if rng.random() < 0.6 else 2), rng.randrange(2, 10)
        if rng.random() < 0.5:
            left, right = right, left
        tokens[at - 1 : at + 2] = [str(left), "×", str(right)]


def _brackets(rng: random.Random) -> Tokens:
    """`(a+b)×c`, `c×(a-b)`, `(a+b)×c-d`, with a bracket that is not negative."""
    digits = rng.choice((1, 1, 2))
    a, b, c = size(rng, digits), size(rng, digits), rng.randrange(2, 10)
    op = rng.choice("+-")
    if op == "-" and a < b:
        a, b = b, a
    bracket = ["(", str(a), op, str(b), ")"]
    tokens = [*bracket, "×", str(c)] if rng.random() < 0.5 else [str(c), "×", *bracket]
    if rng.random() < 0.3:
        tokens += [rng.choice("+-"), str(size(rng, rng.randint(1, 2)))]
    return tokens


def _next_operation(tokens: Tokens) -> int:
    """Index of the operator that comes first: inside brackets, then ×, then from the left."""
    if "(" in tokens:
        return tokens.index("(") + 2
    if "×" in tokens:
        return tokens.index("×")
    return 1


def chain_lines(tokens: Tokens) -> list[str]:
    """All rewriting steps; the last line ends in `=value`."""
    lines = ["".join(tokens)]
    while len(tokens) > 1:
        at = _next_operation(tokens)
        a, op, b = int(tokens[at - 1]), tokens[at], int(tokens[at + 1])
        lines += multiply(a, b) if op == "×" else signed(a, op, b)
        value = a * b if op == "×" else a + b if op == "+" else a - b
        low, high = (at - 2, at + 3) if "(" in tokens and tokens[at - 2] == "(" else (at - 1, at + 2)
        tokens = [*tokens[:low], str(value), *tokens[high:]]
        if len(tokens) > 1:
            lines[-1] += f" → {''.join(tokens)}"
    return lines


_ORDER = {
    "sum": {
        "en": "I go from left to right.",
        "fr": "Je vais de gauche à droite.",
        "pt": "Vou da esquerda para a direita.",
    },
    "product": {"en": "× comes first.", "fr": "D'abord les ×.", "pt": "Primeiro as ×."},
    "brackets": {"en": "Brackets first.", "fr": "D'abord les parenthèses.", "pt": "Primeiro os parênteses."},
}


def solve_chain(problem: Problem, language: str) -> Solution:
    tokens = list(problem.args)
    kind = problem.kind if problem.kind != "product" or "×" in tokens else "sum"
    shown = " ".join(tokens).replace("( ", "(").replace(" )", ")")
    lines = [_ORDER[kind][language], *chain_lines(tokens)]
    return Solution("\n".join(lines), f"{shown} = **{problem.gold[0]}**")


def ask_chain(problem: Problem, language: str, rng: random.Random) -> str:
    return slips(rng, phrase(rng, EXPRESSION[language], e=written(rng, list(problem.args))), language)


# ---- remainders -------------------------------------------------------------------------------------


def draw_modular(rng: random.Random) -> Problem:
    kind = pick(rng, (("a", 0.55), ("+", 0.2), ("-", 0.05), ("×", 0.2)))
    m = rng.randint(2, 9) if rng.random() < 0.75 else rng.randint(10, 20)
    if kind == "a":
        a = size(rng, pick(rng, ((1, 0.05), (2, 0.5), (3, 0.45))))
        return Problem("modular", kind, (a, m), f"{a}%{m}", 0 if a < 100 and m < 10 else 1, (str(a % m),))
    a, b = size(rng, 2), size(rng, rng.randint(1, 2))
    if kind == "-" and a < b:
        a, b = b, a
    value = a * b if kind == "×" else a + b if kind == "+" else a - b
    level = 1 if m < 10 and kind != "×" else 2
    return Problem("modular", kind, (a, b, m), f"({a}{kind}{b})%{m}", level, (str(value % m),))


_DIVIDE_AND_KEEP = {
    "en": "I divide and keep the remainder.",
    "fr": "Je divise et je garde le reste.",
    "pt": "Divido e fico com o resto.",
}
_WORK = {"+": add, "-": subtract, "×": multiply}


def solve_modular(problem: Problem, language: str) -> Solution:
    *operands, m = problem.args
    lines = [_DIVIDE_AND_KEEP[language]]
    value = operands[0]
    shown = str(value)
    if problem.kind != "a":
        a, b = operands
        shown = f"({a} {problem.kind} {b})"
        lines += _WORK[problem.kind](a, b)
        value = int(evaluate(f"{a}{problem.kind}{b}")[0])
    lines += divide(value, m)
    return Solution("\n".join(lines), f"{shown} mod {m} = **{value % m}**")


def ask_modular(problem: Problem, language: str, rng: random.Random) -> str:
    *operands, m = problem.args
    if problem.kind == "a":
        shown = str(operands[0])
    else:
        shown = "(" + written(rng, [str(operands[0]), problem.kind, str(operands[1])]) + ")"
    return slips(rng, phrase(rng, MODULAR[language], e=shown, m=m), language)
