"""Checks of the study's data: what would let a probe succeed for the wrong reason, as findings and tables.

Findings are faults: a target that is no exponent, a homograph, a missing accent, a sentence twice. Tables are
facts to weigh: carriers and token counts by prime, where in its sentence the target stands, how often words
occur (in the data set itself: there is no outside list of frequencies), and which primes stand in the
sentences of which others.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hadal.probe.rows import MARKINGS, Carrier, IsotopySentence, Prime

if TYPE_CHECKING:
    from hadal.probe.dataset import Dataset

PRIMES: Final = 65
LEAST_CARRIERS: Final = 20
LEAST_SQUARES = LEAST_PAIRS = 100
LEAST_ISOTOPY: Final = 15
LEAST_EXPLICATIONS: Final = 20
WORDS_OF_A_CARRIER: Final = (5, 20)
SHINGLE: Final = 5
WORD: Final = re.compile(r"[^\W\d_]+|\d+")
Tokenizer = Callable[[str], Sequence[int]]

# Words without an accent that are words of their own beside an accented one (ou and où).
PLAIN: Final[dict[str, frozenset[str]]] = {
    "fr": frozenset("a la ou du des sur mur cote venus ca jeune boite tache mais".split())
}
# A participle (mangé) beside the present (mange): a fault only after an auxiliary.
PARTICIPLE: Final = {"fr": re.compile(r"é(?=e?s?$)")}
AUXILIARY: Final = frozenset("a ai as ont avons avez avait avaient avais aurait eu été".split())


@dataclass(frozen=True)
class Finding:
    """A fault: which check, where (language and row), what."""

    check: str
    where: str
    message: str


@dataclass(frozen=True)
class Count:
    """A prime's carriers in one language. `places`: targets in the first, middle and last third of their
    sentence. `tokens`: mean of the target in its sentence, and `split` the share of targets of several;
    None without a tokenizer."""

    language: str
    prime: str
    carriers: int
    forms: int
    words: float
    places: tuple[int, int, int]
    tokens: float | None = None
    split: float | None = None


@dataclass(frozen=True)
class Report:
    """What `check` found. `confounds[language][prime][other]`: sentences of `prime` in which a form of
    `other` stands too. `frequencies[language]`: sentences in which a word stands, of all carriers."""

    findings: tuple[Finding, ...]
    counts: tuple[Count, ...]
    sizes: dict[str, dict[str, int]]
    confounds: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    frequencies: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.findings

    def json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "findings": [vars(f) for f in self.findings],
            "counts": [vars(c) | {"places": list(c.places)} for c in self.counts],
            "sizes": self.sizes,
            "confounds": self.confounds,
            "frequencies": self.frequencies,
        }

    def table(self) -> str:
        """For people: sizes, a line a prime, the heaviest confounds, and every finding."""
        lines = ["size of the data set"]
        lines += [f"  {kind:<13}{_each(by)}" for kind, by in self.sizes.items()]
        lines += ["", f"{'prime':<16}{'lang':<6}carriers  forms  words  first/mid/last  tokens  split"]
        for c in self.counts:
            tokens = "     -      -"
            if c.tokens is not None and c.split is not None:
                tokens = f"{c.tokens:6.2f} {c.split:6.0%}"
            places = "/".join(map(str, c.places))
            lines.append(
                f"{c.prime:<16}{c.language:<6}{c.carriers:8d}{c.forms:7d}{c.words:7.1f}{places:>16}  {tokens}"
            )
        for language, table in self.confounds.items():
            heavy = sorted(((n, p, o) for p, row in table.items() for o, n in row.items()), reverse=True)[:10]
            lines += ["", f"primes most often in others' sentences ({language})"]
            lines += [f"  {other} in {n} of {prime}" for n, prime, other in heavy]
        lines += ["", f"findings: {len(self.findings) or 'none'}"]
        return "\n".join(lines + [f"  {f.check}: {f.where}: {f.message}" for f in self.findings])


def _each(by: dict[str, int]) -> str:
    return "  ".join(f"{language} {n}" for language, n in sorted(by.items()))


def check(dataset: Dataset, tokenizer: Tokenizer | None = None) -> Report:
    """Every check over every language of the data set. `tokenizer`: text to ids, for counts of tokens."""
    findings: list[Finding] = []
    counts, confounds, frequencies = [], {}, {}
    for language in dataset.languages:
        primes = {p.id: p for p in dataset.primes_of(language)}
        carriers = dataset.carriers_of(language)
        findings += _primes(primes, carriers, language)
        for carrier in carriers:
            findings += _carrier(carrier, primes[carrier.prime])
        findings += _repeated(dataset, language)
        findings += _accents(dataset, language)
        findings += _squares(dataset, language)
        findings += _isotopies(dataset, language)
        findings += _explications(dataset, language)
        findings += _words(dataset, primes, language)
        counts += [_count(p, carriers, tokenizer) for p in primes.values()]
        confounds[language] = _confounds(primes, carriers)
        frequencies[language] = dict(Counter(w for c in carriers for w in set(words(c.text))).most_common())
    sizes = {
        kind: dict(sorted(Counter(r.language for r in getattr(dataset, kind)).items()))
        for kind in ("primes", "carriers", "squares", "pairs", "isotopies", "explications", "words")
    }
    return Report(tuple(findings), tuple(counts), sizes, confounds, frequencies)


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation."""
    return [w.lower() for w in WORD.findall(text)]


def _primes(primes: dict[str, Prime], carriers: Sequence[Carrier], language: str) -> Iterator[Finding]:
    if len(primes) != PRIMES:
        yield Finding("primes", language, f"{len(primes)} primes; the list has {PRIMES}")
    number = Counter(c.prime for c in carriers)
    for prime in primes.values():
        if number[prime.id] < LEAST_CARRIERS:
            yield Finding(
                "carriers", f"{language} {prime.id}", f"{number[prime.id]} of at least {LEAST_CARRIERS}"
            )


def _carrier(carrier: Carrier, prime: Prime) -> Iterator[Finding]:
    where, text = f"{carrier.language} {carrier.prime}", carrier.text
    target = carrier.target.lower()
    if target not in prime.forms:
        yield Finding("span", where, f"{carrier.target!r} is no form of the prime: {text!r}")
    before, after = text[: carrier.start], text[carrier.end :]
    if (before and before[-1].isalnum()) or (after and after[0].isalnum() and not target.endswith("'")):
        yield Finding("span", where, f"{carrier.target!r} is a part of a word: {text!r}")
    left = re.findall(r"[\w'-]+", before.lower())[-1:]
    if left and {left[0], left[0].split("'")[-1]} & set(prime.not_after):
        yield Finding("homograph", where, f"{carrier.target!r} after {left[0]!r}: {text!r}")
    length, (least, most) = len(words(text)), WORDS_OF_A_CARRIER
    if not least <= length <= most:
        yield Finding("length", where, f"{length} words, not {least} to {most}: {text!r}")
    if text != " ".join(text.split()) or text[-1] not in ".?!":
        yield Finding("form", where, f"stray spaces, or no full stop: {text!r}")


def _repeated(dataset: Dataset, language: str) -> Iterator[Finding]:
    """Sentences twice, up to case and punctuation; and, in sentences of one prime, five words in a row that
    two of them share, the target counted as one (a sign of a filled template)."""
    texts = [(f"{language} {c.prime}", c.text) for c in dataset.carriers_of(language)]
    for row in (r for r in dataset.isotopies if r.language == language):
        texts += [(f"{language} {row.id}", row.text), (f"{language} {row.id}", row.control)]
    seen: dict[tuple[str, ...], str] = {}
    for where, text in texts:
        key = tuple(words(text))
        if key in seen:
            yield Finding("duplicate", where, f"stands in {seen[key]} too: {text!r}")
        seen[key] = where
    shared: dict[tuple[str, ...], str] = {}
    for carrier in dataset.carriers_of(language):
        beside = [*words(carrier.text[: carrier.start]), "…", *words(carrier.text[carrier.end :])]
        for i in range(len(beside) - SHINGLE + 1):
            shingle = (carrier.prime, *beside[i : i + SHINGLE])
            if shared.setdefault(shingle, carrier.text) != carrier.text:
                where = f"{language} {carrier.prime}"
                yield Finding("template", where, f"two sentences share {' '.join(shingle[1:])!r}")
                break
    contents = Counter(c.content for c in dataset.carriers_of(language))
    for content, n in contents.items():
        if n > 1:
            yield Finding("content", f"{language} {content}", f"{n} sentences of one content")


def plain(word: str) -> str:
    """The word without accents."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))


def _texts(dataset: Dataset, language: str) -> Iterator[str]:
    yield from (c.text for c in dataset.carriers_of(language))
    for row in (r for r in dataset.isotopies if r.language == language):
        yield from (row.text, row.control)
    for square in (s for s in dataset.squares if s.language == language):
        yield from square.corners
    for pair in (p for p in dataset.pairs if p.language == language):
        yield from (pair.a, pair.b)
    for explication in (e for e in dataset.explications if e.language == language):
        yield from explication.lines
    yield from (w.word for w in dataset.words if w.language == language)


def _accents(dataset: Dataset, language: str) -> Iterator[Finding]:
    """Words that stand without the accent that the data set itself gives them elsewhere."""
    participle = PARTICIPLE.get(language)
    accented: dict[str, set[str]] = defaultdict(set)
    bare: dict[str, str] = {}
    helped: dict[str, str] = {}
    for text in _texts(dataset, language):
        row = words(text)
        for word, left in zip(row, ["", *row], strict=False):
            if plain(word) != word:
                accented[plain(word)].add(word)
            else:
                bare.setdefault(word, text)
                if left in AUXILIARY:
                    helped.setdefault(word, text)
    for word, others in accented.items():
        ends = participle is not None and all(plain(word) == participle.sub("e", o) for o in others)
        place = (helped if ends else bare).get(word)
        if place is not None and word not in PLAIN.get(language, frozenset()):
            yield Finding("accent", language, f"{word!r} beside {sorted(others)}: {place!r}")


def _squares(dataset: Dataset, language: str) -> Iterator[Finding]:
    squares = [s for s in dataset.squares if s.language == language]
    if len(squares) < LEAST_SQUARES:
        yield Finding("squares", language, f"{len(squares)} of at least {LEAST_SQUARES}")
    seen: dict[str, str] = {}
    for square in squares:
        if len(square.marking) != 2 or not set(square.marking) <= set(MARKINGS):
            yield Finding("squares", square.id, f"marking is {square.marking}, not two of {MARKINGS}")
        for corner in square.corners:
            if corner in seen:
                yield Finding("squares", f"{language} {square.id}", f"{corner!r} is in {seen[corner]} too")
            seen[corner] = square.id
    for relation in ("synonym", "cohyponym"):
        pairs = [p for p in dataset.pairs if p.language == language and p.relation == relation]
        if len(pairs) < LEAST_PAIRS:
            yield Finding("pairs", f"{language} {relation}", f"{len(pairs)} of at least {LEAST_PAIRS}")
        number = Counter(w for p in pairs for w in (p.a, p.b))
        for word, n in number.items():
            if n > 1:
                yield Finding("pairs", f"{language} {relation}", f"{word!r} is in {n} pairs")
    for pair in dataset.pairs:
        if pair.relation not in ("synonym", "cohyponym"):
            yield Finding("pairs", pair.id, f"relation {pair.relation!r} is neither synonym nor cohyponym")


def _isotopies(dataset: Dataset, language: str) -> Iterator[Finding]:
    rows = [r for r in dataset.isotopies if r.language == language]
    number = Counter(r.isotopy for r in rows)
    for isotopy, n in number.items():
        if n < LEAST_ISOTOPY:
            yield Finding("isotopies", f"{language} {isotopy}", f"{n} sentences of {LEAST_ISOTOPY}")
    place: dict[str, tuple[str, str]] = {}
    yield from _leaks(rows, language)
    for row in rows:
        where, text, control = f"{language} {row.id}", row.text.lower(), words(row.control)
        if len(row.forms) != len(row.lemmas) or not row.lemmas:
            yield Finding("isotopies", where, "a lemma for each form is wanted")
        for form in row.forms:
            if form.lower() not in text:
                yield Finding("isotopies", where, f"{form!r} is not in the sentence")
        for lemma in row.lemmas:
            cell = (row.isotopy, row.template)
            if place.setdefault(lemma, cell) != cell:
                yield Finding("isotopies", where, f"lemma {lemma!r} is in {' '.join(place[lemma])} too")
        if bearing := [f for f in row.forms if f.lower() in control]:
            yield Finding("isotopies", where, f"the control has {bearing}, which bear the isotopy")
        if lost := [w for w in row.shared if w.lower() not in control or w.lower() not in words(text)]:
            yield Finding("isotopies", where, f"{lost} are not in both sentences")
        if row.control_isotopy not in {*number, "neutral"} or row.control_isotopy == row.isotopy:
            yield Finding("isotopies", where, f"a control of {row.control_isotopy!r} controls nothing")


def _leaks(rows: Sequence[IsotopySentence], language: str) -> Iterator[Finding]:
    """Words that bear one isotopy in sentences of another, and content words that two sentences share."""
    bears: dict[str, set[str]] = defaultdict(set)
    stands: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for word in (*row.forms, *row.lemmas):
            bears[word.lower()].add(row.isotopy)
        for word in row.shared:
            stands[word].add(row.id)
    for row in rows:
        own = {w.lower() for w in row.forms}
        for label, text in ((row.isotopy, row.text), (row.control_isotopy, row.control)):
            for word in sorted(set(words(text)) & bears.keys() - own):
                if label not in bears[word]:
                    where = f"{language} {row.id}"
                    yield Finding("isotopies", where, f"{word!r} bears {sorted(bears[word])}: {text!r}")
    for word, ids in stands.items():
        if len(ids) > 1:
            yield Finding("isotopies", f"{language} {sorted(ids)}", f"share {word!r}")


def _explications(dataset: Dataset, language: str) -> Iterator[Finding]:
    rows = [e for e in dataset.explications if e.language == language]
    if len(rows) < LEAST_EXPLICATIONS:
        yield Finding("explications", language, f"{len(rows)} of at least {LEAST_EXPLICATIONS}")
    for row in rows:
        if not row.lines or len(row.primes) < 2 or min(row.primes.values()) < 1:
            yield Finding("explications", f"{language} {row.molecule}", "no lines, or hardly a prime in them")
    alike = Counter(tuple(sorted(row.primes.items())) for row in rows)
    for row in rows:
        if alike[tuple(sorted(row.primes.items()))] > 1:
            yield Finding("explications", f"{language} {row.molecule}", "uses the same primes as another")


def _words(dataset: Dataset, primes: dict[str, Prime], language: str) -> Iterator[Finding]:
    forms = {form for prime in primes.values() for form in prime.forms}
    for row in (w for w in dataset.words if w.language == language):
        if row.word.lower() in forms:
            yield Finding("words", f"{language} {row.word}", "is a form of a prime")
        if row.matches not in primes:
            yield Finding("words", f"{language} {row.word}", f"matches {row.matches!r}, which is no prime")


def _count(prime: Prime, carriers: Sequence[Carrier], tokenizer: Tokenizer | None) -> Count:
    own = [c for c in carriers if c.prime == prime.id]
    places, tokens = [0, 0, 0], []
    for carrier in own:
        before, after = len(words(carrier.text[: carrier.start])), len(words(carrier.text[carrier.end :]))
        share = before / (before + after) if before + after else 0.0
        places[min(2, int(share * 3))] += 1
        if tokenizer is not None:
            tokens.append(_tokens(carrier, tokenizer))
    n = max(1, len(own))
    return Count(
        prime.language, prime.id, len(own), len({c.target.lower() for c in own}),
        sum(len(words(c.text)) for c in own) / n, (places[0], places[1], places[2]),
        sum(tokens) / n if tokens else None, sum(t > 1 for t in tokens) / n if tokens else None,
    )  # fmt: skip


def _tokens(carrier: Carrier, tokenizer: Tokenizer) -> int:
    """Tokens that the target adds to its sentence: those of the text to the target's end, less those to its
    beginning (without the space before it, which most tokenizers give to the word)."""
    upto, before = carrier.text[: carrier.end], carrier.text[: carrier.start].rstrip()
    return max(1, len(tokenizer(upto)) - (len(tokenizer(before)) if before else 0))


def _confounds(primes: dict[str, Prime], carriers: Sequence[Carrier]) -> dict[str, dict[str, int]]:
    """Forms of other primes outside the target. A form that several primes have counts for none of them."""
    number = Counter(form for p in primes.values() for form in p.forms)
    keys: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    for prime in primes.values():
        for form in (tuple(words(f)) for f in prime.forms if number[f] == 1):
            keys[form[0]].append((form, prime.id))
    table: dict[str, dict[str, int]] = {p: {} for p in primes}
    for carrier in carriers:
        rest = [*words(carrier.text[: carrier.start]), "…", *words(carrier.text[carrier.end :])]
        found = {
            owner
            for i, word in enumerate(rest)
            for form, owner in keys.get(word, ())
            if tuple(rest[i : i + len(form)]) == form
        }
        for other in sorted(found - {carrier.prime}):
            table[carrier.prime][other] = table[carrier.prime].get(other, 0) + 1
    return table
