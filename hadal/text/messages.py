"""Chat messages as requests send them (OpenAI's form), checked and made into plain dataclasses for the
templates.

Every field is known or refused: a misspelt field that is silently dropped changes the answer without a
word.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_COMMON = frozenset({"role", "content", "name"})
_FIELDS: Final = {
    "system": _COMMON,
    "developer": _COMMON,
    "user": _COMMON,
    "assistant": _COMMON | {"reasoning_content", "reasoning", "tool_calls", "prefix"},
    "tool": _COMMON | {"tool_call_id"},
}
# OpenAI clients send these back in assistant messages, as null or empty; with a value they are refused.
_EMPTY_ONLY: Final = frozenset({"refusal", "audio", "function_call", "annotations"})
_CALL_FIELDS: Final = frozenset({"id", "type", "function", "index"})
_FUNCTION_FIELDS: Final = frozenset({"name", "arguments"})
_TOOL_FIELDS: Final = frozenset({"type", "function"})
_DEFINITION_FIELDS: Final = frozenset({"name", "description", "parameters", "strict"})


class TemplateError(ValueError):
    """Messages, tools or options that a chat template cannot render. `field` names the place in the
    request."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Call:
    """A tool call of an earlier assistant message; `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class ToolDefinition:
    name: str
    description: str
    parameters: str  # JSON schema, as JSON text


@dataclass(frozen=True)
class Message:
    """role is system (also for "developer"), user, assistant or tool. content is None only beside tool
    calls."""

    role: str
    content: str | None
    reasoning: str | None = None
    calls: tuple[Call, ...] = field(default=())
    prefix: bool = False
    call_id: str | None = None


def read_messages(messages: Any) -> list[Message]:
    """The checked messages; results of parallel tool calls are put in the order of their calls.

    Raises TemplateError on an empty list, an unknown role or field, a content that is not text, a `prefix`
    that is not on the last assistant message, or a tool result without a call.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise TemplateError("messages must be a non-empty list", "messages")
    read = [_read_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    for place, message in enumerate(read):
        if message.prefix and place != len(read) - 1:
            raise TemplateError("prefix may only be set on the last message", f"messages[{place}].prefix")
        if message.role == "tool" and not (
            place and (read[place - 1].role == "tool" or read[place - 1].calls)
        ):
            raise TemplateError(
                "a tool message must follow an assistant message with tool_calls", f"messages[{place}].role"
            )
    return _in_call_order(read)


def read_tools(tools: Any) -> list[ToolDefinition]:
    """The checked tool definitions of a request (`[{"type": "function", "function": {...}}]`)."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise TemplateError("tools must be a list", "tools")
    return [_read_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools)]


def check_fields(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse unknown keys, with the nearest known one."""
    known = sorted(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise TemplateError(f"unknown field {name!r}{hint}", f"{where}.{name}" if where else str(name))


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise TemplateError(f"a message must be an object, not {type(message).__name__}", where)
    role = message.get("role")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TemplateError(f"role must be one of {', '.join(ROLES)}, not {role!r}{hint}", f"{where}.role")
    for name in _EMPTY_ONLY & message.keys():
        if role != "assistant" or message[name]:
            raise TemplateError(f"{name} is not supported", f"{where}.{name}")
    check_fields(message.keys() - _EMPTY_ONLY, _FIELDS[role], where)
    calls = tuple(
        _read_call(call, f"{where}.tool_calls[{place}]")
        for place, call in enumerate(_list(message.get("tool_calls"), f"{where}.tool_calls"))
    )
    prefix = message.get("prefix")
    if not isinstance(prefix, (bool, type(None))):
        raise TemplateError(f"prefix must be true or false, not {prefix!r}", f"{where}.prefix")
    if prefix and calls:
        raise TemplateError("a message with tool_calls cannot be a prefix", f"{where}.prefix")
    return Message(
        role="system" if role == "developer" else role,
        content=_read_content(message.get("content"), bool(calls), f"{where}.content"),
        reasoning=_read_reasoning(message, where),
        calls=calls,
        prefix=bool(prefix),
        call_id=_optional_text(message.get("tool_call_id"), f"{where}.tool_call_id"),
    )


def _read_content(content: Any, may_be_none: bool, where: str) -> str | None:
    if isinstance(content, str):
        return content
    if content is None and may_be_none:
        return None
    if isinstance(content, Sequence) and not isinstance(content, bytes) and content:
        return "\n".join(_read_part(part, f"{where}[{place}]") for place, part in enumerate(content))
    kind = "null" if content is None else type(content).__name__
    raise TemplateError(f"content must be text, or a list of text parts, not {kind}", where)


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise TemplateError("a content part must be an object with a type", where)
    if part["type"] != "text":
        raise TemplateError(
            f"content part of type {part['type']!r}: this model reads only text", f"{where}.type"
        )
    check_fields(part, {"type", "text"}, where)
    if not isinstance(part.get("text"), str):
        raise TemplateError("a text part needs a text", f"{where}.text")
    return str(part["text"])


def _read_reasoning(message: Mapping[str, Any], where: str) -> str | None:
    """`reasoning_content`, or `reasoning`: servers send the same text under both names."""
    for name in ("reasoning_content", "reasoning"):
        text = _optional_text(message.get(name), f"{where}.{name}")
        if text is not None:
            return text
    return None


def _read_call(call: Any, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise TemplateError("a tool call must be an object with a function", where)
    check_fields(call, _CALL_FIELDS, where)
    check_fields(function, _FUNCTION_FIELDS, f"{where}.function")
    if call.get("type", "function") != "function":
        raise TemplateError(f"a tool call must be of type 'function', not {call['type']!r}", f"{where}.type")
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str) or not name:
        raise TemplateError(
            f"a tool call needs the name of its function, not {name!r}", f"{where}.function.name"
        )
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise TemplateError(
            f"arguments must be JSON text or an object, not {type(arguments).__name__}",
            f"{where}.function.arguments",
        )
    return Call(name, arguments, _optional_text(call.get("id"), f"{where}.id"))


def _read_tool(tool: Any, where: str) -> ToolDefinition:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise TemplateError("a tool must be an object with a function", where)
    check_fields(tool, _TOOL_FIELDS, where)
    check_fields(function, _DEFINITION_FIELDS, f"{where}.function")
    if tool.get("type", "function") != "function":
        raise TemplateError(f"a tool must be of type 'function', not {tool['type']!r}", f"{where}.type")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise TemplateError(f"a tool needs a name, not {name!r}", f"{where}.function.name")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise TemplateError("parameters must be a JSON schema object", f"{where}.function.parameters")
    description = _optional_text(function.get("description"), f"{where}.function.description") or ""
    try:
        return ToolDefinition(name, description, json.dumps(parameters, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"parameters are not JSON: {error}", f"{where}.function.parameters") from None


def _list(value: Any, where: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TemplateError(f"must be a list, not {type(value).__name__}", where)
    return value


def _optional_text(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TemplateError(f"must be text, not {type(value).__name__}", where)


def _in_call_order(messages: list[Message]) -> list[Message]:
    """DeepSeek's formats carry no call ids: only the order tells which result belongs to which call."""
    ordered: list[Message] = []
    place = 0
    while place < len(messages):
        end = place + 1
        ordered.append(messages[place])
        if messages[place].calls:
            while end < len(messages) and messages[end].role == "tool":
                end += 1
            results = _by_call(messages[place + 1 : end], [call.id for call in messages[place].calls])
            ordered.extend(results)
        place = end
    return [replace(message, call_id=None) for message in ordered]


def _by_call(results: list[Message], ids: list[str | None]) -> list[Message]:
    """The results in the order of `ids`; as they are, if one of them names no call."""
    if any(result.call_id is None or result.call_id not in ids for result in results):
        return results
    return sorted(results, key=lambda result: ids.index(result.call_id))
