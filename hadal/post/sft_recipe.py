"""Recipes of supervised fine-tuning: strict TOML; sections of `hadal train` where they mean the same.

What a trainer needs follows from the recipe, the rows and the model (`SftRecipe.to_train`): so a run is one
of `hadal.train`, with another model, other rows, other gradients where there are adapters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hadal.data.strict import RecipeError as RecipeError
from hadal.data.strict import build, read_toml, require
from hadal.post.conversations import Turns
from hadal.post.lora import LoraRecipe
from hadal.text.templates import TEMPLATES
from hadal.train.recipe import (
    BalanceRecipe,
    CheckpointRecipe,
    DataRecipe,
    EmaRecipe,
    ExportRecipe,
    InitRecipe,
    LearningRateRecipe,
    LogRecipe,
    MtpRecipe,
    OptimizerRecipe,
    Recipe,
    RunRecipe,
    TrainRecipe,
)

FORMATS = ("auto", "fp8", "bfloat16", "float32")


@dataclass(frozen=True)
class BaseRecipe:
    """`[model]`: what is fine-tuned."""

    start: str  # a folder, or a name that `hadal run` takes
    template: str = ""  # of hadal.text.templates; empty: the model's own

    def __post_init__(self) -> None:
        require(bool(self.start), "model.start", self.start, "a folder, or the name of a model")
        known = f"empty (the model's own), or one of {', '.join(TEMPLATES)}"
        require(not self.template or self.template in TEMPLATES, "model.template", self.template, known)


@dataclass(frozen=True)
class ChatDataRecipe:
    """`[data]`: JSONL files of conversations."""

    files: tuple[str, ...]
    heldout_files: tuple[str, ...] = ()
    heldout_share: float = 0.0  # of the conversations of `files`, by the hash of their messages
    turns: str = "all"  # "last": only the last answer of a conversation is trained on

    def __post_init__(self) -> None:
        require(bool(self.files), "data.files", self.files, "at least one .jsonl file")
        require(0 <= self.heldout_share < 1, "data.heldout_share", self.heldout_share, "in [0, 1)")
        alone = not (self.heldout_files and self.heldout_share)
        require(alone, "data.heldout_share", self.heldout_share, "0 with data.heldout_files")
        require(self.turns in ("all", "last"), "data.turns", self.turns, '"all" or "last"')

    @property
    def kind(self) -> Turns:
        return cast(Turns, self.turns)


@dataclass(frozen=True)
class SftTrainRecipe:
    """`[train]`: as of `hadal train`, but counted in epochs."""

    epochs: float = 2.0
    context: int = 4096  # tokens in a row; what is longer is dropped
    batch_tokens: int = 65536
    micro_batch_tokens: int = 0
    dtype: str = "auto"
    fp8: bool = False
    fp8_scales: str = "power_of_two"
    graph: bool | str = "auto"
    recompute: tuple[str, ...] = ()
    max_minutes: float = 0.0

    def __post_init__(self) -> None:
        require(self.epochs > 0, "train.epochs", self.epochs, "above 0")


@dataclass(frozen=True)
class SftRateRecipe:
    """`[learning_rate]`: warm-up, then a cosine down to a share of the peak (R1: to a tenth)."""

    peak: float
    warmup: float = 0.03  # a share of the run
    floor: float = 0.1  # a share of the peak

    def __post_init__(self) -> None:
        require(0 <= self.warmup <= 1, "learning_rate.warmup", self.warmup, "a share of the run")


@dataclass(frozen=True)
class TunedMtpRecipe:
    """`[mtp]`: the modules learn the same answers, so that their drafts keep up."""

    weight: float = 0.1  # λ; V3's at its end

    def __post_init__(self) -> None:
        require(self.weight >= 0, "mtp.weight", self.weight, "0 or more")


@dataclass(frozen=True)
class SftBalanceRecipe:
    """`[balance]`: the load of a narrow set is not that of all text; by default nothing pulls at it."""

    bias_speed: float = 0.0
    sequence_alpha: float = 0.0


@dataclass(frozen=True)
class TunedExportRecipe:
    """`[export]`: how a tuned model is written."""

    format: str = "auto"  # "fp8", "bfloat16" or "float32"; "auto": as the model came
    adapters: bool = False  # with LoRA: A and B too, as PEFT's files in export-adapters/
    max_shard_mib: int = 5120

    def __post_init__(self) -> None:
        known = " or ".join(f'"{name}"' for name in FORMATS)
        require(self.format in FORMATS, "export.format", self.format, known)
        require(self.max_shard_mib >= 1, "export.max_shard_mib", self.max_shard_mib, "at least 1")


@dataclass(frozen=True)
class SftExportRecipe(TunedExportRecipe):
    """`[export]`, also on the way."""

    every_steps: int = 0  # 0: only at the end


@dataclass(frozen=True)
class SftRecipe:
    """A whole run of `hadal sft`."""

    run: RunRecipe
    model: BaseRecipe
    data: ChatDataRecipe
    learning_rate: SftRateRecipe
    train: SftTrainRecipe = field(default_factory=SftTrainRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    balance: SftBalanceRecipe = field(default_factory=SftBalanceRecipe)
    mtp: TunedMtpRecipe = field(default_factory=TunedMtpRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    export: SftExportRecipe = field(default_factory=SftExportRecipe)

    def __post_init__(self) -> None:
        require(
            not self.export.adapters or self.lora.rank > 0, "export.adapters", True, "false without lora.rank"
        )

    def to_train(self, rows: int, folder: Path, data: Path) -> Recipe:
        """The recipe of `hadal.train` for `rows` rows an epoch; `folder`: where the model lies, `data`: the
        rows. Raises RecipeError on sizes that do not fit together."""
        mine, rate = self.train, self.learning_rate
        wanted = max(1, round(mine.epochs * rows)) * mine.context
        return Recipe(
            run=self.run,
            data=DataRecipe("shards", tokenizer=str(folder), path=str(data)),
            train=TrainRecipe(
                tokens=max(wanted, mine.batch_tokens), context=mine.context, batch_tokens=mine.batch_tokens,
                micro_batch_tokens=mine.micro_batch_tokens, dtype=mine.dtype, fp8=mine.fp8,
                fp8_scales=mine.fp8_scales, graph=mine.graph, recompute=mine.recompute,
                max_minutes=mine.max_minutes,
            ),
            learning_rate=LearningRateRecipe(
                peak=rate.peak, warmup=rate.warmup, constant_until=rate.warmup, cosine_until=1.0,
                floor=rate.floor, finals=(), finals_until=(),
            ),
            init=InitRecipe(str(folder)),
            optimizer=self.optimizer,
            balance=BalanceRecipe(self.balance.bias_speed, 1.0, self.balance.sequence_alpha),
            mtp=MtpRecipe(self.mtp.weight, self.mtp.weight, 1.0),
            ema=self.ema,
            log=self.log,
            checkpoint=self.checkpoint,
            export=ExportRecipe(self.export.every_steps, False, False, self.export.max_shard_mib),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default written out; `from_dict` reads it back."""
        return dataclasses.asdict(self)


def load(path: Path, overrides: Sequence[str] = ()) -> SftRecipe:
    """Read a TOML recipe and apply overrides "section.key=value". Raises RecipeError."""
    return from_dict(read_toml(path, overrides, "sft-example", sections_only=True))


def from_dict(table: Mapping[str, Any]) -> SftRecipe:
    """A recipe from plain tables. Raises RecipeError."""
    recipe = build(SftRecipe, table)
    assert isinstance(recipe, SftRecipe)
    return recipe
