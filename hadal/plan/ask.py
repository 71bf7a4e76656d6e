"""A question to the planner of serving, and its answer, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hadal.config import ModelConfig
from hadal.plan.figures import Figure, PlanError
from hadal.plan.layout import Layout
from hadal.plan.machines import Machine
from hadal.plan.memory import CacheDtype, WeightDtype, cache_dtype_of, counts
from hadal.plan.roofline import Step

PUBLISHED_FP8 = 1e10  # parameters from which on a model that was published in FP8 is taken to run in FP8


@dataclass(frozen=True)
class Ask:
    """A question. None leaves a choice to the planner. batch: sequences at once, over all replicas."""

    config: ModelConfig
    machine: Machine
    name: str = "the model"
    stated_context: int | None = None
    dtype: WeightDtype | None = None
    cache: CacheDtype | None = None
    context: int | None = None
    prompt: int = 1024
    batch: int = 1
    drafts: int = 0
    acceptance: float | None = None
    offload: Literal["cpu", "disk"] | None = None
    tp: int | None = None
    dp: int | None = None
    pp: int | None = None
    ep: int | None = None

    @property
    def weights(self) -> WeightDtype:
        """The dtype that is meant: as asked, else as published."""
        if self.dtype is not None:
            return self.dtype
        large = self.config.fp8 is not None and counts(self.config).main > PUBLISHED_FP8
        return "fp8" if large else "bf16"

    @property
    def cache_dtype(self) -> CacheDtype:
        """The cache's dtype: as asked, else what goes with the weights."""
        return self.cache or cache_dtype_of(self.weights)

    @property
    def wanted_context(self) -> int:
        """Tokens: as asked, else the model's own, and no more than it bears."""
        longest = self.config.max_position_embeddings
        return min(self.context or self.stated_context or longest, longest)

    def check(self) -> None:
        """PlanError names a value that means nothing."""
        for name in ("batch", "prompt"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.context is not None and not 1 <= self.context <= self.config.max_position_embeddings:
            most = self.config.max_position_embeddings
            raise PlanError(f"context is {self.context:,}; {self.name} bears 1 to {most:,} tokens")
        if self.drafts < 0 or (self.drafts and not self.config.num_nextn_predict_layers):
            raise PlanError(f"mtp drafts: {self.drafts}; {self.name} has no MTP module to draft with")
        if self.drafts and self.acceptance is None:
            raise PlanError(
                "how many drafts are accepted depends on the text; give acceptance (DeepSeek: 0.85 to 0.9)"
            )
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise PlanError(f"acceptance is {self.acceptance}; it is a share from 0 to 1")
        if self.offload and self.config.moe is None:
            raise PlanError("offloading is for experts; this model is dense")


@dataclass(frozen=True)
class Running:
    """The answer. `memory`: of the fullest device, by part. `why_no_speed`: what speeds would need."""

    ask: Ask
    fits: bool
    layout: Layout
    context: int
    memory: tuple[Figure, ...]
    needed: Figure
    usable: Figure
    notes: tuple[str, ...]
    remedies: tuple[str, ...]
    speeds: tuple[Figure, ...] = ()
    limits: tuple[str, str] = ("", "")
    steps: tuple[tuple[int, Step], ...] = ()
    why_no_speed: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The whole answer."""
        a = self.ask
        return {
            "model": a.name,
            "on": a.machine.describe(),
            "fits": self.fits,
            "layout": self.layout.describe(),
            "weights": a.weights,
            "cache": a.cache_dtype,
            "context": self.context,
            "asked_context": a.wanted_context,
            "batch": a.batch,
            "memory": [f.as_json() for f in self.memory],
            "needed": self.needed.as_json(),
            "usable": self.usable.as_json(),
            "notes": list(self.notes),
            "remedies": list(self.remedies),
            "speeds": [f.as_json() for f in self.speeds],
            "limited_by": {"prefill": self.limits[0], "decode": self.limits[1]} if self.speeds else None,
            "sweep": [
                {"batch": n, "tokens_per_s": s.rate, "per_sequence": s.per_sequence, "limited_by": s.limit}
                for n, s in self.steps
            ],
            "why_no_speed": self.why_no_speed,
        }
