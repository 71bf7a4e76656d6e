"""Exact value of a written expression, by a parser with limits (never `eval`).

Grammar: sum = product {(+|−) product}; product = unary {(×|÷) unary}; unary = −unary | number | (sum).
Values are rationals. Powers, names and functions do not exist, so nothing can hang.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 20
MAX_DIGITS = 12

_TOKEN = re.compile(r"\s*(?:(\d+)|(.))", re.DOTALL)
_SAME = str.maketrans({"*": "×", "x": "×", "X": "×", "·": "×", "/": "÷", ":": "÷", "−": "-", "–": "-"})


class ExpressionError(ValueError):
    """The text is not an expression within the limits."""


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise ExpressionError(f"expression of {len(text)} characters; at most {MAX_CHARACTERS} are read")
        self.tokens = [number or sign for number, sign in _TOKEN.findall(text.translate(_SAME).strip())]
        self.at = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            value = value + self.product(depth) if self.take() == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.unary(depth)
        while self.peek() in ("×", "÷"):
            if self.take() == "×":
                value *= self.unary(depth)
                continue
            divisor = self.unary(depth)
            if divisor == 0:
                raise ExpressionError("division by zero")
            value /= divisor
        return value

    def unary(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"expression nested deeper than {MAX_DEPTH}")
        token = self.take()
        if token == "-":
            return -self.unary(depth + 1)
        if token == "(":
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise ExpressionError("missing ')'")
            return value
        if not token.isdecimal() or len(token) > MAX_DIGITS:
            raise ExpressionError(
                f"unexpected {token!r} in an expression" if token else "expression ends too early"
            )
        self.numbers.append(int(token))
        return Fraction(int(token))


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Value of `text` and the numbers it uses, in order. Raises ExpressionError."""
    parser = _Parser(text)
    value = parser.sum(0)
    if parser.at != len(parser.tokens):
        raise ExpressionError(f"unexpected {parser.peek()!r} in an expression")
    return value, parser.numbers
