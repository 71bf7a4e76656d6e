"""Tools in a prompt, and calls of them: V3's and R1's form, V3.1's form. hadal/text/parsers.py reads both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hadal.text.messages import Call, ToolDefinition
from hadal.text.prompt import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, Parts

V3_EXAMPLE: Final[Parts] = [
    CALLS_BEGIN, CALL_BEGIN, "function", SEPARATOR, "tool_call_name\n```json\ntool_call_arguments\n```",
    CALL_END,
    "{additional_tool_calls}", CALLS_END,
]  # fmt: skip
V31_EXAMPLE: Final[Parts] = [
    CALLS_BEGIN, CALL_BEGIN, "tool_call_name", SEPARATOR, "tool_call_arguments", CALL_END,
    "{additional_tool_calls}", CALLS_END,
]  # fmt: skip


def v3_calls(calls: Sequence[Call]) -> Parts:
    """Calls as V3 and R1 write them: "function", the name, the arguments in a JSON block."""
    parts: Parts = [CALLS_BEGIN]
    for place, call in enumerate(calls):
        parts += ["\n"] if place else []
        parts += [CALL_BEGIN, "function", SEPARATOR, f"{call.name}\n```json\n{call.arguments}\n```", CALL_END]
    return [*parts, CALLS_END]


def v31_calls(calls: Sequence[Call]) -> Parts:
    """Calls as V3.1 writes them: the name and the arguments alone."""
    parts: Parts = [CALLS_BEGIN]
    for call in calls:
        parts += [CALL_BEGIN, call.name, SEPARATOR, call.arguments, CALL_END]
    return [*parts, CALLS_END]


def tool_text(tools: Sequence[ToolDefinition], example: Parts, chaining: str) -> Parts:
    """The tools as V3.1's model card lists them, after the system text."""
    if not tools:
        return []
    listed = "".join(
        f"\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {tool.parameters}\n"
        for tool in tools
    )
    return [
        f"\n\n## Tools\nYou have access to the following tools:\n{listed}\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n",
        *example,
        "\n\nWhere:\n\n- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        f"- For multiple tool calls, {chaining}",
    ]
