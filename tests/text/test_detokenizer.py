"""Streaming text: the same in any grouping, no half characters, no beginning of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.text import Detokenizer, Tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("ab<>｜🙂é \n", max_size=40)
STOPS = st.lists(st.text("ab<>é🙂", min_size=1, max_size=4), max_size=3)


def cut(ids: list[int], places: list[int]) -> list[list[int]]:
    """The ids in groups, cut at `places` (modulo the length)."""
    ends = sorted({place % (len(ids) + 1) for place in places} | {len(ids)})
    return [ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def expected_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: at the stop string whose end comes first, the longest of those."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(ids=st.lists(st.integers(0, 511), max_size=40), places=st.lists(st.integers(0, 50)))
def test_any_grouping_of_any_ids_equals_decoding_all(
    tokenizers_by_style: dict[str, Tokenizer], ids: list[int], places: list[int]
) -> None:
    for tokenizer in tokenizers_by_style.values():
        for skip in (True, False):
            stream = Detokenizer(tokenizer, skip_control=skip)
            text = "".join(stream.push(group) for group in cut(ids, places)) + stream.finish()
            assert text == tokenizer.decode(ids, skip)


@given(text=TEXTS, stops=STOPS, places=st.lists(st.integers(0, 80)), include=st.booleans())
def test_stop_strings_cut_the_same_in_any_grouping(
    tokenizers_by_style: dict[str, Tokenizer], text: str, stops: list[str], places: list[int], include: bool
) -> None:
    tokenizer = tokenizers_by_style["deepseek"]
    expected, stopped = expected_cut(text, stops)
    if include and stopped:
        expected += stopped
    stream = Detokenizer(tokenizer, stops, include_stop=include)
    shown = ""
    for group in cut(tokenizer.encode(text), places):
        shown += stream.push(group)
        assert expected.startswith(shown)
        assert include or not any(stop in shown for stop in stops)
    assert shown + stream.finish() == expected
    assert stream.stopped == stopped


@given(text=TEXTS)
def test_characters_are_never_halved(tokenizers_by_style: dict[str, Tokenizer], text: str) -> None:
    tokenizer = tokenizers_by_style["deepseek"]
    stream = Detokenizer(tokenizer)
    pieces = [stream.push([index]) for index in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert text.count("\ufffd") == "".join(pieces).count("\ufffd")


def test_an_end_within_a_character_shows_once_at_the_finish(deepseek: Tokenizer) -> None:
    ids = [
        index
        for byte in "🙂".encode()
        for index in range(512)
        if deepseek.id_to_bytes(index) == bytes([byte])
    ]
    stream = Detokenizer(deepseek)
    assert [stream.push([index]) for index in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_only_a_possible_beginning_is_held_back(deepseek: Tokenizer) -> None:
    stream = Detokenizer(deepseek, ["<end>", "END"])
    assert stream.push(deepseek.encode("all good <en")) == "all good "
    assert stream.push(deepseek.encode("tity> E")) == "<entity> "
    assert stream.push(deepseek.encode("N")) == ""
    assert stream.push(deepseek.encode("D and more")) == ""
    assert stream.stopped == "END"
    assert stream.push(deepseek.encode("never shown")) == stream.finish() == ""


def test_a_held_beginning_is_given_out_at_the_finish(deepseek: Tokenizer) -> None:
    stream = Detokenizer(deepseek, ["STOP"])
    assert stream.push(deepseek.encode("go ST")) == "go "
    assert stream.finish() == "ST"
    assert stream.stopped is None


def test_overlapping_repeats_of_a_stop_string_are_found(deepseek: Tokenizer) -> None:
    stream = Detokenizer(deepseek, ["aab"])
    assert "".join(stream.push([index]) for index in deepseek.encode("aaaab!")) == "aa"
    assert stream.stopped == "aab"


@pytest.mark.parametrize("stop", ["text", [""], [3]])
def test_bad_stops_are_refused(deepseek: Tokenizer, stop: object) -> None:
    with pytest.raises(ValueError, match="non-empty strings"):
        Detokenizer(deepseek, stop)  # type: ignore[arg-type]


def test_push_after_finish_is_an_error(deepseek: Tokenizer) -> None:
    stream = Detokenizer(deepseek)
    stream.finish()
    with pytest.raises(RuntimeError, match="after finish"):
        stream.push([5])
