"""Reading a /chat/completions body: every field honoured or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hadal.engine.params import MAX_LOGPROBS, SamplingParams
from hadal.serve.answer import Style
from hadal.serve.constraints import Constraint, forced_tools, read_response_format
from hadal.serve.errors import bad
from hadal.serve.fields import Fields
from hadal.serve.messages import read_messages, read_tool_choice, read_tools, template_refusal
from hadal.serve.models import Registry, Served
from hadal.serve.sampling import HARMLESS, MAX_N, make_params, sampling_fields
from hadal.text.messages import TemplateError
from hadal.text.templates import ends_in_reasoning, template_options
from hadal.text.tokenizer import Control

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class ChatRequest:
    """A checked request, its prompt rendered but not yet encoded."""

    served: Served
    model: str
    parts: Sequence[Control | str]
    params: SamplingParams
    style: Style
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    constraint: Constraint | None = field(default=None, compare=False)


def read_chat(fields: Fields, registry: Registry) -> ChatRequest:
    """The request. Raises ApiError 400 naming the field, or 404 for an unknown model."""
    served = registry.of(fields)
    given = sampling_fields(fields, served.info.vocab_size)
    given |= _logprobs(fields)
    messages = read_messages(fields)
    tools = read_tools(fields)
    choice = read_tool_choice(fields, tools)
    thinking = read_thinking(fields)
    constraint = read_response_format(fields)
    n = fields.integer("n", 1, MAX_N) or 1
    stream = fields.boolean("stream") or False
    include_usage, continuous = stream_options(fields, stream)
    one_call = fields.boolean("parallel_tool_calls") is False
    _refused(fields)
    fields.finish()
    parts, style = _prompt(served, messages, tools if choice != "none" else [], thinking)
    constraint = _form(constraint, tools, choice, style, not one_call)
    return ChatRequest(
        served=served,
        model=str(fields.data["model"]),
        parts=parts,
        params=make_params(given, served.info.sampling_defaults),
        style=replace(style, one_call=one_call),
        n=n,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous,
        constraint=constraint,
    )


def _prompt(
    served: Served, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool | None
) -> tuple[list[Control | str], Style]:
    """The rendered prompt, and how its output is to be read."""
    template = served.encoder.template
    parts = served.encoder.render(messages, tools=tools or None, thinking=thinking)
    try:
        may_open = bool(template.may_open_reasoning(messages))
    except TemplateError as error:
        raise template_refusal(error) from None
    tool_format = template.tool_format if tools else None
    return parts, Style(ends_in_reasoning(parts), may_open, tool_format)


def _form(
    constraint: Constraint | None, tools: list[dict[str, Any]], choice: str, style: Style, parallel: bool
) -> Constraint | None:
    """What binds the answer: response_format, or the tools of a forced choice."""
    if choice == "auto" and any(tool["function"].get("strict") for tool in tools):
        message = (
            "tools: strict needs a tool_choice of 'required' or a function: other calls are the model's own"
        )
        raise bad(message, "tools.function.strict", "unsupported_parameter")
    forced = forced_tools(tools, choice, style.tool_format or "", parallel=parallel)
    if forced is not None and constraint is not None:
        raise bad("response_format cannot be combined with a forced tool_choice", "response_format")
    return forced or constraint


def _logprobs(fields: Fields) -> dict[str, Any]:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    return {"logprobs": top or 0} if wanted else {}


def read_thinking(fields: Fields) -> bool | None:
    """DeepSeek's `thinking`, OpenAI's `reasoning_effort` and vLLM's `chat_template_kwargs`, which must agree.
    None: the model's own way. The models have no degrees of effort: every level but "none" means on."""
    said: dict[str, bool] = {}
    mode = fields.object("thinking")
    if mode is not None:
        kind = mode.choice("type", ("enabled", "disabled"))
        if kind is None:
            raise bad("thinking.type is missing; it must be 'enabled' or 'disabled'", "thinking.type")
        mode.finish()
        said["thinking"] = kind == "enabled"
    effort = fields.choice("reasoning_effort", _EFFORTS)
    if effort is not None:
        said["reasoning_effort"] = effort != "none"
    options = fields.object("chat_template_kwargs")
    if options is not None:
        try:
            value = template_options(options.data).get("thinking")
        except TemplateError as error:
            raise template_refusal(error, "chat_template_kwargs") from None
        if value is not None:
            said["chat_template_kwargs"] = value
    if len(set(said.values())) > 1:
        raise bad(f"{' and '.join(said)} contradict each other", next(iter(said)))
    return next(iter(said.values()), None)


def stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    """(include_usage, continuous_usage_stats)."""
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise bad("stream_options needs stream: true", "stream_options")
    include = options.boolean("include_usage") or False
    continuous = options.boolean("continuous_usage_stats") or False
    options.ignore(("include_obfuscation",))
    options.finish()
    return include or continuous, continuous


def _refused(fields: Fields) -> None:
    """Known fields of OpenAI and vLLM that change the output and have no counterpart here."""
    fields.ignore(HARMLESS)
    fields.neutral("modalities", ["text"], "this model writes text")
    fields.refuse("chat_template", "templates are functions of the server, not of requests")
    fields.refuse("functions", "use tools")
    fields.refuse("function_call", "use tool_choice")
    fields.refuse("audio", "this model writes text")
    fields.refuse("prediction", "predicted outputs do not exist here")
    fields.refuse("web_search_options", "this server opens no connections")
    fields.refuse("verbosity", "ask for it in the messages")
    fields.neutral("echo", False, "a chat's prompt has no text of its own")
    fields.neutral("best_of", 1, "use n")
    fields.neutral("use_beam_search", False, "there is no beam search")
    fields.refuse("guided_json", "use response_format {type: json_schema}")
    fields.refuse("guided_regex", "use response_format {type: json_schema} with a pattern")
    fields.refuse("guided_grammar", "use response_format")
    fields.refuse("guided_choice", "use response_format {type: json_schema} with an enum")
    fields.refuse("structured_outputs", "use response_format")
