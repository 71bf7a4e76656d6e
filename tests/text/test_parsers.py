"""Outputs taken apart: the same over every split, nothing lost, the state taken from the prompt."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.text.parsers import OutputParser, Piece, ReasoningParser, ToolCall, ToolParser, split_reasoning
from hadal.text.templates import TEMPLATES

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
Found = list[Piece | ToolCall]


def v3(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


def v31(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{CALL_END}"


WRITE = {"v3": v3, "v3.1": v31}
JOIN = {"v3": "\n", "v3.1": ""}


def merged(found: Found) -> Found:
    """Neighbouring pieces of one kind joined."""
    out: Found = []
    for item in found:
        last = out[-1] if out else None
        if isinstance(item, Piece) and isinstance(last, Piece) and last.kind == item.kind:
            out[-1] = Piece(item.kind, last.text + item.text)
        else:
            out.append(item)
    return out


def run(parser: Any, *texts: str) -> Found:
    found: Found = []
    for text in texts:
        found += parser.push(text)
    found += parser.finish()
    assert all(item.text for item in found if isinstance(item, Piece))
    return merged(found)


def splits(text: str) -> list[list[str]]:
    """Every split in two, every character alone, and every split in three of a short text."""
    halves = [[text[:place], text[place:]] for place in range(len(text) + 1)]
    thirds = [
        [text[:one], text[one:two], text[two:]]
        for one in range(len(text) + 1)
        for two in range(one, len(text) + 1)
    ]
    return [*halves, list(text), *(thirds if len(text) <= 60 else [])]


# --- reasoning ---


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("I add.\n</think>\n\n42", True, "I add.", "42"),
        ("I add.</think>42", True, "I add.", "42"),
        ("</think>42", True, "", "42"),
        ("\n\n</think>\n\n", True, "", ""),
        ("never ends\n", True, "never ends\n", ""),
        ("a\n\nb\n</thin\n</think>c\n</think>\n", True, "a\n\nb\n</thin", "c\n</think>\n"),
        ("a <think> b</think> c", True, "a <think> b", " c"),
        ("<think>no</think>yes", False, None, "<think>no</think>yes"),
        ("\n\nplain", False, None, "\n\nplain"),
        ("", True, "", ""),
        ("", False, None, ""),
    ],
)
def test_reasoning_over_every_split(text: str, inside: bool, reasoning: str | None, content: str) -> None:
    assert split_reasoning(text, inside) == (reasoning, content)
    expected = [Piece(kind, part) for kind, part in (("reasoning", reasoning), ("content", content)) if part]  # type: ignore[arg-type]
    for parts in splits(text):
        assert run(ReasoningParser(inside), *parts) == expected


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        (" \n<think>hm", "hm", ""),
        ("so <think>hm</think>", None, "so <think>hm</think>"),
        ("<thinking>", None, "<thinking>"),
        ("<thi", None, "<thi"),
        ("  ", None, "  "),
    ],
)
def test_reasoning_that_the_model_may_open(text: str, reasoning: str | None, content: str) -> None:
    assert split_reasoning(text, False, may_open=True) == (reasoning, content)
    expected = [Piece(kind, part) for kind, part in (("reasoning", reasoning), ("content", content)) if part]  # type: ignore[arg-type]
    for parts in splits(text):
        assert run(ReasoningParser(False, may_open=True), *parts) == expected


def test_reasoning_streams_as_it_comes() -> None:
    parser = ReasoningParser(True)
    assert parser.push("one two") == [Piece("reasoning", "one two")]
    assert parser.push(" three\n") == [Piece("reasoning", " three")]
    assert parser.push("</thi") == []
    assert parser.inside
    assert parser.push("s") == [Piece("reasoning", "\n</this")]
    assert parser.push("</think>\n") == []
    assert not parser.inside
    assert parser.push("\nfour") == [Piece("content", "four")]


SOUP = st.lists(
    st.sampled_from(["<think>", "</think>", "</", "think>", "\n", " ", "a", "<", "é"]), max_size=12
).map("".join)


@given(
    text=SOUP, places=st.lists(st.integers(0, 80), max_size=8), inside=st.booleans(), may_open=st.booleans()
)
def test_reasoning_in_any_grouping_equals_the_whole(
    text: str, places: list[int], inside: bool, may_open: bool
) -> None:
    reasoning, content = split_reasoning(text, inside, may_open=may_open)
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    found = run(
        ReasoningParser(inside, may_open=may_open),
        *[text[start:end] for start, end in itertools.pairwise(cuts)],
    )
    assert "".join(piece.text for piece in found if piece.kind == "reasoning") == (reasoning or "")  # type: ignore[union-attr]
    assert "".join(piece.text for piece in found if piece.kind == "content") == content  # type: ignore[union-attr]
    if inside and "</think>" in text:
        before, after = text.split("</think>", 1)
        assert (reasoning, content) == (before.strip("\n"), after.lstrip("\n"))
    elif not inside and not may_open:
        assert (reasoning, content) == (None, text)


# --- tool calls ---


@pytest.mark.parametrize("form", WRITE)
def test_calls_over_every_split(form: str) -> None:
    call = WRITE[form]
    text = f"Look: {BEGIN}{call('f', '{}')}{JOIN[form]}{call('g.h-i', '{' + chr(10) + '}')}{END}!"
    expected = [
        Piece("content", "Look: "),
        ToolCall("f", "{}"),
        ToolCall("g.h-i", "{\n}"),
        Piece("content", "!"),
    ]
    for parts in splits(text):
        assert run(ToolParser(form), *parts) == expected


@pytest.mark.parametrize("form", WRITE)
def test_a_call_comes_as_soon_as_it_is_complete(form: str) -> None:
    parser = ToolParser(form)
    assert parser.push("Hello <｜to") == [Piece("content", "Hello ")]
    assert parser.push(BEGIN.removeprefix("<｜to") + WRITE[form]("f", '{"a": 1}')[:-1]) == []
    assert parser.push(">") == [ToolCall("f", '{"a": 1}')]
    assert parser.push("\n" + CALL) == []
    assert parser.finish() == [Piece("content", CALL)]


@pytest.mark.parametrize("form", WRITE)
@pytest.mark.parametrize(
    "arguments", ["", "{", "[1]", '"x"', "null", '{"a": NaN}', "{'a': 1}", "{} {}", "[" * 5000, '{"a": 1}}']
)
def test_bad_arguments_are_given_back(form: str, arguments: str) -> None:
    text = f"a{BEGIN}{WRITE[form]('f', arguments)}{END}b"
    assert run(ToolParser(form), text) == [Piece("content", text)]
    assert run(ToolParser(form), *text) == [Piece("content", text)]


@pytest.mark.parametrize("form", WRITE)
def test_broken_blocks_are_given_back(form: str) -> None:
    good = WRITE[form]("f", "{}")
    for text in (
        BEGIN,
        BEGIN + END,
        f"{BEGIN}\n {END}",
        f"{BEGIN}{CALL}",
        f"{BEGIN}{good[:-3]}",
        f"{BEGIN}{CALL}{CALL_END}{END}",
        f"{BEGIN}{CALL}{SEP}{{}}{CALL_END}{END}",
        f"{BEGIN}oh no{END}",
        f"{BEGIN[:-1]}",
        f"{good}{END}",
        f"{BEGIN}{good.removesuffix(CALL_END)}{END}",
        f"{CALL_END}{END}{SEP}",
    ):
        for parts in splits(text) if len(text) < 60 else [[text], list(text)]:
            assert run(ToolParser(form), *parts) == [Piece("content", text)]


@pytest.mark.parametrize("form", WRITE)
def test_good_calls_survive_bad_neighbours(form: str) -> None:
    good, bad = WRITE[form]("f", "{}"), WRITE[form]("g", "{")
    call = ToolCall("f", "{}")
    for text, expected in {
        f"{BEGIN}{good}{bad}{END}": [call, Piece("content", bad)],
        f"{BEGIN}{bad}{good}{END}": [Piece("content", BEGIN + bad), call, Piece("content", END)],
        f"{BEGIN}{good} text {END}": [call, Piece("content", f" text {END}")],
        f"{BEGIN}{good}": [call],
        f"{BEGIN}{good}{CALL}cut": [call, Piece("content", f"{CALL}cut")],
        f"{BEGIN}{good}{END}{BEGIN}{good}{END}": [call, call],
        f"{BEGIN}{good}{END}\nafter": [call, Piece("content", "\nafter")],
    }.items():
        assert run(ToolParser(form), text) == expected
        assert run(ToolParser(form), *text) == expected


@pytest.mark.parametrize("name", ["deepseek-v2", "r1-distill-qwen", "plain"])
def test_models_without_a_form_of_calls_write_content(name: str) -> None:
    text = f"{BEGIN}{v31('f', '{}')}{END}"
    assert run(ToolParser(name), *text) == [Piece("content", text)]


NAMES = st.text("abc_.-é ", min_size=1, max_size=8).map(str.strip).filter(bool)
ARGUMENTS = st.dictionaries(
    st.text(max_size=5), st.text(max_size=8) | st.integers() | st.none(), max_size=3
).map(lambda value: json.dumps(value, ensure_ascii=False))
CONTENT = st.text("ab \n<>{}｜é", min_size=1, max_size=10)
BLOCKS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)


@given(
    form=st.sampled_from(sorted(WRITE)),
    items=st.lists(CONTENT | BLOCKS, max_size=5),
    places=st.lists(st.integers(0, 900), max_size=12),
)
def test_what_was_written_comes_back(form: str, items: list[Any], places: list[int]) -> None:
    """Texts and blocks, written in the model's form, are found again in any split."""
    text, expected = "", []
    for item in items:
        if isinstance(item, str):
            text += item
            expected.append(Piece("content", item))
        else:
            text += BEGIN + JOIN[form].join(WRITE[form](*call) for call in item) + END
            expected += [ToolCall(*call) for call in item]
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
    assert run(ToolParser(form), *parts) == merged(expected)


PIECES = [
    BEGIN,
    END,
    CALL,
    CALL_END,
    SEP,
    "function",
    "f",
    "\n```json\n",
    "\n```",
    "{}",
    '{"a": 1}',
    "{",
    " ",
    "\n",
    "x",
]
MARKS = re.compile(
    "|".join(map(re.escape, [BEGIN, END, CALL, CALL_END, SEP, "```json", "```", "function"])) + r"|\s"
)


@given(
    form=st.sampled_from(sorted(WRITE)),
    tokens=st.lists(st.sampled_from(PIECES), max_size=25),
    places=st.lists(st.integers(0, 900), max_size=12),
)
def test_nothing_of_a_broken_output_is_lost(form: str, tokens: list[str], places: list[int]) -> None:
    text = "".join(tokens)
    whole = run(ToolParser(form), text)
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    assert run(ToolParser(form), *[text[start:end] for start, end in itertools.pairwise(cuts)]) == whole
    said = [item.text if isinstance(item, Piece) else item.name + item.arguments_json for item in whole]
    assert MARKS.sub("", "".join(said)) == MARKS.sub("", text)
    if not any(isinstance(item, ToolCall) for item in whole):
        assert "".join(said) == text


def test_long_white_space_costs_no_time() -> None:
    """No backtracking: a parser that runs in the server's loop must stay linear."""
    for form in WRITE:
        for body in (" " * 200_000, "function" + SEP + " " * 200_000, "f" + SEP + "```" + "\n" * 200_000):
            text = f"{BEGIN}{CALL}{body}{CALL_END}{END}"
            started = time.thread_time()
            assert run(ToolParser(form), text) == [Piece("content", text)]
            assert time.thread_time() - started < 1.0


# --- both ---

HELLO = [{"role": "user", "content": "Hello"}]


def test_an_answer_is_reasoning_then_content_then_calls() -> None:
    text = f"I look <｜tool▁sep｜>.\n</think>\n\nLet me see.{BEGIN}{v3('f', '{}')}{END}"
    expected = [
        Piece("reasoning", "I look <｜tool▁sep｜>."),
        Piece("content", "Let me see."),
        ToolCall("f", "{}"),
    ]
    for parts in ([text], list(text)):
        assert run(OutputParser(TEMPLATES["deepseek-r1"], HELLO, tools=True), *parts) == expected
    without = run(OutputParser(TEMPLATES["deepseek-r1"], HELLO), *text)
    assert without == [expected[0], Piece("content", text.partition("\n\n")[2])]


def test_the_state_comes_from_the_prompt() -> None:
    text = "<think>hm</think>yes"
    for name, thinking, expected in [
        ("deepseek-v3", None, [Piece("content", text)]),
        ("deepseek-v3.1", False, [Piece("content", text)]),
        ("deepseek-v3.1", True, [Piece("reasoning", "<think>hm"), Piece("content", "yes")]),
        ("deepseek-r1", False, [Piece("content", text)]),
        ("deepseek-r1", None, [Piece("reasoning", "<think>hm"), Piece("content", "yes")]),
    ]:
        assert run(OutputParser(TEMPLATES[name], HELLO, thinking=thinking), *text) == expected
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    after_result = [*HELLO, call, {"role": "tool", "content": "1"}]
    expected = [Piece("reasoning", "hm"), Piece("content", "yes")]
    assert run(OutputParser(TEMPLATES["deepseek-r1"], after_result), *text) == expected
    assert run(OutputParser(TEMPLATES["deepseek-r1"], after_result, thinking=False), *text) == [
        Piece("content", text)
    ]
