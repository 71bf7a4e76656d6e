"""All vectors of one language by one maker: embedded, normalised, averaged by concept.

Legend: n concepts, l layers, d width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hadal.probe.backends import Item, Local, Simulation
from hadal.probe.identity import Embeddings
from hadal.probe.material import Material, Target
from hadal.probe.outcome import Made, Maker, Vectors
from hadal.probe.pooling import TargetPooling
from hadal.probe.recipe import StudyRecipe
from hadal.probe.whiten import Normaliser, fit, iso_score


def make(maker: Maker, recipe: StudyRecipe, material: Material) -> Made:
    """All vectors of one language. Normalisers are fitted on control words made in the same way; where there
    are none, on the studied ones themselves, whose labels they do not know."""
    ways, steps = recipe.vectors.poolings, recipe.vectors.steps
    own_sentences = bool(material.sentences) and not material.sentences_are_targets
    extra: tuple[TargetPooling, ...] = ("mean",) if own_sentences and "mean" not in ways else ()
    found = _embed(maker, recipe, _items(material.targets), (*ways, *extra))
    rest = _embed(maker, recipe, _items(material.others), (*ways, *extra)) if material.others else {}
    fitted = "control words" if len(material.others) >= 10 else "the studied targets themselves"
    clean: dict[str, Embeddings] = {}
    concepts: dict[str, Vectors] = {}
    others: Embeddings | None = None
    for way in (way for way in ways if way in found):
        vectors = found[way]
        normaliser = fit(rest[way] if len(material.others) >= 10 else vectors, steps)
        clean[way] = normaliser.apply(vectors)
        concepts[way] = means(clean[way].vectors, [t.concept for t in material.targets])
        if way == ways[0]:
            others = normaliser.apply(rest[way]) if rest else None
    first = clean[ways[0]]
    primary = _primary(maker, recipe, first.layers)
    sentences, controls = None, None
    if own_sentences:
        like = fit(found.get("mean", found[ways[0]]), steps)
        sentences = _plain(maker, recipe, material.sentences, like)
        controls = _plain(maker, recipe, material.controls, like)
    elif material.sentences:
        sentences = first.vectors.astype(np.float64)
    layer = first.layers[primary]
    return Made(
        maker, material, first.identity, first.layers, primary, concepts, first.vectors.astype(np.float64),
        _named_means(others, material.others), sentences, controls, _terms(maker, recipe, material),
        (iso_score(found[ways[0]].at(layer)), iso_score(first.at(layer))), fitted, steps,
    )  # fmt: skip


def _embed(maker: Maker, recipe: StudyRecipe, items: Sequence[Item], ways: Sequence[TargetPooling]
           ) -> dict[str, Embeddings]:  # fmt: skip
    """By pooling; of a service or a simulation there is one alone, under the first name asked for."""
    backend, layers = maker.backend, recipe.vectors.layers or None
    if isinstance(backend, Local):
        return {str(way): found for way, found in backend.embed_ways(items, layers, ways).items()}
    if isinstance(backend, Simulation):
        return {ways[0]: backend.embed(items, layers)}
    pooling = cast(TargetPooling | None, maker.model.pooling or None)
    return {ways[0]: backend.embed(items, layers, pooling)}


def _items(targets: Sequence[Target]) -> list[Item]:
    return [target.item for target in targets]


def _primary(maker: Maker, recipe: StudyRecipe, layers: tuple[int, ...]) -> int:
    depth = maker.backend.num_layers if isinstance(maker.backend, Local | Simulation) else max(layers)
    wanted = recipe.vectors.primary * max(0, depth)
    return min(range(len(layers)), key=lambda i: (abs(layers[i] - wanted), i))


def means(vectors: NDArray[Any], names: Sequence[str]) -> Vectors:
    """Of the rows of each name, in the order in which the names first come."""
    place: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        place[name].append(row)
    return np.stack([vectors[rows].astype(np.float64).mean(0) for rows in place.values()])


def _named_means(found: Embeddings | None, targets: Sequence[Target]) -> dict[str, Vectors]:
    if found is None:
        return {}
    names = [t.concept for t in targets]
    return dict(zip(dict.fromkeys(names), means(found.vectors, names), strict=True))


def _plain(maker: Maker, recipe: StudyRecipe, targets: Sequence[Target], like: Normaliser) -> Vectors:
    [found] = _embed(maker, recipe, _items(targets), ("mean",)).values()
    return like.apply(found).vectors.astype(np.float64)


def _terms(maker: Maker, recipe: StudyRecipe, material: Material) -> dict[str, Vectors]:
    """Means over frames [l, d] by word, normalised by control words in the same frames."""
    if not material.terms:
        return {}
    ways: tuple[TargetPooling, ...] = (recipe.vectors.poolings[0],)
    names = [word for word, term in material.terms.items() for _ in term.items]
    items = [item for term in material.terms.values() for item in term.items]
    [found] = _embed(maker, recipe, items, ways).values()
    fitting = found
    if len(material.other_terms) >= 10:
        [fitting] = _embed(maker, recipe, [i for t in material.other_terms for i in t.items], ways).values()
    clean = fit(fitting, recipe.vectors.steps).apply(found)
    return dict(zip(dict.fromkeys(names), means(clean.vectors, names), strict=True))
