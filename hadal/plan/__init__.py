"""Planning: will it run, how fast, at what cost, and what does training take. Arithmetic on configurations,
no torch.

    from hadal.plan import answer
    answer({"ask": "run", "model": "deepseek-v3", "on": "8xH800"})["fits"]        # False, and "remedies"

`running(Ask(…))`, `decode_step`, `prefill`, `bubble`, `timeline` and their kin are the same as dataclasses;
every `Figure` carries its formula, source and date.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadal.plan.answers import answer as answer
    from hadal.plan.ask import Ask as Ask
    from hadal.plan.ask import Running as Running
    from hadal.plan.figures import Figure as Figure
    from hadal.plan.figures import PlanError as PlanError
    from hadal.plan.layout import Layout as Layout
    from hadal.plan.machines import Device as Device
    from hadal.plan.machines import Machine as Machine
    from hadal.plan.machines import device as device
    from hadal.plan.machines import parse as parse
    from hadal.plan.pipeline import bubble as bubble
    from hadal.plan.pipeline import timeline as timeline
    from hadal.plan.roofline import Work as Work
    from hadal.plan.roofline import decode_step as decode_step
    from hadal.plan.roofline import efficiency as efficiency
    from hadal.plan.roofline import prefill as prefill
    from hadal.plan.serving import running as running

_HOME = {
    "answers": ("answer",),
    "ask": ("Ask", "Running"),
    "figures": ("Figure", "PlanError"),
    "layout": ("Layout",),
    "machines": ("Device", "Machine", "device", "parse"),
    "pipeline": ("bubble", "timeline"),
    "roofline": ("Work", "decode_step", "efficiency", "prefill"),
    "serving": ("running",),
}
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str) -> Any:
    for home, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"hadal.plan.{home}"), name)
    raise AttributeError(f"module 'hadal.plan' has no attribute {name!r}; it has {', '.join(__all__)}")
