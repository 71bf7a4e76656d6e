"""Hadal: the DeepSeek-V3/R1 system in one readable package.

    from hadal import Engine, SamplingParams

    engine = Engine.load("hadal-mini")
    print(engine.chat([{"role": "user", "content": "12 + 35?"}], SamplingParams(temperature=0)).text)

Importing `hadal` costs nothing: the names below are fetched from their rooms on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadal.config import ModelConfig
    from hadal.engine import AsyncEngine, Engine, SamplingParams

# torch's OpenMP threads spin for milliseconds after every loop, on the very cores that the CPU kernels' own
# threads want: prompts took up to three times as long. 2,000 turns are about 0.1 ms. OpenMP reads this as
# torch is loaded, so it is set here.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

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
