"""What binds an answer's form: response_format, Ollama's `format`, a forced tool; compiled off the event
loop.

With a reasoning model the grammar begins to hold after `</think>`: the reasoning itself is free. Schemas and
patterns come from requests; their bounds, and the time that compiling may take, are those of
hadal.text.grammar.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hadal.engine.request import Matcher
from hadal.serve.errors import bad
from hadal.serve.fields import Fields, shown
from hadal.serve.messages import check_depth
from hadal.text.grammar import Grammar, GrammarError
from hadal.text.messages import read_tools
from hadal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Constraint:
    """A grammar not yet compiled: a response_format, or tools of which one must be called. `param` is named
    in errors."""

    kind: Literal["format", "tools"]
    value: Any
    param: str
    tool_format: str = ""
    parallel: bool = True

    async def factory(self, tokenizer: Tokenizer, inside_reasoning: bool = False) -> Callable[[], Matcher]:
        """Compile in a thread; the result makes a fresh matcher per sequence. Raises ApiError 400."""
        try:
            return await asyncio.to_thread(self._compile, tokenizer, inside_reasoning)
        except GrammarError as error:
            text = str(error)
            raise bad(text if self.param in text else f"{self.param}: {text}", self.param) from None

    def _compile(self, tokenizer: Tokenizer, inside_reasoning: bool) -> Grammar:
        if self.kind == "tools":
            return Grammar.from_tools(
                read_tools(self.value),
                tokenizer,
                self.tool_format,
                parallel=self.parallel,
                after_reasoning=inside_reasoning,
            )
        grammar = Grammar.from_response_format(self.value, tokenizer, after_reasoning=inside_reasoning)
        assert grammar is not None  # "text" is no constraint
        return grammar


def read_response_format(fields: Fields) -> Constraint | None:
    """OpenAI's response_format: text, json_object, json_schema; and {type: regex, pattern} as an extra."""
    value = fields.take("response_format")
    if value is None:
        return None
    form = Fields(value, "response_format.")
    kind = form.choice("type", ("text", "json_object", "json_schema", "regex"))
    if kind is None:
        message = "response_format.type is missing; it must be text, json_object or json_schema"
        raise bad(message, "response_format.type")
    check_depth(value, "response_format", 66)
    return None if kind == "text" and len(value) == 1 else Constraint("format", value, "response_format")


def read_ollama_format(fields: Fields) -> Constraint | None:
    """Ollama's format: "" or absent, "json", or a schema."""
    value = fields.take("format")
    if value is None or value == "":
        return None
    if value == "json":
        return Constraint("format", {"type": "json_object"}, "format")
    if not isinstance(value, dict):
        raise bad(f"format must be 'json' or a JSON schema, not {shown(value)}", "format")
    check_depth(value, "format")
    return Constraint("format", {"type": "json_schema", "json_schema": {"schema": value}}, "format")


def forced_tools(
    tools: list[dict[str, Any]], choice: str, tool_format: str, *, parallel: bool
) -> Constraint | None:
    """The constraint of tool_choice "required" (any of the tools) or "function:NAME" (that one); else
    None."""
    if choice == "required":
        return Constraint("tools", tools, "tools", tool_format, parallel)
    if choice.startswith("function:"):
        name = choice.removeprefix("function:")
        chosen = [tool for tool in tools if tool["function"]["name"] == name]
        return Constraint("tools", chosen, "tools", tool_format, parallel=False)
    return None
