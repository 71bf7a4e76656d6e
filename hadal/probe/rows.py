"""Rows of the study's data set, and their strict reading: JSONL, a row a line, unknown keys refused.

A file is `KIND.jsonl`, whose rows say their language, or `KIND.LANGUAGE.jsonl`, whose name says it. A
language is any code of two or three letters; nothing here knows which languages exist.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

LANGUAGE: Final = re.compile(r"[a-z]{2,3}")


class DatasetError(ValueError):
    """A data set that cannot be used; the message names file, line, cause and remedy."""


@dataclass(frozen=True)
class Prime:
    """A prime in one language. `exponents`: the canonical one and its allolexes. `forms`: all that a target
    span may read, in lower case. `not_after`: words whose neighbour on the right is a homograph."""

    id: str
    language: str
    category: str
    subcategory: str
    pos: str
    exponents: tuple[str, ...]
    forms: tuple[str, ...]
    homographs: str
    not_after: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Carrier:
    """A sentence that carries a prime: text[start:end] is its exponent. Sentences of two languages with one
    `content` say the same."""

    language: str
    prime: str
    text: str
    start: int
    end: int
    content: str

    @property
    def target(self) -> str:
        return self.text[self.start : self.end]

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The target as `hadal.probe.backends.Item` takes it."""
        return ((self.start, self.end),)


@dataclass(frozen=True)
class Square:
    """A semiotic square: contraries s1 and s2, contradictories not_s1 and not_s2. `marking`: how the two
    contradictories are made (MARKINGS). Squares of two languages with one id are translations."""

    id: str
    language: str
    domain: str
    s1: str
    s2: str
    not_s1: str
    not_s2: str
    marking: tuple[str, ...]

    @property
    def corners(self) -> tuple[str, str, str, str]:
        return self.s1, self.s2, self.not_s1, self.not_s2


@dataclass(frozen=True)
class Pair:
    """Two words that are no contraries: `relation` is "synonym" or "cohyponym"."""

    id: str
    language: str
    relation: str
    a: str
    b: str


@dataclass(frozen=True)
class IsotopySentence:
    """A sentence of one isotopy. `forms` bear it, and are forms of `lemmas`. `control` keeps the `shared`
    words, has none of `forms`, and belongs to `control_isotopy`: another isotopy, or "neutral"."""

    id: str
    language: str
    isotopy: str
    template: str
    text: str
    forms: tuple[str, ...]
    lemmas: tuple[str, ...]
    control: str
    control_isotopy: str
    shared: tuple[str, ...]


@dataclass(frozen=True)
class Explication:
    """A concept written in primes, line by line, and how often each prime is used."""

    molecule: str
    language: str
    lines: tuple[str, ...]
    primes: Mapping[str, int]


@dataclass(frozen=True)
class ControlWord:
    """A word that is no prime, near in length (and, where possible, in part of speech) to `matches`."""

    language: str
    word: str
    pos: str
    matches: str


KINDS: Final[dict[str, type]] = {
    "primes": Prime,
    "carriers": Carrier,
    "squares": Square,
    "pairs": Pair,
    "isotopies": IsotopySentence,
    "explications": Explication,
    "words": ControlWord,
}
MARKINGS: Final = ("word", "particle", "phrase")
Row = TypeVar("Row")


def files(folder: Path) -> list[tuple[str, str | None, Path]]:
    """(kind, language of the name, path) of every `.jsonl` of a folder, by name. Raises DatasetError for a
    file of unknown kind."""
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder of JSONL files")
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        kind, *rest = path.name.removesuffix(".jsonl").split(".")
        if kind not in KINDS or len(rest) > 1 or not all(LANGUAGE.fullmatch(code) for code in rest):
            raise DatasetError(
                f"{path}: a name is KIND.jsonl or KIND.LANGUAGE.jsonl; KIND is one of {', '.join(KINDS)}, "
                "and LANGUAGE a code such as sa"
            )
        found.append((kind, rest[0] if rest else None, path))
    if not found:
        raise DatasetError(f"{folder} holds no .jsonl file")
    return found


def read(path: Path, kind: type[Row], language: str | None) -> list[Row]:
    """The rows of a file. Raises DatasetError with the line."""
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not unicodedata.is_normalized("NFC", content):
        raise DatasetError(f"{path} is not in Unicode form NFC; write it through unicodedata.normalize")
    hints = typing.get_type_hints(kind)
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(kind(**_fields(json.loads(line), hints, language)))
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path.name}, line {number}: {error}") from None
    return rows


def _fields(row: object, hints: Mapping[str, Any], language: str | None) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DatasetError(f"{row!r} is no object")
    if language is not None:
        if "language" in row:
            raise DatasetError("the file's name says the language; the row must not have the key")
        row = row | {"language": language}
    for key in row:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise DatasetError(
                f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {list(hints)}")
            )
    if missing := [key for key in hints if key not in row]:
        raise DatasetError(f"keys are missing: {missing}")
    if not LANGUAGE.fullmatch(str(row["language"])):
        raise DatasetError(f"language is {row['language']!r}; it must be a code of two or three letters")
    return {key: _value(key, row[key], hint) for key, hint in hints.items()}


def _value(key: str, value: object, hint: Any) -> Any:
    if hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if origin is Mapping and isinstance(value, dict) and all(type(v) is int for v in value.values()):
        return dict(value)
    raise DatasetError(f"{key} is {value!r}, which is not of type {getattr(hint, '__name__', hint)}")
