"""What a chat template offers, and what all of them share: checks, and the two sides of a conversation that
is learned from. The templates themselves are in hadal/text/templates.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hadal.text.messages import Message, TemplateError, ToolDefinition, read_messages, read_tools
from hadal.text.prompt import Parts, ends_in_reasoning


class Template(Protocol):
    """What a template offers. `thinking` None means the model's own default."""

    @property
    def name(self) -> str:
        """As in `hadal.text.TEMPLATES`."""

    @property
    def supports_thinking(self) -> bool:
        """Whether the model reasons before it answers, always or when asked to."""

    @property
    def always_thinks(self) -> bool:
        """Whether it reasons before every answer and cannot be told not to: `thinking=False` is refused."""

    @property
    def supports_tools(self) -> bool:
        """Whether the model was trained to call tools."""

    @property
    def tool_format(self) -> str | None:
        """Which form of tool calls the model writes ("v3" or "v3.1", for `ToolParser`), or None."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> Parts:
        """The prompt. A last assistant message with `prefix` is left open, to be continued.

        Raises TemplateError on messages, tools or options that the model has no form for.
        """

    def split(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> tuple[Parts, Parts]:
        """A conversation that the assistant ends, as (prompt, what the model writes after it, its end
        included): what it is trained on. Reasoning of the last message is written; a model that always
        reasons writes an empty one where there is none. `thinking` None, of a model that has the choice: as
        the message has it.

        Raises TemplateError as `render`, and where there is nothing to be written.
        """

    def starts_in_reasoning(self, thinking: bool | None, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the prompt ends inside the reasoning, so that the output begins there."""

    def may_open_reasoning(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the prompt leaves it to the model to open its reasoning (R1 after a tool's result)."""


@dataclass(frozen=True)
class Options:
    """A checked call of `render`."""

    messages: list[Message]
    tools: list[ToolDefinition]
    thinking: bool
    generate: bool

    @property
    def system(self) -> str:
        """All system messages, joined by blank lines."""
        return "\n\n".join(message.content or "" for message in self.messages if message.role == "system")

    @property
    def turns(self) -> list[Message]:
        """All other messages, in order."""
        return [message for message in self.messages if message.role != "system"]


@dataclass(frozen=True)
class Base:
    """Checks that all templates share; `_parts` is the template proper."""

    name: str
    supports_thinking: bool = False
    default_thinking: bool = False
    always_thinks: bool = False
    tool_format: str | None = None

    @property
    def supports_tools(self) -> bool:
        return self.tool_format is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> Parts:
        if thinking and not self.supports_thinking:
            raise TemplateError(f"{self.name} has no thinking mode: leave thinking out", "thinking")
        if thinking is False and self.always_thinks:
            raise TemplateError(
                f"{self.name} always reasons before it answers: leave thinking out", "thinking"
            )
        options = Options(
            messages=read_messages(messages),
            tools=read_tools(tools),
            thinking=self.default_thinking if thinking is None else thinking,
            generate=add_generation_prompt,
        )
        self._check(options)
        return [part for part in self._parts(options) if part != ""]

    def split(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> tuple[Parts, Parts]:
        last = _reasoned(read_messages(messages)[-1])
        where = f"messages[{len(messages) - 1}]"
        if last.role != "assistant" or last.prefix or len(messages) < 2:
            raise TemplateError("the last of several messages must be the assistant's, and finished", where)
        if last.reasoning and not self.supports_thinking:
            raise TemplateError(
                f"{self.name} has no thinking mode: leave reasoning out", f"{where}.reasoning_content"
            )
        if thinking is None and self.supports_thinking and not self.default_thinking:
            thinking = bool(last.reasoning)
        prompt = self.render(messages[:-1], tools=tools, thinking=thinking)
        if last.calls and not self.supports_tools:
            raise TemplateError(f"{self.name} has no form for tool calls or results", where)
        return prompt, [part for part in self._written(last, ends_in_reasoning(prompt)) if part != ""]

    def _written(self, message: Message, in_reasoning: bool) -> Parts:
        """What the model writes of a message after its prompt, which has opened the reasoning or not."""
        raise TemplateError(f"{self.name} has no form for an answer: name a chat template", "messages")

    def starts_in_reasoning(self, thinking: bool | None, messages: Sequence[Mapping[str, Any]]) -> bool:
        return ends_in_reasoning(self.render(messages, thinking=thinking))

    def may_open_reasoning(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        return self.default_thinking and read_messages(messages)[-1].role == "tool"

    def _check(self, options: Options) -> None:
        if options.tools and not self.supports_tools:
            raise TemplateError(f"{self.name} was not trained to call tools: leave tools out", "tools")
        for place, message in enumerate(options.messages):
            if (message.role == "tool" or message.calls) and not self.supports_tools:
                raise TemplateError(
                    f"{self.name} has no form for tool calls or results", f"messages[{place}]"
                )
        last = options.messages[-1]
        if last.prefix and last.reasoning and not options.thinking:
            raise TemplateError(
                "a prefix with reasoning_content needs a model that reasons, with thinking on",
                f"messages[{len(options.messages) - 1}].reasoning_content",
            )

    def _parts(self, options: Options) -> Parts:
        raise NotImplementedError


def _reasoned(message: Message) -> Message:
    """With the reasoning that stands in its content, `<think>…</think>…`, moved out of it."""
    content = message.content or ""
    head, end, answer = content.partition("</think>")
    if message.reasoning is not None or not end or not head.startswith("<think>"):
        return message
    reasoning = head.removeprefix("<think>").strip("\n")
    return replace(message, reasoning=reasoning, content=answer.lstrip("\n"))
