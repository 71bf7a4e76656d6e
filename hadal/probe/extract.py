"""The engine's extraction under the name that studies use; see hadal/engine/extract.py."""

from __future__ import annotations

from hadal.engine.extract import (
    MAX_TOKENS,
    Ids,
    ProbeError,
    Progress,
    Taken,
    batches,
    extract,
    extract_all,
    layer_numbers,
)

__all__ = [
    "MAX_TOKENS",
    "Ids",
    "ProbeError",
    "Progress",
    "Taken",
    "batches",
    "extract",
    "extract_all",
    "layer_numbers",
]
