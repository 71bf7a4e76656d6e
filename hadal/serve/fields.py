"""Strict reading of a JSON object: every field is taken by name, type and two-sided bound; what is left is
refused.

A request's field is honoured or refused, never dropped: `finish()` raises for every key that nobody took,
with the nearest known name as a suggestion. `true` is not 1, "1" is not 1, 1.5 is not an integer; null stands
for absent.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hadal.serve.errors import bad

_JSON_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}


def kind(value: Any) -> str:
    """The JSON type of a value, as people call it."""
    if value is None:
        return "null"
    return _JSON_NAMES.get(type(value), "an object")


def shown(value: Any, limit: int = 40) -> str:
    """A value for an error message: short, printable, never the client's whole text."""
    text = repr(value) if not isinstance(value, str) else ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({kind(value)})"


class Fields:
    """One JSON object being read. `path` prefixes the names in error messages ("response_format.")."""

    def __init__(self, data: Any, path: str = "") -> None:
        if not isinstance(data, dict):
            where = path.rstrip(".") or "the request body"
            raise bad(f"{where} must be a JSON object, not {kind(data)}", path.rstrip(".") or None)
        self.data: dict[str, Any] = data
        self.path = path
        self.known: list[str] = []

    def name(self, field: str) -> str:
        """The field's full name for messages."""
        return f"{self.path}{field}"

    def take(self, field: str) -> Any:
        """The raw value, or None if absent or null. Marks the field as known."""
        self.known.append(field)
        return self.data.get(field)

    def has(self, field: str) -> bool:
        """Present and not null."""
        return self.data.get(field) is not None

    def integer(self, field: str, low: int, high: int) -> int | None:
        """An integer in [low, high]."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(f"{self.name(field)} must be an integer, not {shown(value)}", self.name(field))
        if not low <= value <= high:
            message = f"{self.name(field)} must be between {low} and {high}, not {shown(value)}"
            raise bad(message, self.name(field))
        return value

    def number(self, field: str, low: float, high: float) -> float | None:
        """A finite number in [low, high]."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(f"{self.name(field)} must be a number, not {shown(value)}", self.name(field))
        if not low <= value <= high or not math.isfinite(value):
            message = f"{self.name(field)} must be between {low:g} and {high:g}, not {shown(value)}"
            raise bad(message, self.name(field))
        return float(value)

    def boolean(self, field: str) -> bool | None:
        """true or false."""
        value = self.take(field)
        if value is not None and not isinstance(value, bool):
            raise bad(f"{self.name(field)} must be true or false, not {shown(value)}", self.name(field))
        return value

    def string(self, field: str, *, max_bytes: int | None = None) -> str | None:
        """A string, of at most `max_bytes` in UTF-8."""
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, str):
            raise bad(f"{self.name(field)} must be a string, not {shown(value)}", self.name(field))
        if max_bytes is not None and len(value.encode()) > max_bytes:
            raise bad(f"{self.name(field)} must be at most {max_bytes} bytes long", self.name(field))
        return value

    def choice(self, field: str, options: Sequence[str]) -> str | None:
        """One of `options`."""
        value = self.take(field)
        if value is None:
            return None
        if value not in options or not isinstance(value, str):
            listed = ", ".join(repr(option) for option in options)
            raise bad(f"{self.name(field)} must be one of {listed}, not {shown(value)}", self.name(field))
        return value

    def array(self, field: str, most: int) -> list[Any] | None:
        """An array of at most `most` items."""
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, list):
            raise bad(f"{self.name(field)} must be an array, not {shown(value)}", self.name(field))
        if len(value) > most:
            message = f"{self.name(field)} has {len(value)} items; at most {most} are allowed"
            raise bad(message, self.name(field))
        return value

    def object(self, field: str) -> Fields | None:
        """A nested object."""
        value = self.take(field)
        return None if value is None else Fields(value, f"{self.name(field)}.")

    def refuse(self, field: str, reason: str) -> None:
        """A known field that this server does not honour: 400 if it is present."""
        if self.take(field) is not None:
            raise bad(
                f"{self.name(field)} is not supported: {reason}", self.name(field), "unsupported_parameter"
            )

    def neutral(self, field: str, value: Any, reason: str) -> None:
        """A known field that is honoured only at the value that changes nothing."""
        given = self.take(field)
        if given is not None and (given != value or isinstance(given, bool) != isinstance(value, bool)):
            message = (
                f"{self.name(field)} = {shown(given)} is not supported ({reason}); only {shown(value)} is"
            )
            raise bad(message, self.name(field), "unsupported_parameter")

    def ignore(self, fields: Iterable[str]) -> None:
        """Fields that change nothing about the output (bookkeeping of clients)."""
        self.known.extend(fields)

    def finish(self) -> None:
        """Refuse what nobody took."""
        known = set(self.known)
        for field in self.data:
            if field not in known:
                raise bad(
                    unknown_field(self.name(field), [self.name(k) for k in self.known]),
                    self.name(field)[:200],
                )


def unknown_field(field: str, known: Sequence[str]) -> str:
    """The message for an unknown field, with the nearest known one."""
    near = difflib.get_close_matches(field[:100], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown field {shown(field, 80)}{hint}"


def plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A dict without its None values."""
    return {key: value for key, value in mapping.items() if value is not None}
