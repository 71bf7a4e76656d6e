"""Inference: requests, page allocator, scheduler (no tensors), runner (tensors), engine, async engine.

`request`, `blocks` and `scheduler` import no torch; the heavy names below are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hadal.engine.request import (
    Completion,
    EngineError,
    PoolingParams,
    RequestError,
    SamplingParams,
    TokenLogprob,
    Update,
)

if TYPE_CHECKING:
    from hadal.engine.async_engine import AsyncEngine
    from hadal.engine.engine import Engine

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineError",
    "PoolingParams",
    "RequestError",
    "SamplingParams",
    "TokenLogprob",
    "Update",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from hadal.engine.engine import Engine

        return Engine
    if name == "AsyncEngine":
        from hadal.engine.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module 'hadal.engine' has no attribute {name!r}")
