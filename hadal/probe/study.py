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

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from hadal.probe.backends import Backend, Estimate, Item, Local, Simulation
from hadal.probe.checks import words as words_of
from hadal.probe.hypotheses import Concepts, Isotopies, Molecules, Occurrences, Plan, Squares, Study
from hadal.probe.identity import Embeddings, Identity
from hadal.probe.material import Gathered, Material, Target, gather, token_rows
from hadal.probe.pooling import TargetPooling
from hadal.probe.recipe import Model, StudyRecipe
from hadal.probe.stats import Draft, Sentences, StatsError, geometry
from hadal.probe.stats.clusters import clustering, one_hot_rows
from hadal.probe.stats.permute import Curve
from hadal.probe.stats.predict import lexeme_groups
from hadal.probe.stats.result import Family, Kind, Result
from hadal.probe.stats.similarity import table
from hadal.probe.whiten import Normaliser, fit, iso_score

Role = Literal["studied", "baseline"]
Vectors = NDArray[np.float64]
Tell = Callable[[str], None]
RANDOM = "random weights"
AROUND = "the words around"
LETTERS = "the targets' letters"
APART = "H1: silhouette, no shared words"
KIND_NAMES = {"synonym": "synonyms", "cohyponym": "co-hyponyms"}


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
        return any(made.identity.is_simulation for made in self.made)

    def found(self, model: str, language: str, test: str) -> Result | None:
        """The result of a test by its name."""
        hits = (e.result for e in self.entries if (e.model, e.language, e.test) == (model, language, test))
        return next(hits, None)

    def baseline_of(self, model: str) -> str | None:
        return next((m.maker.title for m in self.made if m.maker.of == model), None)


# --- who makes the vectors ---


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


# --- vectors ---


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
        concepts[way] = _means(clean[way].vectors, [t.concept for t in material.targets])
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


def _primary(maker: Maker, recipe: StudyRecipe, layers: tuple[int, ...]) -> int:
    depth = maker.backend.num_layers if isinstance(maker.backend, Local | Simulation) else max(layers)
    wanted = recipe.vectors.primary * max(0, depth)
    return min(range(len(layers)), key=lambda i: (abs(layers[i] - wanted), i))


def _means(vectors: NDArray[Any], names: Sequence[str]) -> Vectors:
    """Of the rows of each name, in the order in which the names first come."""
    place: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        place[name].append(row)
    return np.stack([vectors[rows].astype(np.float64).mean(0) for rows in place.values()])


def _named_means(found: Embeddings | None, targets: Sequence[Target]) -> dict[str, Vectors]:
    if found is None:
        return {}
    names = [t.concept for t in targets]
    return dict(zip(dict.fromkeys(names), _means(found.vectors, names), strict=True))


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
    return dict(zip(dict.fromkeys(names), _means(clean.vectors, names), strict=True))


# --- tests ---


def bag(texts: Sequence[Sequence[str]]) -> Vectors:
    """[n, words] of 0 and 1."""
    place = {word: i for i, word in enumerate(sorted({w for text in texts for w in text}))}
    found = np.zeros((len(texts), max(1, len(place))))
    for row, text in enumerate(texts):
        found[row, [place[w] for w in text]] = 1
    return found


def _counts(rows: Sequence[Mapping[str, int]]) -> Vectors:
    """Logarithms of counts [n, names]."""
    place = {name: i for i, name in enumerate(sorted({name for row in rows for name in row}))}
    found = np.zeros((len(rows), max(1, len(place))))
    for row, counts in enumerate(rows):
        for name, n in counts.items():
            found[row, place[name]] = np.log1p(n)
    return found


def study_of(made: Made, recipe: StudyRecipe, blank: Made | None) -> Study:
    """The parts that this language has data for and that the recipe asks for. `blank`: the same of random
    weights."""
    asked, material = recipe.tests.hypotheses, made.material
    baseline = made.maker.role == "baseline"
    return Study(
        made.layers,
        _concepts(made, blank) if "H1" in asked else None,
        _squares(made) if "H2" in asked and material.squares else None,
        _isotopies(made) if "H3" in asked and made.sentences is not None else None,
        _molecules(made) if "H4" in asked and material.molecules else None,
        _occurrences(made, recipe.tests.occurrences) if "probes" in asked and not baseline else None,
    )


def _concepts(made: Made, blank: Made | None) -> Concepts:
    material, x = made.material, made.concepts[next(iter(made.concepts))]
    names = tuple(material.concepts)
    strata = tuple(material.strata[c] for c in names) if material.strata else None
    baselines: dict[str, Vectors] = {}
    if blank is not None:
        baselines[RANDOM] = blank.at_primary
    if made.maker.role == "studied":
        baselines[AROUND] = _counts(list(material.contexts.values()))
        baselines[LETTERS] = _counts(list(material.letters.values()))
        if strata is not None:
            baselines["part of speech"] = one_hot_rows(strata)
        if isinstance(made.maker.backend, Local) and 0 in made.layers and made.layers[made.primary] != 0:
            baselines["layer 0"] = x[:, made.layers.index(0)]
    pool = [w for w in made.others if w in material.features] if baselines else []
    return Concepts(
        names, x, tuple(material.concepts.values()), strata, baselines,
        np.array([material.features[c] for c in names]) if pool else None,
        np.stack([made.others[w] for w in pool]) if pool else None,
        np.array([material.features[w] for w in pool]) if pool else None,
    )  # fmt: skip


def _squares(made: Made) -> Squares:
    """Of pairs of another kind the shorter word goes first: it is as a rule the more frequent one."""
    vector, material = made.terms, made.material
    corners = np.stack([np.stack([vector[w] for w in c]) for _, _, c in material.squares])
    kinds = {}
    for kind, pairs in material.pairs.items():
        ordered = [sorted(pair, key=lambda w: (len(w), w)) for pair in pairs]
        kinds[KIND_NAMES.get(kind, kind)] = np.stack([np.stack([vector[w] for w in p]) for p in ordered])
    return Squares(corners, corners[:, :2], kinds)


def _isotopies(made: Made) -> Isotopies:
    material = made.material
    rows = material.sentences
    templates = [t.template for t in rows] if all(t.template for t in rows) else None
    lexemes: Any = lexeme_groups(material.lemmas) if material.lemmas else [t.lexeme for t in rows]
    sentences = Sentences.of([t.category for t in rows], lexemes, templates, material.lemmas)
    texts = [_outside(t.item) if material.sentences_are_targets else t.item.text for t in rows]
    assert made.sentences is not None
    return Isotopies(made.sentences, sentences, bag([words_of(t) for t in texts]), made.controls)


def _outside(item: Item) -> str:
    (begin, end), *_ = item.spans
    return item.text[:begin] + " " + item.text[end:]


def _molecules(made: Made) -> Molecules:
    molecules = made.material.molecules
    primes = sorted({p for counts in molecules.values() for p in counts})
    counts = np.array([[float(row.get(p, 0)) for p in primes] for row in molecules.values()])
    return Molecules(np.stack([made.terms[name] for name in molecules]), counts)


def _occurrences(made: Made, most: int) -> Occurrences:
    seen: Counter[str] = Counter()
    kept = []
    for row, target in enumerate(made.material.targets):
        seen[target.concept] += 1
        if seen[target.concept] <= most:
            kept.append(row)
    targets = [made.material.targets[row] for row in kept]
    return Occurrences(made.rows[kept], tuple(t.concept for t in targets), tuple(t.category for t in targets))


# --- the whole ---


class Families:
    """Drafts of all models and languages, kept until all are there."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._kept: dict[tuple[Role, str], tuple[Kind, list[tuple[str, str, Draft]]]] = {}

    def add(self, role: Role, family: str, kind: Kind, model: str, language: str, drafts: Sequence[Draft]
            ) -> None:  # fmt: skip
        if not drafts:
            return
        _, rows = self._kept.setdefault((role, family), (kind, []))
        rows += [(model, language, draft) for draft in drafts]

    def entries(self) -> Iterator[Entry]:
        for (role, name), (kind, rows) in self._kept.items():
            family = Family(name if role == "studied" else f"{name} (baseline)", kind, self.alpha)
            family.add(*(d.named(f"{model} · {language} · {d.name}") for model, language, d in rows))
            for (model, language, draft), result in zip(rows, family.results(), strict=True):
                yield Entry(model, role, language, draft.name, result)


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
        mean = dict(zip(dict.fromkeys(names), _means(made.rows[rows][:, made.primary], names), strict=True))
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
