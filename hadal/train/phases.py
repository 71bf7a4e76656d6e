"""Phases after the main pre-training: longer contexts, with YaRN (DeepSeek-V3 report §4.3).

V3 goes from 4K to 32K to 128K in two phases of 1000 steps at the last learning rate of pre-training, with
batches of 1920 and 480 rows, under YaRN with factor 40 from 4096 (arXiv 2309.00071). A phase begins where the
one before has ended, at a step that follows from the recipe alone: masters, moments, moving average, gate
biases, step and token counts go on; rows are those of the phase's own context, counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hadal.config import ConfigError, ModelConfig, Rope
from hadal.data.strict import RecipeError, require
from hadal.train.schedules import BatchRamp, PhaseKnobs

if TYPE_CHECKING:
    from hadal.train.recipe import Recipe

AS_BEFORE = -1.0  # of a phase's learning rate, γ and λ: what came before goes on as it ended


@dataclass(frozen=True)
class PhaseRecipe:
    """One `[[phases]]` table."""

    name: str
    tokens: int
    context: int
    batch_tokens: int
    micro_batch_tokens: int = 0  # in one forward pass; 0: the whole batch at once
    learning_rate: float = AS_BEFORE  # constant; as before: the rate at which what came before ended (V3)
    warmup: float = 0.0  # the share of the phase over which the rate comes up from 0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)  # keys of config.json; empty: as before
    bias_speed: float = AS_BEFORE
    mtp_weight: float = AS_BEFORE
    path: str = ""  # a folder of shards; empty: for needles a set of the phase's own, else the main data
    heldout_path: str = ""

    def __post_init__(self) -> None:
        where = f"phases.{self.name}"
        require(bool(self.name) and not set("/. ") & set(self.name), "phases.name", self.name, "a plain name")
        require(self.name not in ("main", "ema"), "phases.name", self.name, "another name (it is taken)")
        require(self.context >= 8, f"{where}.context", self.context, "at least 8")
        batch, micro = self.batch_tokens, self.micro_batch_tokens
        whole = batch >= self.context and batch % self.context == 0
        require(whole, f"{where}.batch_tokens", batch, f"a multiple of its context {self.context}")
        fits = micro >= 0 and (not micro or (micro % self.context == 0 and batch % micro == 0))
        want = f"0, or a multiple of its context {self.context} that divides its batch_tokens {batch}"
        require(fits, f"{where}.micro_batch_tokens", micro, want)
        require(self.tokens >= batch, f"{where}.tokens", self.tokens, f"at least one batch of {batch}")
        for key in ("learning_rate", "bias_speed", "mtp_weight"):
            value = getattr(self, key)
            require(value >= 0 or value == AS_BEFORE, f"{where}.{key}", value, "0 or more (-1: as before)")
        require(0 <= self.warmup <= 1, f"{where}.warmup", self.warmup, "a share of the phase")
        require(
            not self.heldout_path or bool(self.path),
            f"{where}.heldout_path",
            self.heldout_path,
            "with a path",
        )


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with one context length, in absolute steps and tokens. `index` 0 is the main
    pre-training, i the i-th phase."""

    index: int
    name: str
    first_step: int
    first_token: int
    steps: int
    tokens: int
    context: int
    micro_tokens: int  # of the largest forward pass
    ramp: BatchRamp
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps

    @property
    def end_token(self) -> int:
        return self.first_token + self.tokens

    def rows(self, position: int) -> int:
        """Rows of the batch that begins at row `position` of this stage."""
        return self.ramp.rows(position * self.context)


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The main pre-training and the phases of a recipe, end to end."""
    train = recipe.train
    steps, tokens = train.ramp.steps(train.tokens, train.context)
    found = [Stage(0, "main", 0, 0, steps, tokens, train.context, train.micro_tokens, train.ramp)]
    for index, phase in enumerate(recipe.phases, start=1):
        rows = phase.batch_tokens // phase.context
        steps = -(-phase.tokens // phase.batch_tokens)
        micro = phase.micro_batch_tokens or phase.batch_tokens
        before = found[-1]
        stage = Stage(
            index, phase.name, before.end_step, before.end_token, steps, steps * phase.batch_tokens,
            phase.context, micro, BatchRamp(rows, rows, 0.0), phase.rope_scaling,
        )  # fmt: skip
        found.append(stage)
    return tuple(found)


def stage_at(all_stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that the step after `step` steps belongs to; the last one at the end of the run."""
    return next((stage for stage in all_stages if step < stage.end_step), all_stages[-1])


def recipe_at(recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe as if `stage` were the whole run: context, batch and tokens are the stage's, rows come in an
    order of their own, and documents with needles are as long as the phase wants them."""
    if not stage.index:
        return recipe
    phase = recipe.phases[stage.index - 1]
    train = replace(
        recipe.train, tokens=stage.tokens, context=stage.context, batch_tokens=phase.batch_tokens,
        batch_tokens_start=0, micro_batch_tokens=phase.micro_batch_tokens,
    )  # fmt: skip
    run = replace(recipe.run, seed=(recipe.run.seed + 7919 * stage.index) % 2**31)
    needles = replace(recipe.needles, short=0.0)
    return replace(recipe, run=run, train=train, needles=needles, phases=())


def phase_knobs(recipe: Recipe, last_rate: float) -> tuple[PhaseKnobs, ...]:
    """The scheduled values of the phases. `last_rate`: the learning rate at which the main part ends."""
    rate, speed, weight = last_rate, _last(recipe.balance), _late(recipe.mtp)
    found = []
    for phase, stage in zip(recipe.phases, stages(recipe)[1:], strict=True):
        rate = rate if phase.learning_rate == AS_BEFORE else phase.learning_rate
        speed = speed if phase.bias_speed == AS_BEFORE else phase.bias_speed
        weight = weight if phase.mtp_weight == AS_BEFORE else phase.mtp_weight
        found.append(PhaseKnobs(stage.first_token, phase.warmup * phase.tokens, rate, speed, weight))
    return tuple(found)


def _last(balance: Any) -> float:
    return 0.0 if balance.bias_until < 1 else float(balance.bias_speed)


def _late(mtp: Any) -> float:
    return float(mtp.weight if mtp.switch >= 1 else mtp.weight_late)


def rope_of(config: ModelConfig, scaling: Mapping[str, Any]) -> Rope:
    """The rotary embedding under a phase's `rope_scaling`, read as in a published config.json. Raises
    RecipeError."""
    if not scaling:
        return config.rope
    table = {**config.to_hf(), "rope_scaling": dict(scaling)}
    table.pop("quantization_config", None)
    try:
        return ModelConfig.from_hf(table).rope
    except ConfigError as error:
        raise RecipeError(f"rope_scaling of a phase: {error}") from None


def config_at(config: ModelConfig, all_stages: tuple[Stage, ...], index: int) -> ModelConfig:
    """The model's configuration in stage `index`: rotary embedding and positions as the stages up to it set
    them. Raises RecipeError."""
    for stage in all_stages[1 : index + 1]:
        rope = rope_of(config, stage.rope_scaling)
        if rope.type == "yarn" and rope.original_max_position_embeddings * rope.factor < stage.context:
            raise RecipeError(
                f"phases.{stage.name}: YaRN with factor {rope.factor:g} from "
                f"{rope.original_max_position_embeddings} reaches "
                f"{int(rope.original_max_position_embeddings * rope.factor)} positions; its context is "
                f"{stage.context}: raise the factor"
            )
        positions = max(config.max_position_embeddings, stage.context)
        config = replace(config, rope=rope, max_position_embeddings=positions)
    return config


def begun(all_stages: tuple[Stage, ...], step: int) -> int:
    """How many phases have begun once `step` steps are done (a phase at whose border a run stands has
    not)."""
    return sum(step > stage.first_step for stage in all_stages[1:])
