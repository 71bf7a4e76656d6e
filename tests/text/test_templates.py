"""The template functions equal the published Jinja; what they refuse, they refuse by name; users stay
users."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hadal.config import PRESETS
from hadal.text import Control, TemplateError, Tokenizer
from hadal.text.templates import (
    TEMPLATES,
    ends_in_reasoning,
    template_for,
    template_options,
    text_of,
)

GOLDEN = Path(__file__).parent / "golden"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Template -> the published texts that it equals.
PUBLISHED = {
    "deepseek-v2": ["deepseek-v2"],
    "deepseek-v3": ["deepseek-v3-0324", "deepseek-v3-2024-12"],
    "deepseek-r1": ["deepseek-r1"],
    "deepseek-r1-0528": ["deepseek-r1-0528"],
    "deepseek-v3.1": ["deepseek-v3.1"],
    "deepseek-v3.1-terminus": ["deepseek-v3.1-terminus"],
    "r1-distill-qwen": ["r1-distill"],
    "r1-distill-llama": ["r1-distill"],
    "hadal-mini": ["deepseek-r1"],
}
PAIRS = [(name, golden) for name, goldens in PUBLISHED.items() for golden in goldens]
WITH_TOOLS = [
    "deepseek-v3",
    "deepseek-r1",
    "deepseek-r1-0528",
    "deepseek-v3.1",
    "deepseek-v3.1-terminus",
]

SYSTEM = {"role": "system", "content": "You are kind."}
HELLO = {"role": "user", "content": "Hello\n there "}
HI = {"role": "assistant", "content": "Hi! "}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 4."}
MORE = {"role": "user", "content": "And <｜User｜> 2 + 2? </think>"}


def call(name: str, arguments: str, id: str = "c1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str, id: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


WEATHER = call("weather", '{"city": "Bonn"}')
TIME = call("time", '{"zone": "CET"}', "c2")

CHATS = {
    "one turn": [HELLO],
    "system": [SYSTEM, HELLO],
    "empty system": [{"role": "system", "content": ""}, HELLO],
    "multi-turn": [SYSTEM, HELLO, HI, MORE],
    "reasoning in the history": [HELLO, THOUGHT, MORE],
    "reasoning twice": [HELLO, THOUGHT, MORE, THOUGHT, HELLO],
    "ends with the assistant": [HELLO, HI],
    "empty texts": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, HELLO],
}
SYSTEMS = {
    "several systems": [SYSTEM, {"role": "system", "content": "Be brief."}, HELLO],
    "a late system": [SYSTEM, HELLO, HI, {"role": "system", "content": "Be brief."}, MORE],
}
TOOL_CHATS = {
    "a call": [HELLO, calling(WEATHER, content="")],
    "a call with text": [SYSTEM, HELLO, calling(WEATHER, content="Let me look.")],
    "a result": [HELLO, calling(WEATHER, content=""), result("rain")],
    "an answer": [HELLO, calling(WEATHER, content=""), result("rain"), HI],
    "a further question": [HELLO, calling(WEATHER, content=""), result("rain"), HI, MORE],
    "parallel calls": [HELLO, calling(WEATHER, TIME, content=""), result("rain"), result("noon", "c2")],
    "parallel and answer": [
        *[SYSTEM, HELLO, calling(WEATHER, TIME, content="Both.")],
        *[result("rain"), result("noon", "c2"), HI, MORE],
    ],
}
# R1's published text never resets its flags, so these are equal only for the templates that came after it.
_FIRST_ROUND = [HELLO, calling(WEATHER, content=""), result("rain")]
_SECOND_ROUND = [calling(TIME, content=""), result("noon", "c2")]
ROUNDS = {
    "two rounds": [*_FIRST_ROUND, *_SECOND_ROUND],
    "two rounds, two questions": [*_FIRST_ROUND, HI, MORE, *_SECOND_ROUND, HI],
}
NO_CONTENT = [HELLO, calling(WEATHER, TIME), result("rain"), result("noon", "c2"), HI]


def published(name: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """As `transformers` renders it: sandboxed, blocks trimmed."""
    return jinja(name).render(messages=messages, bos_token=BOS, eos_token=EOS, **variables)


@functools.cache
def jinja(name: str) -> jinja2.Template:
    text = (GOLDEN / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)


def ours(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return text_of(TEMPLATES[name].render(messages, **options))


def forced(name: str, messages: list[dict[str, Any]]) -> str:
    """R1-0528's prompt is the published one, and the opening tag."""
    return "<think>\n" if name == "deepseek-r1-0528" and messages[-1]["role"] != "tool" else ""


# --- equality with the published Jinja ---


@pytest.mark.parametrize(("name", "golden"), PAIRS)
@pytest.mark.parametrize("chat", CHATS)
def test_chats_equal_the_published(name: str, golden: str, chat: str) -> None:
    messages = CHATS[chat]
    if "reasoning" in chat and name in ("deepseek-v2", "deepseek-v3"):
        messages = [
            {**message, "content": message["content"].replace("</think>", "")} for message in messages
        ]
    expected = published(golden, messages, add_generation_prompt=True) + forced(name, messages)
    assert ours(name, messages) == expected


@pytest.mark.parametrize(("name", "golden"), [pair for pair in PAIRS if "distill" not in pair[0]])
@pytest.mark.parametrize("chat", SYSTEMS)
def test_systems_equal_the_published(name: str, golden: str, chat: str) -> None:
    expected = published(golden, SYSTEMS[chat], add_generation_prompt=True) + forced(name, SYSTEMS[chat])
    assert ours(name, SYSTEMS[chat]) == expected


@pytest.mark.parametrize("name", ["r1-distill-qwen", "r1-distill-llama"])
def test_distills_join_systems_where_the_published_drops_all_but_one(name: str) -> None:
    messages = SYSTEMS["several systems"]
    assert ours(name, messages) == published("deepseek-r1", messages, add_generation_prompt=True)
    assert SYSTEM["content"] not in published("r1-distill", messages)


@pytest.mark.parametrize(("name", "golden"), PAIRS)
def test_without_generation_prompt_equals_the_published(name: str, golden: str) -> None:
    for messages in ([HELLO, HI], [SYSTEM, HELLO, HI, MORE, HI], [HELLO]):
        if golden == "deepseek-v3-2024-12" and messages[-1] is HELLO:
            continue  # since V3-0324 the assistant's marker follows a user message in any case
        assert ours(name, messages, add_generation_prompt=False) == published(golden, messages)


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("chat", TOOL_CHATS)
def test_tool_calls_and_results_equal_the_published(name: str, chat: str) -> None:
    messages = TOOL_CHATS[chat]
    expected = published(PUBLISHED[name][0], messages, add_generation_prompt=True) + forced(name, messages)
    assert ours(name, messages) == expected


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "deepseek-r1-0528", "deepseek-v3.1", "deepseek-v3.1-terminus"]
)
@pytest.mark.parametrize("chat", ROUNDS)
def test_several_rounds_of_tools_equal_the_published(name: str, chat: str) -> None:
    messages = ROUNDS[chat]
    expected = published(PUBLISHED[name][0], messages, add_generation_prompt=True) + forced(name, messages)
    assert ours(name, messages) == expected


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v3.1-terminus"])
def test_calls_without_content_equal_the_published(name: str) -> None:
    assert ours(name, NO_CONTENT) == published(PUBLISHED[name][0], NO_CONTENT, add_generation_prompt=True)


def test_r1_is_well_formed_in_a_second_round_where_the_published_is_not() -> None:
    text = ours("deepseek-r1", ROUNDS["two rounds, two questions"])
    assert text.count("<｜tool▁calls▁begin｜>") == text.count("<｜tool▁calls▁end｜>") == 2
    assert text.count("<｜tool▁outputs▁begin｜>") == text.count("<｜tool▁outputs▁end｜>") == 2
    broken = published("deepseek-r1", ROUNDS["two rounds, two questions"])
    assert broken.count("<｜tool▁calls▁begin｜>") == 1


@pytest.mark.parametrize("name", ["deepseek-v3.1", "deepseek-v3.1-terminus"])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("chat", [*CHATS, *SYSTEMS, *TOOL_CHATS])
def test_v31_thinking_on_and_off_equals_the_published(name: str, thinking: bool, chat: str) -> None:
    messages = {**CHATS, **SYSTEMS, **TOOL_CHATS}[chat]
    for generate in (True, False):
        expected = published(name, messages, thinking=thinking, add_generation_prompt=generate)
        assert ours(name, messages, thinking=thinking, add_generation_prompt=generate) == expected


def test_terminus_prompts_after_a_system_message_alone() -> None:
    for name in ("deepseek-v3.1", "deepseek-v3.1-terminus"):
        assert ours(name, [SYSTEM]) == published(name, [SYSTEM], add_generation_prompt=True)
    assert ours("deepseek-v3.1-terminus", [SYSTEM]).endswith("<｜Assistant｜></think>")


# --- the assistant's beginning, to be continued ---


@pytest.mark.parametrize(("name", "golden"), PAIRS)
@pytest.mark.parametrize("begin", ["The answer", "<think>\nhm\n</think>\n\nThe answer", ""])
def test_a_prefix_is_the_published_text_left_open(name: str, golden: str, begin: str) -> None:
    messages = [SYSTEM, HELLO, {"role": "assistant", "content": begin, "prefix": True}]
    expected = published(golden, messages, add_generation_prompt=False)
    assert ours(name, messages) == expected.removesuffix(EOS)
    assert expected.endswith(EOS)


@pytest.mark.parametrize("name", ["deepseek-v3.1", "deepseek-v3.1-terminus"])
def test_v31_continues_inside_the_reasoning(name: str) -> None:
    messages = [HELLO, {"role": "assistant", "content": "First,", "prefix": True}]
    expected = published(name, messages, thinking=True).removesuffix(EOS)
    assert ours(name, messages, thinking=True) == expected
    assert expected.endswith("<｜Assistant｜><think>First,")
    assert TEMPLATES[name].starts_in_reasoning(True, messages)
    assert not TEMPLATES[name].starts_in_reasoning(False, messages)


@pytest.mark.parametrize(
    ("name", "opened", "closed"),
    [
        ("deepseek-r1", "<think>\nhm", "<think>\nhm\n</think>\n\nIt is"),
        ("hadal-mini", "<think>\nhm", "<think>\nhm\n</think>\n\nIt is"),
        ("deepseek-r1-0528", "<think>\nhm", "<think>\nhm\n</think>\n\nIt is"),
        ("r1-distill-qwen", "<think>\nhm", "<think>\nhm\n</think>\n\nIt is"),
        ("deepseek-v3.1", "<think>hm", "<think>hm</think>It is"),
    ],
)
def test_reasoning_can_be_given_in_a_prefix(name: str, opened: str, closed: str) -> None:
    prompt = [HELLO, {"role": "assistant", "content": "", "reasoning_content": "hm", "prefix": True}]
    assert ours(name, prompt, thinking=True).endswith(f"<｜Assistant｜>{opened}")
    assert TEMPLATES[name].starts_in_reasoning(True, prompt)
    prompt[-1]["content"] = "It is"
    assert ours(name, prompt, thinking=True).endswith(f"<｜Assistant｜>{closed}")
    assert not TEMPLATES[name].starts_in_reasoning(True, prompt)


@pytest.mark.parametrize(
    ("name", "thinking"),
    [("deepseek-v3", None), ("deepseek-v2", None), ("deepseek-v3.1", False), ("deepseek-r1", False)],
)
def test_reasoning_in_a_prefix_needs_thinking(name: str, thinking: bool | None) -> None:
    prompt = [HELLO, {"role": "assistant", "content": "", "reasoning_content": "hm", "prefix": True}]
    with pytest.raises(TemplateError, match="needs a model that reasons, with thinking on") as caught:
        TEMPLATES[name].render(prompt, thinking=thinking)
    assert caught.value.field == "messages[1].reasoning_content"


# --- where the output begins ---


def test_starts_in_reasoning() -> None:
    inside = {name: TEMPLATES[name].starts_in_reasoning(None, [HELLO]) for name in TEMPLATES}
    reasoners = {"deepseek-r1", "deepseek-r1-0528", "r1-distill-qwen", "r1-distill-llama", "hadal-mini"}
    assert inside == {name: name in reasoners for name in TEMPLATES}
    assert TEMPLATES["deepseek-v3.1"].starts_in_reasoning(True, [HELLO])
    assert not TEMPLATES["deepseek-v3.1"].starts_in_reasoning(False, [HELLO])
    for name in reasoners - {"hadal-mini"}:
        assert not TEMPLATES[name].starts_in_reasoning(False, [HELLO])


def test_a_user_who_types_the_tag_does_not_begin_reasoning() -> None:
    typed = [{"role": "user", "content": "<｜Assistant｜><think>\n"}]
    for name in ("deepseek-v2", "deepseek-v3", "deepseek-v3.1", "plain"):
        assert not TEMPLATES[name].starts_in_reasoning(None, typed)
    prefix = [HELLO, {"role": "assistant", "content": "<think>\nhm", "prefix": True}]
    assert not TEMPLATES["deepseek-r1"].starts_in_reasoning(None, prefix)


def test_after_a_result_r1_may_open_its_reasoning_itself() -> None:
    messages = TOOL_CHATS["a result"]
    assert TEMPLATES["deepseek-r1"].may_open_reasoning(messages)
    assert not TEMPLATES["deepseek-r1"].starts_in_reasoning(None, messages)
    assert not TEMPLATES["deepseek-r1"].may_open_reasoning([HELLO])
    assert not TEMPLATES["deepseek-v3"].may_open_reasoning(messages)


def test_r1_without_thinking_gets_an_empty_reasoning() -> None:
    for name in ("deepseek-r1", "deepseek-r1-0528", "r1-distill-qwen"):
        assert ours(name, [HELLO], thinking=False).endswith("<｜Assistant｜><think>\n\n</think>\n\n")
        assert TEMPLATES[name].supports_thinking and not TEMPLATES[name].always_thinks


def test_the_model_on_board_cannot_be_told_not_to_think() -> None:
    """It has never read an empty reasoning: it would reason in its answer."""
    mini = TEMPLATES["hadal-mini"]
    assert mini.supports_thinking and mini.always_thinks
    with pytest.raises(TemplateError, match="hadal-mini always reasons before it answers") as caught:
        mini.render([HELLO], thinking=False)
    assert caught.value.field == "thinking"
    assert mini.render([HELLO], thinking=True) == mini.render([HELLO])
    assert [name for name, template in TEMPLATES.items() if template.always_thinks] == ["hadal-mini"]


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "plain"])
def test_thinking_is_refused_where_the_model_has_none(name: str) -> None:
    with pytest.raises(TemplateError, match=f"{name} has no thinking mode"):
        TEMPLATES[name].render([HELLO], thinking=True)
    assert not ends_in_reasoning(TEMPLATES[name].render([HELLO], thinking=False))


# --- tools ---

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather in a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "Ort, z. B. Köln"}}}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
# The text of DeepSeek-V3.1's model card, "ToolCall".
V31_TOOLS = """You are kind.

## Tools
You have access to the following tools:

### weather
Description: Weather in a city

Parameters: {"type": "object", "properties": {"city": {"type": "string", "description": "Ort, z. B. Köln"}}}

### now
Description: 

Parameters: {"type": "object", "properties": {}}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""  # noqa: W291


def test_v31_tool_definitions_are_those_of_the_model_card() -> None:
    text = ours("deepseek-v3.1", [SYSTEM, HELLO], tools=TOOLS)
    assert text == f"{BOS}{V31_TOOLS}<｜User｜>{HELLO['content']}<｜Assistant｜></think>"


def test_v3_and_r1_tool_definitions_show_their_own_form_of_call() -> None:
    for name, end in [("deepseek-v3", ""), ("deepseek-r1", "<think>\n")]:
        text = ours(name, [SYSTEM, HELLO], tools=TOOLS)
        assert text.startswith(f"{BOS}You are kind.\n\n## Tools\n")
        assert (
            "function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```<｜tool▁call▁end｜>"
            in text
        )
        assert text.endswith(f"<｜User｜>{HELLO['content']}<｜Assistant｜>{end}")


def test_a_model_that_never_saw_tools_refuses_them() -> None:
    assert not TEMPLATES["hadal-mini"].supports_tools
    with pytest.raises(TemplateError, match="tools"):
        ours("hadal-mini", [SYSTEM, HELLO], tools=TOOLS)


def test_no_tools_change_nothing() -> None:
    for name in WITH_TOOLS:
        assert ours(name, [HELLO], tools=[]) == ours(name, [HELLO])


@pytest.mark.parametrize("name", ["deepseek-v2", "r1-distill-qwen", "r1-distill-llama", "plain"])
def test_tools_are_refused_where_the_model_has_no_form_for_them(name: str) -> None:
    assert not TEMPLATES[name].supports_tools
    with pytest.raises(TemplateError, match=f"{name} was not trained to call tools"):
        TEMPLATES[name].render([HELLO], tools=TOOLS)
    with pytest.raises(TemplateError, match=f"{name} has no form for tool calls") as caught:
        TEMPLATES[name].render(TOOL_CHATS["a result"])
    assert caught.value.field == "messages[1]"


def test_v31_calls_tools_only_without_thinking() -> None:
    with pytest.raises(TemplateError, match="non-thinking mode only"):
        TEMPLATES["deepseek-v3.1"].render([HELLO], tools=TOOLS, thinking=True)


def test_results_come_in_the_order_of_their_calls() -> None:
    swapped = [HELLO, calling(WEATHER, TIME), result("noon", "c2"), result("rain", "c1")]
    ordered = [HELLO, calling(WEATHER, TIME), result("rain", "c1"), result("noon", "c2")]
    unknown = [HELLO, calling(WEATHER, TIME), result("noon", "c9"), result("rain", "c1")]
    assert ours("deepseek-v3.1", swapped) == ours("deepseek-v3.1", ordered)
    assert ours("deepseek-v3.1", unknown).index("noon") < ours("deepseek-v3.1", unknown).index("rain")


def test_arguments_may_be_an_object() -> None:
    text = ours("deepseek-v3.1", [HELLO, calling(call("f", {"a": "é"}))])  # type: ignore[arg-type]
    assert 'f<｜tool▁sep｜>{"a": "é"}<｜tool▁call▁end｜>' in text


# --- what is refused ---


@pytest.mark.parametrize(
    ("messages", "message", "field"),
    [
        ([], "non-empty list", "messages"),
        (None, "non-empty list", "messages"),
        ("Hello", "non-empty list", "messages"),
        (["Hello"], "must be an object, not str", "messages[0]"),
        ([{"role": "asistant", "content": "x"}], "did you mean 'assistant'", "messages[0].role"),
        ([{"content": "x"}], "not None", "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "role must be one of", "messages[0].role"),
        ([{"role": "user", "contents": "x"}], "did you mean 'content'", "messages[0].contents"),
        ([{"role": "user", "content": 3}], "not int", "messages[0].content"),
        ([{"role": "user", "content": None}], "not null", "messages[0].content"),
        ([{"role": "user"}], "not null", "messages[0].content"),
        ([{"role": "user", "content": []}], "content must be text", "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1"}}]}],
         "reads only text", "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a text", "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "prefix": True}], "unknown field 'prefix'", "messages[0].prefix"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "unknown field", "messages[0].tool_calls"),
        ([HELLO, {**HI, "prefix": True}, HELLO], "only be set on the last message", "messages[1].prefix"),
        ([HELLO, {**HI, "prefix": "yes"}], "must be true or false", "messages[1].prefix"),
        ([HELLO, {**calling(WEATHER), "prefix": True}], "cannot be a prefix", "messages[1].prefix"),
        ([HELLO, result("x")], "must follow an assistant message with tool_calls", "messages[1].role"),
        ([HELLO, calling({"function": {"name": ""}})], "needs the name",
         "messages[1].tool_calls[0].function.name"),
        ([HELLO, calling({"function": {"name": "f", "arguments": 3}})], "arguments must be JSON text",
         "messages[1].tool_calls[0].function.arguments"),
        ([HELLO, calling({"type": "code", "function": {"name": "f"}})], "must be of type 'function'",
         "messages[1].tool_calls[0].type"),
        ([HELLO, {**HI, "tool_calls": "f"}], "must be a list", "messages[1].tool_calls"),
        ([HELLO, {**HI, "function_call": {"name": "f"}}], "not supported", "messages[1].function_call"),
        ([HELLO, {**HI, "reasoning_content": 3}], "must be text", "messages[1].reasoning_content"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["deepseek-v3.1", "deepseek-r1"])
def test_bad_messages_are_refused_by_field(name: str, messages: Any, message: str, field: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        TEMPLATES[name].render(messages)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("tools", "message", "field"),
    [
        ("f", "must be a list", "tools"),
        ([{"type": "function"}], "object with a function", "tools[0]"),
        ([{"function": {"name": 3}}], "needs a name", "tools[0].function.name"),
        (
            [{"function": {"name": "f", "paramters": {}}}],
            "did you mean 'parameters'",
            "tools[0].function.paramters",
        ),
        (
            [{"function": {"name": "f", "parameters": []}}],
            "JSON schema object",
            "tools[0].function.parameters",
        ),
        ([{"type": "web", "function": {"name": "f"}}], "of type 'function'", "tools[0].type"),
    ],
)
def test_bad_tools_are_refused_by_field(tools: Any, message: str, field: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        TEMPLATES["deepseek-v3"].render([HELLO], tools=tools)
    assert caught.value.field == field


def test_what_clients_send_back_is_accepted() -> None:
    echoed = {
        "role": "assistant", "content": "Hi! ", "reasoning_content": "hm", "reasoning": "hm", "refusal": None,
        "audio": None, "function_call": None, "annotations": [], "tool_calls": None, "name": "bot",
    }  # fmt: skip
    plain = [HELLO, HI, MORE]
    assert ours("deepseek-r1", [HELLO, echoed, MORE]) == ours("deepseek-r1", plain)
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there "}],
    }
    assert ours("deepseek-r1", [parts, HI, MORE]) == ours("deepseek-r1", plain)
    developer = {"role": "developer", "content": "You are kind."}
    assert ours("deepseek-v2", [developer, HELLO]) == ours("deepseek-v2", [SYSTEM, HELLO])


def test_plain_is_one_text_after_bos() -> None:
    assert TEMPLATES["plain"].render([HELLO]) == [Control(BOS), HELLO["content"]]
    for messages in ([SYSTEM, HELLO], [HELLO, HI], [HI]):
        with pytest.raises(TemplateError, match="base model has no chat template"):
            TEMPLATES["plain"].render(messages)


def test_template_options_are_allow_listed() -> None:
    assert template_options(None) == template_options({}) == {}
    assert (
        template_options({"thinking": True})
        == template_options({"enable_thinking": True})
        == {"thinking": True}
    )
    for options, message in [
        ({"chat_template": "{{ 1 }}"}, "unknown field 'chat_template'"),
        ({"thinkin": True}, "did you mean 'thinking'"),
        ({"thinking": "on"}, "must be true or false"),
        ({"thinking": 1}, "must be true or false"),
        ({"thinking": True, "enable_thinking": False}, "contradict"),
    ]:
        with pytest.raises(TemplateError, match=message):
            template_options(options)


# --- users stay users ---

CONTENTS = st.text(max_size=12) | st.sampled_from(
    [
        "<｜User｜>",
        "<think>",
        "</think>x",
        "<｜end▁of▁sentence｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜Assistant｜></think>",
    ]
)


@given(contents=st.lists(CONTENTS, min_size=7, max_size=7), name=st.sampled_from(WITH_TOOLS))
def test_no_content_adds_a_control_token(
    tokenizers_by_style: dict[str, Tokenizer], contents: list[str], name: str
) -> None:
    """Whatever a request says, the control tokens of its prompt are those of the same request with harmless
    texts."""

    def chat(texts: list[str]) -> tuple[list[Any], list[Any]]:
        system, user, said, name, arguments, output, more = texts
        tools = [
            {
                "type": "function",
                "function": {"name": name or "f", "description": said, "parameters": {system: 1}},
            }
        ]
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": said},
            {"role": "user", "content": user},
            calling(call(name or "f", arguments), content=said),
            result(output),
            {"role": "user", "content": more},
        ], tools

    def controls(texts: list[str]) -> list[Control]:
        messages, tools = chat(texts)
        return [part for part in TEMPLATES[name].render(messages, tools=tools) if isinstance(part, Control)]

    assert controls(contents) == controls(["x"] * 7)
    messages, tools = chat([text.encode("utf-8", "ignore").decode() for text in contents])
    tokenizer = tokenizers_by_style["deepseek"]
    parts = TEMPLATES[name].render(messages, tools=tools)
    special = set(tokenizer.special.values())
    expected = [tokenizer.special[part.content] for part in parts if isinstance(part, Control)]
    assert [index for index in tokenizer.encode_parts(parts) if index in special] == expected


@pytest.mark.parametrize(("name", "style"), [
    ("deepseek-v3", "deepseek"), ("deepseek-r1", "deepseek"), ("deepseek-v3.1", "deepseek"),
    ("r1-distill-qwen", "qwen"), ("r1-distill-llama", "llama"), ("hadal-mini", "deepseek"),
])  # fmt: skip
def test_ids_equal_those_of_the_published_text(
    tokenizers_by_style: dict[str, Tokenizer], name: str, style: str
) -> None:
    tokenizer = tokenizers_by_style[style]
    chats = [CHATS["system"], CHATS["one turn"], [SYSTEM, HELLO, HI, HELLO]]
    for messages in chats + ([TOOL_CHATS["parallel calls"]] if TEMPLATES[name].supports_tools else []):
        text = published(PUBLISHED[name][0], messages, add_generation_prompt=True)
        assert tokenizer.encode_parts(TEMPLATES[name].render(messages)) == tokenizer.encode_with_controls(
            text
        )


# --- which template a model has ---


def test_every_preset_has_its_template() -> None:
    for preset in PRESETS.values():
        assert template_for(preset) is TEMPLATES[preset.template]


def test_a_template_is_found_by_name() -> None:
    assert template_for("deepseek-r1").name == "deepseek-r1"
    assert template_for(SimpleNamespace(template="plain")).name == "plain"
    with pytest.raises(
        TemplateError, match="unknown chat template 'deepseek_r1'; did you mean 'deepseek-r1'"
    ):
        template_for("deepseek_r1")


@pytest.mark.parametrize(("golden", "model_type", "name"), [
    ("deepseek-v2", "deepseek_v2", "deepseek-v2"),
    ("deepseek-v3-2024-12", "deepseek_v3", "deepseek-v3"),
    ("deepseek-v3-0324", "deepseek_v3", "deepseek-v3"),
    ("deepseek-r1", "deepseek_v3", "deepseek-r1"),
    ("deepseek-r1-0528", "deepseek_v3", "deepseek-r1-0528"),
    ("deepseek-v3.1", "deepseek_v3", "deepseek-v3.1"),
    ("deepseek-v3.1-terminus", "deepseek_v32", "deepseek-v3.1-terminus"),
    ("r1-distill", "qwen2", "r1-distill-qwen"),
    ("r1-distill", "llama", "r1-distill-llama"),
])  # fmt: skip
def test_the_published_texts_are_recognised_in_a_folder(
    tmp_path: Path, golden: str, model_type: str, name: str
) -> None:
    published_text = (GOLDEN / f"{golden}.jinja").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": published_text}))
    assert template_for(tmp_path).name == name
    assert template_for(str(tmp_path)).name == name
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert template_for(tmp_path).name == "plain"
    (tmp_path / "chat_template.jinja").write_text(published_text, encoding="utf-8")
    assert template_for(tmp_path).name == name


def test_a_folder_may_name_its_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"hadal_template": "hadal-mini", "chat_template": "{{ 1 }}"}'
    )
    assert template_for(tmp_path).name == "hadal-mini"
    (tmp_path / "tokenizer_config.json").write_text('{"hadal_template": "mini"}')
    with pytest.raises(TemplateError, match="unknown hadal_template 'mini'"):
        template_for(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(TemplateError, match="not one that Hadal knows"):
        template_for(tmp_path)


def test_the_golden_data_is_complete() -> None:
    used = set(itertools.chain.from_iterable(PUBLISHED.values()))
    assert {path.stem for path in GOLDEN.glob("*.jinja")} == used
    for path in GOLDEN.glob("*.jinja"):
        jinja2.Environment().parse(path.read_text(encoding="utf-8"))


# --- what is trained on ---


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "deepseek-v3.1", "deepseek-v3.1-terminus"])
@pytest.mark.parametrize("chat", [[HELLO, HI], [SYSTEM, HELLO, HI, MORE, HI]])
def test_prompt_and_answer_are_the_published_text(name: str, chat: list[dict[str, Any]]) -> None:
    prompt, answer = TEMPLATES[name].split(chat)
    golden = PUBLISHED[name][0]
    assert text_of(prompt) + text_of(answer) == published(golden, chat)
    assert text_of(prompt) == text_of(TEMPLATES[name].render(chat[:-1]))
    assert answer[-1] == Control(EOS)


@pytest.mark.parametrize("name", [n for n in WITH_TOOLS if n != "deepseek-r1"])
def test_calls_are_written_as_published(name: str) -> None:
    for chat in (TOOL_CHATS["a call with text"], TOOL_CHATS["an answer"]):
        prompt, answer = TEMPLATES[name].split(chat, thinking=False)
        text = text_of(prompt) + text_of(answer)
        assert text.replace("<think>\n\n</think>\n\n", "") == published(PUBLISHED[name][0], chat)


@pytest.mark.parametrize("name", ["deepseek-r1", "deepseek-r1-0528", "r1-distill-qwen", "hadal-mini"])
def test_reasoning_is_written_after_the_opened_tag_and_dropped_from_the_history(name: str) -> None:
    thought = {"role": "assistant", "content": "It is 4.", "reasoning_content": "hm"}
    chat = [HELLO, thought, MORE, thought]
    prompt, answer = TEMPLATES[name].split(chat)
    assert text_of(prompt).endswith("<｜Assistant｜><think>\n") and "hm" not in text_of(prompt)
    assert answer == ["hm\n", Control("</think>"), "\n\nIt is 4.", Control(EOS)]
    opened = TEMPLATES[name].render([*chat[:-1], {**thought, "prefix": True}])
    assert text_of(prompt) + text_of(answer) == text_of(opened) + EOS
    assert TEMPLATES[name].split([HELLO, THOUGHT])[1] == answer  # in the content, as data sets have it
    empty = TEMPLATES[name].split([HELLO, HI])[1]
    assert text_of(empty) == f"\n</think>\n\nHi! {EOS}"


def test_a_model_that_has_the_choice_reasons_where_the_message_does() -> None:
    template, thought = TEMPLATES["deepseek-v3.1"], {**HI, "reasoning_content": "hm"}
    prompt, answer = template.split([HELLO, thought])
    assert text_of(prompt).endswith("<think>") and text_of(answer) == f"hm</think>Hi! {EOS}"
    prompt, answer = template.split([HELLO, HI])
    assert text_of(prompt).endswith("</think>") and text_of(answer) == f"Hi! {EOS}"


def test_after_a_tools_result_the_model_opens_its_reasoning_itself() -> None:
    chat = [*TOOL_CHATS["a result"], {**HI, "reasoning_content": "so"}]
    assert text_of(TEMPLATES["deepseek-r1"].split(chat)[1]) == f"<think>\nso\n</think>\n\nHi! {EOS}"
    assert text_of(TEMPLATES["deepseek-r1"].split([*chat[:-1], HI])[1]) == f"Hi! {EOS}"


@pytest.mark.parametrize(
    ("name", "chat", "complaint"),
    [
        ("deepseek-v3", [HELLO], "must be the assistant's"),
        ("deepseek-v3", [HI], "must be the assistant's"),
        ("deepseek-v3", [HELLO, THOUGHT], "no thinking mode"),
        ("deepseek-r1", [HELLO, {**HI, "prefix": True}], "finished"),
        ("r1-distill-qwen", TOOL_CHATS["a call"], "no form for tool calls"),
        ("plain", [HELLO, HI], "name a chat template"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(name: str, chat: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(TemplateError, match=complaint):
        TEMPLATES[name].split(chat)
