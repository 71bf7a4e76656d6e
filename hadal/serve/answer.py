"""From an engine's text to an answer's parts: reasoning, content and tool calls, as they come.

Where the reasoning begins comes from the prompt, never from sniffing the output: R1's prompt ends inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hadal.engine.request import TokenLogprob, Update
from hadal.serve.shapes import chat_logprob, new_id
from hadal.text.parsers import Piece, ReasoningParser, ToolCall, ToolParser
from hadal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Style:
    """How the output of one prompt is to be read."""

    starts_inside: bool = False
    may_open: bool = False
    tool_format: str | None = None
    one_call: bool = False

    @property
    def reasons(self) -> bool:
        """Whether there may be reasoning."""
        return self.starts_inside or self.may_open


@dataclass
class Delta:
    """What one update added to an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    reasoning_logprobs: list[dict[str, Any]] = field(default_factory=list)
    content_logprobs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.reasoning or self.content or self.calls or self.content_logprobs or self.reasoning_logprobs
        )

    def logprobs(self) -> dict[str, Any]:
        """DeepSeek's shape: OpenAI's `content`, and beside it the reasoning's tokens."""
        return {
            "content": self.content_logprobs,
            "reasoning_content": self.reasoning_logprobs,
            "refusal": None,
        }


class Answer:
    """One choice being put together. Push updates in order, then `finish()`; each returns what it added."""

    def __init__(self, tokenizer: Tokenizer, style: Style) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.whole = Delta()
        self.call_ids: list[str] = []
        self.reasoning_tokens = 0
        self._reasoning = ReasoningParser(style.starts_inside, may_open=style.may_open)
        self._tools = ToolParser(style.tool_format) if style.tool_format else None
        self._close = tokenizer.special.get("</think>")

    def push(self, update: Update) -> Delta:
        """Take an update's tokens and text."""
        delta = Delta()
        before = self._reasoning.inside
        self._sort(self._reasoning.push(update.text), delta)
        if self.style.reasons or update.logprobs is not None:
            self._count(update.token_ids, update.logprobs, delta, before or self._reasoning.inside)
        return self._kept(delta)

    def finish(self) -> Delta:
        """What the parsers had held back."""
        delta = Delta()
        self._sort(self._reasoning.finish(), delta)
        if self._tools:
            self._take(self._tools.finish(), delta)
        return self._kept(delta)

    def finish_reason(self, engine_reason: str | None) -> str | None:
        """OpenAI's finish_reason: calls outrank "stop"."""
        return "tool_calls" if self.whole.calls and engine_reason == "stop" else engine_reason

    def call_shapes(self, calls: Sequence[ToolCall], *, stream: bool) -> list[dict[str, Any]]:
        """OpenAI's tool_calls; in a stream each has the index of its place in the whole answer."""
        shapes = []
        for call in calls:
            place = next(i for i, known in enumerate(self.whole.calls) if known is call)
            function = {"name": call.name, "arguments": call.arguments_json}
            shape = {"id": self.call_ids[place], "type": "function", "function": function}
            shapes.append({"index": place, **shape} if stream else shape)
        return shapes

    def _sort(self, pieces: Sequence[Piece], delta: Delta) -> None:
        for piece in pieces:
            if piece.kind == "reasoning":
                delta.reasoning += piece.text
            elif self._tools:
                self._take(self._tools.push(piece.text), delta)
            else:
                delta.content += piece.text

    def _take(self, items: Sequence[Piece | ToolCall], delta: Delta) -> None:
        for item in items:
            if isinstance(item, ToolCall):
                if not (self.style.one_call and self.call_ids):
                    delta.calls.append(item)
                    self.call_ids.append(new_id("call"))
            else:
                delta.content += item.text

    def _count(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None, delta: Delta, inside: bool
    ) -> None:
        """Tokens up to and including </think> are reasoning. `inside`: the update had a part of it."""
        for place, token_id in enumerate(token_ids):
            self.reasoning_tokens += inside
            if logprobs is not None:
                shape = chat_logprob(self.tokenizer, logprobs[place])
                (delta.reasoning_logprobs if inside else delta.content_logprobs).append(shape)
            if token_id == self._close:
                inside = False

    def _kept(self, delta: Delta) -> Delta:
        self.whole.reasoning += delta.reasoning
        self.whole.content += delta.content
        self.whole.calls += delta.calls
        self.whole.reasoning_logprobs += delta.reasoning_logprobs
        self.whole.content_logprobs += delta.content_logprobs
        return delta
