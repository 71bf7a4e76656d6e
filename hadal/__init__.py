"""Hadal: the DeepSeek-V3/R1 system in one readable package.

    from hadal import Engine, SamplingParams

    engine = Engine.load("hadal-mini")
    print(engine.chat([{"role": "user", "content": "12 + 35?"}], SamplingParams(temperature=0)).text)

Importing `hadal` costs nothing: the names below are fetched from their rooms on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadal.config import ModelConfig
    from hadal.engine import AsyncEngine, Engine, SamplingParams

__version__ = "0.1.0"
__all__ = ["AsyncEngine", "Engine", "ModelConfig", "SamplingParams", "__version__"]

_HOME = {
    "Engine": "hadal.engine",
    "AsyncEngine": "hadal.engine",
    "SamplingParams": "hadal.engine",
    "ModelConfig": "hadal.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hadal' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
