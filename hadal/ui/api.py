"""The page's only way to a model: the public HTTP API, asked with httpx.

`GET /v1/models`, `GET /health`; `POST` of one question for one answer (plan, probe); `POST
/v1/chat/completions` with `stream: true` (server-sent events, one JSON chunk per `data:` line, `[DONE]` at
the end). Every failure becomes a `ServerError` whose text a person can act on.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

CONNECT_S = 5.0
SILENCE_S = 600.0
"""A server that sends nothing, not even a keep-alive comment, for so long is given up."""


class ServerError(Exception):
    """Something went wrong at the server or on the way, in words for the page's reader.

    `status`: the HTTP status, 0 if there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Model:
    """One entry of /v1/models. `context`: tokens; None if the server does not say.

    `thinking`: "always", "optional" or "never"; "" if the server does not say. `sampling`: what holds where a
    request sets nothing.
    """

    id: str
    context: int | None = None
    description: str = ""
    thinking: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def lets_choose_thinking(self) -> bool:
        """Whether a switch for reasoning can have an effect, as far as is known."""
        return self.thinking in ("optional", "")


class Client:
    """Asks one server. Holds no key: the visitor's key is an argument of each call."""

    def __init__(self, base_url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self._transport = transport

    def _http(self, key: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # trust_env=False: a proxy of the environment must not see requests to this machine.
        return httpx.AsyncClient(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            transport=self._transport,
            trust_env=False,
        )

    async def models(self, key: str = "") -> list[Model]:
        """The models on offer. Raises ServerError."""
        try:
            async with self._http(key) as http:
                response = await http.get("/v1/models", timeout=10.0)
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.content, response.headers)
                entries = response.json()["data"]
        except httpx.HTTPError as error:
            raise self._broken(error, started=False) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.base_url} answered, but not like a model server.") from error
        return [_model(entry) for entry in entries]

    async def post(self, path: str, body: Mapping[str, Any], key: str = "") -> dict[str, Any]:
        """One question, one JSON object in answer. Raises ServerError."""
        try:
            async with self._http(key) as http:
                response = await http.post(path, json=body)
            if response.status_code != 200:
                raise _refusal(response.status_code, response.content, response.headers)
            found = response.json()
        except httpx.HTTPError as error:
            raise self._broken(error, started=False) from error
        except ValueError as error:
            raise ServerError(f"{self.base_url} answered {path}, but not with JSON.") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.base_url} answered {path}, but not with a JSON object.")
        return found

    async def chat(self, body: Mapping[str, Any], key: str = "") -> AsyncIterator[dict[str, Any]]:
        """Stream the chunks of one answer. Leaving the iterator closes the connection, which stops the model.

        Raises ServerError, also for an error event inside the stream and for a stream that ends without
        `[DONE]`.
        """
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        started = False
        try:
            async with (
                self._http(key) as http,
                http.stream("POST", "/v1/chat/completions", json=request) as response,
            ):
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread(), response.headers)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServerError(plain(0, chunk["error"]))
                    started = True
                    yield chunk
        except httpx.HTTPError as error:
            raise self._broken(error, started) from error
        except json.JSONDecodeError as error:
            raise ServerError(
                "The server sent something that is not JSON in the middle of the answer."
            ) from error
        raise ServerError(
            "The server ended the answer early. It may have been stopped; press Retry to ask again."
        )

    def _broken(self, error: httpx.HTTPError, started: bool) -> ServerError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return ServerError("The server has been silent for too long. It may be stuck; look at its log.")
        if started:
            return ServerError("The connection to the server broke off in the middle of the answer.")
        return ServerError(
            f"The server at {self.base_url} does not answer. Is it still running? "
            "Start it again with: hadal serve"
        )


def presented_key(authorization: str) -> str:
    """The key of an Authorization header: a Bearer's token, a Basic one's password, or nothing."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _model(entry: Mapping[str, Any]) -> Model:
    context = entry.get("max_model_len") or entry.get("context_length")
    text = entry.get("description") or entry.get("title") or ""
    own = entry.get("hadal")
    own = own if isinstance(own, Mapping) else {}
    sampling = own.get("sampling")
    known = sampling if isinstance(sampling, Mapping) else {}
    return Model(
        str(entry["id"]),
        context if isinstance(context, int) else None,
        str(text),
        str(own.get("thinking") or ""),
        {str(name): value for name, value in known.items() if isinstance(value, int | float)},
    )


def _refusal(status: int, content: bytes, headers: Mapping[str, str]) -> ServerError:
    try:
        error: object = json.loads(content).get("error", {})
    except (ValueError, AttributeError):
        error = {}
    return ServerError(plain(status, error, headers.get("retry-after", "")), status)


def plain(status: int, error: object, retry_after: str = "") -> str:
    """The error in words for the page's reader: what happened, and what to do.

    `error`: OpenAI's object {message, type, param, code}, or Ollama's string.
    """
    known = error if isinstance(error, Mapping) else {"message": error}
    message = str(known.get("message") or "").strip().rstrip(".")
    code = known.get("code")
    detail = f" The server says: {message}." if message else ""
    if code == "context_length_exceeded":
        return (
            "This conversation has become longer than the model can read. Start a new one, or take back "
            "some turns." + detail
        )
    if status == 401:
        return "This server asks for an API key. Enter it under Settings, at API key."
    if status == 403:
        return f"The server refuses requests from this page.{detail}"
    if status == 404 and code != "model_not_found" and "there is nothing at" in message:
        return f"The server has no such route; this page needs Hadal's own server.{detail}"
    if status == 404:
        return f"The server does not have this model. Choose another one at the top.{detail}"
    if status == 413:
        return "This message is too large for the server. Shorten it."
    if status == 429 or (status == 503 and code == "overloaded"):
        wait = f" in {retry_after} s" if retry_after.isdigit() and retry_after != "1" else " in a moment"
        return f"The server has too much to do: its queue is full. Press Retry{wait}."
    if status == 503:
        return f"The server cannot answer now.{detail} Wait a little and press Retry."
    if status >= 500:
        return f"The server failed. This is its fault, not yours.{detail}"
    return f"The server refused this request.{detail}" if status else f"The answer was broken off.{detail}"
