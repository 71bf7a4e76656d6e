"""Which tokens a vector is made of, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hadal.engine.pooling import pooled, weights
from hadal.probe.extract import ProbeError
from hadal.probe.pooling import Encoded, encode, find_span, joined, pool_weights, span_tokens
from hadal.text.tokenizer import Tokenizer
from hadal.weights import hub

# "Le café où elle pense" with BOS; é and ù are two bytes, in two tokens each.
TEXT = "Le café où elle pense."
CAFE = Encoded(
    TEXT,
    [0, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21],
    # BOS    Le      ␣caf    é₁      é₂      ␣o       ù₁       ù₂       ␣elle     ␣pen      se        .
    [None, (0, 2), (2, 6), (6, 7), (6, 7), (7, 9), (9, 10), (9, 10), (10, 15), (15, 19), (19, 21), (21, 22)],
)


@pytest.mark.parametrize(
    ("target", "tokens", "clipped"),
    [
        ("café", [2, 3, 4], False),  # the space before belongs to the word's token; both halves of é
        ("où", [5, 6, 7], False),
        ("ù", [6, 7], False),
        ("o", [5], False),
        ("é", [3, 4], False),
        ("pense", [9, 10], False),
        ("pens", [9, 10], True),  # "se" holds an e of a neighbour
        ("en", [9], True),
        ("café où", [2, 3, 4, 5, 6, 7], False),
        (".", [11], False),
        ("Le", [1], False),
    ],
)
def test_tokens_of_a_target(target: str, tokens: list[int], clipped: bool) -> None:
    at = TEXT.index(target)
    assert span_tokens(CAFE, ((at, at + len(target)),)) == (tokens, clipped)


def test_white_space_at_the_ends_of_a_target_draws_in_no_neighbour() -> None:
    assert span_tokens(CAFE, ((2, 8),)) == ([2, 3, 4], False)  # " café "
    with pytest.raises(ProbeError, match="no character"):
        span_tokens(CAFE, ((7, 8),))


def test_a_target_in_pieces() -> None:
    text = "Je ne sais pas."
    said = Encoded(text, [0, 1, 2, 3, 4, 5], [None, (0, 2), (2, 5), (5, 10), (10, 14), (14, 15)])
    spans = ((3, 5), (11, 14))
    assert span_tokens(said, spans) == ([2, 4], False) and joined(text, spans) == "ne … pas"
    np.testing.assert_allclose(pool_weights(said, spans, "span"), [0, 0, 0.5, 0, 0.5, 0])
    np.testing.assert_allclose(pool_weights(said, spans, "span-last"), [0, 0, 0, 0, 1, 0])


def test_weights_by_hand() -> None:
    short = Encoded("a b c", [0, 1, 2, 3], [None, (0, 1), (1, 3), (3, 5)])
    for way, expected in {
        "mean": [0, 1 / 3, 1 / 3, 1 / 3],
        "last": [0, 0, 0, 1],
        "weighted": [0, 1 / 6, 2 / 6, 3 / 6],
        "span": [0, 0, 1, 0],
    }.items():
        np.testing.assert_allclose(pool_weights(short, ((2, 3),), way), expected, rtol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(pool_weights(short, (), "mean", special=True), [0.25] * 4)
    np.testing.assert_allclose(pool_weights(short, (), "weighted", special=True), [0.1, 0.2, 0.3, 0.4])
    assert pooled([7, 0, 8, 0], {0}) == [0, 2] and pooled([0, 0], {0}) == [0, 1]
    np.testing.assert_allclose(weights(4, [0, 2], "weighted"), [1 / 3, 0, 2 / 3, 0], rtol=1e-6)


def test_repeated_words_are_told_apart() -> None:
    text = "deux fois deux, deuxième"
    assert [find_span(text, "deux", n) for n in (0, 1)] == [(0, 4), (10, 14)]
    with pytest.raises(ProbeError, match="3 times"):
        find_span(text, "deux", 2)  # a part of "deuxième" is no word
    assert find_span("l'été où", "où") == (6, 8)
    with pytest.raises(ProbeError):
        find_span("un trou, ou bien", "où")


@pytest.mark.parametrize("span", [(-1, 2), (3, 3), (4, 2), (0, 99)])
def test_spans_outside_the_text(span: tuple[int, int]) -> None:
    with pytest.raises(ProbeError, match="not inside"):
        span_tokens(CAFE, (span,))


def test_what_a_way_to_pool_needs() -> None:
    with pytest.raises(ProbeError, match="needs the target"):
        pool_weights(CAFE, (), "span")
    with pytest.raises(ProbeError, match="one of mean"):
        pool_weights(CAFE, (), "max")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["Où est-il ? Ici.", "👩‍👩‍👧‍👦 voit 深度, e\u0301te\u0301", "  deux  espaces\n", "naïve œuvre Ångström"],
)
def test_a_real_tokenizer_covers_every_character(text: str) -> None:
    """Its targets, cut out token by token, hold the bytes of the target, but for white space."""
    tokenizer = Tokenizer.load(hub.resolve("hadal-mini"))
    encoded = encode(tokenizer, text)
    assert encoded.ids[1:] == tokenizer.encode(text) and encoded.offsets[0] is None
    for begin in range(len(text)):
        for end in range(begin + 1, len(text) + 1):
            if text[begin:end].strip():
                found, _ = span_tokens(encoded, ((begin, end),))
                held = b"".join(tokenizer.id_to_bytes(encoded.ids[i]) for i in found)
                assert b"".join(text[begin:end].encode().split()) in b"".join(held.split())
