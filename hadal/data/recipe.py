"""What `hadal data prepare` is told: a recipe in strict TOML, with everything that the shards depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hadal.data.puzzles.mixture import SPLITS, check_name
from hadal.data.strict import RecipeError, build, read_toml, require

FORMATS = ("auto", "text", "jsonl", "parquet")
DROP_RULES = ("language", "quality", "duplicate", "near-duplicate", "contaminated")


@dataclass(frozen=True)
class Source:
    """One source: files of one kind, or puzzles that are written as they are read, and its share of the
    mixture."""

    name: str
    paths: tuple[str, ...] = ()  # files, folders, globs; relative to the recipe
    hub: str = ""  # or a data set of the hub, ORG/NAME, as it lies in this machine's cache
    format: str = "auto"  # by the ending; "text": each file is a document
    text: str = "text"  # field of a record, or a template: "{question}\n{answer}"
    id: str = "id"  # field; a record without one is known by its file and place
    weight: float = 0.0  # share of the mixture's tokens, relative to the others; 0 in all: as they are
    puzzles: str = (
        ""  # instead of files: a task of hadal.data.puzzles ("countdown"), or a kind ("countdown/4")
    )
    documents: int = 0  # how many puzzles
    split: str = "train"  # of the puzzles

    def __post_init__(self) -> None:
        plain = bool(self.name) and self.name.replace("-", "").replace("_", "").isalnum()
        require(plain, "source.name", self.name, "letters, digits, - and _")
        given = [bool(self.paths), bool(self.hub), bool(self.puzzles)]
        require(sum(given) == 1, f"paths of source {self.name!r}", self.paths, "given, or hub, or puzzles")
        both = bool(self.puzzles) == (self.documents > 0)
        require(both, f"documents of source {self.name!r}", self.documents, "above 0 for puzzles, else 0")
        require(self.split in SPLITS, "source.split", self.split, f"one of {', '.join(SPLITS)}")
        if self.puzzles:
            try:
                check_name(self.puzzles)
            except ValueError as error:
                raise RecipeError(f"source {self.name!r}: {error}") from None
        require(self.format in FORMATS, "source.format", self.format, f"one of {', '.join(FORMATS)}")
        require(self.weight >= 0, "source.weight", self.weight, "0 or more")


@dataclass(frozen=True)
class Language:
    """Languages to keep; empty: all. "und" is text whose language cannot be told: code, tables, fragments."""

    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quality:
    """Rules of thumb, after Gopher's (2112.11446, table A1). A document that breaks one is dropped."""

    min_characters: int = 20
    max_characters: int = 10_000_000
    min_letters: float = 0.5  # share of letters and digits among what is no white space
    max_repeated_lines: float = 0.3  # share of lines that stood above already
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    max_word_length: float = 15.0  # mean length of words in scripts that have spaces
    max_broken: float = 0.001  # share of U+FFFD: bytes that were not UTF-8

    def __post_init__(self) -> None:
        require(self.min_characters >= 0, "quality.min_characters", self.min_characters, "0 or more")
        for name in (
            "min_letters",
            "max_repeated_lines",
            "max_bullet_lines",
            "max_ellipsis_lines",
            "max_broken",
        ):
            require(0 <= getattr(self, name) <= 1, f"quality.{name}", getattr(self, name), "in 0..1")


@dataclass(frozen=True)
class Duplicates:
    """Exact by hash, near by MinHash: `bands` × `rows` hashes of word n-grams find candidates; a candidate
    whose signature agrees in `threshold` of the hashes with a document that stays is dropped."""

    exact: bool = True
    near: bool = True
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.72

    def __post_init__(self) -> None:
        for name in ("ngram", "bands", "rows"):
            require(1 <= getattr(self, name) <= 64, f"duplicates.{name}", getattr(self, name), "in 1..64")
        require(0 < self.threshold <= 1, "duplicates.threshold", self.threshold, "above 0, at most 1")

    @property
    def hashes(self) -> int:
        """Hashes in a signature; 0 without near-duplicates."""
        return self.bands * self.rows if self.near else 0


@dataclass(frozen=True)
class Decontaminate:
    """Evaluation sets. A document that holds `ngram` words in a row of one is dropped; of an evaluation text
    that is shorter, but has `shortest` words, the whole (DeepSeekMath's rule, 2402.03300 §2.1)."""

    paths: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("question", "prompt", "problem", "text", "input")
    ngram: int = 10
    shortest: int = 3
    puzzles: int = 0  # and the problems that `hadal eval --limit N` asks

    def __post_init__(self) -> None:
        require(1 <= self.shortest <= self.ngram <= 64, "decontaminate.ngram", self.ngram, "shortest..64")
        require(self.puzzles >= 0, "decontaminate.puzzles", self.puzzles, "0 (none) or more")


@dataclass(frozen=True)
class Mixture:
    tokens: int = 0  # of the whole set; 0: as many as the weights allow within max_epochs
    max_epochs: float = 1.0  # how often a source may be seen

    def __post_init__(self) -> None:
        require(self.tokens >= 0, "mixture.tokens", self.tokens, "0 or more")
        require(self.max_epochs > 0, "mixture.max_epochs", self.max_epochs, "above 0")


@dataclass(frozen=True)
class Fim:
    rate: float = 0.0  # share of documents rearranged for filling in the middle; V3: 0.1

    def __post_init__(self) -> None:
        require(0 <= self.rate <= 1, "fim.rate", self.rate, "in 0..1")


@dataclass(frozen=True)
class Tokens:
    tokenizer: str = "hadal-mini"  # a folder with tokenizer.json, relative to the recipe; or the one on board
    bos: bool = True  # begin each document with it; each ends with eos
    split_rate: float = 0.0  # share of tokens of signs and line breaks that are split in two
    per_shard: int = 50_000_000

    def __post_init__(self) -> None:
        require(0 <= self.split_rate <= 1, "tokens.split_rate", self.split_rate, "in 0..1")
        require(self.per_shard >= 1, "tokens.per_shard", self.per_shard, "at least 1")


@dataclass(frozen=True)
class Heldout:
    share: float = 0.0  # of the documents; never rearranged, never repeated, in OUT/heldout, by source

    def __post_init__(self) -> None:
        require(0 <= self.share < 1, "heldout.share", self.share, "at least 0, below 1")


@dataclass(frozen=True)
class DataRecipe:
    """A whole set of shards."""

    name: str
    source: tuple[Source, ...]
    seed: int = 0
    language: Language = field(default_factory=Language)
    quality: Quality = field(default_factory=Quality)
    duplicates: Duplicates = field(default_factory=Duplicates)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)
    mixture: Mixture = field(default_factory=Mixture)
    fim: Fim = field(default_factory=Fim)
    tokens: Tokens = field(default_factory=Tokens)
    heldout: Heldout = field(default_factory=Heldout)

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a plain name")
        require(0 <= self.seed < 2**31, "seed", self.seed, "in 0..2^31−1")
        require(bool(self.source), "source", self.source, "at least one [[source]]")
        names = [s.name for s in self.source]
        require(len(set(names)) == len(names), "source names", names, "different from one another")
        plain = not (self.duplicates.near and any(s.puzzles for s in self.source))
        want = "false with puzzles: of one template, all are near copies of one another"
        require(plain, "duplicates.near", self.duplicates.near, want)
        weighted = [s.weight > 0 for s in self.source]
        require(
            all(weighted) or not any(weighted), "source weights", [s.weight for s in self.source],
            "above 0 for all sources, or left out for all",
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default written out."""
        return dataclasses.asdict(self)


def load(path: Path, overrides: Sequence[str] = ()) -> DataRecipe:
    """Read a recipe. Raises RecipeError."""
    recipe = build(DataRecipe, read_toml(path, overrides))
    assert isinstance(recipe, DataRecipe)
    return recipe
