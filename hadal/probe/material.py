"""What a study is asked with, of one language, whatever file it came from: targets in sentences, sentences of
isotopies with their controls, words that stand in squares, pairs and explications.

    for material in gather(recipe.data):
        material.language, len(material.targets), material.items()

Two sources: the data of semantic primes and folders of the same files (dataset.py), and JSONL of labelled
spans, {text, start, end, concept, category, language?, template?, lexeme?}.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hadal.probe.backends import Item
from hadal.probe.checks import Report, check, words
from hadal.probe.dataset import Dataset, load
from hadal.probe.extract import ProbeError
from hadal.probe.recipe import HYPOTHESES, Data
from hadal.probe.rows import DatasetError

SPAN_KEYS = {"text": str, "start": int, "end": int, "concept": str, "category": str}
SPAN_OPTIONS = ("language", "template", "lexeme")
Encoder = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Target:
    """A word in its sentence. `concept`: what it is an exponent of; `category`: of the concept."""

    item: Item
    concept: str
    category: str = ""
    lexeme: str = ""
    template: str = ""


@dataclass(frozen=True)
class Term:
    """A word without a sentence of its own, in every frame of its language."""

    word: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Material:
    """All that one language has. `features`: of concepts and of control words, what random words are matched
    by (length, frequency); `contexts`: of each concept, the words beside its targets. `halves`: by another
    language, ids of targets that share no content with the other's."""

    language: str
    targets: tuple[Target, ...]
    others: tuple[Target, ...] = ()
    sentences: tuple[Target, ...] = ()
    controls: tuple[Target, ...] = ()
    lemmas: tuple[frozenset[str], ...] = ()
    squares: tuple[tuple[str, str, tuple[str, str, str, str]], ...] = ()  # id, domain, corners
    pairs: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    molecules: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    terms: Mapping[str, Term] = field(default_factory=dict)
    other_terms: tuple[Term, ...] = ()
    strata: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    halves: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def concepts(self) -> dict[str, str]:
        """Category by concept, in the order of the files."""
        return {t.concept: t.category for t in self.targets}

    @property
    def contexts(self) -> dict[str, Counter[str]]:
        """Words beside the targets of each concept, once a sentence."""
        found: dict[str, Counter[str]] = {concept: Counter() for concept in self.concepts}
        for target in self.targets:
            begin, end = target.item.spans[0]
            text = target.item.text
            found[target.concept].update(set(words(text[:begin]) + words(text[end:])))
        return found

    @property
    def apart(self) -> list[int]:
        """Numbers of concepts, in order, each of which shares no word of its targets with one before it of
        the same category (letters alone do not count as words)."""
        own: dict[str, set[str]] = {concept: set() for concept in self.concepts}
        for target in self.targets:
            for begin, end in target.item.spans:
                own[target.concept].update(w for w in words(target.item.text[begin:end]) if len(w) > 1)
        kept: list[int] = []
        taken: dict[str, set[str]] = defaultdict(set)
        for number, (concept, category) in enumerate(self.concepts.items()):
            if not own[concept] & taken[category]:
                kept.append(number)
                taken[category] |= own[concept]
        return kept

    @property
    def letters(self) -> dict[str, Counter[str]]:
        """Three letters in a row in the targets of each concept: what words of one spelling share, and so
        most of what their tokens do."""
        found: dict[str, Counter[str]] = {concept: Counter() for concept in self.concepts}
        for target in self.targets:
            whole = " … ".join(target.item.text[begin:end] for begin, end in target.item.spans)
            text = f" {whole.lower()} "
            found[target.concept].update(text[i : i + 3] for i in range(len(text) - 2))
        return found

    def items(self) -> Iterator[Item]:
        """Everything that vectors are wanted of."""
        own = () if self.sentences_are_targets else self.sentences
        for target in (*self.targets, *self.others, *own, *self.controls):
            yield target.item
        for term in (*self.terms.values(), *self.other_terms):
            yield from term.items

    @property
    def sentences_are_targets(self) -> bool:
        """Whether the isotopies are the categories of the targets themselves, as in labelled spans."""
        return bool(self.sentences) and self.sentences[0].item is self.targets[0].item


@dataclass(frozen=True)
class Gathered:
    """Material by language, what it came from, and what its checks found."""

    materials: tuple[Material, ...]
    digest: str
    checks: Checked


@dataclass(frozen=True)
class Checked:
    """Sizes by kind and language, findings as (check, where, message)."""

    sizes: Mapping[str, Mapping[str, int]]
    findings: tuple[tuple[str, str, str], ...]
    confounds: tuple[str, ...] = ()


def gather(data: Data, hypotheses: Sequence[str] = HYPOTHESES) -> Gathered:
    """Read everything, and keep what these hypotheses need. Raises DatasetError, ProbeError."""
    found = _of_spans(data) if data.spans else _of_dataset_files(data)
    return replace(found, materials=tuple(_needed(m, hypotheses) for m in found.materials))


def _needed(material: Material, hypotheses: Sequence[str]) -> Material:
    """Without what nothing is asked about: vectors cost time, and of a service money."""
    if "H3" not in hypotheses:
        material = replace(material, sentences=(), controls=(), lemmas=())
    used = {w for _, _, corners in material.squares for w in corners}
    used |= {w for pairs in material.pairs.values() for pair in pairs for w in pair}
    if "H2" not in hypotheses:
        used = set()
        material = replace(material, squares=(), pairs={})
    if "H4" in hypotheses:
        used |= set(material.molecules)
    else:
        material = replace(material, molecules={})
    terms = {word: term for word, term in material.terms.items() if word in used}
    return replace(material, terms=terms, other_terms=material.other_terms if terms else ())


def _of_dataset_files(data: Data) -> Gathered:
    if data.set != "nsm" and not data.folders:
        raise ProbeError("there is nothing to study: give data.set, data.folders or data.spans")
    found = load(*data.folders, languages=data.languages or None, packaged=data.set == "nsm")
    report = check(found)
    materials = tuple(_of_dataset(found, language, data, report) for language in found.languages)
    findings = tuple((f.check, f.where, f.message) for f in report.findings)
    heavy = tuple(line for language in report.confounds for line in _heaviest(report, language))
    return Gathered(materials, found.digest, Checked(report.sizes, findings, heavy))


def _heaviest(report: Report, language: str) -> list[str]:
    table = report.confounds[language]
    rows = sorted(((n, p, o) for p, row in table.items() for o, n in row.items()), reverse=True)[:5]
    return [f"{language}: {other} stands in {n} sentences of {prime}" for n, prime, other in rows]


# --- semantic primes, and folders of the same kinds ---


def _of_dataset(found: Dataset, language: str, data: Data, report: Report) -> Material:
    category = {p.id: p.category for p in found.primes_of(language)}
    targets = []
    for prime in category:
        kept = found.carriers_of(language, prime)[: data.carriers or None]
        for i, c in enumerate(kept):
            item = Item(f"{language}/target/{prime}/{i}", c.text, c.spans)
            targets.append((Target(item, prime, category[prime]), c.content))
    halves = {}
    for other in found.languages:
        if other != language:
            own = {c.content for c in found.halves(language, other)[0]}
            halves[other] = frozenset(t.item.id for t, content in targets if content in own)
    sentences, controls, lemmas = _isotopies(found, language)
    squares = tuple((s.id, s.domain, s.corners) for s in found.squares if s.language == language)
    pairs: dict[str, tuple[tuple[str, str], ...]] = {}
    for pair in (p for p in found.pairs if p.language == language):
        pairs[pair.relation] = (*pairs.get(pair.relation, ()), (pair.a, pair.b))
    molecules = {e.molecule: e.primes for e in found.explications if e.language == language}
    bare = dict.fromkeys(w for _, _, corners in squares for w in corners)
    bare |= dict.fromkeys([w for kind in pairs.values() for pair in kind for w in pair] + list(molecules))
    frames = data.frames_of(language)
    words_of = [w.word for w in found.words if w.language == language and w.word not in bare]
    frequency = report.frequencies[language]
    return Material(
        language, tuple(t for t, _ in targets), _words(found, language, data.words), sentences, controls,
        lemmas, squares, pairs, molecules, {w: _term(language, w, frames) for w in bare},
        tuple(_term(language, w, frames) for w in words_of),
        {p.id: p.pos for p in found.primes_of(language)},
        _features([t for t, _ in targets], report.confounds[language])
        | {f"word {w}": (float(len(w)), math.log1p(frequency.get(w, 0))) for w in words_of},
        halves,
    )  # fmt: skip


def _words(found: Dataset, language: str, most: int) -> tuple[Target, ...]:
    """Control words where they stand in carriers, `most` times each."""
    seen: Counter[str] = Counter()
    kept = []
    for o in found.occurrences(language):
        if seen[o.word.word] < most:
            item = Item(f"{language}/word/{o.word.word}/{seen[o.word.word]}", o.text, ((o.start, o.end),))
            kept.append(Target(item, f"word {o.word.word}"))
            seen[o.word.word] += 1
    return tuple(kept)


def _isotopies(
    found: Dataset, language: str
) -> tuple[tuple[Target, ...], tuple[Target, ...], tuple[frozenset[str], ...]]:
    rows = [r for r in found.isotopies if r.language == language]
    sentences, controls = [], []
    for r in rows:
        here = Item(f"{language}/sentence/{r.id}", r.text)
        sentences.append(Target(here, r.id, r.isotopy, template=r.template))
        controls.append(Target(Item(f"{language}/control/{r.id}", r.control), r.id, r.control_isotopy))
    lemmas = tuple(frozenset((*r.lemmas, *r.shared)) for r in rows)
    return tuple(sentences), tuple(controls), lemmas


def _term(language: str, word: str, frames: Sequence[str]) -> Term:
    items = []
    for i, frame in enumerate(frames):
        begin = frame.index("{}")
        text = frame.replace("{}", word)
        items.append(Item(f"{language}/term/{word}/{i}", text, ((begin, begin + len(word)),)))
    return Term(word, tuple(items))


def _features(
    targets: Sequence[Target], confounds: Mapping[str, Mapping[str, int]]
) -> dict[str, tuple[float, float]]:
    """Mean length of a concept's targets in characters, and the logarithm of how many sentences of other
    concepts it stands in."""
    length: dict[str, list[int]] = defaultdict(list)
    for t in targets:
        length[t.concept].append(sum(end - begin for begin, end in t.item.spans))
    abroad: Counter[str] = Counter()
    for row in confounds.values():
        abroad.update(row)
    return {c: (sum(v) / len(v), math.log1p(abroad[c])) for c, v in length.items()}


# --- labelled spans ---


def _of_spans(data: Data) -> Gathered:
    rows, digest = _read_spans(data.spans, True)
    others, more = _read_spans(data.others, False)
    languages = data.languages or tuple(sorted({row["language"] for row in rows}))
    materials: list[Material] = []
    findings: list[tuple[str, str, str]] = []
    sizes: dict[str, int] = {}
    for language in languages:
        mine = [row for row in rows if row["language"] == language]
        if not mine:
            raise ProbeError(f"no span is in the language {language!r}")
        targets = tuple(_capped([_target(row, i) for i, row in enumerate(mine)], data.carriers))
        rest = tuple(_target(row, i, "word") for i, row in enumerate(others) if row["language"] == language)
        findings += _span_findings(targets, language)
        materials.append(Material(language, targets, rest, targets))
        sizes[language] = len(targets)
    concepts = {m.language: len(m.concepts) for m in materials}
    whole = hashlib.sha256(digest.encode() + more.encode()).hexdigest()
    return Gathered(tuple(materials), whole, Checked({"concepts": concepts, "spans": sizes}, tuple(findings)))


def _read_spans(paths: Sequence[str], labelled: bool) -> tuple[list[dict[str, Any]], str]:
    rows: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            if line.strip():
                try:
                    rows.append(_span(json.loads(line), labelled))
                except (ValueError, RecursionError) as error:
                    raise DatasetError(f"{path.name}, line {number}: {error}") from None
    return rows, digest.hexdigest()


def _span(row: Any, labelled: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is no object")
    wanted = {k: v for k, v in SPAN_KEYS.items() if labelled or k not in ("concept", "category")}
    for key, value in row.items():
        kind = SPAN_KEYS.get(key, str if key in SPAN_OPTIONS else None)
        if kind is None:
            raise ValueError(f"unknown key {key!r}; known: {', '.join([*SPAN_KEYS, *SPAN_OPTIONS])}")
        if type(value) is not kind:
            raise ValueError(f"{key} is {value!r}, which is not of type {kind.__name__}")
    if missing := [key for key in wanted if key not in row]:
        raise ValueError(f"keys are missing: {', '.join(missing)}")
    begin, end, text = row["start"], row["end"], row["text"]
    if not 0 <= begin < end <= len(text):
        raise ValueError(f"[{begin}, {end}) does not lie in {text!r}")
    return {"language": "en", "template": "", "lexeme": "", "concept": text[begin:end], "category": ""} | row


def _target(row: Mapping[str, Any], number: int, kind: str = "target") -> Target:
    item = Item(f"{row['language']}/{kind}/{number}", row["text"], ((row["start"], row["end"]),))
    return Target(item, row["concept"], row["category"], row["lexeme"] or row["concept"], row["template"])


def _capped(targets: Sequence[Target], most: int) -> Iterator[Target]:
    seen: Counter[str] = Counter()
    for target in targets:
        seen[target.concept] += 1
        if not most or seen[target.concept] <= most:
            yield target


def _span_findings(targets: Sequence[Target], language: str) -> Iterator[tuple[str, str, str]]:
    """Sentences twice, concepts of two categories (an error), concepts of few sentences."""
    category: dict[str, str] = {}
    for t in targets:
        if category.setdefault(t.concept, t.category) != t.category:
            raise DatasetError(
                f"the concept {t.concept!r} is of {category[t.concept]!r} and of {t.category!r}: one each"
            )
    for text, n in Counter((t.item.text, t.item.spans) for t in targets).items():
        if n > 1:
            yield "duplicate", language, f"{n} spans are {text[0]!r} at {text[1][0]}"
    for concept, n in Counter(t.concept for t in targets).items():
        if n < 20:
            yield "sentences", language, f"{concept!r} has {n} of at least 20"


def token_rows(materials: Sequence[Material], encode: Encoder) -> list[dict[str, Any]]:
    """How many tokens the targets of each concept have: a confound if categories differ in it."""
    rows = []
    for material in materials:
        counts: dict[str, list[int]] = defaultdict(list)
        for t in material.targets:
            begin, end = t.item.spans[0]
            upto, before = t.item.text[:end], t.item.text[:begin].rstrip()
            tokens = len(encode(upto)) - (len(encode(before)) if before else 0)
            counts[t.concept].append(max(1, tokens))
        rows += [
            {"language": material.language, "concept": c, "category": material.concepts[c],
             "sentences": len(v), "tokens": sum(v) / len(v)}
            for c, v in counts.items()
        ]  # fmt: skip
    return rows
