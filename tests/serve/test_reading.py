"""The small parts: JSON in and out, strict fields, the lower bound on tokens, log lines."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.serve.errors import ApiError
from hadal.serve.fields import Fields, shown
from hadal.serve.jsontext import MAX_CONTAINERS, MAX_DEPTH, JsonError, dumps, loads
from hadal.serve.logs import escaped
from hadal.serve.ollama_models import short_count
from hadal.serve.ollama_options import unloads
from hadal.serve.prompts import Encoder
from tests.serve.fake_engine import FakeEngine

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_json_round_trip(value: object) -> None:
    data = dumps(value)
    assert loads(data) == value == json.loads(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        value = loads(data)
    except JsonError:
        return
    assert loads(dumps(value)) == value


@pytest.mark.parametrize("open_close", [b"[]", b"{}"])
def test_depth(open_close: bytes) -> None:
    def nested(depth: int) -> bytes:
        if open_close == b"[]":
            return b"[" * depth + b"]" * depth
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert loads(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 2, 10_000, 1_000_000):
        start = time.thread_time()
        with pytest.raises(JsonError):
            loads(nested(depth))
        assert time.thread_time() - start < 1


def test_bodies_that_would_explode_in_memory() -> None:
    with pytest.raises(JsonError, match="more than"):
        loads(b"[" + b"[]," * MAX_CONTAINERS + b"[]]")


def test_not_finite_is_never_written() -> None:
    assert dumps({"a": float("nan"), "b": float("-inf")}) == b'{"a":null,"b":null}'


@pytest.mark.parametrize("value", [True, "1", 1.0, [], {}, 2**80])
def test_only_integers_are_integers(value: object) -> None:
    with pytest.raises(ApiError) as caught:
        Fields({"n": value}).integer("n", 0, 10)
    assert (caught.value.status, caught.value.param) == (400, "n")
    assert len(caught.value.message) < 200


def test_null_is_absent() -> None:
    fields = Fields({"n": None, "s": None, "b": None})
    assert fields.integer("n", 1, 2) is fields.string("s") is fields.boolean("b") is None
    fields.finish()


def test_unknown_fields_name_the_nearest() -> None:
    fields = Fields({"temprature": 1})
    fields.number("temperature", 0, 2)
    with pytest.raises(ApiError, match="'temprature'; did you mean 'temperature'"):
        fields.finish()


def test_what_is_shown_of_a_value_is_short_and_printable() -> None:
    assert shown("\r\n\x1b" * 3) == "'\\r\\n\\x1b\\r\\n\\x1b\\r\\n\\x1b'"
    assert len(shown("x" * 10_000_000)) < 80


@given(st.text())
def test_log_text_is_one_printable_line(text: str) -> None:
    line = escaped(text)
    assert line.isascii()
    assert line.isprintable()


ENGINE = FakeEngine()
ENCODER = Encoder(ENGINE)


PIECES = st.sampled_from(["a", " ", "the ", "你", "🙂", "é", "\n", "0", "step ", "\x00", "<think>"])


@given(st.lists(PIECES, max_size=60).map("".join))
def test_the_lower_bound_is_one(text: str) -> None:
    """Both bounds, the plain and the refined, never exceed what the tokenizer makes of a text."""
    count = len(ENGINE.tokenizer.encode(text))
    assert ENCODER.tokenizer.minimum_tokens(text) <= count
    if text:
        assert ENCODER._refined(text.encode()) <= count


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, True),
        ("0", True),
        ("0s", True),
        ("0m0s", True),
        (0.0, True),
        ("5m", False),
        (-1, False),
        ("1h30m", False),
        (None, False),
        ("0.5s", False),
        (300, False),
    ],
)
def test_keep_alive(value: object, expected: bool) -> None:
    assert unloads(Fields({"keep_alive": value})) is expected


@pytest.mark.parametrize("value", ["soon", True, "5 minutes", [], "9" * 100, "-"])
def test_keep_alive_that_is_none(value: object) -> None:
    with pytest.raises(ApiError, match="keep_alive"):
        unloads(Fields({"keep_alive": value}))


def test_short_counts() -> None:
    counts = [999, 15_000_000, 1_777_088_000, 671_026_419_200]
    assert [short_count(count) for count in counts] == ["999", "15M", "1.8B", "671B"]
