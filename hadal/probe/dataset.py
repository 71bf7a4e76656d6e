"""The data set of the study of semantic primes: 65 primes in carrier sentences, semiotic squares, isotopies
with lexical controls, explications, and words to compare with (docs/nsm-data.md says how it was made).

    from hadal.probe.dataset import check, load

    data = load()
    data.languages, len(data.carriers_of("fr", "KNOW"))
    print(check(data).table())

Another language, or another reading of one, is a folder of the same files: `load("my-sanskrit")`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hadal.probe.checks import Report, check
from hadal.probe.rows import (
    KINDS,
    Carrier,
    ControlWord,
    DatasetError,
    Explication,
    IsotopySentence,
    Pair,
    Prime,
    Square,
    files,
    read,
)

__all__ = ["Dataset", "DatasetError", "Occurrence", "Report", "check", "load"]

FOLDER: Final = Path(__file__).resolve().parent.parent / "assets" / "nsm"
WORD: Final = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


@dataclass(frozen=True)
class Occurrence:
    """A control word in a carrier sentence, outside the sentence's own target: text[start:end]."""

    word: ControlWord
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Dataset:
    """All rows, in the order of the files. `digest`: SHA-256 over the files' names and bytes, so that a
    result can say which data made it."""

    primes: tuple[Prime, ...]
    carriers: tuple[Carrier, ...]
    squares: tuple[Square, ...]
    pairs: tuple[Pair, ...]
    isotopies: tuple[IsotopySentence, ...]
    explications: tuple[Explication, ...]
    words: tuple[ControlWord, ...]
    digest: str

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that have primes, sorted."""
        return tuple(sorted({prime.language for prime in self.primes}))

    def primes_of(self, language: str) -> tuple[Prime, ...]:
        return tuple(p for p in self.primes if p.language == language)

    def carriers_of(self, language: str, prime: str | None = None) -> tuple[Carrier, ...]:
        return tuple(
            c for c in self.carriers if c.language == language and (prime is None or c.prime == prime)
        )

    def halves(self, first: str, second: str) -> tuple[tuple[Carrier, ...], tuple[Carrier, ...]]:
        """Carriers of two languages (or of one, twice) that share no content: of what a prime has in both,
        each takes a half (by a hash, so for good); what one alone has, it keeps. Without this, vectors of two
        languages agree because their sentences are translations."""
        for language in (first, second):
            self._known(language)
        one, other = self.carriers_of(first), self.carriers_of(second)
        common: dict[str, set[str]] = defaultdict(set)
        contents = {c.content for c in other}
        for carrier in one:
            if carrier.content in contents:
                common[carrier.prime].add(carrier.content)
        side = {
            content: number % 2
            for shared in common.values()
            for number, content in enumerate(
                sorted(shared, key=lambda c: hashlib.sha256(c.encode()).digest())
            )
        }
        return (
            tuple(c for c in one if side.get(c.content, 0) == 0),
            tuple(c for c in other if side.get(c.content, 1) == 1),
        )

    def occurrences(self, language: str, least: int = 2) -> tuple[Occurrence, ...]:
        """Control words where they stand in carrier sentences, a pool in context: those that do so at least
        `least` times. One occurrence a word and sentence, the first."""
        self._known(language)
        found: dict[str, list[Occurrence]] = {w.word: [] for w in self.words if w.language == language}
        rows = {w.word: w for w in self.words if w.language == language}
        for carrier in self.carriers_of(language):
            seen = set()
            for begin, end, word in words_beside(carrier):
                if word in rows and word not in seen:
                    seen.add(word)
                    found[word].append(Occurrence(rows[word], carrier.text, begin, end))
        return tuple(o for places in found.values() if len(places) >= least for o in places)

    def contexts(self, language: str) -> dict[str, Counter[str]]:
        """Words that stand beside the target in each prime's carriers, counted: what a model without any
        meaning has to tell primes apart by. A study shows more than this, or nothing."""
        self._known(language)
        found: dict[str, Counter[str]] = {p.id: Counter() for p in self.primes_of(language)}
        for carrier in self.carriers_of(language):
            found[carrier.prime].update(word for _, _, word in words_beside(carrier))
        return found

    def _known(self, language: str) -> None:
        if language not in self.languages:
            raise DatasetError(f"there is no language {language!r}; there are {', '.join(self.languages)}")


def words_beside(carrier: Carrier) -> Iterator[tuple[int, int, str]]:
    """(start, end, word in lower case) of every word of a carrier that does not touch its target."""
    for match in WORD.finditer(carrier.text):
        if match.end() <= carrier.start or match.start() >= carrier.end:
            yield match.start(), match.end(), match.group().lower()


def load(*folders: str | Path, languages: Iterable[str] | None = None, packaged: bool = True) -> Dataset:
    """The packaged data set and, after it, the files of `folders`; only `languages`, if given. Raises
    DatasetError, with file and line, for anything that is not as it should be; what `check` finds beyond that
    is no error here."""
    rows: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    digest = hashlib.sha256()
    for folder in [*([FOLDER] if packaged else []), *map(Path, folders)]:
        for kind, language, path in files(folder):
            rows[kind] += read(path, KINDS[kind], language)
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    wanted = None if languages is None else set(languages)
    if wanted is not None:
        known = {prime.language for prime in rows["primes"]}
        if unknown := sorted(wanted - known):
            raise DatasetError(f"no primes in {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        rows = {kind: [r for r in found if r.language in wanted] for kind, found in rows.items()}
        digest.update(" ".join(sorted(wanted)).encode())
    _refuse_twice(rows)
    return Dataset(**{kind: tuple(found) for kind, found in rows.items()}, digest=digest.hexdigest())


def _refuse_twice(rows: dict[str, list[Any]]) -> None:
    """Names must be unique, spans inside their text, and names of primes known. Raises DatasetError."""
    keys = {
        "primes": lambda r: (r.language, r.id),
        "squares": lambda r: (r.language, r.id),
        "pairs": lambda r: (r.language, r.relation, r.id),
        "isotopies": lambda r: (r.language, r.id),
        "explications": lambda r: (r.language, r.molecule),
        "words": lambda r: (r.language, r.word),
    }
    for kind, key in keys.items():
        seen = set()
        for row in rows[kind]:
            if key(row) in seen:
                raise DatasetError(f"{kind} has {' '.join(key(row))} twice")
            seen.add(key(row))
    known = {(p.language, p.id) for p in rows["primes"]}
    for carrier in rows["carriers"]:
        if (carrier.language, carrier.prime) not in known:
            raise DatasetError(
                f"a carrier names the prime {carrier.prime!r}, which {carrier.language!r} does not have: "
                f"{carrier.text!r}"
            )
        if not 0 <= carrier.start < carrier.end <= len(carrier.text):
            raise DatasetError(f"[{carrier.start}, {carrier.end}) does not lie in {carrier.text!r}")
    for row in rows["explications"]:
        for prime in row.primes:
            if (row.language, prime) not in known:
                raise DatasetError(f"the explication of {row.molecule!r} uses an unknown prime, {prime!r}")
