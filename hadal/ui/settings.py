"""What the visitor may set in the side panel, its defaults and bounds, and the request that comes of it.

Defaults: DeepSeek's advice for R1 is temperature 0.6 and top-p 0.95 (https://github.com/deepseek-ai/DeepSeek-R1,
"Usage Recommendations"). The server checks every value again.
"""

from __future__ import annotations

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


def request_body(conversation: Conversation, settings: Settings) -> dict[str, Any]:
    """The JSON body of /v1/chat/completions for the conversation's last question, without the streaming fields."""
    body: dict[str, Any] = {
        "model": settings.model or "",
        "messages": api_messages(conversation, settings.system),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "thinking": {"type": "enabled" if settings.thinking else "disabled"},
    }
    if settings.top_k:
        body["top_k"] = int(settings.top_k)
    if settings.max_tokens:
        body["max_tokens"] = int(settings.max_tokens)
    if settings.seed is not None:
        body["seed"] = int(settings.seed)
    return body
