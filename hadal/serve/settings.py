"""What an operator may set about the server, in one frozen record checked before anything listens.

Sizes are bytes, times are seconds. The defaults serve one person on one machine; each bound exists because
its absence has stopped some server somewhere (floods of headers, endless bodies, silent queues).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "localhost.localdomain"})


class SettingsError(ValueError):
    """A setting that would make the server unsafe or senseless; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """Everything the server needs to know besides its engines."""

    host: str = "127.0.0.1"
    port: int = 11435
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    """Further names that a `Host` header may carry; "*" turns the check off (only with a key)."""
    allowed_origins: tuple[str, ...] = ()
    """Further browser origins ("https://app.example"), exact; "*" is refused: a page's origin must be
    named."""
    public_paths: tuple[str, ...] = ("/health", "/ready")
    """Paths answered without a key. A path ending in "/" stands for all below it."""

    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 64 << 10
    header_timeout: float = 10.0
    """From the first byte of a connection (or of a next request) to the end of its headers."""
    body_timeout: float = 30.0
    """For the whole body of a request."""
    write_timeout: float = 60.0
    """For a client to take what was sent before its stream is ended."""
    keep_alive_timeout: float = 30.0
    """Idle time after which a kept connection is closed."""
    sse_comment_interval: float = 10.0
    """A comment line is sent on a stream that was silent for so long, so that proxies keep it open."""

    max_queue: int = 256
    """Sequences that may wait beyond those that run; more are answered 503 with Retry-After."""
    retry_after: int = 1
    queue_timeout: float | None = None
    """A request that has not begun to run so long after its arrival is answered 503; None: it waits."""
    drain_timeout: float = 60.0
    """After the first SIGTERM: how long running requests may take to end."""
    stall_timeout: float = 60.0
    """An engine with work that makes no step for so long is reported dead (/health 503) and its stacks are
    logged."""

    allow_pull: bool = False
    allow_delete: bool = False
    served_names: tuple[str, ...] = ()
    """Names under which the (single) model is served besides its own."""
    html_policy: str = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'self' data: "
        "blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'none'"
    )
    """Content-Security-Policy of HTML answers (the chat page); all others get `default-src 'none'`."""
    extra: dict[str, str] = field(default_factory=dict)
    """Free text for the operator's own use, shown by /version (for example a deployment's name)."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(
                f"port {self.port} is not between 0 and 65535; choose a free port such as 11435"
            )
        for key in self.api_keys:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or key.strip() != key:
                raise SettingsError(
                    "an API key must be at least 8 printable ASCII characters without outer spaces"
                )
        if not is_loopback(self.host) and not self.api_keys:
            raise SettingsError(
                f"refusing to listen on {self.host} without an API key: anyone who reaches it could use "
                "the model; set --api-key (or HADAL_API_KEY), or listen on 127.0.0.1"
            )
        if "*" in self.allowed_hosts and not self.api_keys:
            raise SettingsError(
                'allowed_hosts "*" needs an API key: without one it opens the door to DNS rebinding'
            )
        if "*" in self.allowed_origins:
            raise SettingsError(
                'allowed_origins "*" is refused: name each origin, such as "https://app.example"'
            )
        for name, value in self._positive().items():
            if not value > 0:
                raise SettingsError(f"{name} must be greater than 0, not {value}")

    def _positive(self) -> dict[str, float]:
        names = (
            "max_body_bytes max_header_bytes header_timeout body_timeout write_timeout "
            "keep_alive_timeout sse_comment_interval retry_after drain_timeout stall_timeout"
        )
        values = {name: float(getattr(self, name)) for name in names.split()}
        if self.queue_timeout is not None:
            values["queue_timeout"] = self.queue_timeout
        values["max_queue + 1"] = self.max_queue + 1
        return values


def is_loopback(host: str) -> bool:
    """True for 127.0.0.0/8, ::1 and the usual names of this machine to itself."""
    name = host.strip("[]").rstrip(".").lower()
    if name in LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
