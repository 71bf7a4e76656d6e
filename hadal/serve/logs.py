"""One log line per request, and nothing in it that a client could use to forge another.

Everything that comes from outside is escaped to printable ASCII before it is logged, so CR, LF and terminal
escapes arrive as `\\r`, `\\n`, `\\x1b`.
"""

from __future__ import annotations

import logging
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("hadal.serve")


def escaped(text: str, limit: int = 200) -> str:
    """Printable ASCII, one line, at most `limit` characters (then an ellipsis)."""
    cut = text[:limit].encode("unicode_escape").decode("ascii")
    return cut if len(text) <= limit else cut + "..."


class AccessLog:
    """Outermost ASGI middleware: `METHOD path status ms client`, plus what the route noted in
    scope["state"]."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        status = 0
        notes: dict[str, object] = {"id": secrets.token_hex(6)}
        scope.setdefault("state", {})["notes"] = notes
        mark = (b"x-request-id", str(notes["id"]).encode())

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), mark]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            client = scope.get("client") or ("-", 0)
            # What a page loads to draw itself is noted as quiet: a visit is then one line, not eighty.
            level = logging.DEBUG if notes.pop("quiet", False) and 0 < status < 400 else logging.INFO
            extra = "".join(f" {key}={escaped(str(value), 80)}" for key, value in notes.items())
            milliseconds = (time.monotonic() - start) * 1000
            # 499: nginx's word for a client that left before the answer began.
            logger.log(
                level,
                "%s %s %d %.0fms %s%s",
                escaped(scope["method"], 20),
                escaped(scope["path"]),
                status or 499,
                milliseconds,
                escaped(str(client[0]), 60),
                extra,
            )
