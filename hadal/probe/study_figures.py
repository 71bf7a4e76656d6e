"""The figures of a study: points at the primary layer, squares by domain, curves over layers, CKA; each with
who made what it shows. How one is drawn is in hadal/probe/figures.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hadal.probe import figures
from hadal.probe.identity import Identity
from hadal.probe.outcome import Made, StudyOutcome
from hadal.probe.stats import StatsError

CORNERS = [name for name, _, _ in figures.PAIRS]


@dataclass(frozen=True)
class Picture:
    """A figure in the folder, with what is said below it. `of`: the heading that it stands under."""

    path: Path
    caption: str
    maker: str
    of: str


@dataclass(frozen=True)
class Several:
    """Makers of one figure, for its line."""

    makers: tuple[Identity, ...]

    @property
    def is_simulation(self) -> bool:
        return any(maker.is_simulation for maker in self.makers)

    def label(self) -> str:
        return " | ".join(maker.label() for maker in self.makers)


def draw(outcome: StudyOutcome, folder: Path) -> list[Picture]:
    """All figures as files of `folder`, half a second each; one that cannot be drawn (too few points) is told
    among what was refused."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Picture] = []

    def attempt(made: Made, kind: str, ending: str, caption: str, make: Callable[[Path], Path],
                maker: Several | None = None) -> None:  # fmt: skip
        path = folder / f"{_safe(made.maker.title)}-{made.material.language}-{kind}{ending}"
        try:
            of = f"{made.maker.title}, {made.material.language}"
            pictures.append(Picture(make(path), caption, (maker or made.identity).label(), of))
        except StatsError as error:
            outcome.refused.append((made.maker.title, made.material.language, f"figure {kind}", str(error)))

    for made in (m for m in outcome.made if m.maker.role == "studied"):
        _draw_points(made, outcome.recipe.seed, attempt)
        if made.material.squares and made.terms:
            caption = "Squares by domain: mean cosines of the corners about the mean of all."
            attempt(made, "squares", ".png", caption, partial(_domains, made))
    for made in outcome.made:
        own = made.maker.title, made.material.language
        for curve in (c.curve for c in outcome.curves if (c.model, c.language) == own):
            caption = f"{', '.join(own)}: {curve.name} over the layers. Grey: if there is nothing."
            kind = f"curve-{_safe(curve.name)}"
            attempt(made, kind, ".png", caption, partial(figures.curve, curve, made.identity))
    for language, (names, values) in outcome.grids.items():
        first = next(m for m in outcome.made if m.material.language == language)
        maker = Several(tuple(m.identity for m in outcome.made if m.material.language == language))
        heat = partial(figures.heat_map, np.clip(values, -1, 1), names, names, maker)
        caption = (
            "Debiased CKA between all layers of all models (descriptive): 1 is the same geometry of "
            "concepts, 0 what independent vectors have."
        )
        attempt(first, "cka", ".png", caption, partial(heat, title=f"debiased CKA, {language}"), maker)
    return pictures


def _draw_points(made: Made, seed: int, attempt: Callable[..., None]) -> None:
    labels, names = list(made.material.concepts.values()), list(made.material.concepts)
    what = f"{made.maker.title}, {made.material.language}: concepts at layer {made.layers[made.primary]}"
    points = made.at_primary, labels, names, made.identity
    flat = partial(figures.scatter, *points, seed=seed, title=what)
    attempt(made, "pca", ".png", f"{what}, PCA.", flat)
    attempt(made, "tsne", ".png", f"{what}, t-SNE.", partial(flat, method="tsne"))
    turning = partial(figures.page_3d, *points, seed=seed, title=what)
    caption = f"{what}, PCA in three dimensions: drag to turn, wheel to come near."
    attempt(made, "turning", ".html", caption, turning)


def _domains(made: Made, path: Path) -> Path:
    """The six cosines of squares, the mean of each domain."""
    corner = np.stack([np.stack([made.terms[w] for w in c]) for _, _, c in made.material.squares])
    corner = corner[:, :, made.primary]
    corner = corner - corner.mean((0, 1))
    corner /= np.maximum(np.linalg.norm(corner, axis=2, keepdims=True), 1e-30)
    values = np.stack([(corner[:, a] * corner[:, b]).sum(1) for _, a, b in figures.PAIRS], 1)
    domains = [domain for _, domain, _ in made.material.squares]
    names = sorted(set(domains))
    rows = np.stack([values[[d == name for d in domains]].mean(0) for name in names])
    titles = [f"{name} ({domains.count(name)})" for name in names]
    return figures.heat_map(
        rows, titles, CORNERS, made.identity, path, title="squares by domain: cosines of corners"
    )


def _safe(text: str) -> str:
    """Of a file name."""
    plain_text = "".join(c if c.isalnum() else "-" for c in text.lower())
    return "-".join(part for part in plain_text.split("-") if part)[-80:]
