"""A streaming client of the OpenAI API, small enough that it is not what is measured: asyncio and JSON.

One connection a request. Events are read as they come; the time of each that brings text or tokens is noted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LINE_LIMIT = 1 << 22  # bytes of one event


class ServerFault(RuntimeError):
    """The server cannot be used: no answer, or a refusal; one line."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, the model to ask for, and the key. `exact`: ask it to count tokens in each
    event."""

    host: str
    port: int
    base: str = ""
    secure: bool = False
    key: str | None = None
    model: str = ""
    exact: bool = True

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Endpoint:
        """From `http://host:port`, with or without `/v1`. ServerFault for what is no address."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise ServerFault(f"{url!r} is no server's address; give one like http://127.0.0.1:11435")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, base, parts.scheme == "https", key)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.base}"


@dataclass
class Answer:
    """One request: perf_counter times, and (time, tokens) of what came. `fault` None: it ended well."""

    sent: float
    ended: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    fault: str | None = None
    late: float = 0.0

    @property
    def ok(self) -> bool:
        return self.fault is None

    @property
    def ttft(self) -> float:
        """Seconds until the first token."""
        return self.arrivals[0][0] - self.sent if self.arrivals else float("inf")

    @property
    def per_token(self) -> float:
        """Mean seconds for each token after the first (TPOT)."""
        later = self.output_tokens - self.arrivals[0][1] if self.arrivals else 0
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later > 0 else 0.0

    def gaps(self) -> list[float]:
        """Seconds between events that brought tokens (ITL)."""
        times = [at for at, _ in self.arrivals]
        return [b - a for a, b in itertools.pairwise(times)]


async def models(endpoint: Endpoint) -> list[str]:
    """Names that the server answers to. ServerFault when it does not answer, or refuses."""
    try:
        status, lines = await asyncio.wait_for(_request(endpoint, "GET", "/v1/models", None), 10)
        body = "".join([line async for line in lines])
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as fault:
        raise ServerFault(
            f"no answer from {endpoint.url} ({fault or type(fault).__name__}); is `hadal serve` running? "
            "`hadal ps` tells"
        ) from None
    if status != 200:
        raise ServerFault(f"{endpoint.url} refused with status {status}: {_message(body)}")
    try:
        return [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        raise ServerFault(f"{endpoint.url}/v1/models did not answer as OpenAI's API does") from None


async def ask(endpoint: Endpoint, path: str, fields: dict[str, Any], timeout: float) -> Answer:
    """Stream one answer; whatever goes wrong is in its `fault`."""
    answer = Answer(time.perf_counter())
    options: dict[str, Any] = {"include_usage": True}
    if endpoint.exact:
        options["continuous_usage_stats"] = True
    body = {"model": endpoint.model, "temperature": 0, **fields, "stream": True, "stream_options": options}
    try:
        await asyncio.wait_for(_stream(endpoint, path, body, answer), timeout)
    except TimeoutError:
        answer.fault = f"no end within {timeout:g} s"
    except (OSError, asyncio.IncompleteReadError, ValueError) as fault:
        answer.fault = f"connection: {type(fault).__name__}: {fault}"
    answer.ended = time.perf_counter()
    if answer.fault is None and not answer.arrivals:
        answer.fault = "the answer has no token"
    return answer


async def _stream(endpoint: Endpoint, path: str, body: dict[str, Any], answer: Answer) -> None:
    status, lines = await _request(endpoint, "POST", path, body)
    if status != 200:
        answer.fault = f"status {status}: {_message(''.join([line async for line in lines]))}"
        return
    ended = False
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            ended = True
            continue
        _take(json.loads(data), answer)
    if not ended and answer.fault is None:
        answer.fault = "the stream ended early"


def _take(event: dict[str, Any], answer: Answer) -> None:
    """Book one event: how many tokens it brought, by the server's count where it counts, else one."""
    if "error" in event:
        answer.fault = _message(json.dumps(event))
        return
    usage = event.get("usage") or {}
    brought = any(_has_text(choice) for choice in event.get("choices") or ())
    counted = usage.get("completion_tokens")
    count = counted - answer.output_tokens if counted is not None else int(brought)
    if brought or (count > 0 and event.get("choices")):
        answer.arrivals.append((time.perf_counter(), max(count, 0)))
    answer.output_tokens += max(count, 0)
    answer.input_tokens = usage.get("prompt_tokens", answer.input_tokens)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(
        choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    )


def _message(body: str) -> str:
    try:
        error = json.loads(body).get("error", {})
        text = error.get("message") if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        text = body
    return " ".join(str(text or body).split())[:200]


async def _request(
    endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None
) -> tuple[int, AsyncIterator[str]]:
    """Send a request; its status, and its body's lines as they come."""
    context = ssl.create_default_context() if endpoint.secure else None
    reader, writer = await asyncio.open_connection(
        endpoint.host, endpoint.port, ssl=context, limit=_LINE_LIMIT
    )
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {endpoint.base}{path} HTTP/1.1",
            f"Host: {endpoint.url.partition('//')[2].partition('/')[0]}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        if endpoint.key:
            head.append(f"Authorization: Bearer {endpoint.key}")
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        status, headers = await _head(reader)
    except BaseException:
        writer.close()
        raise
    return status, _lines(reader, writer, headers)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers. ValueError for what is not HTTP."""
    first = (await reader.readline()).decode("latin-1").split(None, 2)
    if len(first) < 2 or not first[0].startswith("HTTP/1.") or not first[1].isdigit():
        raise ValueError("the answer is not HTTP")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first[1]), headers


async def _lines(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]
) -> AsyncIterator[str]:
    """Lines of a body; closes the connection at its end, or when the reader leaves."""
    rest = b""
    try:
        async for piece in _pieces(reader, headers):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.decode("utf-8", "replace")
        if rest:
            yield rest.decode("utf-8", "replace")
    finally:
        writer.close()


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body: chunked, of a stated length, or to the connection's end."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(1 << 16):
            yield piece
