"""Recipes of `hadal r1`: stages by name, each of a kind, made of the sections that the kind's own verb has.

    [run]                                   [stages.cold]
    name = "r1-cpu"                         kind = "sft"                # sections of `hadal sft`
    seed = 1                                model.start = "@base"       # what stage `base` made
    [measure]                               data.files = ["@worked"]
    tasks = [{name = "steps/3"}]            learning_rate.peak = 1e-3

A value "@NAME" stands for what stage NAME made: a model's folder, or the JSONL of a stage that makes data.
Stages name earlier ones only, so that a recipe's order is an order to follow.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hadal.data.strict import RecipeError as RecipeError
from hadal.data.strict import build, read_toml, require
from hadal.post import grpo_recipe, sft_recipe
from hadal.post.preference import PreferenceRecipe
from hadal.post.rejection import RejectionRecipe
from hadal.post.worked import Faults, WorkedTask
from hadal.train import recipe as train_recipe
from hadal.train.recipe import RunRecipe

MARK = "@"
MODEL_KINDS = ("init", "train", "sft", "grpo", "average", "preference")
DATA_KINDS = ("worked", "prompts", "rejection")


@dataclass(frozen=True)
class InitRecipe:
    """kind = "init": random weights in the published layout, for a model that learns from nothing."""

    model: Mapping[str, Any]  # config.json's keys; the vocabulary is the tokenizer's
    tokenizer: str = "hadal-mini"
    std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.std > 0, "std", self.std, "above 0")


@dataclass(frozen=True)
class AverageRecipe:
    """kind = "average": the mean of models in their weights (hadal/post/average.py)."""

    models: tuple[str, ...]
    format: str = "auto"  # of the export: as the first has it, or float32, bfloat16, fp8
    name: str = ""  # on the card; else the stage's

    def __post_init__(self) -> None:
        require(len(self.models) > 1, "models", list(self.models), "two models or more")
        formats = ("auto", "float32", "bfloat16", "fp8")
        require(self.format in formats, "format", self.format, f"one of {', '.join(formats)}")


@dataclass(frozen=True)
class WorkedRecipe:
    """kind = "worked": conversations whose answers are worked out (hadal/post/worked.py)."""

    tasks: tuple[WorkedTask, ...]
    count: int
    seed: int = 0
    examined: int = 0  # no question of `hadal eval --limit N` is among them; 0: not compared
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "at least one problem, such as {name = 'steps/3'}")
        require(self.count >= 1, "count", self.count, "at least 1")
        require(self.examined >= 0, "examined", self.examined, "0 (not compared) or more")


@dataclass(frozen=True)
class PromptsRecipe:
    """kind = "prompts": what is asked in reinforcement learning and rejection sampling."""

    tasks: tuple[WorkedTask, ...]
    count: int
    seed: int = 0
    examined: int = 0  # as of `worked`

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "at least one problem, such as {name = 'steps/3'}")
        require(self.count >= 1, "count", self.count, "at least 1")
        require(self.examined >= 0, "examined", self.examined, "0 (not compared) or more")


@dataclass(frozen=True)
class MeasureRecipe:
    """`[measure]`: what every model is asked after its stage, by DeepSeek's protocol (R1 report §3)."""

    tasks: tuple[WorkedTask, ...]
    count: int = 64  # held-out problems of each task
    samples: int = 16  # k of pass@1 and cons@k
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 256
    max_seqs: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.tasks), "measure.tasks", self.tasks, "at least one problem")
        for key in ("count", "samples", "max_tokens", "max_seqs"):
            require(getattr(self, key) >= 1, f"measure.{key}", getattr(self, key), "at least 1")
        require(self.temperature > 0, "measure.temperature", self.temperature, "above 0: samples must differ")
        require(0 < self.top_p <= 1, "measure.top_p", self.top_p, "in (0, 1]")


@dataclass(frozen=True)
class EstimateRecipe:
    """`[estimate]`: rates of the machine that the recipe was written for, for --dry-run before a first run.
    Later, the rates that this folder's own stages had."""

    train_tokens_per_second: float = 10_000.0
    sample_tokens_per_second: float = 4_000.0


@dataclass(frozen=True)
class Stage:
    """One stage, checked. table: as given, with the marks; recipe: what its kind makes of it, marks as if
    they were names of files; inputs: the earlier stages that it names."""

    name: str
    kind: str
    title: str
    table: Mapping[str, Any]
    recipe: Any
    inputs: tuple[str, ...]

    @property
    def makes_model(self) -> bool:
        return self.kind in MODEL_KINDS


@dataclass(frozen=True)
class R1Recipe:
    """A whole recipe; `beside`: the folder that its files lie in."""

    run: RunRecipe
    measure: MeasureRecipe
    estimate: EstimateRecipe
    stages: tuple[Stage, ...]
    beside: Path

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises RecipeError with a suggestion."""
        found = {stage.name: stage for stage in self.stages}
        if name not in found:
            near = difflib.get_close_matches(name, found, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(found)}"
            raise RecipeError(f"the recipe has no stage {name!r}; {hint}")
        return found[name]


@dataclass(frozen=True)
class _Head:
    run: RunRecipe
    measure: MeasureRecipe
    stages: Mapping[str, Any]
    estimate: EstimateRecipe = field(default_factory=EstimateRecipe)


def load(path: Path, overrides: Sequence[str] = ()) -> R1Recipe:
    """Read a TOML recipe; overrides: "section.key=value", or "stages.NAME.section.key=value". Raises
    RecipeError."""
    of_stages = [text for text in overrides if text.partition("=")[0].strip().startswith("stages.")]
    table = read_toml(
        path, [text for text in overrides if text not in of_stages], "r1/cpu", sections_only=True
    )
    for text in of_stages:
        _override(table, text)
    return from_dict(table, path.parent)


def _override(table: dict[str, Any], text: str) -> None:
    """Apply "stages.NAME.key=value" or "stages.NAME.section.key=value". Raises RecipeError."""
    key, _, value = text.partition("=")
    _, name, *rest = key.strip().split(".")
    stages = table.get("stages", {})
    if name not in stages or len(rest) not in (1, 2):
        known = ", ".join(stages) or "none"
        raise RecipeError(f"--set {text!r} is not of the form stages.NAME.section.key=value; stages: {known}")
    inner = stages[name] if len(rest) == 1 else stages[name].setdefault(rest[0], {})
    try:
        inner[rest[-1]] = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        inner[rest[-1]] = value.strip()


def from_dict(table: Mapping[str, Any], beside: Path = Path(".")) -> R1Recipe:
    """A recipe from plain tables. Raises RecipeError, naming the stage."""
    head = build(_Head, table)
    if not head.stages:
        raise RecipeError("the recipe has no [stages.NAME]; recipes/r1/cpu.toml is one to start from")
    stages: list[Stage] = []
    for name, given in head.stages.items():
        if not isinstance(given, Mapping):
            raise RecipeError(f"stages.{name} is {given!r}; a table is wanted")
        if not name.replace("-", "").isalnum():
            raise RecipeError(f"stages.{name}: a stage's name has letters, digits and - only")
        stages.append(_stage(name, dict(given), head.run, {stage.name: stage for stage in stages}))
    return R1Recipe(head.run, head.measure, head.estimate, tuple(stages), beside)


def _stage(name: str, given: dict[str, Any], run: RunRecipe, earlier: Mapping[str, Stage]) -> Stage:
    kind, title = given.pop("kind", None), str(given.pop("title", ""))
    known = (*MODEL_KINDS, *DATA_KINDS)
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(known)}"
        raise RecipeError(f"stages.{name}: there is no kind {kind!r}; {hint}")
    preference = given.pop("preference", "") if kind == "grpo" else ""
    if kind in ("train", "sft", "grpo"):
        given["run"] = {"name": f"{run.name}-{name}", "seed": run.seed, "title": title} | given.get("run", {})
    inputs = tuple(dict.fromkeys(marks([given, preference])))
    for one in inputs:
        if one not in earlier:
            raise RecipeError(
                f"stages.{name} names @{one}, which is no earlier stage; "
                f"earlier: {', '.join(earlier) or 'none'}"
            )
    try:
        recipe = _READ[kind](given)
        _check_marks(kind, given, preference, earlier)
    except RecipeError as error:
        raise type(error)(f"stages.{name}: {error}") from None
    table = {"kind": kind, **given} | ({"preference": preference} if preference else {})
    return Stage(name, kind, title, table, recipe, inputs)


def _check_marks(kind: str, given: Mapping[str, Any], preference: str, earlier: Mapping[str, Stage]) -> None:
    """A model where a model is wanted, data where data is."""
    wanted: list[tuple[str, Any, tuple[str, ...]]] = []
    whole = tuple(one for one in MODEL_KINDS if one != "preference")
    if kind in ("sft", "grpo"):
        wanted += [("model.start", given.get("model", {}).get("start"), whole)]
    if kind in ("rejection", "preference"):
        wanted += [("model", given.get("model"), whole)]
    if kind == "average":
        wanted += [("models", one, whole) for one in given.get("models", [])]
    if kind == "preference":
        wanted += [("pool", given.get("pool"), ("rejection",))]
    wanted += [("data.files", one, DATA_KINDS) for one in given.get("data", {}).get("files", [])]
    wanted += [("tasks.path", one.get("path"), DATA_KINDS) for one in given.get("tasks", [])]
    if preference:
        wanted += [("preference", preference, ("preference",))]
    for key, value, kinds in wanted:
        if isinstance(value, str) and value.startswith(MARK):
            found = earlier[value[1:]].kind
            ok = found in kinds
            require(ok, key, value, f"a stage of kind {' or '.join(kinds)}; @{value[1:]} is of kind {found}")


def marks(value: Any) -> Iterator[str]:
    """The stages that a table names, in order."""
    if isinstance(value, str):
        if value.startswith(MARK):
            yield value[1:]
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from marks(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from marks(inner)


def resolved(value: Any, places: Mapping[str, str]) -> Any:
    """The table with places in the stages' stead."""
    if isinstance(value, str):
        return places[value[1:]] if value.startswith(MARK) else value
    if isinstance(value, Mapping):
        return {key: resolved(inner, places) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(inner, places) for inner in value]
    return value


def plain(recipe: Any) -> dict[str, Any]:
    """A stage's recipe as plain data, every default written out."""
    return recipe.to_dict() if hasattr(recipe, "to_dict") else dataclasses.asdict(recipe)


_READ: Mapping[str, Any] = {
    "init": lambda table: build(InitRecipe, table),
    "average": lambda table: build(AverageRecipe, table),
    "worked": lambda table: build(WorkedRecipe, table),
    "prompts": lambda table: build(PromptsRecipe, table),
    "rejection": lambda table: build(RejectionRecipe, table),
    "preference": lambda table: build(PreferenceRecipe, table),
    "train": train_recipe.from_dict,
    "sft": sft_recipe.from_dict,
    "grpo": grpo_recipe.from_dict,
}
