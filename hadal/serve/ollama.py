"""POST /api/chat and /api/generate: Ollama's dialect of the same two things.

Streams by default: one JSON object a line, each ending in a newline (Page Assist drops a last line without
one), the last with done_reason, counts and durations in nanoseconds. Without messages or prompt a request
loads the model, or with keep_alive 0 unloads it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hadal.engine.params import MAX_LOGPROBS, SamplingParams
from hadal.engine.updates import Update
from hadal.serve.answer import Answer, Delta, Style
from hadal.serve.completions import fill_in
from hadal.serve.constraints import Constraint, read_ollama_format
from hadal.serve.errors import ApiError, bad
from hadal.serve.fields import Fields
from hadal.serve.generation import Job
from hadal.serve.jsontext import JsonError, dumps, loads
from hadal.serve.messages import read_messages, read_tools, template_refusal
from hadal.serve.models import Registry, Served
from hadal.serve.ollama_options import read_options, read_think, unloads
from hadal.serve.sampling import make_params
from hadal.serve.state import App, Visit
from hadal.serve.streaming import NDJSON, LiveStream, unless_gone
from hadal.text.messages import TemplateError
from hadal.text.templates import ends_in_reasoning
from hadal.text.tokenizer import Control


@dataclass(frozen=True)
class OllamaRequest:
    """A checked request. Exactly one of `parts`, `raw`, `middle` is its prompt; none: load or unload."""

    served: Served
    model: str
    kind: str  # "chat" or "generate"
    stream: bool
    unload: bool
    params: SamplingParams
    style: Style = field(default_factory=Style)
    parts: Sequence[Control | str] | None = None
    raw: str | None = None
    middle: tuple[str, str] | None = None
    constraint: Constraint | None = field(default=None, compare=False)

    @property
    def is_empty(self) -> bool:
        return self.parts is None and self.raw is None and self.middle is None


def read_chat(fields: Fields, registry: Registry) -> OllamaRequest:
    """The body of /api/chat."""
    common = _common(fields, registry, "chat")
    tools = read_tools(fields)
    messages = _messages(fields) if fields.data.get("messages") else []
    fields.ignore(("messages",))
    think = read_think(fields)
    fields.finish()
    if not messages:
        return common
    return _templated(common, messages, tools, think)


def read_generate(fields: Fields, registry: Registry) -> OllamaRequest:
    """The body of /api/generate."""
    common = _common(fields, registry, "generate")
    prompt, suffix, system = fields.string("prompt"), fields.string("suffix"), fields.string("system")
    raw, think = fields.boolean("raw") or False, read_think(fields)
    if fields.take("images"):
        raise bad("images: this model reads text only", "images")
    if fields.take("context"):
        raise bad("context is not supported: use /api/chat, whose messages carry the history", "context")
    if fields.take("template"):
        raise bad(
            "template is not supported: templates are functions of the server, not of requests", "template"
        )
    for name in ("width", "height", "steps"):
        fields.refuse(name, "this model writes text")
    fields.finish()
    if not prompt:
        return common
    if suffix:
        return replace(common, middle=(prompt, suffix))
    if raw:
        if system:
            raise bad("system cannot be combined with raw", "system")
        return replace(common, raw=prompt)
    messages = [{"role": "system", "content": system}] if system else []
    return _templated(common, [*messages, {"role": "user", "content": prompt}], [], think)


def _common(fields: Fields, registry: Registry, kind: str) -> OllamaRequest:
    served = registry.of(fields, "name")
    given = read_options(fields)
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    if wanted:
        given["logprobs"] = top or 0
    stream, unload = fields.boolean("stream"), unloads(fields)
    constraint = read_ollama_format(fields)
    model = str(fields.data.get("model") or fields.data.get("name"))
    params = make_params(given, served.info.sampling_defaults)
    return OllamaRequest(served, model, kind, stream is not False, unload, params, constraint=constraint)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """Ollama's messages in OpenAI's form: `thinking`, tool arguments as objects, `tool_name`."""
    items = fields.array("messages", 4096) or []
    converted = []
    for place, item in enumerate(items):
        if not isinstance(item, dict):
            raise bad(f"messages[{place}] must be an object", f"messages[{place}]")
        message = dict(item)
        if message.pop("images", None):
            raise bad(f"messages[{place}].images: this model reads text only", f"messages[{place}].images")
        for old, new in (("thinking", "reasoning_content"), ("tool_name", "name")):
            if message.get(old) is not None:
                message[new] = message[old]
            message.pop(old, None)
        if message.get("content") is None and not message.get("tool_calls"):
            message["content"] = ""
        converted.append(message)
    return read_messages(Fields({"messages": converted}))


def _templated(
    common: OllamaRequest, messages: list[dict[str, Any]], tools: list[dict[str, Any]], think: bool | None
) -> OllamaRequest:
    encoder = common.served.encoder
    if think is False and not encoder.template.supports_thinking:
        think = None
    if think is False and encoder.template.always_thinks:
        message = f"think: {common.served.name} always reasons first: leave think out or set it to true"
        raise bad(message, "think")
    parts = encoder.render(messages, tools=tools or None, thinking=think)
    try:
        may_open = bool(encoder.template.may_open_reasoning(messages))
    except TemplateError as error:
        raise template_refusal(error) from None
    style = Style(
        starts_inside=ends_in_reasoning(parts),
        may_open=may_open,
        tool_format=encoder.template.tool_format if tools else None,
    )
    return replace(common, parts=parts, style=style)


async def chat(request: Request) -> Response:
    """POST /api/chat."""
    return await _serve(request, read_chat)


async def generate(request: Request) -> Response:
    """POST /api/generate."""
    return await _serve(request, read_generate)


async def _serve(request: Request, read: Any) -> Response:
    app = App.of(request)
    visit = await app.visit(request)
    wanted: OllamaRequest = read(visit.fields, app.registry)
    visit.note(model=wanted.served.name, stream=wanted.stream)
    run = _Run(visit, wanted)
    if wanted.is_empty:
        return Response(dumps(await run.load_only()) + b"\n", media_type="application/json")
    if wanted.stream:
        return LiveStream(run.lines(), app.settings, NDJSON, _error_line)
    return Response(dumps(await unless_gone(request, run.answer())), media_type="application/json")


def _error_line(error: ApiError) -> bytes:
    return dumps(error.ollama_body()) + b"\n"


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class _Run:
    """One request of Ollama's being answered."""

    def __init__(self, visit: Visit, wanted: OllamaRequest) -> None:
        self.visit = visit
        self.wanted = wanted
        self.loaded = 0.0

    async def load_only(self) -> dict[str, Any]:
        """The model is loaded (or unloaded) and nothing is said."""
        if self.wanted.unload:
            unloaded = await self.wanted.served.unload()
            reason = "unload" if unloaded else "load"
        else:
            async with self.visit.call(self.wanted.served, 1):
                reason = "load"
        return {**self._piece("", ""), "done": True, "done_reason": reason}

    async def answer(self) -> dict[str, Any]:
        """The whole answer as one object."""
        async with self.visit.call(self.wanted.served, 1) as call:
            self.loaded = time.monotonic()
            job = await self._job()
            answer = Answer(self.wanted.served.encoder.tokenizer, self.wanted.style)
            update = await call.whole(job)
            answer.push(update)
            answer.finish()
            self._unload()
        whole = answer.whole
        body = self._piece(whole.content, whole.reasoning, whole)
        return {**body, **self._logprobs(whole), **self._end(update)}

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The answer line by line."""
        async with self.visit.call(self.wanted.served, 1) as call:
            self.loaded = time.monotonic()
            job = await self._job()
            answer = Answer(self.wanted.served.encoder.tokenizer, self.wanted.style)
            async with aclosing(call.updates(job)) as updates:
                async for update in updates:
                    delta = answer.push(update)
                    if delta:
                        yield self._line(delta)
                    if update.finish_reason is not None:
                        rest = answer.finish()
                        last = self._line(rest) if rest else b""
                        yield last + dumps({**self._piece("", ""), **self._end(update)}) + b"\n"
            self._unload()

    def _unload(self) -> None:
        """keep_alive 0: the model goes when its last request has left."""
        if self.wanted.unload and self.wanted.served.load is not None:
            self.wanted.served.unload_wanted = True

    async def _job(self) -> Job:
        wanted, encoder = self.wanted, self.wanted.served.encoder
        if wanted.parts is not None:
            ids = await encoder.parts(wanted.parts, "messages" if wanted.kind == "chat" else "prompt")
        elif wanted.middle is not None:
            ids = await fill_in(encoder, *wanted.middle, bos=True)
        else:
            ids = await encoder.text(wanted.raw or "", "prompt", bos=True)
        encoder.check_fit(len(ids), None, "prompt")
        params = wanted.params
        if params.max_tokens is not None:
            params = replace(params, max_tokens=min(params.max_tokens, encoder.limit - len(ids)))
        if wanted.constraint is not None:
            grammar = await wanted.constraint.factory(encoder.tokenizer, wanted.style.starts_inside)
            params = replace(params, grammar=grammar)
        return Job(0, ids, params)

    def _piece(self, content: str, thinking: str, delta: Delta | None = None) -> dict[str, Any]:
        head = {"model": self.wanted.model, "created_at": now(), "done": False}
        if self.wanted.kind == "generate":
            return {**head, "response": content, **({"thinking": thinking} if thinking else {})}
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thinking:
            message["thinking"] = thinking
        if delta is not None and delta.calls:
            calls = [
                {"function": {"name": c.name, "arguments": _arguments(c.arguments_json)}} for c in delta.calls
            ]
            message["tool_calls"] = calls
        return {**head, "message": message}

    def _line(self, delta: Delta) -> bytes:
        return dumps({**self._piece(delta.content, delta.reasoning, delta), **self._logprobs(delta)}) + b"\n"

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        if self.wanted.params.logprobs is None:
            return {}
        return {"logprobs": [*delta.reasoning_logprobs, *delta.content_logprobs]}

    def _end(self, update: Update) -> dict[str, Any]:
        """Counts and durations in nanoseconds."""
        self.visit.note(prompt_tokens=update.prompt_tokens, completion_tokens=update.completion_tokens)
        times = update.metrics
        start = self.visit.arrival
        first = times.first_token if times is not None and times.first_token is not None else time.monotonic()
        scheduled = (
            times.first_scheduled if times is not None and times.first_scheduled is not None else first
        )
        end = times.finished if times is not None and times.finished is not None else time.monotonic()
        return {
            "done": True,
            "done_reason": update.finish_reason,
            "total_duration": _ns(time.monotonic() - start),
            "load_duration": _ns(self.loaded - start),
            "prompt_eval_count": update.prompt_tokens,
            "prompt_eval_duration": _ns(first - scheduled),
            "eval_count": update.completion_tokens,
            "eval_duration": _ns(end - first),
        }


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _arguments(text: str) -> Any:
    """Ollama's clients want an object; what a model wrote that is none goes under its raw text."""
    try:
        value = loads(text.encode())
    except JsonError:
        value = None
    return value if isinstance(value, dict) else {"raw": text}
