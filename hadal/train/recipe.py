"""Recipes: strict TOML into frozen dataclasses. Unknown keys are refused with a suggestion.

A recipe says everything that a run's result depends on; the resolved one (defaults filled in, overrides
applied) is saved beside the run. Marks in a schedule are *shares of the run's tokens*, so that one number,
`train.tokens`, lengthens or shortens a run without bending its shape. V3's own marks (report §4.2) are the
defaults: 10T, 14.3T and 14.3T + 333B of 14.8T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hadal.data.strict import RecipeError as RecipeError
from hadal.data.strict import build, join, override_phase, read_toml, require
from hadal.ops.fp8_training import SCALES
from hadal.ops.recompute import KINDS
from hadal.train.phases import PhaseRecipe, phase_knobs, stages
from hadal.train.schedules import BatchRamp, LearningRate, Schedule, learning_rate


@dataclass(frozen=True)
class RunRecipe:
    name: str
    seed: int = 0
    title: str = ""  # one line for the model card

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a plain name")
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "in 0..2^31−1")


@dataclass(frozen=True)
class DataRecipe:
    """Where tokens come from."""

    source: str  # "puzzles", "needles": this package's generators; "shards": a folder of packed shards
    tokenizer: str = "hadal-mini"  # a folder with tokenizer.json; "hadal-mini": the one in the package
    path: str = ""  # the folder of shards; for puzzles where they are written (default: OUT/data)
    heldout_path: str = ""  # shards of text that is never trained on
    mask_documents: bool = True  # False: attention crosses documents, as in V3's pre-training
    prompt_weight: float = 0.0  # how much the tokens of questions count, against 1 for those of solutions
    workers: int = 0  # processes that write puzzles; 0: as many as there are cores
    examined: int = 300  # of puzzles: no question of `hadal eval --limit N` is trained on; 0: not compared

    def __post_init__(self) -> None:
        known = ("puzzles", "needles", "shards")
        require(self.source in known, "data.source", self.source, '"puzzles", "needles" or "shards"')
        require(
            self.source != "shards" or bool(self.path), "data.path", self.path, "the folder of packed shards"
        )
        require(0 <= self.prompt_weight <= 1, "data.prompt_weight", self.prompt_weight, "in 0..1")
        require(self.examined >= 0, "data.examined", self.examined, "0 (none) or more")
        require(self.workers >= 0, "data.workers", self.workers, "0 (all cores) or more")


@dataclass(frozen=True)
class TrainRecipe:
    tokens: int
    context: int = 1024  # tokens in a row
    batch_tokens: int = 65536  # in one optimizer step
    batch_tokens_start: int = 0  # in the first step, growing from there to batch_tokens; 0: no ramp
    batch_ramp: float = 469 / 14_800  # the share of the run over which the batch grows
    micro_batch_tokens: int = 0  # in one forward pass; 0: the whole batch at once
    dtype: str = "auto"  # "auto": bfloat16 on a GPU, float32 on a CPU
    fp8: bool = False  # products of linear layers in FP8, V3's recipe (§3.3); else all in dtype
    fp8_scales: str = "power_of_two"  # of all FP8 tiles; "float32": V3's, but where they are cut anew
    init_std: float = 0.006
    graph: bool | str = "auto"  # passes as CUDA graphs; "auto": where they can be, true: or refuse
    compile: bool = False  # fuse experts and feed-forward networks with torch.compile (GPU)
    recompute: tuple[str, ...] = ()  # of "norm", "up", "swiglu", "rows": made again in the backward pass
    z_loss: float = 0.0
    max_minutes: float = 0.0  # save and stop after so long; 0: no limit. `--resume` goes on

    def __post_init__(self) -> None:
        require(self.context >= 8, "train.context", self.context, "at least 8")
        batch, micro = self.batch_tokens, self.micro_batch_tokens
        whole_rows = batch >= self.context and batch % self.context == 0
        require(whole_rows, "train.batch_tokens", batch, f"a multiple of train.context {self.context}")
        fits = micro >= 0 and (not micro or (micro % self.context == 0 and batch % micro == 0))
        want = f"0, or a multiple of train.context that divides train.batch_tokens {batch}"
        require(fits, "train.micro_batch_tokens", micro, want)
        start = self.batch_tokens_start
        unit = micro or self.context
        want = f"0, or a multiple of {unit} (a micro-batch, or else a row) up to train.batch_tokens {batch}"
        require(0 <= start <= batch and start % unit == 0, "train.batch_tokens_start", start, want)
        require(0 <= self.batch_ramp <= 1, "train.batch_ramp", self.batch_ramp, "a share of the run")
        enough = self.tokens == 0 or self.tokens >= self.batch_tokens
        require(enough, "train.tokens", self.tokens, "at least one batch (or 0, with [[phases]] alone)")
        require(
            self.dtype in ("auto", "float32", "bfloat16"),
            "train.dtype",
            self.dtype,
            '"auto", "float32" or "bfloat16"',
        )
        known = f"some of {', '.join(KINDS)}"
        require(set(self.recompute) <= set(KINDS), "train.recompute", self.recompute, known)
        alone = not (self.recompute and self.compile)
        require(alone, "train.recompute", self.recompute, "empty with train.compile (it plans memory itself)")
        alone = not (self.fp8 and self.compile)
        require(
            alone, "train.fp8", self.fp8, "false with train.compile (which would compile the rounding away)"
        )
        known = " or ".join(f'"{name}"' for name in SCALES)
        require(self.fp8_scales in SCALES, "train.fp8_scales", self.fp8_scales, known)
        known = 'true, false or "auto"'
        require(isinstance(self.graph, bool) or self.graph == "auto", "train.graph", self.graph, known)
        require(self.init_std > 0, "train.init_std", self.init_std, "above 0")
        require(self.z_loss >= 0, "train.z_loss", self.z_loss, "0 or more")
        require(self.max_minutes >= 0, "train.max_minutes", self.max_minutes, "0 (no limit) or more")

    @property
    def ramp(self) -> BatchRamp:
        """Rows of a batch as a function of tokens seen."""
        last = self.batch_tokens // self.context
        first = self.batch_tokens_start // self.context or last
        return BatchRamp(
            first, last, self.batch_ramp * self.tokens, self.micro_batch_tokens // self.context or 1
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: the last one reaches or passes `tokens`."""
        return self.ramp.steps(self.tokens, self.context)[0]

    @property
    def tokens_read(self) -> int:
        """Tokens of all steps: `tokens`, filled up to whole batches."""
        return self.ramp.steps(self.tokens, self.context)[1]

    @property
    def micro_tokens(self) -> int:
        """Tokens of the largest forward pass."""
        return self.micro_batch_tokens or self.batch_tokens


@dataclass(frozen=True)
class OptimizerRecipe:
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    moments: str = "bfloat16"

    def __post_init__(self) -> None:
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.clip >= 0, "optimizer.clip", self.clip, "0 (off) or more")
        require(
            self.moments in ("bfloat16", "float32"),
            "optimizer.moments",
            self.moments,
            '"bfloat16" or "float32"',
        )


@dataclass(frozen=True)
class LearningRateRecipe:
    """V3's shape; marks are shares of `train.tokens`, rates below the peak are shares of the peak."""

    peak: float
    warmup: float = 0.01
    constant_until: float = 10 / 14.8
    cosine_until: float = 14.3 / 14.8
    floor: float = 0.1
    finals: tuple[float, ...] = (0.1, 7.3 / 220)
    finals_until: tuple[float, ...] = (14.633 / 14.8, 1.0)

    def __post_init__(self) -> None:
        require(self.peak > 0, "learning_rate.peak", self.peak, "above 0")
        require(
            len(self.finals) == len(self.finals_until),
            "learning_rate.finals_until",
            self.finals_until,
            "as long as learning_rate.finals",
        )
        marks = (0.0, self.warmup, self.constant_until, self.cosine_until, *self.finals_until, 1.0)
        require(
            list(marks) == sorted(marks), "learning_rate marks", marks[1:-1], "shares of the run, in order"
        )
        require(0 <= self.floor <= 1, "learning_rate.floor", self.floor, "a share of the peak")


@dataclass(frozen=True)
class BalanceRecipe:
    bias_speed: float = 0.001
    bias_until: float = 14.3 / 14.8
    sequence_alpha: float = 1e-4

    def __post_init__(self) -> None:
        require(self.bias_speed >= 0, "balance.bias_speed", self.bias_speed, "0 or more")
        require(0 <= self.bias_until <= 1, "balance.bias_until", self.bias_until, "a share of the run")
        require(self.sequence_alpha >= 0, "balance.sequence_alpha", self.sequence_alpha, "0 or more")


@dataclass(frozen=True)
class MtpRecipe:
    weight: float = 0.3
    weight_late: float = 0.1
    switch: float = 10 / 14.8

    def __post_init__(self) -> None:
        require(min(self.weight, self.weight_late) >= 0, "mtp.weight", self.weight, "0 or more")
        require(0 <= self.switch <= 1, "mtp.switch", self.switch, "a share of the run")


@dataclass(frozen=True)
class EmaRecipe:
    """A moving average of the weights, kept on the host (hadal/train/ema.py)."""

    rate: float = 0.0  # what stays of the average at a step; 0: none is kept
    every_steps: int = 1

    def __post_init__(self) -> None:
        require(0 <= self.rate < 1, "ema.rate", self.rate, "in [0, 1), 0 for none")
        require(self.every_steps >= 1, "ema.every_steps", self.every_steps, "at least 1")


@dataclass(frozen=True)
class LogRecipe:
    every_steps: int = 10
    heldout_every_steps: int = 200  # 0: never
    heldout_tokens: int = 65536
    accuracy_every_steps: int = 0  # greedy answers to held-out puzzles, by task; 0: never
    accuracy_problems: int = 12  # of each task
    accuracy_max_tokens: int = 768  # an answer that is longer is wrong
    tensorboard: bool = True
    spike_sigmas: float = 6.0  # a loss so far above the recent ones is logged with its batch; 0: none is

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "log.every_steps", self.every_steps, "at least 1")
        require(
            self.heldout_every_steps >= 0, "log.heldout_every_steps", self.heldout_every_steps, "0 or more"
        )
        require(self.spike_sigmas >= 0, "log.spike_sigmas", self.spike_sigmas, "0 (off) or more")
        require(self.heldout_tokens >= 1, "log.heldout_tokens", self.heldout_tokens, "at least 1")
        every, problems, most = self.accuracy_every_steps, self.accuracy_problems, self.accuracy_max_tokens
        require(every >= 0, "log.accuracy_every_steps", every, "0 (never) or more")
        require(problems >= 1, "log.accuracy_problems", problems, "at least 1, of each task")
        require(most >= 1, "log.accuracy_max_tokens", most, "at least 1")


@dataclass(frozen=True)
class CheckpointRecipe:
    every_steps: int = 500  # 0: only at the end
    every_minutes: float = 0.0  # 0: by steps alone
    keep: int = 2
    shard_mib: int = 1024
    asynchronous: bool = (
        True  # steps go on while a copy is written; it takes as much host memory as the state
    )

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "0 or more")
        require(self.every_minutes >= 0, "checkpoint.every_minutes", self.every_minutes, "0 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        require(self.shard_mib >= 1, "checkpoint.shard_mib", self.shard_mib, "at least 1")


@dataclass(frozen=True)
class ExportRecipe:
    every_steps: int = 0  # 0: only at the end
    fp8: bool = True
    phases: bool = True  # export-NAME at the end of every stage but the last, where there are phases
    max_shard_mib: int = 5120
    temperature: float = 0.6  # that generation_config.json asks for; 0: greedy

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "export.every_steps", self.every_steps, "0 or more")
        require(0 <= self.temperature <= 2, "export.temperature", self.temperature, "from 0 to 2")
        require(self.max_shard_mib >= 1, "export.max_shard_mib", self.max_shard_mib, "at least 1")


@dataclass(frozen=True)
class InitRecipe:
    """What a run starts from: random weights, or those of a finished model (moments then start at zero)."""

    weights: str = ""  # a folder in the published layout; [model] then holds what is to differ from it


@dataclass(frozen=True)
class NeedlesRecipe:
    """Long documents with planted facts (hadal/data/needles.py), for data.source = "needles"."""

    share: float = 0.5  # of the rows; the others hold puzzles
    lists: float = 0.0  # of the documents with needles: lists of brief facts, all of them asked for
    short: float = (
        0.0  # of the main part's rows with needles: documents of 64 to 255 tokens, whatever its context
    )
    haystack: tuple[str, ...] = ()  # text files; none: puzzles

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "needles.share", self.share, "a share of the rows")
        require(0 <= self.short <= 1, "needles.short", self.short, "a share of the main part's rows")
        require(0 <= self.lists <= 1, "needles.lists", self.lists, "a share of the documents with needles")


@dataclass(frozen=True)
class Recipe:
    """A whole run. `model` holds published `config.json` keys (vocabulary and token ids come from the
    tokenizer)."""

    run: RunRecipe
    data: DataRecipe
    train: TrainRecipe
    learning_rate: LearningRateRecipe
    model: Mapping[str, Any] = field(default_factory=dict)
    init: InitRecipe = field(default_factory=InitRecipe)
    needles: NeedlesRecipe = field(default_factory=NeedlesRecipe)
    phases: tuple[PhaseRecipe, ...] = ()
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    balance: BalanceRecipe = field(default_factory=BalanceRecipe)
    mtp: MtpRecipe = field(default_factory=MtpRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)

    def __post_init__(self) -> None:
        if not self.model and not self.init.weights:
            raise RecipeError("the recipe lacks 'model' (it may be left out with init.weights)")
        names = [phase.name for phase in self.phases]
        require(len(set(names)) == len(names), "phases", names, "of different names")
        want = "at least one batch, or 0 with [[phases]] of which the first has a learning_rate"
        first = self.phases[0].learning_rate if self.phases else -1
        require(self.train.tokens > 0 or first >= 0, "train.tokens", self.train.tokens, want)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, phases included."""
        return stages(self)[-1].end_step

    @property
    def tokens_read(self) -> int:
        """Tokens of all steps, phases included."""
        return stages(self)[-1].end_token

    def schedule(self) -> Schedule:
        """The run's schedules in absolute tokens."""
        total, rate = self.train.tokens, self.learning_rate
        shape = LearningRate(
            peak=rate.peak,
            floor=rate.floor * rate.peak,
            warmup_until=rate.warmup * total,
            constant_until=rate.constant_until * total,
            cosine_until=rate.cosine_until * total,
            finals=tuple(
                (v * rate.peak, u * total) for v, u in zip(rate.finals, rate.finals_until, strict=True)
            ),
        )
        last = shape.peak if rate.constant_until >= 1 else learning_rate(math.inf, shape)
        return Schedule(
            learning_rate=shape,
            bias_speed=self.balance.bias_speed,
            bias_until=self.balance.bias_until * total,
            mtp_weight=self.mtp.weight,
            mtp_weight_late=self.mtp.weight_late,
            mtp_switch=self.mtp.switch * total,
            phases=phase_knobs(self, last),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default written out: what is saved with the run. `from_dict` reads it back."""
        return dataclasses.asdict(self)


# --- reading ---
def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply overrides of the form "train.tokens=1e6", or "phases.NAME.tokens=1e6" of a
    phase. Raises RecipeError."""
    of_phases = [text for text in overrides if text.split("=")[0].strip().startswith("phases.")]
    others = [text for text in overrides if text not in of_phases]
    table = read_toml(path, others, "mini", sections_only=True)
    for text in of_phases:
        override_phase(table.get("phases", []), text)
    return from_dict(table)


def from_dict(table: Mapping[str, Any]) -> Recipe:
    """A recipe from plain tables (of TOML, or of a saved run). Raises RecipeError."""
    recipe = build(Recipe, table)
    assert isinstance(recipe, Recipe)
    return recipe


# --- comparing, for resume ---
FREE_ON_RESUME = (
    "log",
    "checkpoint",
    "export",
    "train.max_minutes",
    "train.compile",
    "train.graph",
    "train.recompute",
    "data.workers",
    "data.path",
)
"""Sections and keys that may change between a run and its continuation: no trained number depends on them
(but `train.compile`, which rounds differently: the run goes on soundly, not bit for bit)."""


def comparable(resolved: Mapping[str, Any], begun: int) -> dict[str, Any]:
    """A resolved recipe for `differences`, with the first `begun` phases by name: those that have not begun
    may change, and where the shards of a phase lie may too."""
    free = ("path", "heldout_path")
    phases = {
        phase["name"]: {"number": number} | {k: v for k, v in phase.items() if k not in free}
        for number, phase in enumerate(resolved["phases"][:begun])
    }
    return {**resolved, "phases": phases}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted keys in which two resolved recipes differ, those of FREE_ON_RESUME left out."""
    found: list[str] = []
    for key in sorted(set(saved) | set(now)):
        dotted = join(path, key)
        if dotted in FREE_ON_RESUME:
            continue
        a, b = saved.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, dotted)
        elif _plain(a) != _plain(b):
            found.append(dotted)
    return found


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
