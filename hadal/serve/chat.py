"""POST /chat/completions: OpenAI's and DeepSeek's chat, whole or streamed.

    body → ChatRequest (chat_request.py) → prompt → n sequences → Answer per choice (answer.py) → their JSON

Reasoning is sent twice, as `reasoning_content` (DeepSeek) and `reasoning` (vLLM's clients time the first
token by it).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hadal.engine.request import Update
from hadal.serve.answer import Answer, Delta
from hadal.serve.chat_request import ChatRequest, read_chat
from hadal.serve.generation import Job, make_jobs
from hadal.serve.jsontext import dumps
from hadal.serve.shapes import Usage, new_id
from hadal.serve.state import App, Visit
from hadal.serve.streaming import SSE, SSE_COMMENT, SSE_DONE, LiveStream, sse, sse_error, unless_gone


async def chat_completions(request: Request) -> Response:
    """The route."""
    app = App.of(request)
    visit = await app.visit(request)
    chat = read_chat(visit.fields, app.registry)
    visit.note(model=chat.served.name, stream=chat.stream)
    talk = _Talk(visit, chat)
    if chat.stream:
        return LiveStream(talk.events(), app.settings, SSE, sse_error, SSE_COMMENT)
    return Response(dumps(await unless_gone(request, talk.answer())), media_type="application/json")


class _Talk:
    """One chat request being answered."""

    def __init__(self, visit: Visit, chat: ChatRequest) -> None:
        self.visit = visit
        self.chat = chat
        self.usage = Usage()
        self.counts: dict[int, int] = {}
        self.answers: list[Answer] = []
        self.head = {"id": new_id("chatcmpl"), "object": "chat.completion", "created": int(time.time())}
        self.head["model"] = chat.model

    async def answer(self) -> dict[str, Any]:
        """The whole answer as one object."""
        async with self.visit.call(self.chat.served, self.chat.n) as call:
            jobs = await self._jobs()
            updates = await call.all(jobs)
        choices = [self._choice(job, update) for job, update in zip(jobs, updates, strict=True)]
        self._sum()
        return {**self.head, "choices": choices, "usage": self.usage.shape(), "system_fingerprint": None}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        self.head["object"] = "chat.completion.chunk"
        async with self.visit.call(self.chat.served, self.chat.n) as call:
            jobs = await self._jobs()
            seen: set[int] = set()
            async with aclosing(call.merged(jobs)) as updates:
                async for job, update in updates:
                    self._count(job, update)
                    first = job.index not in seen
                    data = self._chunk(job, {"role": "assistant", "content": ""}) if first else b""
                    seen.add(job.index)
                    data += self._progress(job, update)
                    if data:
                        yield data
        self._sum()
        if self.chat.include_usage:
            yield sse(dumps({**self.head, "choices": [], "usage": self.usage.shape()}))
        yield SSE_DONE

    async def _jobs(self) -> list[Job]:
        chat = self.chat
        encoder = chat.served.encoder
        prompt_ids = await encoder.parts(chat.parts, "messages")
        encoder.check_fit(len(prompt_ids), chat.params.max_tokens, "messages")
        params = chat.params
        if chat.constraint is not None:
            grammar = await chat.constraint.factory(encoder.tokenizer, chat.style.starts_inside)
            params = replace(params, grammar=grammar)
        self.answers = [Answer(encoder.tokenizer, chat.style) for _ in range(chat.n)]
        return make_jobs([prompt_ids], params, chat.n)

    def _count(self, job: Job, update: Update) -> None:
        self.usage.prompt = update.prompt_tokens
        if job.index == 0:
            self.usage.cached = update.cached_tokens
        self.counts[job.index] = update.completion_tokens

    def _sum(self) -> None:
        self.usage.completion = sum(self.counts.values())
        self.usage.reasoning = sum(answer.reasoning_tokens for answer in self.answers)
        self.visit.note(prompt_tokens=self.usage.prompt, completion_tokens=self.usage.completion)

    def _choice(self, job: Job, update: Update) -> dict[str, Any]:
        self._count(job, update)
        answer = self.answers[job.index]
        answer.push(update)
        answer.finish()
        whole = answer.whole
        message: dict[str, Any] = {"role": "assistant", "content": whole.content}
        if answer.style.reasons:
            message["reasoning_content"] = message["reasoning"] = whole.reasoning
        if whole.calls:
            message["tool_calls"] = answer.call_shapes(whole.calls, stream=False)
            message["content"] = whole.content or None
        return {
            "index": job.index,
            "message": message,
            "logprobs": whole.logprobs() if self.chat.params.logprobs is not None else None,
            "finish_reason": answer.finish_reason(update.finish_reason),
        }

    def _progress(self, job: Job, update: Update) -> bytes:
        """The events of one update; empty when its text is still held back."""
        answer = self.answers[job.index]
        deltas = [answer.push(update)]
        if update.finish_reason is not None:
            deltas.append(answer.finish())
        data = b"".join(self._delta(job, answer, delta) for delta in deltas if delta)
        if update.finish_reason is not None:
            data += self._chunk(job, {}, finish_reason=answer.finish_reason(update.finish_reason))
        return data

    def _delta(self, job: Job, answer: Answer, delta: Delta) -> bytes:
        """Reasoning first: the two never come in one event, nor content with calls."""
        parts: list[dict[str, Any]] = []
        if delta.reasoning:
            parts.append({"reasoning_content": delta.reasoning, "reasoning": delta.reasoning})
        if delta.content:
            parts.append({"content": delta.content})
        if delta.calls:
            parts.append({"tool_calls": answer.call_shapes(delta.calls, stream=True)})
        parts = parts or [{}]
        logprobs = delta.logprobs() if self.chat.params.logprobs is not None else None
        chunks = [self._chunk(job, part) for part in parts[:-1]]
        return b"".join([*chunks, self._chunk(job, parts[-1], logprobs)])

    def _chunk(
        self,
        job: Job,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {"index": job.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: dict[str, Any] = {**self.head, "choices": [choice]}
        if self.chat.continuous_usage:
            chunk["usage"] = self._running_usage()
        elif self.chat.include_usage:
            chunk["usage"] = None
        return sse(dumps(chunk))

    def _running_usage(self) -> dict[str, Any]:
        done: Sequence[int] = list(self.counts.values())
        reasoning = sum(answer.reasoning_tokens for answer in self.answers)
        return Usage(self.usage.prompt, self.usage.cached, sum(done), reasoning).shape()
