"""A completion taken apart: its reasoning and its answer, and the value in the answer, by a named rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hadal.data.puzzles.task import bold_value
from hadal.post.rewards.protocol import Completion, RewardError

OPEN, CLOSE = "<think>", "</think>"
MAX_ANSWER = 20_000  # characters at the end of an answer that are searched

_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?")
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


@dataclass(frozen=True, slots=True)
class Parts:
    """reasoning and answer, stripped; closed: whether there is reasoning, and it ended. Without think tags,
    and where the template opened none, all is the answer."""

    reasoning: str
    answer: str
    closed: bool


def split(completion: Completion) -> Parts:
    """What stands before and after the last `</think>`. A reasoning that never ends leaves no answer."""
    head, tag, tail = completion.text.rpartition(CLOSE)
    if tag:
        return Parts(head.replace(OPEN, "").strip(), tail.strip(), True)
    if completion.opened or OPEN in tail:
        return Parts(tail.replace(OPEN, "").strip(), "", False)
    return Parts("", tail.strip(), False)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} whose braces are balanced."""
    opened: list[int] = []
    last = None
    for at, letter in enumerate(text):
        if letter == "{":
            opened.append(at)
        elif letter == "}" and opened:
            start = opened.pop()
            if text.endswith(("\\boxed", "\\fbox"), 0, start) and (last is None or start > last[0]):
                last = start, at
    return None if last is None else text[last[0] + 1 : last[1]].strip()


def last_number(text: str) -> str | None:
    """The last number, a fraction of two whole; thousands' commas left out, `−` as `-`."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("−", "-").replace(" ", "") if found else None


def tagged(text: str) -> str | None:
    """What the one pair <answer>…</answer> holds; None if there is none, or several."""
    found = _TAG.findall(text)
    return found[0].strip() if len(found) == 1 else None


def after_hashes(text: str) -> str | None:
    """What stands behind the last `####`, as in GSM8K's answers, without thousands' commas."""
    found = _HASHES.findall(text)
    return re.sub(r"(?<=\d),(?=\d{3})", "", found[-1].strip()) or None if found else None


def last_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


RULES = {
    "boxed": boxed,
    "bold": bold_value,
    "tag": tagged,
    "hashes": after_hashes,
    "last-number": last_number,
    "last-line": last_line,
    "all": lambda text: text.strip() or None,
}


def check_rules(rules: Sequence[str]) -> None:
    """Raises RewardError, which lists the rules."""
    for rule in rules:
        if rule not in RULES:
            raise RewardError(f"extract names {rule!r}; rules: {', '.join(RULES)}")
    if not rules:
        raise RewardError(f"extract is empty; at least one of {', '.join(RULES)}")


def extract(answer: str, rules: Sequence[str]) -> tuple[str, str] | None:
    """The value that the first rule finds which finds any, and that rule's name. Only the last
    MAX_ANSWER characters are read."""
    for rule in rules:
        value = RULES[rule](answer[-MAX_ANSWER:])
        if value:
            return value, rule
    return None
