"""What a study gives, as plain data: who made the vectors, the vectors, results, curves, and all of it.

Legend: n concepts, l layers, d width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hadal.probe.backends import Backend
from hadal.probe.identity import Identity
from hadal.probe.material import Gathered, Material
from hadal.probe.recipe import Model, StudyRecipe
from hadal.probe.stats.permute import Curve
from hadal.probe.stats.result import Result

Role = Literal["studied", "baseline"]
Vectors = NDArray[np.float64]
RANDOM = "random weights"
AROUND = "the words around"
LETTERS = "the targets' letters"
APART = "H1: silhouette, no shared words"


@dataclass(frozen=True)
class Maker:
    """A backend with its place in the study. `of`: for a baseline, the title of the model that it is for."""

    title: str
    role: Role
    backend: Backend
    model: Model
    of: str = ""


@dataclass(frozen=True)
class Made:
    """What one maker gave for one language, normalised. `concepts`: by pooling, [n, l, d]; `rows`: of every
    target, at the first pooling. `others`: means of control words, by name. `terms`: of bare words."""

    maker: Maker
    material: Material
    identity: Identity
    layers: tuple[int, ...]
    primary: int  # index into `layers`
    concepts: dict[str, Vectors]
    rows: Vectors
    others: dict[str, Vectors]
    sentences: Vectors | None
    controls: Vectors | None
    terms: dict[str, Vectors]
    isotropy: tuple[float, float]
    fitted: str
    fitted_steps: tuple[str, ...]

    @property
    def at_primary(self) -> Vectors:
        """Concepts at the primary layer, first pooling [n, d]."""
        return self.concepts[next(iter(self.concepts))][:, self.primary]


@dataclass(frozen=True)
class Entry:
    """A result with what it is of. `test`: its name without model and language."""

    model: str
    role: Role
    language: str
    test: str
    result: Result

    def row(self) -> dict[str, Any]:
        """The result's row for tables, with what it is of."""
        own = {"model": self.model, "role": self.role, "language": self.language}
        return own | self.result.row() | {"name": self.test}


@dataclass(frozen=True)
class LayerCurve:
    """A curve with what it is of."""

    model: str
    role: Role
    language: str
    curve: Curve


@dataclass
class StudyOutcome:
    """All that may be told. `grids`: by title, a table of debiased CKA (names, values)."""

    recipe: StudyRecipe
    gathered: Gathered
    made: list[Made] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    curves: list[LayerCurve] = field(default_factory=list)
    refused: list[tuple[str, str, str, str]] = field(default_factory=list)  # model, language, test, reason
    grids: dict[str, tuple[list[str], Vectors]] = field(default_factory=dict)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    clipped: dict[str, int] = field(default_factory=dict)

    @property
    def is_simulation(self) -> bool:
        """Whether any vector was made up: then nothing here is of a model alone."""
        return any(made.identity.is_simulation for made in self.made)

    def found(self, model: str, language: str, test: str) -> Result | None:
        """The result of a test by its name; None where it was not made."""
        hits = (e.result for e in self.entries if (e.model, e.language, e.test) == (model, language, test))
        return next(hits, None)

    def baseline_of(self, model: str) -> str | None:
        """The title of the random network beside a model, if there is one."""
        return next((m.maker.title for m in self.made if m.maker.of == model), None)
