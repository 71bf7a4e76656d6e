"""What the visitor may set in the side panel, its defaults and bounds, and the request that comes of it.

Defaults: DeepSeek's advice for R1 is temperature 0.6 and top-p 0.95 (https://github.com/deepseek-ai/DeepSeek-R1,
"Usage Recommendations"). The server checks every value again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hadal.ui.conversation import Conversation, api_messages


@dataclass(frozen=True)
class Settings:
    """In the order of the panel's components. `top_k` 0, `max_tokens` None and `seed` None mean: not sent."""

    model: str | None = None
    system: str = ""
    thinking: bool = True
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_tokens: int | None = None
    seed: int | None = None
    key: str = ""


DEFAULTS = Settings()
MAX_WHOLE = 2**31 - 1


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
        top_k=int(_number("Top-k", top_k, 0, 200)),
        max_tokens=_whole("Most tokens", max_tokens, 1),
        seed=_whole("Seed", seed, 0),
        key=str(key or "").strip(),
    )


def _number(name: str, value: object, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise SettingsError(
            f"{name} is {value!r}: it must be a number from {least:g} to {most:g}. See Settings."
        )
    return float(value)


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
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "thinking": {"type": "enabled" if settings.thinking else "disabled"},
    }
    if settings.top_k:
        body["top_k"] = settings.top_k
    if settings.max_tokens is not None:
        body["max_tokens"] = settings.max_tokens
    if settings.seed is not None:
        body["seed"] = settings.seed
    return body
