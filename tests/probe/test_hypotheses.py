"""The study's tests on data with and without an effect; pictures that say who made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hadal.probe import figures
from hadal.probe.hypotheses import Concepts, Isotopies, Molecules, Occurrences, Outcome, Plan, Squares, Study
from hadal.probe.stats import Sentences, StatsError

from .planted import D, squares

PLAN = Plan(layer=1, draws=199, bootstraps=99, folds=3)


def study(delta: float, seed: int = 0) -> Study:
    """Two layers: the effect is in the second."""
    rng = np.random.default_rng(seed)

    def layered(x: np.ndarray, effect: np.ndarray) -> np.ndarray:
        return np.stack([rng.normal(size=x.shape), x + delta * effect], -2)

    category = np.repeat(np.arange(4), 8)
    concepts = layered(rng.normal(size=(32, D)), rng.normal(size=(4, D))[category])
    label, lexeme = np.repeat(np.arange(4), 12), np.repeat(np.arange(12), 4)
    isotopy = layered(rng.normal(size=(48, D)), rng.normal(size=(4, D))[label])
    primes = rng.poisson(1.0, (14, 4)).astype(float)
    types = np.repeat(np.arange(12), 4)
    text = [f"c{c}" for c in category]
    return Study(
        layers=(4, 8),
        concepts=Concepts(
            tuple(f"p{i}" for i in range(32)),
            concepts,
            tuple(text),
            strata=tuple("ab"[i % 2] for i in range(32)),
            baselines={"static": rng.normal(size=(32, D))},
            features=rng.normal(size=(32, 2)),
            pool=rng.normal(size=(90, 2, D)),
            pool_features=rng.normal(size=(90, 2)),
        ),
        squares=Squares(
            np.moveaxis(np.stack([squares(0, rng), squares(delta, rng)]), 0, 2),
            layered(rng.normal(size=(12, 2, D)), np.stack([np.ones((12, D)), np.zeros((12, D))], 1)),
            {"synonyms": rng.normal(size=(12, 2, 2, D))},
        ),
        isotopies=Isotopies(
            isotopy,
            Sentences.of(label, lexeme, np.tile(np.arange(4), 12)),
            np.eye(12)[lexeme],
            rng.normal(size=isotopy.shape),
        ),
        molecules=Molecules(layered(rng.normal(size=(14, D)), primes @ rng.normal(size=(4, D))), primes),
        occurrences=Occurrences(
            layered(rng.normal(size=(48, D)), rng.normal(size=(2, D))[types // 6]),
            tuple(f"w{t}" for t in types),
            tuple("xy"[t // 6] for t in types),
        ),
        others={"another model": concepts[:, 1] + rng.normal(size=(32, D))},
    )


@pytest.fixture(scope="module")
def strong() -> Outcome:
    return study(2.5).run(PLAN)


def test_every_hypothesis_is_tested_and_a_strong_effect_found(strong: Outcome) -> None:
    assert not strong.refused
    assert list(strong.results) == [
        "H1, categories",
        "H1, baselines",
        "H2, squares",
        "H2, exact chances",
        "H3, isotopies",
        "H4, molecules",
        "probes",
        "geometry",
    ]
    for name in ("H1, categories", "H2, squares", "H3, isotopies", "H4, molecules"):
        assert all(r.correction == "Holm" for r in strong.results[name])
        assert any(r.significant for r in strong.results[name]), name
    assert all(r.correction in ("Benjamini-Hochberg", "") for r in strong.results["H1, baselines"])
    assert [r.name for r in strong.results["H1, baselines"] if r.p is None] == ["purity of k-means"]


def test_curves_find_the_layer_of_the_effect(strong: Outcome) -> None:
    assert [c.name for c in strong.curves] == [
        "H1: silhouette",
        "H3: balanced accuracy",
        "probe: selectivity",
    ]
    for curve in strong.curves:
        assert curve.layers == (4, 8) and curve.results[1].significant and "layer 8" in curve.draft.note
        assert all(r.correction == "max statistic over layers" for r in curve.results)


def test_rows_are_plain_and_the_run_is_reproducible(strong: Outcome) -> None:
    rows = strong.rows()
    assert json.loads(json.dumps(rows)) == rows
    assert all(row["draws"] or "exact" in row["exchanged"] for row in rows)
    assert all((row["p"] is None) == (row["p_corrected"] is None) for row in rows)
    small = Study(layers=(4, 8), concepts=study(2.5).concepts)
    assert small.run(PLAN).results["H1, categories"] == strong.results["H1, categories"]


def test_nothing_is_found_in_nothing_and_what_cannot_be_tested_is_told() -> None:
    none = study(0.0, 3)
    assert none.concepts is not None
    same = tuple(none.concepts.category)
    odd = Concepts(none.concepts.names, none.concepts.vectors, same, strata=same)
    outcome = Study(layers=(4, 8), concepts=odd, molecules=none.molecules).run(PLAN)
    assert "fewer than 20 labelings" in outcome.refused["H1, categories, clusters"]
    assert "H1, categories" not in outcome.results and not any(
        r.significant for r in outcome.results["H4, molecules"]
    )
    with pytest.raises(StatsError, match="layer 2 is not one"):
        none.run(Plan(layer=2))


@dataclass(frozen=True)
class Somebody:
    name: str = "tiny @ 0123456789ab · layer 4 <script>"
    is_simulation: bool = False

    def label(self) -> str:
        return self.name


def test_every_picture_says_who_made_it(strong: Outcome, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, labels, names = rng.normal(size=(12, 5)), ["a", "b $x"] * 6, [f"w{i} $_</script>" for i in range(12)]
    for maker in (Somebody(), Somebody("SIMULATION, no model", True)):
        drawn = [
            figures.curve(strong.curves[0], maker, tmp_path / "curve.svg"),
            figures.page_3d(x, labels, names, maker, tmp_path / "turn.html"),
        ]
        if maker.is_simulation:
            drawn += [
                figures.scatter(x, labels, names, maker, tmp_path / "pca.svg"),
                figures.heat_map(np.eye(3), ["r", "s", "t"], ["a", "b", "c"], maker, tmp_path / "heat.svg"),
                figures.squares(rng.normal(size=(3, 4, 5)), ["x", "y", "z"], maker, tmp_path / "squares.svg"),
            ]
        for path in drawn:
            text = path.read_text("utf-8")
            assert maker.label().split(" <")[0] in text, path
            assert ("SIMULATION" in text) == maker.is_simulation or path.suffix == ".html"
    with pytest.raises(StatsError, match="nobody made"):
        figures.scatter(x, labels, names, Somebody(" "), tmp_path / "none.svg")
    with pytest.raises(StatsError, match="11 names for 12"):
        figures.scatter(x, labels, names[1:], Somebody(), tmp_path / "none.svg")


def test_the_turning_page_loads_nothing_and_runs_no_name(tmp_path: Path) -> None:
    x, names = np.random.default_rng(0).normal(size=(8, 5)), ["</script><script>alert(1)</script>"] * 8
    page = figures.page_3d(x, ["a"] * 4 + ["b"] * 4, names, Somebody(), tmp_path / "t.html").read_text(
        "utf-8"
    )
    assert page.count("<script>") == 1 and page.count("</script>") == 1
    assert "http" not in page.replace("http-equiv", "") and "default-src 'none'" in page
    assert "%DATA%" not in page and "innerHTML" not in page


def test_tsne_is_of_all_points_and_the_same_twice() -> None:
    x = np.random.default_rng(0).normal(size=(14, 5))
    one, words = figures.project(x, 2, "tsne", 3)
    again, _ = figures.project(x, 2, "tsne", 3)
    assert one.shape == (14, 2) and "perplexity 4" in words
    np.testing.assert_allclose(one, again, rtol=1e-4, atol=1e-4)
