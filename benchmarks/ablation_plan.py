"""Families of ablations as data: recipes/ablations/FAMILY.toml → the recipe of every arm and seed.

A family names arms; an arm is the base recipe with a few keys changed or dropped. Where the family says
`equal_parameters`, that key (a width) is chosen for each arm so that it has as many parameters as the
reference arm, within TOLERANCE. Equal recipes are one run, whichever families ask for them.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hadal.config import ModelConfig
from hadal.data.strict import RecipeError, build
from hadal.train import recipe as recipes
from hadal.train.recipe import Recipe

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "ablations"
FAMILIES = ("balance", "mtp", "precision", "attention")
TOLERANCE = 0.01  # of total and active parameters, where they are to be equal
WIDTH_STEP = 16  # grouped products want rows of whole 16 bytes
VOCABULARY = 4096  # for counting; all arms share the tokenizer, so that it does not matter which

Json = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way of doing it. `set`: dotted keys of a recipe; `drop`: those that it must not have; `repeat`:
    the same recipe run again is another run."""

    name: str
    title: str
    set: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    repeat: int = 1


@dataclass(frozen=True)
class Family:
    """Arms that answer one question; all are compared with `reference`, seed by seed."""

    title: str
    question: str
    reference: str
    metrics: tuple[str, ...]
    arm: tuple[Arm, ...]
    set: Mapping[str, Any] = field(default_factory=dict)
    equal_parameters: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arm]
        if len(set(names)) < len(names) or self.reference not in names:
            raise RecipeError(f"{self.name}: the arms are {names}, the reference is {self.reference!r}")

    def __getitem__(self, name: str) -> Arm:
        return next(arm for arm in self.arm if arm.name == name)


@dataclass(frozen=True)
class Planned:
    """One run: an arm of a family with a seed. Runs with one `key` are the same run."""

    family: str
    arm: str
    seed: int
    repeat: int
    table: Json  # the recipe as plain tables, without the defaults

    @cached_property
    def recipe(self) -> Recipe:
        return recipes.from_dict(self.table)

    @property
    def key(self) -> str:
        """What makes the run: its recipe and which repetition it is. Where the data lies does not matter:
        `about.json` holds that all runs of a folder read the same."""
        what = self.table | {"data": "", "repeat": self.repeat}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def label(self) -> str:
        return f"{self.family}/{self.arm}, seed {self.seed}"


def family(name: str) -> Family:
    """A family of recipes/ablations. Raises RecipeError."""
    path = FOLDER / f"{name}.toml"
    if name not in FAMILIES:
        raise RecipeError(f"no family {name!r}; there are {', '.join(FAMILIES)}")
    found = build(Family, tomllib.loads(path.read_text("utf-8")) | {"name": name})
    assert isinstance(found, Family)
    return found


def overlay(path: Path) -> Json:
    """The keys of a file such as tiny.toml. Raises RecipeError."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--overlay {path} cannot be read: {error}; recipes/ablations/tiny.toml is one"
        ) from None
    if set(table) != {"set"}:
        raise RecipeError(f"{path} holds {', '.join(table)}; an overlay is one table [set] of dotted keys")
    return dict(table["set"])


def plan(chosen: Family, seeds: Sequence[int], changes: Mapping[str, Any]) -> list[Planned]:
    """Every run of a family; `changes` (an overlay, data, --set) lie between the base and the arms."""
    base = tomllib.loads((FOLDER / "base.toml").read_text("utf-8"))
    tables = {arm.name: table(base, changes, chosen, arm) for arm in chosen.arm}
    if chosen.equal_parameters:
        tables = equalise(chosen, tables)
    runs = []
    for seed in seeds:
        for arm in chosen.arm:
            made = tables[arm.name] | {"run": {**tables[arm.name]["run"], "seed": seed}}
            runs.append(Planned(chosen.name, arm.name, seed, arm.repeat, made))
            _ = runs[-1].recipe  # an unknown key, or a value out of bounds, is refused here
    return runs


def table(base: Json, changes: Mapping[str, Any], chosen: Family, arm: Arm) -> Json:
    """The recipe of one arm as plain tables."""
    out: Json = json.loads(json.dumps(base))
    for dotted, value in {**changes, **chosen.set, **arm.set}.items():
        put(out, dotted, value)
    for dotted in arm.drop:
        section, key = dotted.split(".")
        if key not in out[section]:
            raise RecipeError(f"{chosen.name}/{arm.name} drops {dotted}, which the base does not have")
        del out[section][key]
    return out


def put(out: Json, dotted: str, value: Any) -> None:
    section, dot, key = dotted.partition(".")
    if not dot or "." in key:
        raise RecipeError(f"{dotted!r} is not of the form section.key")
    out.setdefault(section, {})[key] = value


# --- equal parameters ---
def config_of(model: Mapping[str, Any], vocabulary: int = VOCABULARY) -> ModelConfig:
    return ModelConfig.from_hf({"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, **model})


def parameters(model: Mapping[str, Any]) -> int:
    """All parameters that are trained: main model and MTP module."""
    n = config_of(model).parameters()
    return n.main + n.mtp_unique


def main_parameters(model: Mapping[str, Any]) -> int:
    """Parameters of the main model alone."""
    return config_of(model).parameters().main


def active_parameters(model: Mapping[str, Any]) -> int:
    """Parameters of the main model that a token meets, embedding and head included."""
    return config_of(model).parameters().active


def equalise(chosen: Family, tables: Mapping[str, Json]) -> dict[str, Json]:
    """Tables whose width `equal_parameters` brings each arm's main model to the reference's parameters.

    Raises RecipeError where all parameters, or the active ones, then differ by more than TOLERANCE."""
    section, key = chosen.equal_parameters.split(".")
    if section != "model":
        raise RecipeError(f"equal_parameters is {chosen.equal_parameters!r}; it must be a width of [model]")
    reference = tables[chosen.reference]["model"]
    wanted, out = main_parameters(reference), {}
    for name, made in tables.items():
        model = dict(made["model"])
        if name != chosen.reference:
            here, further = (main_parameters(model | {key: model[key] + w}) for w in (0, WIDTH_STEP))
            if further == here:
                raise RecipeError(f"{chosen.name}/{name}: no layer of the model has the width {key}")
            model[key] += WIDTH_STEP * round((wanted - here) / (further - here))
            if model[key] < WIDTH_STEP:
                raise RecipeError(f"{chosen.name}/{name}: {key} would have to be {model[key]}")
        for count in (parameters, active_parameters):
            off = count(model) / count(reference) - 1
            if abs(off) > TOLERANCE:
                raise RecipeError(f"{chosen.name}/{name}: {count.__name__} are {off:+.1%} of the reference's")
        out[name] = made | {"model": model}
    return out


# --- the recipe as a file ---
def to_toml(tables: Json) -> str:
    """Tables of keys as a file that `hadal train` reads back as the same."""
    lines = []
    for section, values in tables.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value) if isinstance(value, bool | str | int) else repr(float(value))
