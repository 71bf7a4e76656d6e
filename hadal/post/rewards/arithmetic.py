"""Written arithmetic, valued exactly: Python's parser for the tree, a walker that knows four operations.

A text is read if it is short, holds no character but digits, letters of unknowns, + - * / ( ) and a point,
and no number of many digits. Then its tree is walked with limits on depth and nodes; a node that is not a
number, an unknown, a sign or one of the four operations ends the walk. Powers (`**`), names, calls and
comparisons are such nodes. Values are rationals, so nothing is rounded, and nothing grows: the digits of a
value are bounded by those of the text. Nothing of the text is ever run.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

MAX_CHARACTERS = 300
MAX_DEPTH = 100
MAX_DIGITS = 15

_SAME = str.maketrans({"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∶": "/", ":": "/", "−": "-",
                       "–": "-", "[": "(", "]": ")", "\u00a0": " "})  # fmt: skip
_LATEX = ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""), ("$", ""))
_FRACTION = re.compile(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}")
_ALLOWED = re.compile(r"[0-9a-z+\-*/(). \t]*")
_DECIMAL = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_LONG = re.compile(rf"\d{{{MAX_DIGITS + 1},}}")


class ArithmeticRefused(ValueError):
    """The text is not arithmetic within the limits; the message says why."""


@dataclass
class Value:
    """What a text is worth, and the whole numbers that it is written with, in order."""

    value: Fraction
    numbers: list[Fraction] = field(default_factory=list)


def normal(text: str) -> str:
    r"""The signs of print and of LaTeX as those of a keyboard: `3 \times 4` → `3 * 4`."""
    for old, new in _LATEX:
        text = text.replace(old, new)
    text = _FRACTION.sub(r"((\1)/(\2))", text)
    return text.translate(_SAME).replace("\\(", "").replace("\\)", "").strip()


def evaluate(text: str, unknowns: Mapping[str, Fraction] | None = None) -> Value:
    """The value of an expression. `unknowns`: values of one-letter names; with them, `3x` and `2(x+1)` are
    products. Raises ArithmeticRefused."""
    if len(text) > MAX_CHARACTERS:
        raise ArithmeticRefused(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    text = normal(text)
    if not _ALLOWED.fullmatch(text):
        raise ArithmeticRefused("it holds a character that arithmetic has no use for")
    if _LONG.search(text):
        raise ArithmeticRefused(f"it holds a number of more than {MAX_DIGITS} digits")
    if unknowns:
        text = re.sub(r"(?<=[0-9)a-z])\s*(?=[a-z(])", "*", text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that of `3(4)`
            tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ArithmeticRefused("it is no expression") from None
    found = Value(Fraction(0))
    found.value = _walk(tree.body, text, unknowns or {}, found.numbers, 0)
    return found


def _walk(
    node: ast.expr, text: str, unknowns: Mapping[str, Fraction], numbers: list[Fraction], depth: int
) -> Fraction:
    if depth > MAX_DEPTH:
        raise ArithmeticRefused(f"it is nested deeper than {MAX_DEPTH}")
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            digits = ast.get_source_segment(text, node) or ""
            if not _DECIMAL.fullmatch(digits):  # 1e9, 0x10
                raise ArithmeticRefused("it holds a number in a notation that is not decimal")
            numbers.append(Fraction(digits))
            return numbers[-1]
        case ast.Name(id=name) if name in unknowns:
            return unknowns[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_walk(inner, text, unknowns, numbers, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _walk(inner, text, unknowns, numbers, depth + 1)
        case ast.BinOp(left=a, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as op, right=b):
            left = _walk(a, text, unknowns, numbers, depth + 1)
            right = _walk(b, text, unknowns, numbers, depth + 1)
            return _apply(op, left, right)
    raise ArithmeticRefused(f"it holds {type(getattr(node, 'op', node)).__name__}, which is not arithmetic")


def _apply(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
    if right == 0:
        raise ArithmeticRefused("it divides by zero")
    return left / right


def letters(text: str) -> set[str]:
    """The one-letter names of a text."""
    return set(re.findall(r"(?<![a-z])[a-z](?![a-z])", normal(text)))
