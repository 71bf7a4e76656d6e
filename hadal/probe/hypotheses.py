"""The study's hypotheses on its data: which vectors, which nulls, which family (statistics:
hadal/probe/stats).

    study = Study(concepts=Concepts(...), squares=Squares(...), sentences=..., molecules=...)
    outcome = study.run(Plan(layer=12, draws=999))
    outcome.results, outcome.curves, outcome.refused

- H1, primes of a category cluster; H2, semiotic squares have a geometry; H3, the isotopy of a sentence is
  predictable without shared words; H4, molecules are linear in primes. Each is a confirmatory family (Holm)
  at one layer, fixed before anything is seen. What is compared besides is exploratory (Benjamini-Hochberg):
  baselines, probes, models and languages.
- Curves over layers are corrected by the largest of all layers, and are a family each.
- A test that cannot be made for these data is told with its reason, and the others go on.

All vectors are [n, layers, d], centred or whitened before (hadal/probe/whiten.py), one row a concept: a
prime's is the mean over its carrier sentences, so that n is the number of concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .stats.arrays import Floats, StatsError
from .stats.clusters import against_baseline, against_words, clustering, layer_clusters, matched_words, purity
from .stats.molecules import molecules
from .stats.permute import Curve, max_statistic
from .stats.predict import Sentences, isotopies, layer_isotopies, lexical_controls
from .stats.probing import description_length, layer_selectivity, selectivity
from .stats.result import Draft, Family, Kind, Result
from .stats.similarity import geometry
from .stats.squares import against_kinds, antonym_direction, corners, deixis, negation

Vectors = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Plan:
    """What is fixed before anything is seen. `layer`: index into the layers of the vectors, where H1 to H4
    are tested. `draws`: permutations, `bootstraps`: of intervals, 0 for none."""

    layer: int
    draws: int = 999
    bootstraps: int = 999
    folds: int = 5
    seed: int = 0
    alpha: float = 0.05


@dataclass(frozen=True)
class Concepts:
    """H1. `vectors` [n, l, d], a category each, strata in which alone labels are exchanged (part of speech,
    length). `baselines`: vectors [n, d] of the same concepts by name (static, random weights, part of
    speech); `features` [n, f] and `pool` [m, l, d] with `pool_features` [m, f]: words to match by frequency
    and length."""

    names: tuple[str, ...]
    vectors: Vectors
    category: tuple[str, ...]
    strata: tuple[str, ...] | None = None
    baselines: Mapping[str, Vectors] = field(default_factory=dict)
    features: Floats | None = None
    pool: Vectors | None = None
    pool_features: Floats | None = None


@dataclass(frozen=True)
class Squares:
    """H2. `corners` [q, 4, l, d]: s1, s2, not s1, not s2. `antonyms` [n, 2, l, d], positive pole first;
    `kinds`: other pairs by name (synonyms, co-hyponyms), the more frequent member first."""

    corners: Vectors
    antonyms: Vectors | None = None
    kinds: Mapping[str, Vectors] = field(default_factory=dict)


@dataclass(frozen=True)
class Isotopies:
    """H3. `vectors` [n, l, d] of sentences, `words` [n, v] a bag of words; `controls` [n, l, d]: of every
    sentence, one of the same other words which is not of its isotopy."""

    vectors: Vectors
    sentences: Sentences
    words: Floats | None = None
    controls: Vectors | None = None


@dataclass(frozen=True)
class Molecules:
    """H4. `vectors` [n, l, d] of molecules, `primes` [n, f]: counts of primes in their explications."""

    vectors: Vectors
    primes: Floats


@dataclass(frozen=True)
class Occurrences:
    """Probes. `vectors` [n, l, d] of targets in their sentences, the word (type) of each, and its
    category."""

    vectors: Vectors
    types: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass
class Outcome:
    """What may be told: results by family, curves by name, and tests that could not be made, with the
    reason."""

    results: dict[str, list[Result]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Every result as plain data, those of the curves included, for CSV and JSON."""
        told = [result for family in self.results.values() for result in family]
        return [result.row() for result in [*told, *(r for curve in self.curves for r in curve.results)]]


Test = Callable[[np.random.Generator], Draft | list[Draft]]


@dataclass(frozen=True)
class Study:
    """The parts that there are data for. `layers`: numbers of the layers, by which curves are drawn.
    `others`: vectors [n, d] of the same concepts by another model or language, by name."""

    layers: tuple[int, ...]
    concepts: Concepts | None = None
    squares: Squares | None = None
    isotopies: Isotopies | None = None
    molecules: Molecules | None = None
    occurrences: Occurrences | None = None
    others: Mapping[str, Vectors] = field(default_factory=dict)

    def run(self, plan: Plan) -> Outcome:
        """Every test that the data allow. Each has a seed of its own, so that what is tested does not change
        what another finds."""
        if not 0 <= plan.layer < len(self.layers):
            raise StatsError(
                f"layer {plan.layer} is not one of the {len(self.layers)} layers of these vectors"
            )
        outcome = Outcome()
        drafts, outcome.refused = self.drafts(plan)
        for name, (kind, found) in drafts.items():
            family = Family(name, kind, plan.alpha)
            family.add(*found)
            outcome.results[name] = family.results()
        outcome.curves = self.curves(plan, outcome.refused)
        return outcome

    def drafts(self, plan: Plan) -> tuple[dict[str, tuple[Kind, list[Draft]]], dict[str, str]]:
        """What every test found, by family and not corrected yet, so that a study of several models and
        languages corrects all of them together; and tests that could not be made, with the reason."""
        made: dict[str, tuple[Kind, list[Draft]]] = {}
        refused: dict[str, str] = {}
        for number, (name, (kind, tests)) in enumerate(self._families(plan).items()):
            drafts: list[Draft] = []
            for test_number, (title, test) in enumerate(tests.items()):
                try:
                    found = test(np.random.default_rng([plan.seed, number, test_number]))
                    drafts += found if isinstance(found, list) else [found]
                except StatsError as error:
                    refused[f"{name}, {title}"] = str(error)
            if drafts:
                made[name] = kind, drafts
        return made, refused

    def _families(self, plan: Plan) -> dict[str, tuple[Kind, dict[str, Test]]]:
        """Family by name: its kind, and its tests by title."""
        found: dict[str, tuple[Kind, dict[str, Test]]] = {}
        for name, kind, tests in (
            ("H1, categories", "confirmatory", self._h1(plan)),
            ("H1, baselines", "exploratory", self._h1_baselines(plan)),
            ("H2, squares", "confirmatory", self._h2(plan)),
            ("H2, exact chances", "exploratory", self._h2_chances(plan)),
            ("H3, isotopies", "confirmatory", self._h3(plan)),
            ("H4, molecules", "confirmatory", self._h4(plan)),
            ("probes", "exploratory", self._probes(plan)),
            ("geometry", "exploratory", self._geometry(plan)),
        ):
            if tests:
                found[name] = (kind, tests)  # type: ignore[assignment]
        return found

    def _h1(self, plan: Plan) -> dict[str, Test]:
        data = self.concepts
        if data is None:
            return {}
        x = _at(data.vectors, plan)
        return {
            "clusters": lambda rng: clustering(
                x, data.category, plan.draws, rng, strata=data.strata, bootstraps=plan.bootstraps
            )
        }

    def _h1_baselines(self, plan: Plan) -> dict[str, Test]:
        data = self.concepts
        if data is None:
            return {}
        x = _at(data.vectors, plan)
        tests: dict[str, Test] = {"purity": lambda rng: purity(x, data.category, plan.draws, rng, plan.seed)}
        for name, base in data.baselines.items():
            tests[name] = lambda rng, base=base, name=name: against_baseline(  # type: ignore[misc]
                x,
                base,
                data.category,
                plan.draws,
                rng,
                strata=data.strata,
                bootstraps=max(199, plan.bootstraps),
                baseline=name,
            )
        if data.pool is not None and data.features is not None and data.pool_features is not None:
            pool, features, of_pool = _at(data.pool, plan), data.features, data.pool_features
            tests["matched words"] = lambda rng: against_words(
                x, data.category, pool, matched_words(features, of_pool, min(plan.draws, 499), rng)
            )
        return tests

    def _h2(self, plan: Plan) -> dict[str, Test]:
        data = self.squares
        if data is None:
            return {}
        corner = np.asarray(data.corners)[:, :, plan.layer]
        tests: dict[str, Test] = {
            "deixis": lambda rng: deixis(corner, plan.draws, rng, bootstraps=plan.bootstraps),
            "negation": lambda rng: negation(corner, plan.draws, rng),
        }
        if data.antonyms is not None:
            pairs = np.asarray(data.antonyms)[:, :, plan.layer]
            kinds = {name: np.asarray(v)[:, :, plan.layer] for name, v in data.kinds.items()}
            tests["direction"] = lambda rng: antonym_direction(pairs, plan.draws, rng)
            tests["other pairs"] = lambda rng: against_kinds(pairs, kinds, plan.draws, rng)
        return tests

    def _h2_chances(self, plan: Plan) -> dict[str, Test]:
        data = self.squares
        return (
            {}
            if data is None
            else {"corners": lambda rng: corners(np.asarray(data.corners)[:, :, plan.layer])}
        )

    def _h3(self, plan: Plan) -> dict[str, Test]:
        data = self.isotopies
        if data is None:
            return {}
        x = _at(data.vectors, plan)
        tests: dict[str, Test] = {
            "prediction": lambda rng: isotopies(
                x,
                data.sentences,
                plan.draws,
                rng,
                folds=plan.folds,
                words_NV=data.words,
                bootstraps=plan.bootstraps,
            )
        }
        if data.controls is not None:
            control = _at(data.controls, plan)
            tests["lexical controls"] = lambda rng: lexical_controls(
                x, data.sentences, control, plan.draws, rng, folds=plan.folds
            )
        return tests

    def _h4(self, plan: Plan) -> dict[str, Test]:
        data = self.molecules
        if data is None:
            return {}
        y = _at(data.vectors, plan)
        return {"ridge": lambda rng: molecules(data.primes, y, plan.draws, rng, bootstraps=plan.bootstraps)}

    def _probes(self, plan: Plan) -> dict[str, Test]:
        data = self.occurrences
        if data is None:
            return {}
        x = _at(data.vectors, plan)
        return {
            "selectivity": lambda rng: selectivity(
                x, data.labels, data.types, plan.draws, rng, folds=plan.folds
            ),
            "MDL": lambda rng: description_length(x, data.labels, data.types, min(plan.draws, 99), rng),
        }

    def _geometry(self, plan: Plan) -> dict[str, Test]:
        data = self.concepts
        if data is None:
            return {}
        x, strata = _at(data.vectors, plan), data.strata
        return {
            name: lambda rng, other=other, name=name: geometry(  # type: ignore[misc]
                x, other, plan.draws, rng, strata=strata, bootstraps=plan.bootstraps, name=name
            )
            for name, other in self.others.items()
        }

    def curves(self, plan: Plan, refused: dict[str, str]) -> list[Curve]:
        """Layer-wise statistics, each a family corrected by its largest; what cannot be made goes into
        `refused`."""
        curves: list[Curve] = []
        for number, (name, unit, n, d, folds, make) in enumerate(self._layerwise(plan)):
            try:
                found, null, how, exact = make(np.random.default_rng([plan.seed, 1000, number]))
                curves.append(
                    max_statistic(
                        name, self.layers, found, null, how, n=n, unit=unit, d=d, folds=folds, exact=exact
                    )
                )
            except StatsError as error:
                refused[name] = str(error)
        return curves

    def _layerwise(self, plan: Plan) -> Iterable[tuple[str, str, int, int, int, Layerwise]]:
        if (c := self.concepts) is not None:
            x = np.asarray(c.vectors, np.float64)
            yield (
                "H1: silhouette",
                "concepts",
                len(x),
                x.shape[2],
                0,
                lambda rng: layer_clusters(x, c.category, plan.draws, rng, c.strata),
            )
        if (s := self.isotopies) is not None:
            v, groups = np.asarray(s.vectors, np.float64), len(np.unique(s.sentences.lexeme))
            yield (
                "H3: balanced accuracy",
                "lexemes",
                groups,
                v.shape[2],
                plan.folds,
                lambda rng: layer_isotopies(v, s.sentences, plan.draws, rng, plan.folds),
            )
        if (o := self.occurrences) is not None:
            w = np.asarray(o.vectors, np.float64)
            yield (
                "probe: selectivity",
                "types",
                len(set(o.types)),
                w.shape[2],
                plan.folds,
                lambda rng: layer_selectivity(w, o.labels, o.types, min(plan.draws, 199), rng, plan.folds),
            )


Layerwise = Callable[[np.random.Generator], tuple[Floats, Floats, str, bool]]


def _at(vectors: Vectors, plan: Plan) -> Floats:
    """[n, d] at the layer of the plan, in double precision."""
    array = np.asarray(vectors, np.float64)
    if array.ndim != 3 or not plan.layer < array.shape[1]:
        raise StatsError(
            f"vectors are [n, layers, d] with layer {plan.layer}, and the shape is {list(array.shape)}"
        )
    return array[:, plan.layer]
