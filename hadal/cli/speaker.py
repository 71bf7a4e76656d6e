"""Who answers: an engine in this process, or a server over its OpenAI-style HTTP API. Both speak in pieces.

`speak` yields `Piece`s (reasoning or content, as the text arrives) and last an `Answer` with its rate.
Setting `stop` (an Event) ends the answer early: the request is aborted, or the connection closed.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from hadal.cli.meter import Rate
from hadal.cli.options import Sampling
from hadal.cli.terminal import CliError

if TYPE_CHECKING:
    from hadal.engine import Engine

Messages = Sequence[dict[str, Any]]
DEFAULT_URL = "http://127.0.0.1:11435"


@dataclass(frozen=True)
class Piece:
    """Text that just arrived."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclass
class Answer:
    """What was said, how it ended, and how fast it came."""

    content: str
    reasoning: str
    finish_reason: str
    rate: Rate
    reasoning_seconds: float | None = None


class Speaker(Protocol):
    """Something that answers a conversation."""

    name: str

    def speak(
        self, messages: Messages, sampling: Sampling, think: bool | None, stop: Event
    ) -> Iterator[Piece | Answer]:
        """Pieces, then one `Answer`. `think`: on or off where the model can choose, None for its habit."""

    def facts(self) -> dict[str, Any]:
        """Name, place and limits, for /info."""


@dataclass
class _Record:
    """Collects the pieces of one answer and the times at which they came."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    reasoning_end: float | None = None
    parts: dict[str, list[str]] = field(default_factory=lambda: {"reasoning": [], "content": []})

    def add(self, piece: Piece) -> None:
        now = time.monotonic()
        self.first = self.first or now
        self.parts[piece.kind].append(piece.text)
        if piece.kind == "reasoning":
            self.reasoning_end = now

    def answer(self, finish_reason: str, prompt: int, cached: int, completion: int) -> Answer:
        ended = time.monotonic()
        rate = Rate.of(
            prompt=prompt,
            cached=cached,
            completion=completion,
            started=self.started,
            first=self.first,
            ended=ended,
        )
        thought = self.reasoning_end - self.started if self.reasoning_end else None
        content, reasoning = ("".join(self.parts[kind]) for kind in ("content", "reasoning"))
        return Answer(content.strip(), reasoning.strip(), finish_reason, rate, thought)


class LocalSpeaker:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        if engine.template is None:
            raise CliError(f"{engine.name} has no chat template; `hadal complete` continues plain text")
        self.engine, self.template = engine, engine.template
        self.name = engine.name
        self.defaults = engine.sampling_defaults

    def speak(
        self, messages: Messages, sampling: Sampling, think: bool | None, stop: Event
    ) -> Iterator[Piece | Answer]:
        """See `Speaker`."""
        from hadal.text.parsers import ReasoningParser

        params = sampling.params(self.defaults)
        template = self.template
        inside, may_open = (
            template.starts_in_reasoning(think, messages),
            template.may_open_reasoning(messages),
        )
        parser, record, last = ReasoningParser(inside, may_open=may_open), _Record(), None
        stream: Any = self.engine.chat_stream(list(messages), params, thinking=think)
        try:
            for last in stream:
                yield from self._pieces(parser.push(last.text), record)
                if stop.is_set():
                    break
        finally:
            stream.close()  # aborts the request if it still runs
        yield from self._pieces(parser.finish(), record)
        if last is None:
            raise CliError("the engine ended the answer before its first token; run again with HADAL_DEBUG=1")
        if last.error:
            raise CliError(f"the engine could not answer: {last.error}")
        reason = last.finish_reason or "abort"
        answer = record.answer(reason, last.prompt_tokens, last.cached_tokens, last.completion_tokens)
        answer.rate = self._with_share(answer.rate)
        yield answer

    @staticmethod
    def _pieces(found: Sequence[Any], record: _Record) -> Iterator[Piece]:
        for item in found:
            piece = Piece(item.kind, item.text)
            record.add(piece)
            yield piece

    def _with_share(self, rate: Rate) -> Rate:
        from dataclasses import replace

        if rate.decode is None:
            return rate
        return replace(rate, bandwidth_share=bandwidth_share(self.engine, rate))

    def facts(self) -> dict[str, Any]:
        """See `Speaker`."""
        engine = self.engine
        return {
            "model": engine.name,
            "folder": str(engine.folder) if engine.folder else None,
            "context": f"{engine.max_model_len} tokens",
            "weights": f"{engine.dtype} on {engine.device}".replace("torch.", ""),
            "sampling the model asks for": ", ".join(f"{k} {v}" for k, v in self.defaults.items()) or "none",
        }


def bandwidth_share(engine: Engine, rate: Rate) -> float | None:
    """Share of the measured memory bandwidth that decoding at `rate` uses: the bytes are counted on the live
    weights, so that they hold for packed ones too."""
    import torch

    from hadal.bench.work import step_work
    from hadal.cli import machine

    if rate.decode is None:
        return None
    drafting = engine.stats().speculation
    per_step = (drafting.tokens_per_step if drafting is not None else None) or 1.0
    read = step_work(engine).bytes(1, rate.prompt_tokens + rate.completion_tokens / 2)
    return read * rate.decode / per_step / machine.bandwidth(torch.device(engine.device))


class Http:
    """JSON requests to one server, with its faults as one line."""

    def __init__(self, url: str, key: str | None) -> None:
        self._parts, self._key = urlsplit(url if "//" in url else f"http://{url}"), key
        try:
            valid = self._parts.scheme in ("http", "https") and self._parts.hostname and self._parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise CliError(f"{url!r} is no server's address; give one like {DEFAULT_URL}", 2)
        self.url = f"{self._parts.scheme}://{self._parts.netloc}"
        self._base = self._parts.path.rstrip("/").removesuffix("/v1")

    def connect(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """The open response, with a good status; everything else is a `CliError`."""
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=600)
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, self._base + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as fault:
            raise CliError(
                f"no answer from {self.url} ({fault}); is `hadal serve` running? `hadal ps` tells"
            ) from None
        if response.status >= 400:
            raise CliError(_refusal(self.url, response.status, response.read(65536)))
        return response

    def get(self, path: str) -> dict[str, Any]:
        """One JSON object from the server."""
        with self.connect("GET", path) as response:
            try:
                found = json.loads(response.read())
            except ValueError:
                raise CliError(f"{self.url}{path} did not answer in JSON; is it a Hadal server?") from None
        return found if isinstance(found, dict) else {}


class RemoteSpeaker:
    """A server that speaks OpenAI's chat completions; Hadal's own, by default on this machine."""

    def __init__(self, url: str, key: str | None, model: str | None = None) -> None:
        self._http = Http(url, key)
        self.url = self._http.url
        known = [str(entry["id"]) for entry in self._http.get("/v1/models").get("data", [])]
        if not known:
            raise CliError(f"{self.url} serves no model; start one with `hadal serve MODEL`")
        if model is not None and model not in known:
            raise CliError(f"{self.url} serves {', '.join(known)}, not {model!r}; leave the name out", 2)
        self.name = model or known[0]

    def speak(
        self, messages: Messages, sampling: Sampling, think: bool | None, stop: Event
    ) -> Iterator[Piece | Answer]:
        """See `Speaker`."""
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            **sampling.given(),
        }
        body["stream_options"] = {"include_usage": True}
        if think is not None:
            body["thinking"] = {"type": "enabled" if think else "disabled"}
        record, reason, usage = _Record(), "abort", dict[str, Any]()
        with self._http.connect("POST", "/v1/chat/completions", body) as response:
            for event in _events(response):
                if "error" in event:
                    raise CliError(_refusal(self.url, 200, json.dumps(event).encode()))
                usage = event.get("usage") or usage
                for choice in event.get("choices", []):
                    reason = choice.get("finish_reason") or reason
                    yield from self._deltas(choice.get("delta") or {}, record)
                if stop.is_set():
                    break
        prompt, cached = usage.get("prompt_tokens", 0), usage.get("prompt_cache_hit_tokens", 0)
        yield record.answer(reason, prompt, cached, usage.get("completion_tokens", 0))

    @staticmethod
    def _deltas(delta: dict[str, Any], record: _Record) -> Iterator[Piece]:
        texts = (delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content"))
        for kind, text in zip(("reasoning", "content"), texts, strict=True):
            if text:
                piece = Piece("reasoning" if kind == "reasoning" else "content", text)
                record.add(piece)
                yield piece

    def facts(self) -> dict[str, Any]:
        """See `Speaker`."""
        return {"model": self.name, "server": self.url}


def _refusal(url: str, status: int, body: bytes) -> str:
    """One line from a server's error body, with what to do about the usual ones."""
    try:
        error = json.loads(body)["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace").strip() or http.client.responses.get(status, "")
    remedy = {401: "; give the server's key with --api-key or HADAL_API_KEY", 503: "; try again in a moment"}
    return f"{url} answered {status}: {message}{remedy.get(status, '')}"


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, until `[DONE]`; a comment gives an empty one."""
    for raw in response:
        line = raw.decode("utf-8").strip()
        if not line.startswith("data:"):
            if line.startswith(":"):
                yield {}
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        yield json.loads(data)
