"""The parts of a study that one language of one model has data for: from vectors to what
hadal/probe/hypotheses.py tests.

Legend: n concepts, l layers, d width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hadal.probe.backends import Item, Local
from hadal.probe.checks import words as words_of
from hadal.probe.hypotheses import Concepts, Isotopies, Molecules, Occurrences, Squares, Study
from hadal.probe.outcome import AROUND, LETTERS, RANDOM, Made, Vectors
from hadal.probe.recipe import StudyRecipe
from hadal.probe.stats import Sentences
from hadal.probe.stats.clusters import one_hot_rows
from hadal.probe.stats.predict import lexeme_groups

KIND_NAMES = {"synonym": "synonyms", "cohyponym": "co-hyponyms"}


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
