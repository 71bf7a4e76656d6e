"""What the visitor may set in the side panel, its defaults and bounds, and the request that comes of it.

Temperature and top-p are sent only where the visitor sets them: else the model's own hold (R1 asks for 0.6
and 0.95, hadal-mini for 0). The server checks every value again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hadal.ui.conversation import Conversation, api_messages


@dataclass(frozen=True)
class Settings:
    """In the order of the panel's components. None, and 0 for `top_k`, mean: not sent."""

    model: str | None = None
    system: str = ""
    thinking: bool | None = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    max_tokens: int | None = None
    seed: int | None = None
    key: str = ""


DEFAULTS = Settings()
MAX_WHOLE = 2**31 - 1
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+")


class SettingsError(ValueError):
    """A value in the panel that cannot be sent; the message names it and what would do."""


def from_panel(values: Sequence[Any]) -> Settings:
    """The panel's raw values, in the order of Settings, as the browser sent them. Raises SettingsError."""
    model, system, thinking, temperature, top_p, top_k, max_tokens, seed, key = values
    return Settings(
        model=str(model) if model else None,
        system=str(system or ""),
        thinking=bool(thinking),
        temperature=_number("Temperature", temperature, 0.0, 2.0),
        top_p=_number("Top-p", top_p, 0.01, 1.0),
        top_k=int(_number("Top-k", top_k, 0, 200) or 0),
        max_tokens=_whole("Most tokens", max_tokens, 1),
        seed=_whole("Seed", seed, 0),
        key=str(key or "").strip(),
    )


def _number(name: str, value: object, least: float, most: float) -> float | None:
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    number = float(text) if _NUMBER.fullmatch(text) else float("nan")
    if not least <= number <= most:
        shown = text[:20]
        raise SettingsError(
            f"{name} is {shown!r}: it must be empty or a number from {least:g} to {most:g}. See Settings."
        )
    return number


def _whole(name: str, value: object, least: int) -> int | None:
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not least <= int(text[:20]) <= MAX_WHOLE:
        raise SettingsError(
            f"{name} is {text[:20]!r}: it must be empty or a whole number from {least}. See Settings."
        )
    return int(text)


def request_body(conversation: Conversation, settings: Settings) -> dict[str, Any]:
    """The JSON body of /v1/chat/completions for the conversation's last question, without the streaming
    fields."""
    body: dict[str, Any] = {
        "model": settings.model or "",
        "messages": api_messages(conversation, settings.system),
    }
    if settings.thinking is not None:
        body["thinking"] = {"type": "enabled" if settings.thinking else "disabled"}
    if settings.top_k:
        body["top_k"] = settings.top_k
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        value = getattr(settings, name)
        if value is not None:
            body[name] = value
    return body
