"""A small OpenAI/DeepSeek-compatible server whose model says what the question tells it to.

    "slow"  many pieces with pauses, to be stopped    "html"  hostile HTML and remote images
    "math"  Markdown, a code block, LaTeX             "busy"  503, queue full
    "long"  400 context_length_exceeded               "cut"   ends without [DONE]
    "die"   an error event in the middle

Anything else is answered by a worked addition of its numbers, and how often the server was asked.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

HOSTILE = (
    "Look: <script>window.hacked = 1</script>\n\n"
    '<img src="x" onerror="window.hacked = 2">\n\n'
    '<img src="http://images.example/pixel.png">\n\n'
    "![remote](http://images.example/other.png)\n\n"
    '<svg onload="window.hacked = 3"><circle r="4"></circle></svg>\n\n'
    '<a href="javascript:window.hacked = 4">click me</a> and [me too](javascript:window.hacked=5)\n\n'
    '<iframe srcdoc="<script>parent.hacked = 6</script>"></iframe>\n\n'
    '<div style="position:fixed;inset:0;background:url(http://images.example/bg.png);z-index:99999">cover</div>\n\n'
    '<form action="http://images.example/"><input name="key"></form>\n\n'
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=7></style></mglyph></table></mtext>"
    "</math>"
    "\n\n`<b>code stays</b>` and the end."
)
MATH = (
    "**Euclid**'s algorithm, with \\(a > b\\):\n\n"
    "\\[\\gcd(a, b) = \\gcd(b, a \\bmod b)\\]\n\n"
    "```python\ndef gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n```\n\n"
    "| a | b |\n|---|---|\n| 48 | 18 |\n| 18 | 12 |\n\nSo \\(\\gcd(48, 18) = 6\\)."
)


def script(question: str, asked: int) -> tuple[str, str, float]:
    """(reasoning, answer, pause in seconds between pieces) for a question."""
    if "slow" in question:
        return "Counting slowly. " * 2000, "All done.", 0.05  # minutes: whoever asks it stops it
    if "html" in question:
        return "A trap <script>window.hacked = 8</script> in thought.", HOSTILE, 0.0
    if "math" in question:
        return "The user wants Euclid. Let \\(r = a \\bmod b\\).", MATH, 0.01
    numbers = [int(n) for n in re.findall(r"\d+", question)] or [0]
    steps = "\n".join(f"{sum(numbers[:i])} + {n} = {sum(numbers[: i + 1])}" for i, n in enumerate(numbers))
    return f"I add the numbers one by one.\n{steps}", f"The sum is **{sum(numbers)}** (asked {asked}).", 0.01


class Fake:
    """The app and what it saw."""

    def __init__(self, *, key: str = "", model: str = "hadal-mini", pace: float = 1.0) -> None:
        self.key = key
        self.model = model
        self.pace = pace
        self.requests: list[dict[str, Any]] = []
        self.closed_early = 0
        self.app = FastAPI(openapi_url=None)
        self.app.get("/")(lambda: PlainTextResponse("Ollama is running"))
        self.app.get("/v1/models")(self.models)
        self.app.get("/health")(lambda: {"status": "ok"})
        self.app.post("/v1/chat/completions")(self.chat)

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "a valid API key is needed", "invalid_api_key")
        return None

    def models(self, request: Request) -> Any:
        refused = self._refused(request)
        if refused:
            return refused
        entries = [
            {"id": self.model, "object": "model", "max_model_len": 2048},
            {
                "id": "other",
                "object": "model",
                "hadal": {"thinking": "always", "sampling": {"temperature": 0.25}},
            },
        ]
        return {"object": "list", "data": entries}

    async def chat(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused:
            return refused
        body = await request.json()
        self.requests.append(body)
        question = body["messages"][-1]["content"]
        if "busy" in question:
            return _error(
                503, "the queue is full: 256 sequences run or wait", "overloaded", {"retry-after": "7"}
            )
        if "long" in question:
            return _error(400, "9000 tokens asked, the context holds 2048", "context_length_exceeded")
        return StreamingResponse(self._stream(body, question), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], question: str) -> AsyncIterator[str]:
        reasoning, answer, pause = script(question, len(self.requests))
        if body.get("thinking", {}).get("type") == "disabled":
            reasoning = ""
        finished = False
        try:
            yield ": keep-alive\n\n"
            yield _event(body, {"role": "assistant", "content": ""})
            pieces = [("reasoning_content", piece) for piece in re.findall(r"\S*\s*", reasoning) if piece]
            pieces += [("content", piece) for piece in re.findall(r"\S*\s*", answer) if piece]
            for number, (field, piece) in enumerate(pieces):
                await asyncio.sleep(pause * self.pace)
                yield _event(body, {field: piece})
                if number == 3 and "die" in question:
                    yield 'data: {"error": {"message": "the engine stopped", "code": "engine_dead"}}\n\n'
                if number == 3 and "cut" in question:
                    finished = True
                    return
            yield _event(body, {}, "stop")
            thought = sum(field != "content" for field, _ in pieces)
            usage = {
                "prompt_tokens": 24,
                "completion_tokens": len(pieces),
                "total_tokens": 24 + len(pieces),
                "completion_tokens_details": {"reasoning_tokens": thought},
            }
            yield "data: " + json.dumps({"model": body["model"], "choices": [], "usage": usage}) + "\n\n"
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            self.closed_early += not finished


def _event(body: dict[str, Any], delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "model": body["model"],
        "choices": [choice],
    }
    return f"data: {json.dumps(chunk)}\n\n"


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": "x", "param": None, "code": code}}, status, headers
    )
