"""Masks that allow exactly what the grammar allows; bounds that no schema or regex of a request gets
past."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hadal.text import Tokenizer
from hadal.text.grammar import Grammar, GrammarError, Limits, Matcher, mask_to_bool, mask_words
from hadal.text.messages import read_tools
from hadal.text.parsers import ReasoningParser, ToolCall, ToolParser
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Léa"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["deepseek", "qwen", "llama"])
def padded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose model has a larger table than it needs."""
    folder = make_tiny_tokenizer(tmp_path_factory.mktemp("padded"), 640, request.param)
    (folder / "config.json").write_text('{"vocab_size": 701}')
    return Tokenizer.load(folder)


def allowed(matcher: Matcher, tokenizer: Tokenizer) -> list[int]:
    return np.flatnonzero(mask_to_bool(matcher.mask(), tokenizer.padded_vocab_size)).tolist()


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, longest: int = 600) -> str:
    """A random answer that keeps to the mask, control tokens shown; the walk must end by itself."""
    matcher, rng, ids = grammar(), random.Random(seed), list[int]()
    while not matcher.is_done():
        choices = allowed(matcher, tokenizer)
        assert choices, "the mask is empty before the answer is complete"
        if matcher.may_end() and set(tokenizer.eos_ids) & set(choices):
            break
        index = rng.choice([index for index in choices if index not in tokenizer.eos_ids])
        matcher.accept(index)
        ids.append(index)
        assert len(ids) < longest
    return tokenizer.decode(ids, skip_control=False)


def takes(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar allows this text as a whole, token by token, by its masks."""
    matcher = grammar()
    for index in tokenizer.encode_with_controls(text):
        if index not in allowed(matcher, tokenizer):
            return False
        matcher.accept(index)
    return matcher.may_end()


# --- what is allowed ---


@pytest.mark.parametrize("seed", range(5))
def test_random_answers_keep_to_the_schema(padded: Tokenizer, seed: int) -> None:
    value = json.loads(walk(Grammar.from_schema(PERSON, padded), padded, seed))
    assert list(value) == ["name", "age", "tags"]
    assert value["name"] in ("Ada", "Léa")
    assert 0 <= value["age"] <= 120
    assert len(value["tags"]) <= 3
    assert all(isinstance(tag, bool) for tag in value["tags"])


def test_json_object_is_any_object_and_nothing_else(padded: Tokenizer) -> None:
    grammar = Grammar.from_response_format({"type": "json_object"}, padded)
    assert grammar is not None
    for text in ["{}", '{"a": [1, 2.5e3, null, {"b": "é🙂\\n"}]}', '{\n  "a": true\n}']:
        assert takes(grammar, padded, text)
    for text in ["[]", '"a"', "1", "{", '{"a"}', '{"a": 1,}', "{} {}", "Sure: {}", "{'a': 1}", '{"a": "\n"}']:
        assert not takes(grammar, padded, text)


def test_json_schema_of_a_request(padded: Tokenizer) -> None:
    grammar = Grammar.from_response_format(
        {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}, padded
    )
    assert grammar is not None
    assert takes(grammar, padded, '{"name": "Ada", "age": 36, "tags": []}')
    for text in ['{"name": "Bob", "age": 3, "tags": []}', '{"name": "Ada", "age": 121, "tags": []}', "{}"]:
        assert not takes(grammar, padded, text)


def test_recursive_schemas_work(padded: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    grammar = Grammar.from_schema(schema, padded)
    assert takes(grammar, padded, '{"next": {"next": {}}}')
    assert not takes(grammar, padded, '{"next": {"prev": {}}}')


def test_a_regex_is_matched_as_a_whole(padded: Tokenizer) -> None:
    pattern = r"[A-Z]/\d{2,3}(é|🙂)"
    grammar = Grammar.from_response_format({"type": "regex", "pattern": pattern}, padded)
    assert grammar is not None
    for seed in range(5):
        assert re.fullmatch(pattern, walk(grammar, padded, seed))
    assert takes(grammar, padded, "A/42é")
    for text in ["A/4é", "a/42é", "A/42", "A/42éé"]:
        assert not takes(grammar, padded, text)


def test_text_needs_no_grammar(padded: Tokenizer) -> None:
    assert Grammar.from_response_format(None, padded) is None
    assert Grammar.from_response_format({"type": "text"}, padded) is None


def test_control_tokens_and_padding_are_never_text(padded: Tokenizer) -> None:
    outside = {*padded.special.values(), *range(padded.vocab_size, padded.padded_vocab_size)} - set(
        padded.eos_ids
    )
    matcher = Grammar.from_schema({"type": "object"}, padded)()
    for index in padded.encode('{"a": "x'):
        assert not outside & set(allowed(matcher, padded))
        matcher.accept(index)
    assert not outside & set(allowed(matcher, padded))
    assert not set(padded.eos_ids) & set(allowed(matcher, padded))
    for index in padded.encode('"}'):
        matcher.accept(index)
    assert allowed(matcher, padded) == sorted(padded.eos_ids)
    assert matcher.is_done()
    assert matcher.may_end()
    matcher.accept(padded.eos_ids[0])
    assert matcher.is_done()


def test_a_forbidden_token_is_refused(padded: Tokenizer) -> None:
    matcher = Grammar.from_schema({"type": "object"}, padded)()
    with pytest.raises(GrammarError, match=r"token \d+ \('x'\) is not allowed"):
        matcher.accept(padded.encode("x")[0])


def test_each_answer_has_its_own_state(padded: Tokenizer) -> None:
    grammar = Grammar.from_schema(PERSON, padded)
    first, second = grammar(), grammar.matcher()
    before = allowed(second, padded)
    for index in padded.encode('{"name'):
        first.accept(index)
    assert allowed(second, padded) == before
    assert allowed(first, padded) != before


def test_masks_are_packed(padded: Tokenizer) -> None:
    matcher = Grammar.from_schema(PERSON, padded)()
    words = mask_words(padded.padded_vocab_size)
    assert words == 22
    rows = np.zeros((3, words), np.int32)
    assert matcher.mask(rows[1]) is not None
    assert rows[1].any()
    assert not rows[0].any()
    assert not rows[2].any()
    mask = mask_to_bool(rows, padded.padded_vocab_size)
    assert mask.shape == (3, 701)
    for index in np.flatnonzero(mask[1]):
        assert rows[1, index // 32] >> (index % 32) & 1
    for bad in (
        np.zeros(words - 1, np.int32),
        np.zeros(words, np.int64),
        np.zeros((words, 2), np.int32)[:, 0],
    ):
        with pytest.raises(ValueError, match="contiguous int32"):
            matcher.mask(bad)


# --- after reasoning, and calls ---


def test_reasoning_is_free_and_the_answer_is_not(padded: Tokenizer) -> None:
    grammar = Grammar.from_schema(PERSON, padded, after_reasoning=True)
    matcher = grammar()
    choices = set(allowed(matcher, padded))
    assert padded.special["</think>"] in choices
    assert not choices & set(padded.eos_ids)
    assert {index for index in choices if index in padded.special.values()} == {padded.special["</think>"]}
    answer = '{"name": "Ada", "age": 36, "tags": [true]}'
    assert takes(grammar, padded, f"Let me think: {{ 3 ]\n</think>\n\n{answer}")
    assert takes(grammar, padded, f"</think>{answer}")
    assert not takes(grammar, padded, answer)
    assert not takes(grammar, padded, f"hm</think>\n\nSure! {answer}")


TOOLS = read_tools([
    {"type": "function", "function": {"name": "weather.now", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Bonn", "Köln"]}}, "required": ["city"],
        "additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop", "parameters": {"additionalProperties": False}}},
])  # fmt: skip


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tiny_tokenizer(tmp_path_factory.mktemp("tools"), 640, "deepseek"))


@pytest.mark.parametrize("form", ["v3", "v3.1"])
@pytest.mark.parametrize("after_reasoning", [False, True])
def test_forced_calls_are_read_by_our_parser(with_tools: Tokenizer, form: str, after_reasoning: bool) -> None:
    grammar = Grammar.from_tools(TOOLS, with_tools, form, parallel=False, after_reasoning=after_reasoning)
    names = set()
    for seed in range(8):
        text = walk(grammar, with_tools, seed, 5000)
        pieces = ReasoningParser(after_reasoning).push(text)
        found = ToolParser(form).push(pieces[-1].text)
        assert len(found) == 1
        assert isinstance(found[0], ToolCall)
        names.add(found[0].name)
        arguments = json.loads(found[0].arguments_json)
        assert arguments in ([{"city": "Bonn"}, {"city": "Köln"}] if found[0].name == "weather.now" else [{}])
    assert names == {"weather.now", "stop"}


@pytest.mark.parametrize("form", ["v3", "v3.1"])
def test_parallel_calls_are_allowed_or_not(with_tools: Tokenizer, form: str) -> None:
    separator = "\n" if form == "v3" else ""
    if form == "v3":
        call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n```json\n{}\n```<｜tool▁call▁end｜>"
    else:
        call = "<｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    one = f"<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>"
    two = f"<｜tool▁calls▁begin｜>{call}{separator}{call}<｜tool▁calls▁end｜>"
    many = Grammar.from_tools(TOOLS, with_tools, form)
    single = Grammar.from_tools(TOOLS, with_tools, form, parallel=False)
    assert [takes(many, with_tools, one), takes(many, with_tools, two)] == [True, True]
    assert [takes(single, with_tools, one), takes(single, with_tools, two)] == [True, False]
    assert not takes(many, with_tools, one.replace("stop", "halt"))


def test_calls_need_tools_and_tokens(
    with_tools: Tokenizer, tokenizers_by_style: dict[str, Tokenizer]
) -> None:
    with pytest.raises(GrammarError, match="there are no tools"):
        Grammar.from_tools([], with_tools, "v3")
    with pytest.raises(GrammarError, match="unknown form of tool calls 'v4'"):
        Grammar.from_tools(TOOLS, with_tools, "v4")
    with pytest.raises(GrammarError, match="no token '<｜tool▁call▁begin｜>'"):
        Grammar.from_tools(TOOLS, tokenizers_by_style["qwen"], "v3")
    with pytest.raises(GrammarError, match="cannot be called"):
        Grammar.from_tools(read_tools([{"function": {"name": 'a" b'}}]), with_tools, "v3")


# --- what is refused ---


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (nested(64), "nested more than 64 levels"),
        (nested(100_000), "nested more than 64 levels"),
        ({"properties": {f"p{number}": {} for number in range(1001)}}, "has 1001 entries; at most 1000"),
        ({"enum": list(range(60_000))}, "more than 50000 values"),
        ({"description": "x" * 300_000}, "more than 262144 bytes"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "outside the schema"),
        ({"$ref": "file:///etc/passwd"}, "outside the schema"),
        ({"$ref": "#"}, "matches no text"),
        ({"$ref": "#/$defs/none"}, "not valid"),
        ({"x-guidance": {"lenient": True}}, "x-guidance is not supported"),
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ."not".'),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "string", "pattern": "("}, "not valid"),
        ({"allOf": [{"anyOf": [{"properties": {f"{a}{b}": {}}} for a in range(8)]} for b in range(8)]},
         "too large"),
        ([1], "must be an object, not list"),
        ({"default": {1, 2}}, "not JSON"),
        ({"const": "\ud800"}, "not JSON"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_schemas_are_refused_in_time(deepseek: Tokenizer, schema: Any, message: str) -> None:
    started = time.process_time()
    with pytest.raises(GrammarError, match=message) as caught:
        Grammar.from_schema(schema, deepseek)
    assert time.process_time() - started < 6
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "backreferences are not supported"),
        (r"(?=a)b", "look-around"),
        ("(", "unclosed group"),
        ("a" * 17_000, "at most 16384 bytes"),
        ("(" * 8000 + ")" * 8000, "not valid"),
        (7, "must be text"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_bad_regexes_are_refused_in_time(deepseek: Tokenizer, pattern: Any, message: str) -> None:
    started = time.process_time()
    with pytest.raises(GrammarError, match=message) as caught:
        Grammar.from_regex(pattern, deepseek)
    assert time.process_time() - started < 6
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+b", r"((a|aa)+)+", r"((((a{1,30}){1,30}){1,30}){1,30}){1,30}", r".*a.{200}",
     r"(.*a.{20})(.*b.{20})",
     "|".join("a" * length for length in range(1, 170))],
    ids=lambda pattern: pattern[:20],
)  # fmt: skip
def test_evil_regexes_stay_cheap(deepseek: Tokenizer, pattern: str) -> None:
    """Every step is bounded: it gives a mask, or fails for this request alone."""
    started = time.process_time()
    try:
        matcher = Grammar.from_regex(pattern, deepseek)()
        for _ in range(40):
            choices = allowed(matcher, deepseek)
            matcher.accept(next((index for index in deepseek.encode("a") if index in choices), choices[0]))
    except GrammarError as error:
        assert "\n" not in str(error)
    assert time.process_time() - started < 10


def test_a_step_that_costs_too_much_fails_alone(deepseek: Tokenizer) -> None:
    """The work of a step is bounded by llguidance: the error says so, and other answers go on."""
    other = Grammar.from_schema(PERSON, deepseek)()
    matcher, rng = Grammar.from_regex(r"(.{0,400}a.{0,400}){20}", deepseek)(), random.Random(0)
    letters = deepseek.encode("ab")
    started = time.process_time()
    with pytest.raises(GrammarError, match="cannot be followed further: lexer error"):
        for _ in range(2000):
            matcher.mask()
            matcher.accept(rng.choice(letters))
    assert time.process_time() - started < 20
    assert not matcher.is_done()
    assert allowed(other, deepseek)


def test_compiling_has_a_time_limit(deepseek: Tokenizer) -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(1000)}}
    with pytest.raises(GrammarError, match=r"takes more than 0\.001 s to compile"):
        Grammar.from_schema(schema, deepseek, limits=Limits(seconds=0.001))
    assert Grammar.from_schema(PERSON, deepseek)


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ("json", "must be an object, not str"),
        ({"type": "xml"}, "must be text, json_object, json_schema or regex, not 'xml'"),
        ({}, "not None"),
        ({"type": "json_schema"}, "needs a schema"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "needs a schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strct": True}}, "unknown field 'strct'"),
        ({"type": "json_object", "schema": {}}, "unknown field 'schema'"),
    ],
)
def test_bad_response_formats_are_refused(deepseek: Tokenizer, response_format: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        Grammar.from_response_format(response_format, deepseek)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(GrammarError, match="names none"):
        Grammar.from_schema(PERSON, Tokenizer.load(folder))
