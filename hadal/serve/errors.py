"""Errors as clients expect them: OpenAI's `{"error": {message, type, param, code}}`, Ollama's `{"error":
"…"}`.

Status codes follow DeepSeek's table: 400 bad request, 401 no or wrong key, 404 unknown model or route, 422 is
never used (400 instead), 429 too many, 500 our fault, 503 overloaded, draining or dead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from hadal.serve.jsontext import dumps

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than 2xx. `param`: the JSON field at fault; `code`: OpenAI's machine-readable word."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def openai_body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def ollama_body(self) -> dict[str, Any]:
        """Ollama's error object; the field's name is part of the sentence."""
        return {"error": self.message}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, retry_after: int) -> ApiError:
    """A 503 that clients retry by themselves (the openai clients honour Retry-After)."""
    return ApiError(503, message, code="overloaded", headers={"retry-after": str(retry_after)})


def error_response(error: ApiError, path: str) -> Response:
    """The answer in the dialect of the path: Ollama's under /api/, OpenAI's elsewhere."""
    body = error.ollama_body() if path.startswith("/api/") else error.openai_body()
    return Response(dumps(body), error.status, dict(error.headers), "application/json")
