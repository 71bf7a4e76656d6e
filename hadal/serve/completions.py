"""POST /completions: plain continuation, as lm-eval, FIM editors and old OpenAI clients use it.

Prompts are text or token ids, one or many; `echo` with `logprobs` gives the prompt's own log-probabilities in
the legacy shape; `suffix` fills in the middle on models that have the tokens for it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hadal.engine.params import MAX_LOGPROBS, SamplingParams
from hadal.engine.updates import TokenLogprob, Update
from hadal.serve.chat_request import stream_options
from hadal.serve.constraints import Constraint, read_response_format
from hadal.serve.errors import bad
from hadal.serve.fields import Fields
from hadal.serve.generation import Job, make_jobs
from hadal.serve.jsontext import dumps
from hadal.serve.models import Registry, Served
from hadal.serve.prompts import Encoder, prompt_list
from hadal.serve.sampling import HARMLESS, MAX_N, MAX_SEQUENCES, make_params, sampling_fields
from hadal.serve.shapes import LegacyLogprobs, Usage, new_id
from hadal.serve.state import App, Visit
from hadal.serve.streaming import SSE, SSE_COMMENT, SSE_DONE, LiveStream, sse, sse_error, unless_gone

# (before the prefix, between, after the suffix) by family; the tokens tell which one a model has.
FIM_TOKENS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request; prompts not yet encoded."""

    served: Served
    model: str
    prompts: list[str | list[Any]]
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    bos: bool
    suffix: str | None
    constraint: Constraint | None = field(default=None, compare=False)


def read_completion(fields: Fields, registry: Registry) -> CompletionRequest:
    """The request. Raises ApiError 400 naming the field, or 404."""
    served = registry.of(fields)
    given = sampling_fields(fields, served.info.vocab_size)
    given.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    prompt = fields.take("prompt")
    if prompt is None:
        raise bad("prompt is missing; send a string, strings, token ids, or arrays of token ids", "prompt")
    prompts = prompt_list(prompt, MAX_SEQUENCES, "prompt")
    n = fields.integer("n", 1, MAX_N) or 1
    if len(prompts) * n > MAX_SEQUENCES:
        raise bad(f"{len(prompts)} prompts × n = {n} are more than {MAX_SEQUENCES} sequences", "n")
    echo = fields.boolean("echo") or False
    logprobs = _legacy_logprobs(fields)
    if logprobs is not None:
        given["logprobs"] = logprobs
        if echo:
            given["prompt_logprobs"] = logprobs
    suffix = fields.string("suffix")
    if suffix and echo:
        raise bad("echo and suffix cannot be combined", "echo")
    if suffix and any(not isinstance(item, str) for item in prompts):
        raise bad("suffix needs a prompt of text", "suffix")
    stream = fields.boolean("stream") or False
    include_usage, continuous = stream_options(fields, stream)
    bos = fields.boolean("add_special_tokens")
    constraint = read_response_format(fields)
    _refused(fields, n)
    fields.finish()
    return CompletionRequest(
        served=served,
        model=str(fields.data["model"]),
        prompts=prompts,
        params=make_params(given, served.info.sampling_defaults),
        n=n,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous,
        echo=echo,
        bos=bos is not False,
        suffix=suffix or None,
        constraint=constraint,
    )


def _legacy_logprobs(fields: Fields) -> int | None:
    if isinstance(fields.data.get("logprobs"), bool):
        raise bad(
            "logprobs must be an integer from 0 to 20 here (true or false is /chat/completions)", "logprobs"
        )
    return fields.integer("logprobs", 0, MAX_LOGPROBS)


def _refused(fields: Fields, n: int) -> None:
    fields.ignore(HARMLESS)
    fields.neutral("best_of", n, "sequences are not ranked; use n")
    fields.neutral("use_beam_search", False, "there is no beam search")
    fields.refuse("prompt_logprobs", "use echo with logprobs")
    fields.refuse("chat_template", "use /chat/completions, whose templates are functions of the server")
    for name in ("guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs"):
        fields.refuse(name, "use response_format")


async def completions(request: Request) -> Response:
    """The route."""
    app = App.of(request)
    visit = await app.visit(request)
    wanted = read_completion(visit.fields, app.registry)
    visit.note(model=wanted.served.name, stream=wanted.stream)
    run = _Run(visit, wanted)
    if wanted.stream:
        return LiveStream(run.events(), app.settings, SSE, sse_error, SSE_COMMENT)
    return Response(dumps(await unless_gone(request, run.answer())), media_type="application/json")


async def encode_prompts(wanted: CompletionRequest) -> list[list[int]]:
    """All prompts as token ids that fit. Raises ApiError."""
    encoder = wanted.served.encoder
    ids = []
    for prompt in wanted.prompts:
        if isinstance(prompt, str):
            if wanted.suffix is not None:
                ids.append(await fill_in(encoder, prompt, wanted.suffix, bos=wanted.bos))
            else:
                ids.append(await encoder.text(prompt, "prompt", bos=wanted.bos))
        else:
            ids.append(prompt)
        encoder.check_fit(len(ids[-1]), wanted.params.max_tokens, "prompt")
        ids[-1] = encoder.ids(ids[-1], "prompt")
    return ids


async def fill_in(encoder: Encoder, prefix: str, suffix: str, *, bos: bool) -> list[int]:
    """BOS, begin, prefix, hole, suffix, end (DeepSeek-V3, section 2.1.2 of arXiv 2412.19437)."""
    special = encoder.tokenizer.special
    found = next((names for names in FIM_TOKENS if all(name in special for name in names)), None)
    if found is None:
        raise bad("suffix: this model has no fill-in-the-middle tokens", "suffix", "unsupported_parameter")
    start = [encoder.tokenizer.bos_id] if bos and encoder.tokenizer.bos_id is not None else []
    before = await encoder.text(prefix, "prompt", bos=False)
    after = await encoder.text(suffix, "suffix", bos=False)
    begin, hole, end = (special[name] for name in found)
    return [*start, begin, *before, hole, *after, end]


class _Run:
    """One completion request being answered."""

    def __init__(self, visit: Visit, wanted: CompletionRequest) -> None:
        self.visit = visit
        self.wanted = wanted
        self.tokenizer = wanted.served.encoder.tokenizer
        self.head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time())}
        self.head["model"] = wanted.model
        self.usages: dict[int, Usage] = {}
        self.shapers: dict[int, LegacyLogprobs] = {}

    async def _jobs(self) -> list[Job]:
        params = self.wanted.params
        if self.wanted.constraint is not None:
            grammar = await self.wanted.constraint.factory(self.tokenizer)
            params = replace(params, grammar=grammar)
        return make_jobs(await encode_prompts(self.wanted), params, self.wanted.n)

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        async with self.visit.call(self.wanted.served, len(self.wanted.prompts) * self.wanted.n) as call:
            jobs = await self._jobs()
            updates = await call.all(jobs)
        choices = [self._choice(job, update, first=True) for job, update in zip(jobs, updates, strict=True)]
        return {**self.head, "choices": choices, "usage": self._usage().shape()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        async with self.visit.call(self.wanted.served, len(self.wanted.prompts) * self.wanted.n) as call:
            jobs = await self._jobs()
            seen: set[int] = set()
            async with aclosing(call.merged(jobs)) as updates:
                async for job, update in updates:
                    choice = self._choice(job, update, first=job.index not in seen)
                    seen.add(job.index)
                    if choice["text"] or choice["logprobs"] or update.finish_reason:
                        yield self._event(choice)
        if self.wanted.include_usage:
            yield sse(dumps({**self.head, "choices": [], "usage": self._usage().shape()}))
        yield SSE_DONE

    def _event(self, choice: dict[str, Any]) -> bytes:
        chunk: dict[str, Any] = {**self.head, "choices": [choice]}
        if self.wanted.continuous_usage:
            chunk["usage"] = self._usage().shape()
        elif self.wanted.include_usage:
            chunk["usage"] = None
        return sse(dumps(chunk))

    def _choice(self, job: Job, update: Update, *, first: bool) -> dict[str, Any]:
        """A choice, or what an update adds to it; `first` brings the echo."""
        self.usages[job.index] = Usage(update.prompt_tokens, update.cached_tokens, update.completion_tokens)
        echo = self.wanted.echo and first
        text = self._echo_text(job) + update.text if echo else update.text
        return {
            "index": job.index,
            "text": text,
            "logprobs": self._logprobs(job, update, echo),
            "finish_reason": update.finish_reason,
        }

    def _echo_text(self, job: Job) -> str:
        prompt = self.wanted.prompts[job.index // self.wanted.n]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(job.prompt_ids)

    def _logprobs(self, job: Job, update: Update, echo: bool) -> dict[str, Any] | None:
        if self.wanted.params.logprobs is None:
            return None
        shaper = self.shapers.setdefault(job.index, LegacyLogprobs(self.tokenizer))
        token_ids = list(update.token_ids)
        entries: list[TokenLogprob | None] = list(update.logprobs or ())
        if echo:
            token_ids = [*job.prompt_ids, *token_ids]
            entries = [*(update.prompt_logprobs or ()), *entries]
        return shaper.shape(token_ids, entries) if token_ids else None

    def _usage(self) -> Usage:
        """Each prompt is counted once, however many choices it has."""
        n = self.wanted.n
        firsts = [usage for index, usage in self.usages.items() if index % n == 0]
        done = sum(usage.completion for usage in self.usages.values())
        usage = Usage(sum(u.prompt for u in firsts), sum(u.cached for u in firsts), done)
        self.visit.note(prompt_tokens=usage.prompt, completion_tokens=done)
        return usage
