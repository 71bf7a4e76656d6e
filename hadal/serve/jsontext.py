"""JSON in and out: strict when reading (depth, NaN, lone surrogates, bad UTF-8), compact when writing.

Reading uses pydantic's jiter: linear time, no recursion beyond 200 levels, and it refuses NaN, Infinity,
invalid UTF-8, a byte-order mark, lone surrogates and integers of more than 4300 digits.
"""

from __future__ import annotations

from typing import Any

import pydantic_core

MAX_DEPTH = 200  # jiter's own limit, enforced while it reads; tests/serve/test_jsontext.py holds it to that


MAX_CONTAINERS = 1_000_000  # 32 MiB of "[],[],…" would become 640 MB of lists and seconds of work
MAX_ITEMS = 4_000_000


class JsonError(ValueError):
    """The text is not acceptable JSON; the message says why."""


def loads(data: bytes) -> Any:
    """Parse one JSON document. Raises JsonError."""
    if not data.strip():
        raise JsonError("the request body is empty; send a JSON object")
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS or data.count(b",") > MAX_ITEMS:
        raise JsonError(
            f"the request body has more than {MAX_CONTAINERS} lists and objects or {MAX_ITEMS} items"
        )
    try:
        return pydantic_core.from_json(data, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        reason = str(error)
        if "recursion limit" in reason:
            reason = f"nested deeper than {MAX_DEPTH} levels"
        raise JsonError(f"the request body is not acceptable JSON: {reason}") from None


def dumps(value: Any) -> bytes:
    """Compact UTF-8 JSON. Written by pydantic's serializer: a streamed event costs a few microseconds."""
    return pydantic_core.to_json(value, inf_nan_mode="null")
