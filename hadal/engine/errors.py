"""What the engine raises: a request that cannot be served, an engine that cannot go on."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be served. `field` names the offending parameter, `code` the kind of error."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code


class EngineError(RuntimeError):
    """The engine cannot start or go on; the message says why and what to change."""
