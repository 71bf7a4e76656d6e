"""What `hadal probe` is told: a recipe in strict TOML, with everything that a result depends on.

    recipe = load(Path("recipes/probe/nsm.toml"))

The study of semantic primes is `StudyRecipe()`, the defaults; any other set of concepts is one file of
labelled spans in `data.spans`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from hadal.data.strict import RecipeError, build, overridden, read_toml, require
from hadal.probe.pooling import TARGET_POOLINGS, TargetPooling
from hadal.probe.whiten import STEPS, Step

HYPOTHESES: Final = ("H1", "H2", "H3", "H4", "probes", "geometry")
SETS: Final = ("nsm", "")
HOLE: Final = "{}"
FRAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "en": ("Once more, the topic: {}.", "We had already spoken about this: {}."),
    "fr": ("Encore une fois, le sujet : {}.", "Nous en avions déjà parlé : {}."),
}


@dataclass(frozen=True)
class Data:
    """What is asked with. Paths are relative to the recipe."""

    set: str = "nsm"  # the packaged data of semantic primes; "": none
    folders: tuple[str, ...] = ()  # of the same kinds of files: another language, another reading
    spans: tuple[str, ...] = ()  # JSONL of labelled spans: any concepts
    others: tuple[str, ...] = ()  # JSONL of spans that are not studied: normalisers are fitted on them
    languages: tuple[str, ...] = ()  # codes; all that there are
    carriers: int = 0  # sentences of a concept, at most; 0: all
    words: int = 3  # sentences of a control word, at most
    frames: Mapping[str, Any] = field(default_factory=dict)  # by language: what a bare word stands in

    def __post_init__(self) -> None:
        require(self.set in SETS, "data.set", self.set, "nsm, or empty")
        given = bool(self.set or self.spans or self.folders)
        require(given, "data.spans", self.spans, "given where there is no data.set: nothing to study")
        plain = not (self.set and self.spans)
        require(plain, "data.set", self.set, 'set = "" beside data.spans: one study, one set of concepts')
        require(self.carriers >= 0, "data.carriers", self.carriers, "0 or more")
        require(self.words >= 1, "data.words", self.words, "at least 1")
        for language, frames in self.frames.items():
            fine = isinstance(frames, list | tuple) and bool(frames)
            fine = fine and all(isinstance(f, str) and f.count(HOLE) == 1 for f in frames)
            require(fine, f"data.frames.{language}", frames, "a list of texts with one {} each")

    def frames_of(self, language: str) -> tuple[str, ...]:
        """Sentences for bare words; "{}", the word alone, for a language without any."""
        return tuple(self.frames.get(language, FRAMES.get(language, (HOLE,))))


@dataclass(frozen=True)
class Model:
    """One that makes vectors: a model here by `name`; a service at `url`, `name` being the model there; or
    a simulation with a planted effect of this size."""

    name: str = ""
    url: str = ""
    simulate: float | int | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = ""
    baseline: bool = True  # of a model here: the same network with random weights beside it
    pooling: str = ""  # of a service that is Hadal's own; others choose themselves
    requests_per_minute: float | int | None = None
    tokens_per_minute: float | int | None = None
    price: float | int | None = None  # of a million tokens, for estimates
    cache: str = ""  # of a service: a file, relative to where it is run

    def __post_init__(self) -> None:
        require(
            bool(self.name) != (self.simulate is not None), "model.name", self.name,
            "given, unless the model is simulated",
        )  # fmt: skip
        size = 0.0 if self.simulate is None else self.simulate
        require(math.isfinite(size) and size >= 0, "model.simulate", size, "0 or more")
        service = (self.requests_per_minute, self.tokens_per_minute, self.price, self.cache or None)
        given = [value for value in (*service, self.pooling or None) if value is not None]
        require(
            bool(self.url) or not given,
            "model.url",
            self.url,
            "given: limits, cache and pooling are a service's",
        )
        known = ("", *TARGET_POOLINGS[:3])
        require(self.pooling in known, "model.pooling", self.pooling, f"one of {', '.join(known[1:])}")

    @property
    def title(self) -> str:
        """What it is called in tables."""
        if self.simulate is not None:
            return f"simulation {self.simulate:g}"
        short = Path(self.name).name if self.name.startswith(("/", ".", "~")) else self.name
        return f"{self.name} at {self.url}" if self.url else short


@dataclass(frozen=True)
class Vectors:
    """How texts become vectors. `primary`: where along the depth the hypotheses are tested, 0 the embedding
    and 1 the end; fixed here, before anything is seen. The first pooling is the one that they are tested on;
    the others are told as exploratory."""

    layers: tuple[int, ...] = ()  # all
    primary: float = 0.5
    pooling: tuple[str, ...] = ("span", "span-last", "weighted")
    normalise: tuple[str, ...] = ("zscore",)

    def __post_init__(self) -> None:
        require(0 <= self.primary <= 1, "vectors.primary", self.primary, "in 0..1")
        for key, values, known in (
            ("pooling", self.pooling, TARGET_POOLINGS),
            ("normalise", self.normalise, STEPS),
        ):
            fine = bool(values) and set(values) <= set(known) and len(set(values)) == len(values)
            require(fine, f"vectors.{key}", values, f"some of {', '.join(known)}, each once")
        require(len(set(self.layers)) == len(self.layers), "vectors.layers", self.layers, "each once")

    @property
    def poolings(self) -> tuple[TargetPooling, ...]:
        return cast(tuple[TargetPooling, ...], self.pooling)

    @property
    def steps(self) -> tuple[Step, ...]:
        return cast(tuple[Step, ...], self.normalise)


@dataclass(frozen=True)
class Questions:
    """What is tested, and with how many draws."""

    hypotheses: tuple[str, ...] = HYPOTHESES
    permutations: int = 999
    bootstraps: int = 999
    folds: int = 5
    occurrences: int = 8  # of a concept, for the probes
    alpha: float = 0.05

    def __post_init__(self) -> None:
        fine = bool(self.hypotheses) and set(self.hypotheses) <= set(HYPOTHESES)
        require(fine, "tests.hypotheses", self.hypotheses, f"some of {', '.join(HYPOTHESES)}")
        require(self.permutations >= 19, "tests.permutations", self.permutations, "at least 19")
        fine = self.bootstraps == 0 or self.bootstraps >= 99
        require(fine, "tests.bootstraps", self.bootstraps, "0, or at least 99")
        require(self.folds >= 2, "tests.folds", self.folds, "at least 2")
        require(self.occurrences >= 2, "tests.occurrences", self.occurrences, "at least 2")
        require(0 < self.alpha < 1, "tests.alpha", self.alpha, "between 0 and 1")


@dataclass(frozen=True)
class StudyRecipe:
    """A whole study."""

    name: str = "nsm"
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: tuple[Model, ...] = (Model("hadal-mini"),)
    vectors: Vectors = field(default_factory=Vectors)
    tests: Questions = field(default_factory=Questions)

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a plain name")
        require(0 <= self.seed < 2**31, "seed", self.seed, "in 0..2^31−1")
        require(bool(self.model), "model", self.model, "at least one [[model]]")
        titles = [m.title for m in self.model]
        require(len(set(titles)) == len(titles), "model names", titles, "different from one another")
        kinds = {m.simulate is None for m in self.model}
        require(
            len(kinds) == 1, "model", titles, "models, or simulations: the two are not told in one report"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default written out."""
        return cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def nsm(overrides: Sequence[str] = ()) -> StudyRecipe:
    """The study of semantic primes: the defaults, as recipes/probe/nsm.toml has them. Raises RecipeError."""
    return cast(StudyRecipe, build(StudyRecipe, overridden({}, overrides)))


def load(path: Path, overrides: Sequence[str] = ()) -> StudyRecipe:
    """Read a recipe; paths in it become relative to where it lies. Raises RecipeError."""
    table = read_toml(path, overrides, "probe/nsm")
    recipe = cast(StudyRecipe, build(StudyRecipe, table))
    data, where = recipe.data, path.parent

    def placed(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(_there(where / name, path) for name in names)

    folders, spans, others = placed(data.folders), placed(data.spans), placed(data.others)
    data = dataclasses.replace(data, folders=folders, spans=spans, others=others)
    return dataclasses.replace(recipe, data=data)


def _there(place: Path, recipe: Path) -> str:
    if not place.exists():
        raise RecipeError(f"{place} does not exist, which {recipe} names in [data]")
    return str(place)
