"""The data of the study of primes: complete, rightly marked, without what would let a probe cheat; and the
loader and the checks refuse and find what they should."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hadal.probe.checks import Report, plain
from hadal.probe.dataset import FOLDER, Dataset, DatasetError, check, load
from hadal.probe.rows import Carrier, IsotopySentence

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES = {
    "substantives": 6, "relational": 2, "determiners": 3, "quantifiers": 6, "evaluators-descriptors": 4,
    "mental": 7, "speech": 3, "actions": 3, "location-existence-specification": 3, "possession-life": 3,
    "time": 8, "space": 9, "logical": 5, "intensifier-similarity": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load()


@pytest.fixture(scope="module")
def report(data: Dataset) -> Report:
    return check(data)


def test_nothing_is_found_in_the_packaged_data(report: Report) -> None:
    assert report.ok, report.table()


def test_the_primes_are_the_65_of_the_list_in_both_languages(data: Dataset) -> None:
    assert data.languages == ("en", "fr")
    for language in data.languages:
        assert Counter(p.category for p in data.primes_of(language)) == CATEGORIES
    english, french = ([p.id for p in data.primes_of(code)] for code in ("en", "fr"))
    assert english == french and len(set(english)) == 65
    assert all("secondary lists" in p.source for p in data.primes_of("fr"))


def test_there_is_enough_of_everything(data: Dataset, report: Report) -> None:
    assert {(c.language, c.prime) for c in report.counts if c.carriers >= 20} == {
        (p.language, p.id) for p in data.primes
    }
    for language in data.languages:
        assert report.sizes["squares"][language] >= 100
        pairs = Counter(p.relation for p in data.pairs if p.language == language)
        assert set(pairs) == {"synonym", "cohyponym"} and min(pairs.values()) >= 100
        isotopies = Counter(r.isotopy for r in data.isotopies if r.language == language)
        assert len(isotopies) == 7 and min(isotopies.values()) >= 15
        templates = Counter((r.isotopy, r.template) for r in data.isotopies if r.language == language)
        assert len(templates) == 35 and set(templates.values()) == {3}
        assert report.sizes["words"][language] >= 200
    assert report.sizes["explications"]["en"] >= 40 and report.sizes["explications"]["fr"] >= 20


def test_every_target_is_a_whole_exponent_read_from_the_file_itself(data: Dataset) -> None:
    forms = {(p.language, p.id): set(p.forms) for p in data.primes}
    for language in data.languages:
        seen = set()
        for line in (FOLDER / f"carriers.{language}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            text, start, end = row["text"], row["start"], row["end"]
            assert text[start:end].lower() in forms[language, row["prime"]], text
            assert not text[:start] or not text[start - 1].isalnum(), text
            assert text[end - 1] == "'" or not text[end : end + 1].isalnum(), text
            seen.add(re.sub(r"\W+", " ", text).strip().lower())
        assert len(seen) == len(data.carriers_of(language))


def test_targets_stand_in_every_part_of_their_sentences(report: Report) -> None:
    """Conjunctions and "there is" cannot end a sentence; nothing stands in one third alone."""
    for language in ("en", "fr"):
        places = [sum(c.places[i] for c in report.counts if c.language == language) for i in range(3)]
        assert min(places) > 0.2 * sum(places), places
    assert all(sorted(c.places)[1] >= 3 for c in report.counts)


def test_french_has_its_accents(data: Dataset) -> None:
    where = {c.target.lower() for c in data.carriers_of("fr", "WHERE")}
    assert "où" in where and "ou" not in where
    marked = {form for p in data.primes_of("fr") for form in p.forms if plain(form) != form}
    assert {"à moi", "très", "près", "côté", "peut-être", "la même", "à l'intérieur", "après"} <= marked


def test_negations_of_squares_are_told_apart_by_how_they_are_made(data: Dataset) -> None:
    for square in data.squares:
        for corner, how in zip(square.corners[2:], square.marking, strict=True):
            assert how == "particle" or not corner.startswith(("not ", "no ", "ne pas ", "non ")), corner
            assert (how == "word") <= (" " not in corner), corner


def test_halves_of_two_languages_share_no_content(data: Dataset) -> None:
    english, french = data.halves("en", "fr")
    assert not {c.content for c in english} & {c.content for c in french}
    for half in (english, french):
        number = Counter(c.prime for c in half)
        assert len(number) == 65 and min(number.values()) >= 10
    one, other = data.halves("fr", "fr")
    assert len(one) + len(other) == len({*one, *other}) == len(data.carriers_of("fr"))
    with pytest.raises(DatasetError, match="no language 'sa'"):
        data.halves("en", "sa")


def test_control_words_are_found_in_sentences_beside_the_target(data: Dataset) -> None:
    for language in data.languages:
        found = data.occurrences(language)
        assert len({o.word.word for o in found}) >= 2 * 65  # what matching wants of a pool
        assert all(o.text[o.start : o.end].lower() == o.word.word for o in found)
    assert "see" not in data.contexts("en")["SEE"] and data.contexts("en")["SEE"]["moon"] == 1


def test_an_explication_of_another_s_primes_is_found(data: Dataset) -> None:
    small = replace(
        data, primes=data.primes_of("en"), carriers=(), isotopies=(), squares=(), pairs=(), words=()
    )
    assert not [f for f in check(small).findings if f.check == "explications"]
    twice = (*small.explications, replace(small.explications[0], molecule="fib"))
    found = check(replace(small, explications=twice)).findings
    assert {f.where for f in found if f.check == "explications"} == {"en lie", "en fib"}


def test_explications_use_most_primes(data: Dataset) -> None:
    for language, least in (("en", 55), ("fr", 45)):
        used = {p for e in data.explications if e.language == language for p in e.primes}
        assert len(used) >= least, sorted({p.id for p in data.primes} - used)
    lie = next(e for e in data.explications if e.molecule == "lie")
    assert lie.primes["TRUE"] == 2 and lie.primes["SAY"] == 1 and "BIG" not in lie.primes


def test_the_page_tells_the_sizes(report: Report) -> None:
    page = (ROOT / "docs" / "nsm-data.md").read_text("utf-8")
    for kind, by in report.sizes.items():
        assert f"| `{kind}` | {by['en']:,} | {by['fr']:,} |" in page, kind


def test_tokens_are_counted_in_the_sentence(data: Dataset) -> None:
    small = replace(data, carriers=tuple(c for c in data.carriers if c.prime in ("A_LONG_TIME", "I")))
    small = replace(small, isotopies=(), squares=(), pairs=(), explications=(), words=())
    found = {(c.language, c.prime): c for c in check(small, lambda text: text.split()).counts}
    assert found["en", "A_LONG_TIME"].tokens == 3 and found["en", "A_LONG_TIME"].split == 1
    assert found["en", "I"].tokens == 1 and found["fr", "A_LONG_TIME"].split == 0
    assert found["fr", "NOW"].tokens is None


def carrier(data: Dataset, **change: Any) -> Dataset:
    """The data reduced to one sentence beside two of its prime, with that sentence changed."""
    row = next(c for c in data.carriers if c.text == "The pilot could not see the runway in the fog.")
    rest = [c for c in data.carriers_of("en", "SEE") if c != row][:2]
    return replace(data, carriers=(replace(row, **change), *rest), isotopies=())


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("span", {"start": 10, "end": 15}),
    ("span", {"end": 18}),
    ("homograph", {"text": "They lent a see to the old pilot.", "start": 12, "end": 15}),
    ("length", {"text": "We see.", "start": 3, "end": 6}),
    ("form", {"text": "The pilot could not see the runway in the fog"}),
    ("duplicate", {"text": "from the tower, you can SEE the sea!", "start": 24, "end": 27}),
    ("template", {"text": "From the tower you can see the moon.", "start": 23, "end": 26}),
    ("content", {"content": "SEE-01"}),
]


@pytest.mark.parametrize(("name", "change"), FAULTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(FAULTS)])
def test_checks_find_a_planted_fault(data: Dataset, name: str, change: dict[str, Any]) -> None:
    small = replace(data, primes=data.primes_of("en"), squares=(), pairs=(), explications=(), words=())
    clean = [f for f in check(carrier(small)).findings if f.check == name]
    assert not clean and any(f.check == name for f in check(carrier(small, **change)).findings)


def test_a_missing_accent_is_found(data: Dataset) -> None:
    def french(text: str) -> Carrier:
        start = text.index("tôt")
        return Carrier("fr", "NOW", text, start, start + 3, text)

    small = replace(data, primes=data.primes_of("fr"), isotopies=(), squares=(), pairs=(), explications=())
    small = replace(small, words=())
    faults = {
        "Il mange tôt, car il a mangé très tard.": None,
        "Elle a mange tôt ; il a mangé tard.": "'mange'",
        "Où est le thé ? Ou bien est-il trop tôt ?": None,
        "Déjà si tôt, et deja si tard ce soir.": "'deja'",
    }
    for text, word in faults.items():
        found = check(replace(small, carriers=(french(text),))).findings
        accents = [f.message for f in found if f.check == "accent"]
        assert (not accents) if word is None else (len(accents) == 1 and accents[0].startswith(word)), accents


ISOTOPY: list[Callable[[IsotopySentence], dict[str, Any]]] = [
    lambda r: {"lemmas": ("understand", *r.lemmas[1:])},  # of another template
    lambda r: {"control": r.text},
    lambda r: {"control_isotopy": r.isotopy},
    lambda r: {"shared": ("zebra",)},
    lambda r: {"forms": ("zebra", *r.forms[1:])},
    lambda r: {"text": r.text.replace(".", " yesterday.")},  # bears time
]


@pytest.mark.parametrize("change", ISOTOPY)
def test_leaks_between_isotopies_are_found(
    data: Dataset, change: Callable[[IsotopySentence], dict[str, Any]]
) -> None:
    rows = [r for r in data.isotopies if r.language == "en"]
    spoilt = next(r for r in rows if r.id == "knowing-07")
    small = replace(data, primes=data.primes_of("en"), carriers=(), squares=(), pairs=(), words=())
    assert not [f for f in check(replace(small, isotopies=tuple(rows))).findings if f.check == "isotopies"]
    rows[rows.index(spoilt)] = replace(spoilt, **change(spoilt))
    assert [f for f in check(replace(small, isotopies=tuple(rows))).findings if f.check == "isotopies"]


def test_words_in_two_squares_and_primes_among_control_words_are_found(data: Dataset) -> None:
    small = replace(data, primes=data.primes_of("en"), carriers=(), isotopies=(), explications=())
    square, word = small.squares[0], small.words[0]
    bad = replace(
        small, squares=(*small.squares, replace(square, id="x")), words=(replace(word, word="see"),)
    )
    assert {f.check for f in check(bad).findings} - {f.check for f in check(small).findings} == {
        "words",
        "squares",
    }


SANSKRIT = {
    "id": "KNOW", "category": "mental", "subcategory": "mental", "pos": "verb", "exponents": ["जानाति"],
    "forms": ["जानाति"], "homographs": "", "not_after": [], "source": "a test",
}  # fmt: skip


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return folder


def test_a_linguist_adds_a_language(data: Dataset, tmp_path: Path) -> None:
    text = "बालकः मार्गं जानाति।"
    start = text.index("जा")
    row = {"prime": "KNOW", "text": text, "start": start, "end": len(text) - 1, "content": "KNOW-01"}
    write(tmp_path, "primes.sa.jsonl", SANSKRIT)
    both = load(write(tmp_path, "carriers.sa.jsonl", row))
    assert both.languages == ("en", "fr", "sa") and both.digest != data.digest
    alone = load(tmp_path, packaged=False)
    assert [c.target for c in alone.carriers] == ["जानाति"]
    messages = [f"{f.where}: {f.message}" for f in check(alone).findings]
    assert "sa: 1 primes; the list has 65" in messages and "sa KNOW: 1 of at least 20" in messages
    with pytest.raises(DatasetError, match="no primes in xx; there are sa"):
        load(tmp_path, languages=["xx"], packaged=False)


def test_only_wanted_languages_are_loaded(data: Dataset) -> None:
    french = load(languages=["fr"])
    assert french.languages == ("fr",) and {c.language for c in french.carriers} == {"fr"}
    assert french.digest != data.digest


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("primes.sa.jsonl", SANSKRIT | {"form": ["x"]}, "line 1: unknown key 'form'; did you mean 'forms'"),
    ("primes.sa.jsonl", {k: v for k, v in SANSKRIT.items() if k != "pos"}, "keys are missing: \\['pos'\\]"),
    ("primes.sa.jsonl", SANSKRIT | {"pos": 3}, "pos is 3, which is not of type str"),
    ("primes.sa.jsonl", SANSKRIT | {"language": "sa"}, "the file's name says the language"),
    ("primes.jsonl", SANSKRIT | {"language": "Sanskrit"}, "a code of two or three letters"),
    ("primes.jsonl", SANSKRIT | {"language": "en"}, "primes has en KNOW twice"),
    ("primes.sa.jsonl", SANSKRIT | {"source": "e\u0301"}, "not in Unicode form NFC"),
    ("verbs.sa.jsonl", SANSKRIT, "KIND is one of primes, carriers"),
    ("primes.Sanskrit.jsonl", SANSKRIT, "LANGUAGE a code such as sa"),
    ("carriers.en.jsonl", {"prime": "LOVE", "text": "x", "start": 0, "end": 1, "content": "c"}, "'LOVE'"),
    ("carriers.en.jsonl", {"prime": "KNOW", "text": "x", "start": 0, "end": 2, "content": "c"}, "not lie in"),
    ("explications.en.jsonl", {"molecule": "x", "lines": [], "primes": {"LOVE": 1}}, "unknown prime, 'LOVE'"),
    ("explications.en.jsonl", {"molecule": "x", "lines": [], "primes": {"KNOW": "1"}}, "primes is"),
]


@pytest.mark.parametrize(("name", "row", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_the_loader_refuses(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    write(tmp_path, "primes.en.jsonl", SANSKRIT)
    with pytest.raises(DatasetError, match=message):
        load(write(tmp_path, name, row), packaged=False)


def test_the_loader_refuses_what_is_no_data(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds no .jsonl")):
        with pytest.raises(DatasetError, match=message):
            load(folder, packaged=False)
    (tmp_path / "primes.sa.jsonl").write_bytes(b"\xff")
    with pytest.raises(DatasetError, match="not UTF-8"):
        load(tmp_path, packaged=False)
    for content in ("{", "[1]", "[" * 100_000):
        (tmp_path / "primes.sa.jsonl").write_text(content)
        with pytest.raises(DatasetError, match="line 1"):
            load(tmp_path, packaged=False)


def test_the_report_is_a_table_and_plain_data(report: Report) -> None:
    table = report.table()
    assert "findings: none" in table
    assert re.search(r"KNOW +en +21 ", table) and re.search(r"KNOW +fr +3\d ", table)
    known = json.loads(json.dumps(report.json()))
    assert known["sizes"] == report.sizes and len(known["counts"]) == 130
    assert known["confounds"]["fr"]["THERE_IS"]["ONE"] > 0  # articles are forms of UN
    assert known["frequencies"]["en"]["the"] > 500
