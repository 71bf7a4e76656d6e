"""Weights: published safetensors folders ↔ `Transformer`, FP8 conversion, and the models on this machine.

`load`, `save` and `convert` need torch; `hub` and `names` do not: everything is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hadal.weights.errors import HubError, NotFoundError, PullError, WeightsError

if TYPE_CHECKING:
    from hadal.weights import hub, names
    from hadal.weights.conversion import convert
    from hadal.weights.folder import load
    from hadal.weights.info import ModelInfo, inspect
    from hadal.weights.writer import save

__all__ = [
    "HubError",
    "ModelInfo",
    "NotFoundError",
    "PullError",
    "WeightsError",
    "convert",
    "hub",
    "inspect",
    "load",
    "names",
    "save",
]

_HOME = {"load": "folder", "save": "writer", "convert": "conversion", "inspect": "info", "ModelInfo": "info"}


def __getattr__(name: str) -> Any:
    if name in ("hub", "names"):
        return importlib.import_module(f"hadal.weights.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"hadal.weights.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hadal.weights' has no attribute {name!r}; it exports {', '.join(__all__)}")
