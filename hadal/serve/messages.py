"""Chat messages, tools and tool_choice of a request: bounds and naming here, form in `hadal.text.messages`.

The template itself refuses what the model has no form for; both name the field in their 400.
"""

from __future__ import annotations

import re
from typing import Any

from hadal.serve.errors import ApiError, bad
from hadal.serve.fields import Fields, shown
from hadal.text.messages import TemplateError
from hadal.text.messages import read_messages as check_messages
from hadal.text.messages import read_tools as check_tools

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOLS = 128
MAX_SCHEMA_DEPTH = 64
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# What agents send back of an earlier answer, or beside a text, and no model reads.
_IGNORED = frozenset({"id", "reasoning_details", "provider_specific_fields", "cache_control"})


def template_refusal(error: TemplateError, fallback: str = "messages") -> ApiError:
    """The template's refusal as a 400 naming the field."""
    field = error.field or fallback
    text = str(error)
    return bad(text if field in text else f"{field}: {text}", field)


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The `messages` of a chat, in the form that templates take. Raises ApiError 400 naming message and
    field."""
    items = fields.array("messages", MAX_MESSAGES)
    if not items:
        state = "is missing" if items is None else "is empty"
        raise bad(
            f'messages {state}; send at least one, such as {{"role": "user", "content": "…"}}', "messages"
        )
    messages = [_known_part(item) for item in items]
    try:
        check_messages(messages)
    except TemplateError as error:
        raise template_refusal(error) from None
    return messages


def _known_part(message: Any) -> Any:
    """The message without what `_IGNORED` names, null fields, and marks beside its text parts."""
    if not isinstance(message, dict):
        return message
    clean = {
        key: value
        for key, value in message.items()
        if key not in _IGNORED and (value is not None or key in ("role", "content"))
    }
    content = clean.get("content")
    if isinstance(content, list):
        if len(content) > MAX_PARTS:
            raise bad(
                f"messages: a content has {len(content)} parts; at most {MAX_PARTS} are allowed", "messages"
            )
        clean["content"] = [
            {key: value for key, value in part.items() if key not in _IGNORED}
            if isinstance(part, dict)
            else part
            for part in content
        ]
    return clean


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """The `tools` array: at most 128 functions with unique names and JSON-schema parameters."""
    tools: list[dict[str, Any]] = fields.array("tools", MAX_TOOLS) or []
    for place, tool in enumerate(tools):
        check_depth(tool, f"tools[{place}]", MAX_SCHEMA_DEPTH + 2)
    try:
        names = [tool.name for tool in check_tools(tools)]
    except TemplateError as error:
        raise template_refusal(error, "tools") from None
    for place, name in enumerate(names):
        where = f"tools[{place}].function.name"
        if not _TOOL_NAME.fullmatch(name):
            raise bad(f"{where} must be 1 to 64 of A-Z a-z 0-9 _ . -, not {shown(name)}", where)
        if name in names[:place]:
            raise bad(f"{where}: {shown(name)} is used twice", where)
    return tools


def check_depth(value: Any, name: str, limit: int = MAX_SCHEMA_DEPTH) -> None:
    """Refuse a schema nested deeper than `limit`; iterative, so that depth costs no stack."""
    level = [value]
    for _ in range(limit):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise bad(f"{name} is nested deeper than {limit} levels", name)


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [child for child in item.values() if isinstance(child, dict | list)]
    if isinstance(item, list):
        return [child for child in item if isinstance(child, dict | list)]
    return []


def read_tool_choice(fields: Fields, tools: list[dict[str, Any]]) -> str:
    """ "none", "auto", "required", or "function:NAME". Default: auto with tools, none without."""
    value = fields.take("tool_choice")
    if value is None:
        return "auto" if tools else "none"
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise bad(
                f"tool_choice must be none, auto, required or a function, not {shown(value)}", "tool_choice"
            )
        if value == "required" and not tools:
            raise bad("tool_choice is 'required', but tools is empty", "tool_choice")
        return value if tools else "none"
    return _named_choice(Fields(value, "tool_choice."), tools)


def _named_choice(choice: Fields, tools: list[dict[str, Any]]) -> str:
    choice.choice("type", ("function",))
    function = choice.object("function")
    name = function.string("name") if function is not None else None
    if function is None or name is None:
        raise bad("tool_choice.function.name is missing", "tool_choice.function.name")
    function.finish()
    choice.finish()
    if name not in [tool["function"]["name"] for tool in tools]:
        raise bad(f"tool_choice names {shown(name)}, which is not among tools", "tool_choice")
    return f"function:{name}"
