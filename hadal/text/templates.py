"""Chat templates: messages to the prompt on which a model was trained, as plain functions.

A prompt is a list of `Control` tokens and texts, so that no text of a user can become a control token. The
texts equal those of the Jinja templates that DeepSeek published in each model's tokenizer_config.json
(tests/text/golden):

    deepseek-v2             DeepSeek-V2, V2-Lite, MoE-16B chat: "User: …", blank line, "Assistant: …"
    deepseek-v3             DeepSeek-V3, V3-0324
    deepseek-r1             DeepSeek-R1 (of February 2025, whose prompt opens the reasoning), R1-Zero
    deepseek-r1-0528        DeepSeek-R1-0528
    deepseek-v3.1           DeepSeek-V3.1: reasoning switched by the prompt
    deepseek-v3.1-terminus  DeepSeek-V3.1-Terminus, V3.2-Exp
    r1-distill-qwen, -llama the R1 distills: R1's text, no tool tokens
    hadal-mini              R1's text; always reasons, as it was trained to
    plain                   base models: one text, after BOS

Where a published template is at fault or silent, we differ, on purpose:
 - Tool definitions: V3.1's model card gives the text, which its Jinja does not render. Nothing was published
   for V3 and R1; they get V3.1's text with their own form of call.
 - R1's Jinja never resets its tool flags, so a second round of tools lacks its opening tokens; ours is
   well-formed, as in R1-0528's. Results that a user message follows are closed.
 - Models that reason: earlier reasoning is dropped from every assistant message, also those beside tools.
 - The distills' Jinja keeps only the last system message; ours joins them, as all others do.
 - R1-0528's prompt is followed by the opening tag, so that where reasoning begins is known, not guessed.
 - R1 has no switch; `thinking=False` writes an empty reasoning (Ma et al. 2025, arXiv 2504.09858).
   hadal-mini has read nothing of the kind and would reason in its answer: there it is refused.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from hadal.text.messages import (
    Call,
    Message,
    TemplateError,
    ToolDefinition,
    check_fields,
    read_messages,
    read_tools,
)
from hadal.text.tokenizer import Control

Part = Control | str
Parts = list[Part]

BOS: Final = Control("<｜begin▁of▁sentence｜>")
EOS: Final = Control("<｜end▁of▁sentence｜>")
USER: Final = Control("<｜User｜>")
ASSISTANT: Final = Control("<｜Assistant｜>")
THINK: Final = Control("<think>")
END_THINK: Final = Control("</think>")
CALLS_BEGIN: Final = Control("<｜tool▁calls▁begin｜>")
CALLS_END: Final = Control("<｜tool▁calls▁end｜>")
CALL_BEGIN: Final = Control("<｜tool▁call▁begin｜>")
CALL_END: Final = Control("<｜tool▁call▁end｜>")
SEPARATOR: Final = Control("<｜tool▁sep｜>")
OUTPUTS_BEGIN: Final = Control("<｜tool▁outputs▁begin｜>")
OUTPUTS_END: Final = Control("<｜tool▁outputs▁end｜>")
OUTPUT_BEGIN: Final = Control("<｜tool▁output▁begin｜>")
OUTPUT_END: Final = Control("<｜tool▁output▁end｜>")


class Template(Protocol):
    """What a template offers. `thinking` None means the model's own default."""

    @property
    def name(self) -> str: ...
    @property
    def supports_thinking(self) -> bool:
        """Whether the model reasons before it answers, always or when asked to."""

    @property
    def always_thinks(self) -> bool:
        """Whether it reasons before every answer and cannot be told not to: `thinking=False` is refused."""

    @property
    def supports_tools(self) -> bool: ...
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


def ends_in_reasoning(parts: Sequence[Part]) -> bool:
    """Whether the last control token of a prompt is the one that opens reasoning."""
    return next((part for part in reversed(parts) if isinstance(part, Control)), None) == THINK


def text_of(parts: Sequence[Part]) -> str:
    """The prompt as the published Jinja would render it. For eyes and tests: encode the parts, not this."""
    return "".join(part if isinstance(part, str) else part.content for part in parts)


def template_options(options: Mapping[str, Any] | None) -> dict[str, bool]:
    """The checked `chat_template_kwargs` of a request: {"thinking": bool} or {}.

    `enable_thinking` is another name of `thinking`. Everything else is refused, `chat_template` first of all.
    """
    if not options:
        return {}
    check_fields(options, {"thinking", "enable_thinking"}, "chat_template_kwargs")
    values = set()
    for name, value in options.items():
        if not isinstance(value, bool):
            message = f"{name} must be true or false, not {value!r}"
            raise TemplateError(message, f"chat_template_kwargs.{name}")
        values.add(value)
    if len(values) > 1:
        raise TemplateError("thinking and enable_thinking contradict each other", "chat_template_kwargs")
    return {"thinking": values.pop()}


# --- the pieces of a prompt ---


@dataclass(frozen=True)
class _Options:
    """A checked call of `render`."""

    messages: list[Message]
    tools: list[ToolDefinition]
    thinking: bool
    generate: bool

    @property
    def system(self) -> str:
        return "\n\n".join(message.content or "" for message in self.messages if message.role == "system")

    @property
    def turns(self) -> list[Message]:
        return [message for message in self.messages if message.role != "system"]


def _reasoned(message: Message) -> Message:
    """With the reasoning that stands in its content, `<think>…</think>…`, moved out of it."""
    content = message.content or ""
    head, end, answer = content.partition("</think>")
    if message.reasoning is not None or not end or not head.startswith("<think>"):
        return message
    reasoning = head.removeprefix("<think>").strip("\n")
    return replace(message, reasoning=reasoning, content=answer.lstrip("\n"))


def _v3_calls(calls: Sequence[Call]) -> Parts:
    parts: Parts = [CALLS_BEGIN]
    for place, call in enumerate(calls):
        parts += ["\n"] if place else []
        parts += [CALL_BEGIN, "function", SEPARATOR, f"{call.name}\n```json\n{call.arguments}\n```", CALL_END]
    return [*parts, CALLS_END]


def _v31_calls(calls: Sequence[Call]) -> Parts:
    parts: Parts = [CALLS_BEGIN]
    for call in calls:
        parts += [CALL_BEGIN, call.name, SEPARATOR, call.arguments, CALL_END]
    return [*parts, CALLS_END]


_V3_EXAMPLE: Final[Parts] = [
    CALLS_BEGIN, CALL_BEGIN, "function", SEPARATOR, "tool_call_name\n```json\ntool_call_arguments\n```",
    CALL_END,
    "{additional_tool_calls}", CALLS_END,
]  # fmt: skip
_V31_EXAMPLE: Final[Parts] = [
    CALLS_BEGIN, CALL_BEGIN, "tool_call_name", SEPARATOR, "tool_call_arguments", CALL_END,
    "{additional_tool_calls}", CALLS_END,
]  # fmt: skip


def _tool_text(tools: Sequence[ToolDefinition], example: Parts, chaining: str) -> Parts:
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


# --- the templates ---


@dataclass(frozen=True)
class _Base:
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
        options = _Options(
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

    def _check(self, options: _Options) -> None:
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

    def _parts(self, options: _Options) -> Parts:
        raise NotImplementedError


@dataclass(frozen=True)
class _V2(_Base):
    def _parts(self, options: _Options) -> Parts:
        parts: Parts = [BOS]
        for message in options.messages:
            if message.role == "system":
                parts.append(f"{message.content}\n\n")
            elif message.role == "user":
                parts.append(f"User: {message.content}\n\n")
            else:
                parts.append(f"Assistant: {message.content}")
                parts += [] if message.prefix else [EOS]
        if options.generate and not options.messages[-1].prefix:
            parts.append("Assistant:")
        return parts

    def _written(self, message: Message, in_reasoning: bool) -> Parts:
        return [f" {message.content}", EOS]


@dataclass(frozen=True)
class _V3(_Base):
    """V3 and R1. `eager`: the assistant's marker follows each user message at once (V3-0324, R1-0528),
    instead of beginning the assistant's. `between`: what stands between two results."""

    tool_format: str | None = "v3"
    eager: bool = False
    between: str = ""

    def _parts(self, options: _Options) -> Parts:
        parts: Parts = [BOS, options.system]
        parts += _tool_text(options.tools, _V3_EXAMPLE, "chain them with a newline between two calls")
        previous = "system"
        for message in options.turns:
            if previous == "tool" and message.role != "tool":
                parts.append(OUTPUTS_END)
            if message.role == "user":
                parts += [USER, message.content or "", *([ASSISTANT] if self.eager else [])]
            elif message.role == "tool":
                parts += [self.between] if previous == "tool" else [OUTPUTS_BEGIN]
                parts += [OUTPUT_BEGIN, message.content or "", OUTPUT_END]
            else:
                parts += [] if self.eager or previous == "tool" else [ASSISTANT]
                parts += self._assistant(message, options.thinking)
            previous = message.role
        if previous == "tool":
            return [*parts, OUTPUTS_END]
        if options.generate and not options.messages[-1].prefix:
            parts += [] if self.eager and previous == "user" else [ASSISTANT]
            parts += self._opening(options.thinking)
        return parts

    def _assistant(self, message: Message, thinking: bool) -> Parts:
        if message.calls:
            return [self._answer(message), *_v3_calls(message.calls), EOS]
        if not message.prefix:
            return [self._answer(message), EOS]
        if message.reasoning is None:
            return [*([] if thinking else self._opening(False)), self._answer(message)]
        if not self._answer(message):
            return [THINK, f"\n{message.reasoning}"]
        return [THINK, f"\n{message.reasoning}\n", END_THINK, f"\n\n{self._answer(message)}"]

    def _written(self, message: Message, in_reasoning: bool) -> Parts:
        answer, end = message.content or "", [*(_v3_calls(message.calls) if message.calls else []), EOS]
        if in_reasoning:
            return [f"{message.reasoning or ''}\n", END_THINK, f"\n\n{answer}", *end]
        if message.reasoning:  # after a tool's result, where the prompt leaves it to the model
            return [THINK, f"\n{message.reasoning}\n", END_THINK, f"\n\n{answer}", *end]
        return [answer, *end]

    def _opening(self, thinking: bool) -> Parts:
        """How a new answer begins: inside the reasoning, after an empty one, or (V3) with neither."""
        if not self.supports_thinking:
            return []
        return [THINK, "\n"] if thinking else [THINK, "\n\n", END_THINK, "\n\n"]

    def _answer(self, message: Message) -> str:
        """The content; of a model that reasons, without reasoning that a client left in it."""
        content = message.content or ""
        return content.split("</think>")[-1] if self.supports_thinking else content


@dataclass(frozen=True)
class _V31(_Base):
    """V3.1: the marker of the assistant is followed by <think> or </think>. `revised`: Terminus, which also
    prompts after a system message alone, and after an assistant message."""

    tool_format: str | None = "v3.1"
    supports_thinking: bool = True
    revised: bool = False

    def _check(self, options: _Options) -> None:
        super()._check(options)
        if options.tools and options.thinking:
            raise TemplateError(
                f"{self.name} calls tools in non-thinking mode only: leave out thinking or tools", "tools"
            )
        last = options.messages[-1]
        if last.prefix and last.reasoning is not None and [m.role for m in options.turns[-2:-1]] != ["user"]:
            raise TemplateError(
                f"{self.name} continues a reasoning only after a user message",
                "messages[-1].reasoning_content",
            )

    def _parts(self, options: _Options) -> Parts:
        parts: Parts = [BOS, options.system]
        parts += _tool_text(options.tools, _V31_EXAMPLE, "chain them directly without separators or spaces")
        previous = "system"
        for message in options.turns:
            if message.role == "user":
                parts += [USER, message.content or ""]
            elif message.role == "tool":
                parts += [OUTPUT_BEGIN, message.content or "", OUTPUT_END]
            elif message.calls:
                if previous == "user" or (self.revised and previous == "system"):
                    parts += [ASSISTANT, END_THINK]
                parts += [self._answer(message), *_v31_calls(message.calls), EOS]
            else:
                opens = message.prefix and options.thinking
                parts += [ASSISTANT, THINK if opens else END_THINK] if previous == "user" else []
                parts += self._answer_parts(message)
            previous = message.role
        prompts = previous == "user" or (self.revised and previous in ("system", "assistant"))
        if options.generate and prompts and not options.messages[-1].prefix:
            parts += [ASSISTANT, THINK if options.thinking else END_THINK]
        return parts

    def _written(self, message: Message, in_reasoning: bool) -> Parts:
        reasoning: Parts = [message.reasoning or "", END_THINK] if in_reasoning else []
        calls = _v31_calls(message.calls) if message.calls else []
        return [*reasoning, message.content or "", *calls, EOS]

    def _answer_parts(self, message: Message) -> Parts:
        answer = self._answer(message)
        if not message.prefix:
            return [answer, EOS]
        if message.reasoning is None:
            return [answer]
        return [message.reasoning, END_THINK, answer] if answer else [message.reasoning]

    def _answer(self, message: Message) -> str:
        """What follows the *first* </think>, where V3 takes the last."""
        content = message.content or ""
        return content.split("</think>", 1)[1] if "</think>" in content else content


@dataclass(frozen=True)
class _Plain(_Base):
    def _parts(self, options: _Options) -> Parts:
        if len(options.messages) != 1 or options.messages[0].role != "user":
            message = "a base model has no chat template: send one user message, or use completions"
            raise TemplateError(message, "messages")
        return [BOS, options.messages[0].content or ""]


def _r1(name: str, tool_format: str | None, between: str = "") -> _V3:
    return _V3(name, supports_thinking=True, default_thinking=True, tool_format=tool_format, between=between)


TEMPLATES: Final[Mapping[str, Template]] = {
    template.name: template
    for template in (
        _V2("deepseek-v2"),
        _V3("deepseek-v3", eager=True, between="\n"),
        _r1("deepseek-r1", "v3"),
        _V3("deepseek-r1-0528", supports_thinking=True, default_thinking=True, eager=True, between="\n"),
        _V31("deepseek-v3.1"),
        _V31("deepseek-v3.1-terminus", revised=True),
        _r1("r1-distill-qwen", None),
        _r1("r1-distill-llama", None),
        replace(_r1("hadal-mini", None), always_thinks=True),
        _Plain("plain"),
    )
}


# --- which template a model has ---


class _HasTemplate(Protocol):
    @property
    def template(self) -> str: ...


def template_for(model: str | Path | _HasTemplate) -> Template:
    """The template of a model: by its name in TEMPLATES, of a preset (`.template`), or of a model folder.

    A folder's tokenizer_config.json may name it (`"hadal_template"`); otherwise it is recognised in the
    published `chat_template`, which is only compared with, never run. No `chat_template`: "plain". Raises
    TemplateError if it cannot be recognised.
    """
    if isinstance(model, Path) or (
        isinstance(model, str) and model not in TEMPLATES and Path(model).is_dir()
    ):
        return TEMPLATES[_template_of_folder(Path(model))]
    name = model if isinstance(model, str) else model.template
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TEMPLATES)}"
        raise TemplateError(f"unknown chat template {name!r}; {hint}")
    return TEMPLATES[name]


def _template_of_folder(folder: Path) -> str:
    config = _read_json(folder / "tokenizer_config.json")
    named = config.get("hadal_template")
    if named is not None:
        if named not in TEMPLATES:
            raise TemplateError(f"{folder}/tokenizer_config.json names an unknown hadal_template {named!r}")
        return str(named)
    jinja = config.get("chat_template")
    separate = folder / "chat_template.jinja"
    if jinja is None and separate.is_file():
        jinja = separate.read_text(encoding="utf-8")
    if jinja is None:
        return "plain"
    name = _recognise(str(jinja), str(_read_json(folder / "config.json").get("model_type")))
    if name is None:
        raise TemplateError(
            f"{folder}: its chat_template is not one that Hadal knows; name one of {', '.join(TEMPLATES)}"
            " as hadal_template in tokenizer_config.json"
        )
    return name


def _recognise(jinja: str, model_type: str) -> str | None:
    """By the marks in which the published templates differ."""
    if "'User: '" in jinja and "'Assistant:'" in jinja:
        return "deepseek-v2"
    if "<｜User｜>" not in jinja or "<｜Assistant｜>" not in jinja:
        return None
    if "<｜Assistant｜></think>" in jinja:
        return "deepseek-v3.1-terminus" if "is_only_sys" in jinja else "deepseek-v3.1"
    if model_type in ("qwen2", "llama"):
        return {"qwen2": "r1-distill-qwen", "llama": "r1-distill-llama"}[model_type]
    if "</think>" not in jinja:
        return "deepseek-v3"
    return "deepseek-r1-0528" if "is_last_user" in jinja else "deepseek-r1"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TemplateError(f"{path} is not valid JSON: {error}") from None
    return data if isinstance(data, dict) else {}
