"""Data with a planted effect of size `delta`, and the nuisances that real data have: a common direction of
all vectors (anisotropy); words, templates, parts of speech and negations with directions of their own."""

from __future__ import annotations

import numpy as np

from hadal.probe.stats import (
    Draft,
    Sentences,
    against_kinds,
    antonym_direction,
    clustering,
    deixis,
    description_length,
    geometry,
    isotopies,
    lexical_controls,
    max_statistic,
    molecules,
    negation,
    selectivity,
)
from hadal.probe.stats.arrays import Floats
from hadal.probe.stats.clusters import layer_clusters

D = 16
Rng = np.random.Generator


def rows(rng: Rng, *shape: int) -> Floats:
    """Noise [*shape, D] about a common mean, with two dimensions of large variance."""
    scale = np.ones(D)
    scale[:2] = 3.0
    return rng.normal(size=(*shape, D)) * scale + 2.0 * rng.normal(size=D)


def concepts(delta: float, rng: Rng) -> tuple[Floats, np.ndarray, np.ndarray]:
    """32 concepts of 4 categories and 2 parts of speech, which have a direction and go with the
    categories."""
    category = np.repeat(np.arange(4), 8)
    speech = np.where(np.arange(32) % 8 == 0, 1 - category % 2, category % 2)
    x = rows(rng, 32) + 3 * rng.normal(size=(2, D))[speech] + delta * rng.normal(size=(4, D))[category]
    return x - x.mean(0), category, speech


def h1(delta: float, rng: Rng, draws: int = 39) -> list[Draft]:
    x, category, speech = concepts(delta, rng)
    return clustering(x, category, draws, rng, strata=speech)


def squares(delta: float, rng: Rng, count: int = 12) -> Floats:
    """s₁ and not-s₂ share a direction of size delta, s₂ and not-s₁ another; not-s echoes s, and all negations
    share one direction."""
    corner = rows(rng, count, 4)
    corner[:, 2:] += 2.0 * rng.normal(size=D)
    meant = delta * rng.normal(size=(count, 2, D))
    corner[:, 0] += meant[:, 0]
    corner[:, 3] += meant[:, 0]
    corner[:, 1] += meant[:, 1]
    corner[:, 2] += meant[:, 1]
    return corner


def h2(delta: float, rng: Rng, draws: int = 199) -> list[Draft]:
    corner = squares(delta, rng)
    antonym, synonym = rows(rng, 14, 2), rows(rng, 14, 2)
    antonym[:, 0] += delta * rng.normal(size=D)
    return [
        *deixis(corner, draws, rng),
        *negation(corner, draws, rng),
        *antonym_direction(antonym, draws, rng),
        *against_kinds(antonym, {"synonyms": synonym}, draws, rng),
    ]


def h3(delta: float, rng: Rng, draws: int = 59) -> list[Draft]:
    """48 sentences: 4 isotopies, 12 lexemes, 4 templates; lexemes and templates have directions."""
    label, lexeme, template = (
        np.repeat(np.arange(4), 12),
        np.repeat(np.arange(12), 4),
        np.tile(np.arange(4), 12),
    )
    meaning = delta * rng.normal(size=(4, D))
    x = rows(rng, 48) + meaning[label] + rng.normal(size=(12, D))[lexeme] + rng.normal(size=(4, D))[template]
    words = np.eye(12)[lexeme] + rng.poisson(0.3, (48, 12))
    context = rng.normal(size=(48, D))
    x, control = x + context, x - meaning[label] + context + rng.normal(size=(48, D))
    sentences = Sentences.of(label, lexeme, template)
    found = isotopies(x, sentences, draws, rng, folds=3, words_NV=words)
    return [*found, lexical_controls(x, sentences, control, draws, rng, folds=3)]


def h4(delta: float, rng: Rng, draws: int = 39) -> list[Draft]:
    """14 molecules of 5 primes."""
    primes = rng.poisson(1.0, (14, 5)).astype(float)
    y = rows(rng, 14) + delta * primes @ rng.normal(size=(5, D))
    return molecules(primes, y, draws, rng)


def probes(delta: float, rng: Rng, draws: int = 39) -> list[Draft]:
    """48 occurrences of 16 words of 2 classes; words have directions."""
    kind = np.repeat(np.arange(16), 3)
    label = kind // 8
    x = rows(rng, 48) + rng.normal(size=(16, D))[kind] + delta * rng.normal(size=(2, D))[label]
    return [
        selectivity(x, label, kind, draws, rng, folds=3),
        description_length(x, label, kind, draws, rng, axes=6),
    ]


def similarity(delta: float, rng: Rng, draws: int = 39) -> list[Draft]:
    """Two models of 24 concepts with a shared part."""
    shared = rng.normal(size=(24, D))
    x, y = (rows(rng, 24) + delta * shared @ rng.normal(size=(D, D)) / 4 for _ in range(2))
    return geometry(x, y, draws, rng)


def layers(delta: float, rng: Rng, draws: int = 39) -> list[Draft]:
    """Categories at one of 4 layers, which are alike; the best layer is told."""
    category = np.repeat(np.arange(3), 7)
    x = rows(rng, 21)[:, None] + rng.normal(size=(21, 4, D))
    x[:, 2] += delta * rng.normal(size=(3, D))[category]
    x = x - x.mean(0)
    found, null, how, exact = layer_clusters(x, category, draws, rng)
    return [max_statistic("silhouette", range(4), found, null, how, n=21, unit="concepts", d=D, folds=0,
                          exact=exact).draft]  # fmt: skip


FAMILIES = {
    "H1": h1,
    "H2": h2,
    "H3": h3,
    "H4": h4,
    "probes": probes,
    "similarity": similarity,
    "layers": layers,
}
EFFECTS = {"H1": (0.7, 2.0), "H2": (0.6, 2.0), "H3": (0.6, 2.0), "H4": (0.4, 2.0), "probes": (0.7, 3.0),
           "similarity": (1.6, 4.0), "layers": (0.8, 3.0)}  # fmt: skip
