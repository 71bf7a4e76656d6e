"""A whole study: from a recipe to results that may be told, with baselines and verdicts.

    outcome = run(recipe)
    outcome.verdicts, outcome.entries, outcome.curves

Every model of the recipe, and a network of the same shape with random weights beside each model here, embeds
all languages; each language is tested by hadal/probe/hypotheses.py at the layer that the recipe fixed. What
all studied models and languages are tested for is one family a hypothesis, so that p values are corrected for
every comparison that a reader sees; baselines have families of their own.

Legend: n concepts, l layers, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from hadal.probe.backends import Local
from hadal.probe.hypotheses import Concepts, Plan
from hadal.probe.makers import estimate, makers
from hadal.probe.material import Gathered, Material, gather, token_rows
from hadal.probe.outcome import APART, RANDOM, Entry, LayerCurve, Made, Maker, Role, StudyOutcome, Vectors
from hadal.probe.parts import study_of
from hadal.probe.recipe import StudyRecipe
from hadal.probe.stats import Draft, StatsError, geometry
from hadal.probe.stats.clusters import clustering
from hadal.probe.stats.result import Family, Kind
from hadal.probe.stats.similarity import table
from hadal.probe.vectors import make, means

__all__ = ["Entry", "Families", "LayerCurve", "Made", "Maker", "StudyOutcome", "estimate", "makers", "run"]

Tell = Callable[[str], None]


def run(recipe: StudyRecipe, *, gathered: Gathered | None = None, found: Sequence[Maker] | None = None,
        tell: Tell = lambda text: None) -> StudyOutcome:  # fmt: skip
    """The study. `found`: makers that are there already. Raises what data and backends raise; a test
    that cannot be made is told in `refused`."""
    gathered = gathered or gather(recipe.data, recipe.tests.hypotheses)
    outcome = StudyOutcome(recipe, gathered)
    everyone = makers(recipe, gathered) if found is None else list(found)
    for maker in everyone:
        for material in gathered.materials:
            tell(f"{maker.title}, {material.language}: vectors")
            outcome.made.append(make(maker, recipe, material))
        if isinstance(maker.backend, Local) and maker.role == "studied":
            _confounds(outcome, maker)
    families = Families(recipe.tests.alpha)
    for made in outcome.made:
        tell(f"{made.maker.title}, {made.material.language}: tests")
        _test(outcome, families, made)
    if "geometry" in recipe.tests.hypotheses:
        tell("geometry")
        _compare(outcome, families)
    outcome.entries = list(families.entries())
    return outcome


class Families:
    """Drafts of all models and languages, kept until all are there."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._kept: dict[tuple[Role, str], tuple[Kind, list[tuple[str, str, Draft]]]] = {}

    def add(self, role: Role, family: str, kind: Kind, model: str, language: str, drafts: Sequence[Draft]
            ) -> None:  # fmt: skip
        """Keep the drafts of one model and language under the family that they are corrected in."""
        if not drafts:
            return
        _, rows = self._kept.setdefault((role, family), (kind, []))
        rows += [(model, language, draft) for draft in drafts]

    def entries(self) -> Iterator[Entry]:
        """Every result, corrected within its family; baselines have families of their own."""
        for (role, name), (kind, rows) in self._kept.items():
            family = Family(name if role == "studied" else f"{name} (baseline)", kind, self.alpha)
            family.add(*(d.named(f"{model} · {language} · {d.name}") for model, language, d in rows))
            for (model, language, draft), result in zip(rows, family.results(), strict=True):
                yield Entry(model, role, language, draft.name, result)


def _confounds(outcome: StudyOutcome, maker: Maker) -> None:
    """Tokens of targets, and targets that cannot be cut out of their tokens."""
    backend = cast(Local, maker.backend)
    for row in token_rows(outcome.gathered.materials, backend.tokenizer.encode):
        outcome.tokens.append({"model": maker.title} | row)
    targets = [t.item for m in outcome.gathered.materials for t in m.targets]
    outcome.clipped[maker.title] = len(backend.clipped(targets))


def _plan(outcome: StudyOutcome, made: Made) -> Plan:
    tests = outcome.recipe.tests
    return Plan(
        made.primary, tests.permutations, tests.bootstraps, tests.folds, outcome.recipe.seed, tests.alpha
    )


def _test(outcome: StudyOutcome, families: Families, made: Made) -> None:
    role, title, language = made.maker.role, made.maker.title, made.material.language
    plan = _plan(outcome, made)
    blank = next((m for m in outcome.made if m.maker.of == title and m.material is made.material), None)
    study = study_of(made, outcome.recipe, blank)
    drafts, refused = study.drafts(plan)
    for family, (kind, rows) in drafts.items():
        if role == "studied" or family != "H1, baselines":
            families.add(role, family, kind, title, language, rows)
    for curve in study.curves(plan, refused):
        outcome.curves.append(LayerCurve(title, role, language, curve))
    if role == "studied" and study.concepts is not None:
        families.add(role, "H1, baselines", "exploratory", title, language,
                     _without_shared_words(made, plan, study.concepts, refused))  # fmt: skip
        families.add(role, "H1, other poolings", "exploratory", title, language,
                     _other_poolings(made, plan, study.concepts, refused))  # fmt: skip
    outcome.refused += [(title, language, test, why) for test, why in refused.items()]


def _without_shared_words(made: Made, plan: Plan, concepts: Concepts, refused: dict[str, str]) -> list[Draft]:
    """The silhouette of concepts of which no two of a category share a word: what is gone here was spelling.
    Empty where none do."""
    kept = made.material.apart
    if len(kept) == len(concepts.names):
        return []
    rng = np.random.default_rng([plan.seed, 2500])
    strata = None if concepts.strata is None else [concepts.strata[i] for i in kept]
    x, category = np.asarray(concepts.vectors)[kept, plan.layer], [concepts.category[i] for i in kept]
    try:
        found = clustering(x, category, plan.draws, rng, strata=strata)
    except StatsError as error:
        refused[APART] = str(error)
        return []
    return [replace(found[0].named(APART), note=f"{len(kept)} of {len(concepts.names)} concepts")]


def _other_poolings(made: Made, plan: Plan, concepts: Concepts, refused: dict[str, str]) -> list[Draft]:
    """Silhouettes of the other poolings, at the same layer."""
    drafts = []
    for number, (way, vectors) in enumerate(list(made.concepts.items())[1:]):
        rng = np.random.default_rng([plan.seed, 2000, number])
        try:
            found = clustering(vectors[:, plan.layer], concepts.category, plan.draws, rng,
                               strata=concepts.strata)  # fmt: skip
            drafts.append(found[0].named(f"H1: silhouette, pooling {way}"))
        except StatsError as error:
            refused[f"H1, pooling {way}"] = str(error)
    return drafts


def _compare(outcome: StudyOutcome, families: Families) -> None:
    """Models of one language with one another, and languages of one model, by halves that share no
    content."""
    studied = [m for m in outcome.made if m.maker.role == "studied"]
    for number, made in enumerate(studied):
        title, language, material = made.maker.title, made.material.language, made.material
        partners: dict[str, tuple[Vectors, Vectors]] = {}
        for other in outcome.made:
            if other.material is material and other is not made and (other.maker.of == title or (
                other.maker.role == "studied" and other not in studied[: number + 1]
            )):  # fmt: skip
                name = RANDOM if other.maker.of == title else other.maker.title
                partners[f"with {name}"] = made.at_primary, other.at_primary
        for other in studied[number + 1 :]:
            if other.maker is made.maker and other.material.language in material.halves:
                name = f"with {other.material.language}, other contents"
                try:
                    partners[name] = _halves(made, other)
                except StatsError as error:
                    outcome.refused.append((title, language, f"geometry {name}", str(error)))
        for i, (name, (x, y)) in enumerate(partners.items()):
            plan = _plan(outcome, made)
            rng = np.random.default_rng([plan.seed, 3000, number, i])
            try:
                drafts = geometry(x, y, plan.draws, rng, bootstraps=plan.bootstraps, name=name)
                families.add("studied", "geometry", "exploratory", title, language, drafts)
            except StatsError as error:
                outcome.refused.append((title, language, f"geometry {name}", str(error)))
    for material in outcome.gathered.materials:
        _grid(outcome, material)


def _halves(one: Made, other: Made) -> tuple[Vectors, Vectors]:
    """Means [n, d] at the primary layers of the concepts that both have, each over its own contents."""
    found = []
    shared = [c for c in one.material.concepts if c in other.material.concepts]
    for made, partner in ((one, other), (other, one)):
        kept = made.material.halves[partner.material.language]
        rows = [i for i, t in enumerate(made.material.targets) if t.item.id in kept and t.concept in shared]
        names = [made.material.targets[i].concept for i in rows]
        mean = dict(zip(dict.fromkeys(names), means(made.rows[rows][:, made.primary], names), strict=True))
        if missing := [c for c in shared if c not in mean]:
            raise StatsError(
                f"{missing[0]!r} has no sentence in {made.material.language!r} whose content the other "
                "language lacks: take more sentences (data.carriers)"
            )
        found.append(np.stack([mean[c] for c in shared]))
    return found[0], found[1]


def _grid(outcome: StudyOutcome, material: Material) -> None:
    """Debiased CKA between all layers of all makers of a language, for a heat map."""
    sets = {
        f"{'random' if m.maker.of else m.maker.title} {layer}": m.concepts[next(iter(m.concepts))][:, i]
        for m in outcome.made
        if m.material is material
        for i, layer in enumerate(m.layers)
    }
    if 2 <= len(sets) <= 80:
        try:
            outcome.grids[material.language] = table(sets)
        except StatsError as error:
            outcome.refused.append(("all", material.language, "table of CKA", str(error)))
