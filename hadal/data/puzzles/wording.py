"""How people ask: a tiny template grammar, the symbols they use, and the slips they make.

A template such as `[What is|What's] {e}[?|]` stands for all its readings; a reading is drawn by first
drawing a template, then one of its readings, so that long templates do not crowd out bare ones.
"""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from functools import cache

from hadal.data.puzzles.phrases.common import AFTER, BEFORE

_CHOICE = re.compile(r"\[([^\]]*)\]")

Templates = tuple[str, ...]


@cache
def readings(template: str) -> tuple[str, ...]:
    """All readings of a template: `a[b|c]` → (`ab`, `ac`)."""
    parts = _CHOICE.split(template)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple(dict.fromkeys("".join(choice) for choice in itertools.product(*options)))


def phrase(rng: random.Random, templates: Templates, **fields: object) -> str:
    """Draw a reading and fill it in."""
    options = readings(templates[int(rng.random() * len(templates))])
    return options[int(rng.random() * len(options))].format(**fields)


_TIMES = ("×", "×", "×", "*", "*", "x", "x", "·")
_OVER = ("÷", "÷", "/", "/", ":")


def written(rng: random.Random, tokens: list[str]) -> str:
    """An expression as people type it: its symbols and its spacing. `tokens` use `+ - × ÷`."""
    draw = rng.random()
    if draw < 0.5:
        text = " ".join(tokens).replace("( ", "(").replace(" )", ")")
    elif draw < 0.93:
        text = "".join(tokens)
    else:
        text = "".join(token + (" " if rng.random() < 0.5 else "") for token in tokens).strip()
    if "×" in text:
        text = text.replace("×", _TIMES[int(rng.random() * len(_TIMES))])
    if "÷" in text:
        text = text.replace("÷", _OVER[int(rng.random() * len(_OVER))])
    if "-" in text and rng.random() < 0.15:
        text = text.replace("-", "−")
    return text


def slips(rng: random.Random, text: str, language: str) -> str:
    """The prompt with the habits of typing: politeness, lower case, lost accents, marks and letters."""
    if rng.random() < 0.35:
        return text
    if rng.random() < 0.13:
        before = phrase(rng, BEFORE[language])
        text = before + text[:1].lower() + text[1:]
    if rng.random() < 0.07:
        text += phrase(rng, AFTER[language])
    if rng.random() < 0.35:
        text = text.lower()
    if rng.random() < 0.15:
        text = text.rstrip("?.! ")
    if language != "en" and rng.random() < 0.12:
        text = without_accents(text)
    draw = rng.random()
    if draw < 0.05:
        text = _typo(rng, text)
    elif draw < 0.08:
        text = text.replace(" ", "  ", 1)
    elif draw < 0.09:
        text = " " + text
    elif draw < 0.11:
        text += " "
    elif draw < 0.12:
        text = text.upper()
    return text


def without_accents(text: str) -> str:
    """`Ça fait` → `Ca fait`. Symbols such as × and ÷ stay."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def _typo(rng: random.Random, text: str) -> str:
    """One letter lost, doubled or exchanged with its neighbour, inside a word, never in a number."""
    places = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    draw = rng.random()
    if draw < 0.4:
        return text[:i] + text[i + 1 :]
    if draw < 0.6:
        return text[:i] + text[i] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


AND = {"en": "and", "fr": "et", "pt": "e"}


def listed(rng: random.Random, items: list[str], language: str) -> str:
    """A list as people type it: `3, 1, 2`, `3 1 2`, `[3, 1, 2]`, `3, 1 and 2`."""
    draw = rng.random()
    if draw < 0.5:
        return ", ".join(items)
    if draw < 0.64:
        return " ".join(items)
    if draw < 0.72:
        return "[" + ", ".join(items) + "]"
    if draw < 0.77:
        return ",".join(items)
    if draw < 0.8:
        return "; ".join(items)
    return f"{', '.join(items[:-1])} {AND[language]} {items[-1]}"
