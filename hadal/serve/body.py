"""Reading a request's body by hand: any content type, a size limit while it streams in, one deadline for all
of it.

FastAPI answers 422 to `curl -d '{…}'` without a JSON content type, and Ollama's documentation uses exactly
that; so no route declares a body, and each calls `read_json`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from hadal.serve.errors import ApiError, bad
from hadal.serve.fields import Fields
from hadal.serve.jsontext import JsonError, loads
from hadal.serve.settings import Settings

_CLOSE = {"connection": "close"}


class ClientGone(Exception):
    """The client closed the connection before its request was complete; nobody reads an answer."""


async def read_json(request: Request, settings: Settings) -> Fields:
    """The body as strict `Fields`. Raises ApiError 400, 408, 413, 415, or ClientGone."""
    data = await read_body(request, settings)
    try:
        value = loads(data)
    except JsonError as error:
        raise bad(str(error), code="invalid_json") from None
    return Fields(value)


async def read_body(request: Request, settings: Settings) -> bytes:
    """The raw body, at most `max_body_bytes`, complete within `body_timeout`."""
    _check_headers(request.headers, settings.max_body_bytes)
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await _collect(request, settings.max_body_bytes)
    except TimeoutError:
        message = f"the request body did not arrive within {settings.body_timeout:g} s"
        raise ApiError(408, message, headers=_CLOSE) from None


def _check_headers(headers: Mapping[str, str], limit: int) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415, f"content-encoding {ascii(encoding)[:40]} is not supported; send the body uncompressed"
        )
    length = headers.get("content-length", "0")
    # A body somewhat over the limit is read to its end and dropped, so that the client gets to read the
    # answer; one far over it is answered at once.
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > 4 * limit):
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {limit} bytes", headers=_CLOSE)


async def _collect(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message: Any = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size <= limit:
            parts.append(chunk)
        else:
            parts.clear()
        if size > 4 * limit:
            raise _too_large(limit)
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)
