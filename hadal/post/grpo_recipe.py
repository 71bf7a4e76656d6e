"""Recipes of reinforcement learning: strict TOML; sections of `hadal sft` where they mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hadal.data.strict import RecipeError as RecipeError
from hadal.data.strict import build, read_toml, require
from hadal.ops.recompute import KINDS
from hadal.post import rewards
from hadal.post.lora import LoraRecipe
from hadal.post.objectives import VARIANTS, PolicyObjective
from hadal.post.sft_recipe import BaseRecipe, TunedExportRecipe, TunedMtpRecipe
from hadal.post.tasks import TaskRecipe
from hadal.train.recipe import OptimizerRecipe, RunRecipe


@dataclass(frozen=True)
class ObjectiveRecipe:
    """`[objective]`: a variant by name, and what is to differ from it (−1, or empty: as the variant has
    it)."""

    variant: str = "grpo"
    clip_low: float = -1.0
    clip_high: float = -1.0
    kl_weight: float = -1.0
    kl: str = ""
    aggregation: str = ""
    scale: str = ""
    reference_every: int = 0  # steps after which the reference becomes the policy; 0: never (R1: 400)
    reference_on: str = "device"  # or "host"; where a copy of all weights lies, without LoRA

    def __post_init__(self) -> None:
        known = f"one of {', '.join(VARIANTS)}"
        require(self.variant in VARIANTS, "objective.variant", self.variant, known)
        for key, choices in (
            ("kl", ("k1", "k2", "k3")),
            ("aggregation", ("sequence", "token", "constant")),
            ("scale", ("std", "none")),
        ):
            value = getattr(self, key)
            want = f"empty (the variant's), or one of {', '.join(choices)}"
            require(value in ("", *choices), f"objective.{key}", value, want)
        for key in ("clip_low", "clip_high", "kl_weight"):
            value = getattr(self, key)
            require(value >= 0 or value == -1, f"objective.{key}", value, "0 or more, or -1 (the variant's)")
        require(
            self.reference_every >= 0, "objective.reference_every", self.reference_every, "0 (never) or more"
        )
        where = self.reference_on
        require(where in ("device", "host"), "objective.reference_on", where, '"device" or "host"')

    def resolve(self) -> PolicyObjective:
        """The variant with the changes."""
        given = {key: getattr(self, key) for key in ("clip_low", "clip_high", "kl_weight")}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value != -1}
        changes |= {k: getattr(self, k) for k in ("kl", "aggregation", "scale") if getattr(self, k)}
        return dataclasses.replace(VARIANTS[self.variant], **changes)


@dataclass(frozen=True)
class SampleRecipe:
    """`[sample]`: what a step asks the engine for."""

    prompts: int = 32  # of a step
    group: int = 16  # completions of each prompt
    temperature: float = 1.0
    max_tokens: int = 1024  # of a completion
    max_tokens_late: int = 0  # from `late` on; 0: the same. R1-Zero's context was widened so
    late: float = 0.8  # a share of the run
    max_prompt_tokens: int = 1024  # a prompt that is longer is passed over
    refill: int = 0  # DAPO: rounds of further prompts, at most, in place of groups of equal rewards
    truncated: str = "keep"  # "mask": completions that were cut off have no part in the loss
    max_seqs: int = 256  # at once
    cache_mib: int = 0  # of the engine; 0: for `max_seqs` sequences, at most half of the free memory
    speculation: str = "off"  # as of `hadal run`

    def __post_init__(self) -> None:
        for key in ("prompts", "max_tokens", "max_prompt_tokens", "max_seqs"):
            require(getattr(self, key) >= 1, f"sample.{key}", getattr(self, key), "at least 1")
        require(self.group >= 2, "sample.group", self.group, "at least 2: a group is its own baseline")
        good = 1e-4 <= self.temperature <= 100
        require(good, "sample.temperature", self.temperature, "above 0: greedy completions are all alike")
        wider = self.max_tokens_late == 0 or self.max_tokens_late >= self.max_tokens
        want = f"0, or at least sample.max_tokens {self.max_tokens}"
        require(wider, "sample.max_tokens_late", self.max_tokens_late, want)
        require(0 <= self.late <= 1, "sample.late", self.late, "a share of the run")
        require(self.refill >= 0, "sample.refill", self.refill, "0 (off) or more rounds")
        require(self.truncated in ("keep", "mask"), "sample.truncated", self.truncated, '"keep" or "mask"')
        require(self.cache_mib >= 0, "sample.cache_mib", self.cache_mib, "0 (chosen) or more")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt_tokens + max(self.max_tokens, self.max_tokens_late)

    def limit(self, progress: float) -> int:
        """The most tokens of a completion, at this share of the run."""
        return self.max_tokens_late if self.max_tokens_late and progress >= self.late else self.max_tokens


@dataclass(frozen=True)
class GrpoTrainRecipe:
    """`[train]`."""

    steps: int
    mini_batches: int = 1  # updates of a roll-out, each on its share of the prompts
    epochs: int = 1  # times that a roll-out is gone through
    max_pack_tokens: int = 16384  # of a forward pass; a longer sample has one to itself
    exact: bool = False  # sampling and scoring in exact mode (docs/exact.md)
    dtype: str = "auto"
    recompute: tuple[str, ...] = ()
    max_minutes: float = 0.0

    def __post_init__(self) -> None:
        for key in ("steps", "mini_batches", "epochs", "max_pack_tokens"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        known = '"auto", "float32" or "bfloat16"'
        require(self.dtype in ("auto", "float32", "bfloat16"), "train.dtype", self.dtype, known)
        known = f"some of {', '.join(KINDS)}"
        require(set(self.recompute) <= set(KINDS), "train.recompute", self.recompute, known)
        require(self.max_minutes >= 0, "train.max_minutes", self.max_minutes, "0 (no limit) or more")


@dataclass(frozen=True)
class GrpoRateRecipe:
    """`[learning_rate]`: constant after the warm-up (R1-Zero: 3e-6)."""

    peak: float
    warmup: int = 0  # updates

    def __post_init__(self) -> None:
        require(self.peak > 0, "learning_rate.peak", self.peak, "above 0")
        require(self.warmup >= 0, "learning_rate.warmup", self.warmup, "0 or more updates")


@dataclass(frozen=True)
class GrpoOptimizerRecipe(OptimizerRecipe):
    """`[optimizer]`: without weight decay, which at such small rates only pulls at what is known."""

    weight_decay: float = 0.0


@dataclass(frozen=True)
class GrpoLogRecipe:
    """`[log]`."""

    samples: int = 2  # prompts of a step whose completions are kept in samples.jsonl
    samples_every: int = 1  # steps
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require(self.samples >= 0, "log.samples", self.samples, "0 (none) or more")
        require(self.samples_every >= 1, "log.samples_every", self.samples_every, "at least 1")


@dataclass(frozen=True)
class GrpoCheckpointRecipe:
    """`[checkpoint]`."""

    every_steps: int = 50  # 0: only at the end
    keep: int = 2

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "0 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True)
class GrpoRecipe:
    """A whole run of `hadal grpo`. `reward`: the [[reward]] tables as given (docs/rewards.md)."""

    run: RunRecipe
    model: BaseRecipe
    train: GrpoTrainRecipe
    learning_rate: GrpoRateRecipe
    tasks: tuple[TaskRecipe, ...]
    reward: tuple[Mapping[str, Any], ...]
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    sample: SampleRecipe = field(default_factory=SampleRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    optimizer: GrpoOptimizerRecipe = field(default_factory=GrpoOptimizerRecipe)
    mtp: TunedMtpRecipe = field(default_factory=TunedMtpRecipe)
    log: GrpoLogRecipe = field(default_factory=GrpoLogRecipe)
    checkpoint: GrpoCheckpointRecipe = field(default_factory=GrpoCheckpointRecipe)
    export: TunedExportRecipe = field(default_factory=TunedExportRecipe)

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "at least one [[tasks]] table (docs/rewards.md)")
        rewards.read(self.reward)
        fits = self.train.mini_batches <= self.sample.prompts
        want = f"at most sample.prompts {self.sample.prompts}"
        require(fits, "train.mini_batches", self.train.mini_batches, want)
        alone = not self.export.adapters or self.lora.rank > 0
        require(alone, "export.adapters", True, "false without lora.rank")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default written out; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"reward": [one.to_dict() for one in rewards.read(self.reward)]}


def load(path: Path, overrides: Sequence[str] = ()) -> GrpoRecipe:
    """Read a TOML recipe and apply overrides "section.key=value". Raises RecipeError."""
    return from_dict(read_toml(path, overrides, "grpo-smoke", sections_only=True))


def from_dict(table: Mapping[str, Any]) -> GrpoRecipe:
    """A recipe from plain tables. Raises RecipeError."""
    recipe = build(GrpoRecipe, table)
    assert isinstance(recipe, GrpoRecipe)
    return recipe
