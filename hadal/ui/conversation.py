"""Conversations as plain data: what the browser keeps, what the API is asked, what the page shows.

    conversation  = id, title, times, turns            (JSON, lives in the visitor's browser only)
    turn          = question → reasoning → answer, with the figures of that answer
    stream chunks → `Fold` → turn → `messages()`       (Gradio's Chatbot format, reasoning as a foldable
    thought)

Everything here is pure: no network, no Gradio, no clock of its own (times are arguments, in seconds).
The wire format is DeepSeek's: `delta.reasoning_content` apart from `delta.content`
(https://api-docs.deepseek.com/guides/reasoning_model).
"""

from __future__ import annotations

import html
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from hadal.ui.markdown import inert

Status = Literal["running", "done", "stopped", "failed"]
STATUSES: tuple[Status, ...] = ("running", "done", "stopped", "failed")
TITLE_CHARS = 48
UNTITLED = "New conversation"


class ConversationError(ValueError):
    """What the browser sent is not a conversation; the message names the field."""


@dataclass
class Figures:
    """What an answer cost and how fast it came. Times in seconds as seen by the page, the network
    included."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    first_token_s: float | None = None
    tokens_per_s: float | None = None


@dataclass
class Turn:
    """One question and what came of it."""

    question: str
    reasoning: str = ""
    answer: str = ""
    status: Status = "running"
    error: str = ""
    thought_s: float | None = None
    finish_reason: str = ""
    model: str = ""
    figures: Figures | None = None


@dataclass
class Conversation:
    """A list of turns with a name. `created` and `updated` are Unix seconds."""

    id: str
    title: str = UNTITLED
    created: float = 0.0
    updated: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    @classmethod
    def new(cls, now: float) -> Conversation:
        """An empty conversation with a fresh random id."""
        return cls(id=uuid.uuid4().hex, created=now, updated=now)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Conversation:
        """Read what the browser kept. A turn that was cut off by a reload counts as stopped.

        Raises ConversationError for anything that is not exactly this shape.
        """
        record = _checked(data, cls, "conversation")
        turns = record.pop("turns", [])
        if not isinstance(turns, list):
            raise ConversationError(f"conversation.turns must be a list, not {type(turns).__name__}")
        conversation = cls(**record)
        if not re.fullmatch(r"[0-9a-f-]{8,36}", conversation.id):
            raise ConversationError(f"conversation.id {conversation.id!r} is not a hexadecimal id")
        conversation.turns = [_turn(turn, f"turns[{i}]") for i, turn in enumerate(turns)]
        return conversation

    def ask(self, question: str, now: float) -> Turn:
        """Append a turn; the first question names the conversation."""
        if self.title == UNTITLED:
            self.title = title_of(question)
        turn = Turn(question=question)
        self.turns.append(turn)
        self.updated = now
        return turn


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "Status": (str,),
}


def _checked(data: object, cls: type, where: str) -> dict[str, Any]:
    """`data` as keyword arguments of dataclass `cls`, types checked (nested ones are left to the caller)."""
    if not isinstance(data, dict):
        raise ConversationError(f"{where} must be an object, not {type(data).__name__}")
    known = {f.name: str(f.type) for f in fields(cls)}
    for key, value in data.items():
        if key not in known:
            raise ConversationError(f"{where}.{key} is unknown; known are {', '.join(known)}")
        kinds = _KINDS.get(known[key])
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ConversationError(f"{where}.{key} must be {known[key]}, not {type(value).__name__}")
    if cls is Conversation and "id" not in data:
        raise ConversationError(f"{where}.id is missing")
    if cls is Turn and "question" not in data:
        raise ConversationError(f"{where}.question is missing")
    return dict(data)


def _turn(data: object, where: str) -> Turn:
    record = _checked(data, Turn, where)
    figures = record.pop("figures", None)
    turn = Turn(**record)
    if turn.status not in STATUSES:
        raise ConversationError(f"{where}.status {turn.status!r} is unknown; known are {', '.join(STATUSES)}")
    if turn.status == "running":
        turn.status = "stopped"
    if figures is not None:
        turn.figures = Figures(**_checked(figures, Figures, f"{where}.figures"))
    return turn


def title_of(question: str) -> str:
    """First line of the question, cut at a word near TITLE_CHARS."""
    line = " ".join(question.split())
    if len(line) <= TITLE_CHARS:
        return line or UNTITLED
    cut = line[:TITLE_CHARS].rsplit(" ", 1)[0] or line[:TITLE_CHARS]
    return cut.rstrip(",;:.") + "…"


# ── stream → turn ───────────────────────────────────────────────────────────────────────────────────────────


class Fold:
    """Folds the chunks of one streamed answer into a turn; the caller gives the time of each.

    `started`: when the request was sent. Reasoning lasts from its first to the first piece of the answer.
    """

    def __init__(self, turn: Turn, started: float) -> None:
        self.turn = turn
        self._started = started
        self._first: float | None = None
        self._last = started
        self._thinking_since: float | None = None
        self._usage: Mapping[str, Any] = {}

    def feed(self, chunk: Mapping[str, Any], now: float) -> None:
        """Take one `chat.completion.chunk`."""
        self.turn.model = str(chunk.get("model") or self.turn.model)
        usage = chunk.get("usage")
        if isinstance(usage, Mapping):
            self._usage = usage
        for choice in chunk.get("choices") or ():
            self._delta(choice.get("delta") or {}, now)
            self.turn.finish_reason = str(choice.get("finish_reason") or self.turn.finish_reason)

    def _delta(self, delta: Mapping[str, Any], now: float) -> None:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        content = delta.get("content") or ""
        if not reasoning and not content:
            return
        self._first = now if self._first is None else self._first
        self._last = now
        if reasoning:
            self._thinking_since = now if self._thinking_since is None else self._thinking_since
            self.turn.reasoning += reasoning
        if content:
            self._end_thought(now)
            self.turn.answer += content

    def _end_thought(self, now: float) -> None:
        if self._thinking_since is not None and self.turn.thought_s is None:
            self.turn.thought_s = now - self._thinking_since

    def finish(self, status: Status, now: float, error: str = "") -> None:
        """End the turn: stop the thought's clock, work out the figures."""
        self._end_thought(now)
        self.turn.status = status
        self.turn.error = error
        self.turn.answer = self.turn.answer.strip("\n")
        if self._first is not None:
            self.turn.figures = self._figures()

    def _figures(self) -> Figures:
        assert self._first is not None
        usage = self._usage
        figures = Figures(
            prompt_tokens=_count(usage, "prompt_tokens"),
            cached_tokens=_count(usage, "prompt_cache_hit_tokens")
            or _count(usage.get("prompt_tokens_details"), "cached_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            reasoning_tokens=_count(usage.get("completion_tokens_details"), "reasoning_tokens"),
            first_token_s=self._first - self._started,
        )
        if figures.completion_tokens > 1 and self._last > self._first:
            figures.tokens_per_s = (figures.completion_tokens - 1) / (self._last - self._first)
        return figures


def _count(usage: object, key: str) -> int:
    value = usage.get(key) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


# ── turn → API ──────────────────────────────────────────────────────────────────────────────────────────────


def api_messages(conversation: Conversation, system: str) -> list[dict[str, str]]:
    """The `messages` of the request: system prompt, answered turns, and the last question.

    Earlier reasoning is left out, as DeepSeek's templates drop it anyway; a turn without an answer (failed,
    stopped while thinking) is left out whole, so that the model never sees two questions in a row.
    """
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in conversation.turns[:-1]:
        if turn.answer:
            messages += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.answer},
            ]
    if conversation.turns:
        messages.append({"role": "user", "content": conversation.turns[-1].question})
    return messages


# ── turn → page ─────────────────────────────────────────────────────────────────────────────────────────────


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as `gr.Chatbot` shows it: question, thought, answer, error, figures."""
    return [message for turn in conversation.turns for message in turn_messages(turn)]


def turn_messages(turn: Turn) -> list[dict[str, Any]]:
    """One turn as Chatbot messages; consecutive assistant messages are drawn as one."""
    shown: list[dict[str, Any]] = [{"role": "user", "content": turn.question}]
    if turn.reasoning:
        thinking = turn.status == "running" and turn.thought_s is None
        metadata = {"title": thought_title(turn), "status": "pending" if thinking else "done"}
        shown.append(
            {"role": "assistant", "content": inert(turn.reasoning.strip("\n")), "metadata": metadata}
        )
    if turn.answer:
        shown.append({"role": "assistant", "content": inert(turn.answer)})
    if turn.error:
        note = f'<div class="hadal-error">{html.escape(" ".join(turn.error.split()))}</div>'
        shown.append({"role": "assistant", "content": note})
    line = figures_line(turn)
    if line:
        shown.append(
            {"role": "assistant", "content": f'<div class="hadal-figures">{html.escape(line)}</div>'}
        )
    return shown


def thought_title(turn: Turn) -> str:
    """ "Thinking…" while it lasts, then "Thought for 1.2 s"."""
    if turn.thought_s is None:
        return "Thinking…" if turn.status == "running" else "Thought"
    return f"Thought for {seconds(turn.thought_s)}"


def seconds(value: float) -> str:
    """A duration for people: 40 ms, 0.31 s, 1.2 s, 15 s, 2 min 5 s."""
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    if value < 0.995:
        return f"{value:.2f} s"
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def figures_line(turn: Turn) -> str:
    """The small print under a finished answer; empty while it runs and when there is nothing to say."""
    if turn.status == "running":
        return ""
    parts = []
    if turn.status == "stopped":
        parts.append("stopped")
    elif turn.finish_reason == "length":
        parts.append("cut off: the limit of tokens was reached")
    figures = turn.figures
    if figures is None:
        return parts[0].capitalize() if parts else ""
    if figures.tokens_per_s is not None:
        rate = figures.tokens_per_s
        parts.append(f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s")
    if figures.first_token_s is not None:
        parts.append(f"first token after {seconds(figures.first_token_s)}")
    if figures.completion_tokens:
        parts.append(_written(figures))
    if figures.prompt_tokens:
        cached = f" ({figures.cached_tokens:,} cached)" if figures.cached_tokens else ""
        parts.append(f"{figures.prompt_tokens:,} read{cached}")
    line = " · ".join(parts)
    return line[:1].upper() + line[1:]


def _written(figures: Figures) -> str:
    written = f"{figures.completion_tokens:,} tokens"
    return written + (f", {figures.reasoning_tokens:,} of them thought" if figures.reasoning_tokens else "")


def turn_at(conversation: Conversation, index: int) -> int:
    """The number of the turn whose messages contain Chatbot message `index`.

    Raises IndexError when the page and the conversation have gone apart.
    """
    seen = 0
    for number, turn in enumerate(conversation.turns):
        seen += len(turn_messages(turn))
        if index < seen:
            return number
    raise IndexError(f"message {index} is beyond the {seen} messages of this conversation; reload the page")
