"""Who may speak to the server: Host, Origin and key, checked on the raw ASGI scope before anything else runs.

- Host: a page that rebinds its own name to 127.0.0.1 (CVE-2024-28224) still sends its name; it is refused.
- Origin: a `text/plain` POST skips the browser's preflight, so the server itself refuses foreign origins.
- Key: every path is denied without one unless listed as public; keys are compared as SHA-256 digests in
  constant time (CVE-2025-59425). The path checked is `scope["path"]`, the very one that is routed
  (CVE-2026-48710).

Then the answer gets its protective headers: CSP, nosniff, no-referrer, and CORS for allowed origins only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hadal.serve.errors import ApiError, error_response
from hadal.serve.settings import Settings, is_loopback

_HOST = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?$")
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"
_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"


def host_name(header: str) -> str | None:
    """The name in a Host header, lower case, without port; None if it is not a plain host."""
    match = _HOST.match(header)
    return match.group(1).strip("[]").rstrip(".").lower() if match else None


def key_digest(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """ASGI middleware: refuse or pass on, and dress the answer. Sets scope["state"]["cache_salt"] per key."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self.digests = [key_digest(key) for key in settings.api_keys]
        self.local = is_loopback(settings.host)
        self.names = {name.lower() for name in settings.allowed_hosts} | {settings.host.strip("[]").lower()}
        if not self.local:
            self.names.add(socket.gethostname().lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        origin = headers.get("origin")
        try:
            self._check_size(scope)
            self._check_host(headers)
            self._check_origin(origin, headers)
            if scope["method"] == "OPTIONS" and origin and "access-control-request-method" in headers:
                await self._preflight(origin, headers, send)
                return
            self._check_key(scope, headers)
        except ApiError as refusal:
            await error_response(refusal, scope["path"])(scope, receive, self._dressed(send, None))
            return
        await self.app(scope, receive, self._dressed(send, origin))

    def _check_size(self, scope: Scope) -> None:
        size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        size += sum(len(key) + len(value) + 4 for key, value in scope["headers"])
        if size > self.settings.max_header_bytes:
            message = f"the request's headers are larger than {self.settings.max_header_bytes} bytes"
            raise ApiError(431, message, headers={"connection": "close"})

    def _check_host(self, headers: dict[str, str]) -> None:
        header = headers.get("host", "")
        name = host_name(header)
        if name is None or not self._known_host(name):
            raise ApiError(
                403,
                f"Host {header[:80]!a} is not one of this server's names; start it with "
                "--allowed-host NAME if it should be",
                code="host_not_allowed",
            )

    def _known_host(self, name: str) -> bool:
        if name in self.names or "*" in self.names or is_loopback(name):
            return True
        if self.local:
            return False
        try:  # an address cannot be rebound, a name can
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_origin(self, origin: str | None, headers: dict[str, str]) -> None:
        if origin is None or origin in self.settings.allowed_origins:
            return
        try:
            parts = urlsplit(origin)
            name = host_name(parts.netloc)
        except ValueError:
            name = None
        if name is not None and parts.scheme in ("http", "https") and not parts.path and not parts.query:
            if parts.netloc.lower() == headers.get("host", "").lower():
                return
            # Any port, or none: Page Assist sends "http://127.0.0.1". Pages of this machine only.
            if self.local and is_loopback(name):
                return
        raise ApiError(
            403,
            f"Origin {origin[:80]!a} is not allowed; start the server with --allowed-origin ORIGIN "
            "if it should be",
            code="origin_not_allowed",
        )

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        state = scope.setdefault("state", {})
        state["cache_salt"] = ""
        if not self.digests:
            return
        given = _presented_key(headers.get("authorization", ""))
        digest = key_digest(given)
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        if any(matches):
            state["cache_salt"] = digest.hex()
            return
        if self._is_public(scope["path"]):
            return
        scheme = (
            'Basic realm="hadal", charset="UTF-8"' if "text/html" in headers.get("accept", "") else "Bearer"
        )
        raise ApiError(
            401,
            "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"www-authenticate": scheme},
        )

    def _is_public(self, path: str) -> bool:
        return any(path == item or (item.endswith("/") and path.startswith(item)) for item in self._public())

    def _public(self) -> tuple[str, ...]:
        return self.settings.public_paths

    async def _preflight(self, origin: str, headers: dict[str, str], send: Send) -> None:
        wanted = headers.get("access-control-request-headers", "authorization, content-type")
        answer = [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", _METHODS.encode()),
            (b"access-control-allow-headers", wanted[:2000].encode("latin-1")),
            (b"access-control-max-age", b"600"),
            (b"vary", b"origin"),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": answer})
        await send({"type": "http.response.body", "body": b""})

    def _dressed(self, send: Send, origin: str | None) -> Send:
        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = self._protective(list(message.get("headers", [])), origin)
            await send(message)

        return dressed

    def _protective(
        self, headers: list[tuple[bytes, bytes]], origin: str | None
    ) -> list[tuple[bytes, bytes]]:
        names = {name.lower(): value for name, value in headers}
        html = names.get(b"content-type", b"").startswith(b"text/html")
        policy = self.settings.html_policy if html else _API_POLICY
        wanted = [
            (b"content-security-policy", policy.encode("latin-1")),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"cross-origin" if origin else b"same-origin"),
        ]
        if origin is not None:
            wanted += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
        return headers + [(name, value) for name, value in wanted if name not in names]


def _presented_key(authorization: str) -> str:
    """The key of a Bearer header, or the password of a Basic one (so that a browser can open the chat
    page)."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(value.strip(), validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return ""
        return decoded.partition(":")[2]
    return ""
