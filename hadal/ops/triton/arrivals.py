"""Counters by which the programs of a launch learn who of them comes last."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 8192  # groups of programs that one launch may count
_COUNTERS: dict[torch.device, Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """int32 [MOST], all zero, which every kernel leaves zero again: one set a device, so launches that use it
    must not overlap on two streams.

    While a graph is being recorded, and there is none yet, one of the graph's own, whose clearing is recorded
    too: memory of the graph's pool must not become everybody's.
    """
    if device in _COUNTERS:
        return _COUNTERS[device]
    fresh = torch.zeros(MOST, dtype=torch.int32, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return fresh
    return _COUNTERS.setdefault(device, fresh)
