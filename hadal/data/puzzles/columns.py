"""Written arithmetic, one line a step: the lookups and copies that every puzzle is made of.

A small model cannot add 4,578 and 967 in one token, but it can copy two digits, look up `8+7=15`
and put a digit before a number. So every step below reads only text that stands shortly before it:
numbers are padded to one length, columns run from the right, a carry is the first digit of the sum on
the line above, and each line ends in the result so far (`→ 45`), so that nothing is gathered later.

All functions return the lines of a trace; the last line ends in `=result` or `a∘b=result`.
"""

from __future__ import annotations

IN_HEAD = 100  # below it, a helper step (not a question) adds and subtracts in one line


def pad(a: int, b: int) -> tuple[str, str]:
    """Both numbers (≥ 0) with leading zeros to the same number of digits."""
    width = max(len(str(a)), len(str(b)))
    return str(a).zfill(width), str(b).zfill(width)


def add(a: int, b: int) -> list[str]:
    """a + b, both ≥ 0, by columns from the right: `345+078:`, `5+8=13 → 3`, `4+7+1=12 → 23`, …"""
    if a < 10 and b < 10:
        return [f"{a}+{b}={a + b}"]
    x, y = pad(a, b)
    lines, done, carry = [f"{x}+{y}:"], "", 0
    for i in range(len(x) - 1, -1, -1):
        total = int(x[i]) + int(y[i]) + carry
        done = (str(total % 10) if i else str(total)) + done
        lines.append(f"{x[i]}+{y[i]}{'+1' if carry else ''}={total} → {done}")
        carry = total // 10
    return [*lines, f"={a + b}"]


def compare(a: int, b: int) -> str:
    """Digits from the left until they differ: `425 ? 478: 4=4, 2<7`."""
    x, y = pad(a, b)
    return f"{x} ? {y}: {digits_until_different(x, y)}"


def digits_until_different(x: str, y: str) -> str:
    """`4=4, 2<7` for two strings of one length; a decimal point is passed over."""
    steps = []
    for p, q in zip(x, y, strict=True):
        if p == q:
            if p.isdigit():
                steps.append(f"{p}={q}")
            continue
        steps.append(f"{p}<{q}" if p < q else f"{p}>{q}")
        break
    return ", ".join(steps)


def subtract(a: int, b: int) -> list[str]:
    """a − b, both ≥ 0; a negative result is minus the difference the other way round.

    A borrow is the 1 before the upper digit: `13-8=5 → 5`; the next column then takes 1 off.
    """
    if a < 10 and b < 10:
        return [f"{a}-{b}={a - b}"]
    lines = [compare(a, b)]
    if a < b:
        return [*lines, f"{a}-{b}=-({b}-{a})", *_borrow(b, a), f"=-{b - a}"]
    return [*lines, *_borrow(a, b), f"={a - b}"]


def _borrow(a: int, b: int) -> list[str]:
    x, y = pad(a, b)
    lines, done, borrow = [f"{x}-{y}:"], "", 0
    for i in range(len(x) - 1, -1, -1):
        top, low = int(x[i]), int(y[i])
        left = f"{low}-1" if borrow else f"{low}"
        short = top < low + borrow
        top += 10 if short else 0
        digit = top - low - borrow
        done = f"{digit}{done}"
        lines.append(f"{top}-{left}={digit} → {done}")
        borrow = int(short)
    return lines


def signed(a: int, op: str, b: int) -> list[str]:
    """a + b or a − b for any a and b ≥ 0, as a step inside a longer solution."""
    result = a + b if op == "+" else a - b
    if abs(a) < IN_HEAD and b < IN_HEAD:
        return [f"{a}{op}{b}={result}"]
    if a >= 0:
        return add(a, b) if op == "+" else subtract(a, b)
    if op == "+":
        return [f"{a}+{b}={b}-{-a}", *subtract(b, -a)]
    return [f"{a}-{b}=-({-a}+{b})", *add(-a, b), f"={result}"]


def times_digit(a: int, d: int) -> list[str]:
    """a × d with d < 10: one product a digit, plus the carry: `4×6=24, 24+4=28 → 82`."""
    if a < 10 or d == 0:
        return [f"{a}×{d}={a * d}"]
    x = str(a)
    lines, done, carry = [f"{a}×{d}:"], "", 0
    for i in range(len(x) - 1, -1, -1):
        product = int(x[i]) * d
        total = product + carry
        done = (str(total % 10) if i else str(total)) + done
        plus = f", {product}+{carry}={total}" if carry else ""
        lines.append(f"{x[i]}×{d}={product}{plus} → {done}")
        carry = total // 10
    return [*lines, f"={a * d}"]


def multiply(a: int, b: int) -> list[str]:
    """a × b, both ≥ 0: one partial product for each digit of the smaller number, then their sum."""
    a, b = max(a, b), min(a, b)
    if b < 10:
        return times_digit(a, b)
    lines, total = [f"{a}×{b}:"], 0
    for power, digit in enumerate(reversed(str(b))):
        part = a * int(digit) * 10**power
        lines += times_digit(a, int(digit))
        if power and part:
            lines[-1] += f" → {part}"
        if total and part:
            lines += add(total, part)
        total += part
    return [*lines, f"={total}"]


def divide(a: int, b: int) -> list[str]:
    """a ÷ b with remainder, long division digit by digit: `24: 4×6=24, 24-24=0 → 14`.

    For b > 9 the multiples of b come first, so that each step is a choice from a list.
    The last line is `=quotient r remainder`.
    """
    lines = [f"{a}÷{b}:"]
    if b > 9:
        lines.append(" ".join(str(b * k) for k in range(1, 10)))
    rest, quotient = 0, ""
    for digit in str(a):
        part = rest * 10 + int(digit)
        q, rest = divmod(part, b)
        quotient += str(q)
        lines.append(f"{part}: {q}×{b}={q * b}, {part}-{q * b}={rest} → {quotient}")
    return [*lines, f"={a // b} r {rest}"]


def divide_exact(a: int, b: int) -> list[str]:
    """a ÷ b without remainder, as a step: from the times table if that will do."""
    if b <= 10 and a // b <= 10:
        return [f"{a}÷{b}={a // b}"]
    return divide(a, b)
