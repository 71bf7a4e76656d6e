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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from hadal.text.messages import Message, TemplateError, check_fields
from hadal.text.prompt import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK,
    USER,
    Part,
    Parts,
    ends_in_reasoning,
    text_of,
)
from hadal.text.template_base import Base, Options, Template
from hadal.text.tool_text import V3_EXAMPLE, V31_EXAMPLE, tool_text, v3_calls, v31_calls

__all__ = [
    "TEMPLATES",
    "Part",
    "Parts",
    "Template",
    "ends_in_reasoning",
    "template_for",
    "template_options",
    "text_of",
]


@dataclass(frozen=True)
class _V2(Base):
    def _parts(self, options: Options) -> Parts:
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
class _V3(Base):
    """V3 and R1. `eager`: the assistant's marker follows each user message at once (V3-0324, R1-0528),
    instead of beginning the assistant's. `between`: what stands between two results."""

    tool_format: str | None = "v3"
    eager: bool = False
    between: str = ""

    def _parts(self, options: Options) -> Parts:
        parts: Parts = [BOS, options.system]
        parts += tool_text(options.tools, V3_EXAMPLE, "chain them with a newline between two calls")
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
            return [self._answer(message), *v3_calls(message.calls), EOS]
        if not message.prefix:
            return [self._answer(message), EOS]
        if message.reasoning is None:
            return [*([] if thinking else self._opening(False)), self._answer(message)]
        if not self._answer(message):
            return [THINK, f"\n{message.reasoning}"]
        return [THINK, f"\n{message.reasoning}\n", END_THINK, f"\n\n{self._answer(message)}"]

    def _written(self, message: Message, in_reasoning: bool) -> Parts:
        answer, end = message.content or "", [*(v3_calls(message.calls) if message.calls else []), EOS]
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
class _V31(Base):
    """V3.1: the marker of the assistant is followed by <think> or </think>. `revised`: Terminus, which also
    prompts after a system message alone, and after an assistant message."""

    tool_format: str | None = "v3.1"
    supports_thinking: bool = True
    revised: bool = False

    def _check(self, options: Options) -> None:
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

    def _parts(self, options: Options) -> Parts:
        parts: Parts = [BOS, options.system]
        parts += tool_text(options.tools, V31_EXAMPLE, "chain them directly without separators or spaces")
        previous = "system"
        for message in options.turns:
            if message.role == "user":
                parts += [USER, message.content or ""]
            elif message.role == "tool":
                parts += [OUTPUT_BEGIN, message.content or "", OUTPUT_END]
            elif message.calls:
                if previous == "user" or (self.revised and previous == "system"):
                    parts += [ASSISTANT, END_THINK]
                parts += [self._answer(message), *v31_calls(message.calls), EOS]
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
        calls = v31_calls(message.calls) if message.calls else []
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
class _Plain(Base):
    def _parts(self, options: Options) -> Parts:
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


# --- what a request may ask of one ---


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
