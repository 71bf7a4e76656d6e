"""Form, language and quality of one document, and the numbers that copies are found by."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hadal.data.cleaning import language_of, normalise, quality_fault
from hadal.data.contamination import build_index, load_index, save_index
from hadal.data.duplicates import EXACT, KEEP, NEAR, MinHash, exact_key, find_copies
from hadal.data.recipe import Decontaminate, Duplicates, Quality
from hadal.data.words import Words, ngrams, split
from tests.data.conftest import prose


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ufeff a \t\nb  \n\n\n\n\n\nc\n", " a\nb\n\n\nc"),
        ("e\u0301\x00\x1b[1m", "é[1m"),
        ("one\u2028two", "one\ntwo"),
        ("    indented\n\tcode", "    indented\n\tcode"),
        ("x\ud800y", "xy"),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The harbour was quiet, and it is not known who had been there before the rain."),
        ("fr", "Il est dans la maison avec les enfants, et ce n'est pas pour une heure."),
        ("de", "Das ist nicht der Weg, den wir mit der Karte auf dem Tisch gefunden haben."),
        ("es", "El perro de la casa no está en el jardín, pero hay una gata con los niños."),
        ("pt", "Não é o que eu queria, mas a casa foi uma boa ideia e os meninos são felizes."),
        ("it", "La casa non è più grande, ma questo giardino è il più bello della città."),
        ("nl", "Het is niet de bedoeling dat wij met een boot naar het eiland gaan."),
        ("zh", "欲出未出光辣達，千山萬山如火發。"),
        ("ja", "昨日は雨が降っていたので、家で本を読みました。"),
        ("ko", "오늘은 날씨가 맑아서 산책을 했습니다."),
        ("ru", "Сегодня хорошая погода, и мы пошли гулять."),
        ("und", "int main() {\n    int x = f(3);\n    printf(x);\n    return x;\n}"),
        ("und", "12 + 35 = 47"),
        ("en", 'The word of the day is "深度" and it is a word that was in use for a long time.'),
    ],
)
def test_language(language: str, text: str) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (None, prose(random.Random(1), 6)),
        (None, "欲出未出光辣達，千山萬山如火發。須臾走向天上來，逐却殘星趕却月。"),
        ("too short", "short"),
        ("few letters", "#### ---- **** ====  ab"),
        ("broken characters", "caf\ufffd and na\ufffdve words of a broken file"),
        ("long words", "a" * 60 + " " + "b" * 60),
        ("repeated lines", "the same line again\n" * 5),
        ("bullet lines", "\n".join(f"- point number {i}" for i in range(20))),
        ("ellipsis lines", "\n".join(f"teaser number {i} ..." for i in range(20))),
    ],
)
def test_quality(rule: str | None, text: str) -> None:
    fault = quality_fault(text, Quality(max_bullet_lines=0.9))
    assert (fault and fault[0]) == rule


def test_limits_are_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quality_fault("x" * 30 + " yes", Quality(max_characters=33)) == (
        "too long", "34 characters; at most 33"
    )  # fmt: skip
    assert quality_fault("the same line\n" * 5, Quality(max_repeated_lines=0.9)) is None


def test_words_ignore_layout_and_signs() -> None:
    assert split("Hello,  WORLD_42!\n深度") == ["hello", "world", "42", "深", "度"]
    words = Words()
    assert (words.of("a b c") == Words().of("A, b;\nC")).all()
    grams = ngrams(words.of("a b c a b c"), 3)
    assert len(grams) == 4 and grams[0] == grams[3] and len(set(grams.tolist())) == 3
    assert len(ngrams(words.of("a b"), 3)) == 0


def jaccard(a: str, b: str, n: int) -> float:
    x, y = (set(ngrams(Words().of(t), n).tolist()) for t in (a, b))
    return len(x & y) / len(x | y)


def test_signatures_estimate_the_jaccard_similarity() -> None:
    """Against the sets themselves: the error of a share of P minima is at most 4·√(¼/P)."""
    rng = random.Random(3)
    settings = Duplicates(bands=64, rows=8)
    minhash = MinHash(settings)
    for cut in (0.0, 0.1, 0.4, 1.0):
        a = prose(rng, 40)
        b = a[: int(len(a) * (1 - cut))] + prose(rng, round(40 * cut))
        one, two = (minhash.signature(Words().of(t)) for t in (a, b))
        assert abs(float((one == two).mean()) - jaccard(a, b, 5)) < 4 * 0.5 / settings.hashes**0.5
    assert (minhash.signature(Words().of("")) == 0xFFFFFFFF).all()


def test_copies_go_and_no_chain_of_likeness_forms() -> None:
    """d1 is like d0, d2 like d1 but not like d0: d2 stays, since d1 is gone. Exact copies name the first."""
    rng = random.Random(5)
    lines = prose(rng, 60).split("\n")
    texts = ["\n".join(lines[i : i + 40]) for i in (0, 4, 8)] + ["", "\n".join(lines[:40]).upper(), ""]
    settings = Duplicates(threshold=0.75)
    likeness = [
        jaccard(texts[0], texts[1], 5),
        jaccard(texts[1], texts[2], 5),
        jaccard(texts[0], texts[2], 5),
    ]
    assert likeness[0] > 0.8 < likeness[1] and likeness[2] < 0.7
    minhash, words = MinHash(settings), Words()
    keys = np.array([exact_key(t) for t in texts], dtype=np.uint64)
    signatures = np.array([minhash.signature(words.of(t)) for t in texts])
    found = find_copies(keys, signatures, settings)
    assert found.decision.tolist() == [KEEP, NEAR, KEEP, KEEP, EXACT, EXACT]
    assert found.original.tolist() == [-1, 0, -1, -1, 0, 3]
    only_exact = find_copies(keys, signatures[:, :0], Duplicates(near=False))
    assert only_exact.decision.tolist() == [KEEP, KEEP, KEEP, KEEP, EXACT, EXACT]


def test_most_near_copies_are_found_among_many() -> None:
    """At a similarity of 0.8 the bands promise 92%; texts of their own are left alone."""
    rng = random.Random(11)
    originals = [prose(rng, 30) for _ in range(150)]
    copies = []
    for text in originals:
        lines = text.split("\n")
        lines[rng.randrange(30)] = prose(rng, 1)
        lines[rng.randrange(30)] = prose(rng, 1)
        copies.append("\n".join(lines))
    settings, words = Duplicates(), Words()
    minhash = MinHash(settings)
    texts = originals + copies
    keys = np.array([exact_key(t) for t in texts], dtype=np.uint64)
    found = find_copies(keys, np.array([minhash.signature(words.of(t)) for t in texts]), settings)
    assert not found.decision[:150].any()
    near = found.decision[150:] == NEAR
    assert near.mean() > 0.85 and (found.original[150:][near] == np.flatnonzero(near)).all()


def test_contamination_is_found_by_ngrams_or_whole_short_texts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(2)
    long, settings = prose(rng, 2), Decontaminate(ngram=8, shortest=3)
    numbers = " ".join(map(str, range(30)))
    made = build_index(
        [("long", long), ("short", "Why is blue?"), ("tiny", "Yes no"), ("n", numbers)], settings
    )
    save_index(made, tmp_path)
    index, words = load_index(tmp_path), Words()
    for found in (made, index):
        piece = " ".join(long.split()[3:11])
        assert found.find(words.of(f"{prose(rng, 2)} {piece.upper()}! {prose(rng, 1)}")) == 0
        assert found.shared(f"Now {piece}") == " ".join(split(piece))
        assert found.find(words.of(" ".join(long.split()[3:10]))) == -1, "seven words are too few"
        assert found.find(words.of("so: why is\nBLUE then")) == 1
        assert found.find(words.of("yes no " + numbers)) == -1, "too short, or numbers alone"
        assert found.find(words.of("")) == -1 and found.shared("") == ""
