"""In which language a question is answered: the one that its words give away.

`12 + 35`, `max(3, 7)` or `Compare 3, 7` are English as much as French or Portuguese. A model cannot guess
which was meant, so such questions are answered in the language of the turn before, or in English. A word is
evidence for a language if the wordings of this package use it in that language only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from hadal.data.puzzles.phrases import (
    arithmetic,
    chains,
    chat,
    common,
    compare,
    countdown,
    digits,
    equations,
    sequences,
)
from hadal.data.puzzles.task import LANGUAGES
from hadal.data.puzzles.wording import AND, without_accents

_WORD = re.compile(r"[a-z]+")
_SLOT = re.compile(r"\{\w+\}")
_LETTERS = frozenset("abntxyz")  # unknowns of equations, and × typed as x
_MODULES = (arithmetic, chains, chat, common, compare, countdown, digits, equations, sequences)


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without accents; letters that may be unknowns are none."""
    return [word for word in _WORD.findall(without_accents(text).lower()) if word not in _LETTERS]


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from _texts(inner)


@cache
def evidence() -> dict[str, frozenset[str]]:
    """For each language, the words that only its wordings use."""
    used: dict[str, set[str]] = {language: set(words(AND[language])) for language in LANGUAGES}
    for module in _MODULES:
        for table in vars(module).values():
            if not isinstance(table, dict) or "en" not in table:
                continue
            for language in LANGUAGES:
                for text in _texts(table[language]):
                    used[language].update(words(_SLOT.sub(" ", text)))
    return {
        language: frozenset(
            used[language].difference(*(used[other] for other in LANGUAGES if other != language))
        )
        for language in LANGUAGES
    }


def is_recognisable(prompt: str, language: str) -> bool:
    """Whether a question holds a word that gives its language away."""
    return not evidence()[language].isdisjoint(words(prompt))
