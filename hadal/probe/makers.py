"""Who makes a study's vectors: the backends of a recipe, and a network with random weights beside each model
that runs here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import cast

from hadal.probe.backends import Backend, Estimate, Local, Simulation
from hadal.probe.material import Gathered
from hadal.probe.outcome import RANDOM, Maker
from hadal.probe.recipe import Model, StudyRecipe


def makers(recipe: StudyRecipe, gathered: Gathered, api_key: str | None = None) -> list[Maker]:
    """Every backend of the recipe, and the random networks beside models here. Raises what backends raise."""
    found = []
    for model in recipe.model:
        if model.simulate is not None:
            found.append(Maker(model.title, "studied", _simulation(recipe, gathered, model.simulate), model))
        elif model.url:
            found.append(Maker(model.title, "studied", _endpoint(model, api_key), model))
        else:
            found.append(Maker(model.title, "studied", _local(model), model))
            if model.baseline:
                blank = _local(model, recipe.seed)
                found.append(Maker(f"{model.title}, {RANDOM}", "baseline", blank, model, model.title))
    return found


def _local(model: Model, random_weights: int | None = None) -> Local:
    quantize = model.quantize or None
    if random_weights is not None:
        quantize = None
    return Local(
        model.name, device=model.device, dtype=model.dtype, quantize=quantize, random_weights=random_weights
    )


def _endpoint(model: Model, api_key: str | None) -> Backend:
    from hadal.probe.endpoint import Endpoint

    return Endpoint(
        model.url, model.name, api_key=api_key or os.environ.get("HADAL_API_KEY"), cache=model.cache or None,
        requests_per_minute=model.requests_per_minute, tokens_per_minute=model.tokens_per_minute,
        price=model.price,
    )  # fmt: skip


def _simulation(recipe: StudyRecipe, gathered: Gathered, effect: float) -> Simulation:
    """The effect lies where the hypotheses look: categories, isotopies, squares, molecules."""
    groups: dict[str, str] = {}
    squares: list[tuple[str, str, str, str]] = []
    mixtures: dict[str, Mapping[str, float]] = {}
    for material in gathered.materials:
        for target in (*material.targets, *material.sentences, *material.controls):
            if target.category != "neutral":
                groups[target.item.id] = target.category
        for _, _, corners in material.squares:
            for items in zip(*(material.terms[word].items for word in corners), strict=True):
                squares.append(cast(tuple[str, str, str, str], tuple(item.id for item in items)))
        for name, primes in material.molecules.items():
            for item in material.terms[name].items:
                mixtures[item.id] = {k: float(v) for k, v in primes.items()}
    return Simulation(seed=recipe.seed, effect=effect, groups=groups, squares=squares, mixtures=mixtures)


def estimate(recipe: StudyRecipe, gathered: Gathered, found: Sequence[Maker]) -> list[tuple[str, Estimate]]:
    """What each maker will take, by its title."""
    items = [item for material in gathered.materials for item in material.items()]
    told = []
    for maker in found:
        items_of = items
        if not isinstance(maker.backend, Local):
            items_of = list({item.text: item for item in items}.values())
        told.append((maker.title, maker.backend.estimate(items_of)))
    return told
