"""Whole studies, small: what they find, what they say of it, and that the report says no more than the
numbers do."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hadal.data.strict import RecipeError, build
from hadal.probe import recipe as recipes
from hadal.probe import report
from hadal.probe.backends import Estimate
from hadal.probe.identity import Embeddings, issue
from hadal.probe.material import gather
from hadal.probe.recipe import Data, Model, Questions, StudyRecipe, Vectors
from hadal.probe.rows import DatasetError
from hadal.probe.stats.result import Interval, Result
from hadal.probe.study import Entry, Maker, StudyOutcome, estimate, run
from hadal.probe.verdicts import HYPOTHESES, summary, verdicts
from hadal.weights import save
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer
from tests.weights import tiny
from tests.weights.helpers import random_model

ROOT = Path(__file__).resolve().parents[2]


def spans(folder: Path, language: str = "en") -> Path:
    """12 concepts of 3 categories, 3 sentences each."""
    rows = []
    for category in ("<b>colour</b>", "animal", "number & co"):
        for c in range(4):
            word = f"{category[-3]}word{c}"
            for s in range(3):
                text = f"Sentence {s} has {word} in place {c}."
                begin = text.index(word)
                rows.append({"text": text, "start": begin, "end": begin + len(word), "concept": word,
                             "category": category, "language": language})  # fmt: skip
    path = folder / f"spans-{language}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def small(
    folder: Path, *models: Model, draws: int = 99, hypotheses: tuple[str, ...] = ("H1", "H3")
) -> StudyRecipe:
    data = Data(set="", spans=(str(spans(folder)),))
    tests = Questions(hypotheses, draws, 99, folds=4, occurrences=3)
    return StudyRecipe("small <i>study", 1, data, models, Vectors(pooling=("span", "span-last")), tests)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyOutcome, Path]:
    folder = tmp_path_factory.mktemp("planted")
    outcome = run(small(folder, Model(simulate=1.0)))
    return outcome, report.write(outcome, folder / "out", {"date": "today"})


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = dataclasses.replace(tiny.ALL["qwen2"], vocab_size=512, bos_token_id=0, eos_token_id=(1,))
    save(random_model(config, seed=4), folder)
    make_tiny_tokenizer(folder, 512)
    return folder


@pytest.fixture(scope="module")
def real(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyOutcome, Path]:
    """A tiny random model, in two languages, with its baseline."""
    folder = tmp_path_factory.mktemp("real")
    model = Model(str(tiny_folder), device="cpu", dtype="float32")
    recipe = small(folder, model, draws=49, hypotheses=("H1", "H3", "probes", "geometry"))
    both = Data(set="", spans=(*recipe.data.spans, str(spans(folder, "fr"))))
    outcome = run(dataclasses.replace(recipe, data=both))
    return outcome, report.write(outcome, folder / "out", pictures=False)


def test_a_planted_effect_is_evidence_and_called_planted(planted: tuple[StudyOutcome, Path]) -> None:
    outcome, path = planted
    found = verdicts(outcome)
    assert [v.hypothesis for v in found] == ["H1", "H3"]
    assert found[0].status == "evidence" and "planted" in found[0].text and "simulated" in found[0].text
    result = outcome.found("simulation 1", "en", "H1: silhouette")
    assert result is not None and result.interval is not None and result.significant
    assert f"{result.statistic:.3f}" in found[0].text and f"{result.interval.low:.3f}" in found[0].text
    page = path.read_text("utf-8")
    assert page.count("SIMULATION") > 5 and "They come from no model" in page
    assert json.loads((path.parent / "results.json").read_text())["simulation"] is True
    assert "SIMULATION" in (path.parent / "tables" / "results.csv").read_text("utf-8").splitlines()[1]


def test_without_an_effect_it_says_that_nothing_is_there(tmp_path: Path) -> None:
    outcome = run(small(tmp_path, Model(simulate=0)))
    found = verdicts(outcome)
    assert {v.status for v in found} == {"no evidence"} and all(
        v.text.startswith("No evidence") for v in found
    )
    assert summary(found).startswith("Nothing is there")
    page = report.write(outcome, tmp_path / "out", pictures=False).read_text("utf-8")
    assert "Nothing is there" in page and "SIMULATION" in page


def test_results_are_the_same_bytes_twice(planted: tuple[StudyOutcome, Path], tmp_path: Path) -> None:
    outcome, path = planted
    saved = path.parent / "recipe.json"
    again = run(recipes.load(saved))
    report.write(again, tmp_path, {"date": "another day"}, pictures=False)
    assert (tmp_path / "results.json").read_bytes() == (path.parent / "results.json").read_bytes()
    assert (tmp_path / "recipe.json").read_bytes() == saved.read_bytes()
    other = run(dataclasses.replace(outcome.recipe, seed=2))
    assert report.as_json(other, verdicts(other)) != report.as_json(outcome, verdicts(outcome))


def test_the_report_is_one_file_that_loads_nothing_and_is_escaped(
    planted: tuple[StudyOutcome, Path], real: tuple[StudyOutcome, Path]
) -> None:
    for _, path in (planted, real):
        page = path.read_text("utf-8")
        assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[^"'\s>]+""", page)
        assert not re.findall(r"@import|url\(|<link|<script\s+src|fetch\(|XMLHttp", page)
        assert "default-src 'none'" in page
        assert "<b>colour</b>" not in page and "<i>study" not in page and "&lt;i&gt;study" in page
        for h in (h for h in HYPOTHESES if h.id in ("H1", "H3")):
            assert report.esc(h.tests) in page and report.esc(h.shown_by) in page
    page = planted[1].read_text("utf-8")
    assert page.count("data:image/png;base64,") == 4 and page.count("<iframe") == 1


def test_a_model_here_has_random_weights_beside_it(real: tuple[StudyOutcome, Path]) -> None:
    outcome, path = real
    assert [(m.maker.role, m.material.language) for m in outcome.made] == [
        ("studied", "en"), ("studied", "fr"), ("baseline", "en"), ("baseline", "fr"),
    ]  # fmt: skip
    one, blank = outcome.made[0], outcome.made[2]
    assert one.identity.revision != blank.identity.revision and "random" in blank.identity.label()
    tests = {e.test for e in outcome.entries if e.role == "studied"}
    assert {"H1: silhouette minus random weights", "H1: silhouette minus the words around",
            "H1: silhouette minus the targets' letters", "H1: silhouette, pooling span-last",
            "with random weights: debiased CKA", "probe: selectivity"} <= tests  # fmt: skip
    page = path.read_text("utf-8")
    for made in outcome.made:
        assert report.esc(made.identity.label()) in page
    assert {len(names) for names, _ in outcome.grids.values()} == {2 * len(one.layers)}
    assert one.layers == blank.layers == (0, 1, 2)


def test_one_family_over_all_models_and_languages(real: tuple[StudyOutcome, Path]) -> None:
    outcome, _ = real
    own = [e for e in outcome.entries if e.result.family == "H1, categories"]
    assert {(e.language, e.result.comparisons, e.result.correction) for e in own} == {
        ("en", 4, "Holm"), ("fr", 4, "Holm"),
    }  # fmt: skip
    blank = [e for e in outcome.entries if e.result.family == "H1, categories (baseline)"]
    assert len(blank) == 4 and {e.role for e in blank} == {"baseline"}


def test_vectors_are_means_of_targets_normalised(real: tuple[StudyOutcome, Path]) -> None:
    made = real[0].made[0]
    first = [i for i, t in enumerate(made.material.targets) if t.concept == made.material.targets[0].concept]
    np.testing.assert_allclose(made.concepts["span"][0], made.rows[first].mean(0), rtol=1e-6)
    assert np.abs(made.rows.mean(0)).max() < 1e-4 and made.fitted == "the studied targets themselves"


def result(name: str, p: float, *, statistic: float = 0.3, effect: float = 2.0, low: float = 0.1,
           floor: float = 0.001) -> Result:  # fmt: skip
    spread = Interval(low, 0.9, "made up")
    return Result("f", name, statistic, 0.0, -0.1, 0.1, 99, "labels", 12, "concepts", 8, 0, effect, "sd", p,
                  p, floor, "Holm", 1, 0.05, spread)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "blank", "status", "says"),
    [
        ({"silhouette": (0.01, {})}, {}, "evidence", "random weights does not show it"),
        ({"silhouette": (0.2, {}), "ANOSIM R": (0.06, {})}, {}, "no evidence", "corrected p = 0.200"),
        ({"silhouette": (0.01, {}), "silhouette minus random weights": (0.01, {"low": -0.2})}, {},
         "not the model's own", "not surely more than random weights"),
        ({"silhouette": (0.01, {}), "silhouette minus the words around": (0.01, {"low": -0.2})}, {},
         "not the model's own", "not surely more than the words around"),
        ({"silhouette": (0.01, {}), "silhouette, no shared words": (0.3, {})}, {}, "not the model's own",
         "not significant among"),
        ({"silhouette": (0.01, {})}, {"silhouette": (0.01, {})}, "not the model's own", "show it too"),
        ({"silhouette": (0.01, {})}, {"silhouette": (0.3, {"effect": 3.0})},
         "not the model's own", "as much"),
        ({"silhouette": (0.2, {"floor": 0.2})}, {}, "not tested", "cannot reach"),
        ({}, {}, "not tested", "no data"),
    ],
)  # fmt: skip
def test_verdicts_follow_the_numbers(
    real: tuple[StudyOutcome, Path], rows: dict[str, Any], blank: dict[str, Any], status: str, says: str
) -> None:
    outcome = StudyOutcome(real[0].recipe, real[0].gathered, real[0].made)
    title, other = outcome.made[0].maker.title, outcome.made[2].maker.title
    for of, role, table in ((title, "studied", rows), (other, "baseline", blank)):
        for name, (p, more) in table.items():
            outcome.entries.append(Entry(of, role, "en", f"H1: {name}", result(f"H1: {name}", p, **more)))  # type: ignore[arg-type]
    [found] = [v for v in verdicts(outcome) if (v.hypothesis, v.language) == ("H1", "en")]
    assert found.status == status and says in found.text


def test_half_of_a_claim_is_no_evidence(real: tuple[StudyOutcome, Path]) -> None:
    outcome = StudyOutcome(real[0].recipe, real[0].gathered, real[0].made[:1])
    title = outcome.made[0].maker.title
    for name, p in (("balanced accuracy", 0.01), ("accuracy minus bag of words", 0.4)):
        outcome.entries.append(Entry(title, "studied", "en", f"H3: {name}", result(f"H3: {name}", p)))
    [_, found] = verdicts(outcome)
    assert found.lead == "H3: accuracy minus bag of words"
    assert found.status == "no evidence" and "does not: accuracy minus bag of words" in found.text


def test_the_study_of_primes_with_few_sentences(tmp_path: Path) -> None:
    """All of its parts: English, two sentences a prime, an effect."""
    data = Data(languages=("en",), carriers=2, words=1)
    tests = Questions(("H1", "H2", "H3", "H4"), 199, 0)
    outcome = run(StudyRecipe(data=data, model=(Model(simulate=1.0),), vectors=Vectors((2,)), tests=tests))
    assert not [r for r in outcome.refused if "minus" not in r[2]], outcome.refused
    assert {v.hypothesis: v.status for v in verdicts(outcome)} == dict.fromkeys(
        ("H1", "H2", "H3", "H4"), "evidence"
    )


def test_the_recipe_on_disk_is_the_study_on_board() -> None:
    assert recipes.load(ROOT / "recipes" / "probe" / "nsm.toml") == recipes.nsm()
    own = recipes.load(ROOT / "recipes" / "probe" / "colours.toml")
    [material] = gather(own.data).materials
    assert len(material.concepts) == 12 and len(material.targets) == 48


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"dta": {}}, "unknown key 'dta'"),
        ({"tests": {"permutation": 5}}, "Did you mean 'permutations'"),
        ({"data": {"set": "", "spans": []}}, "nothing to study"),
        ({"model": [{"name": "a"}, {"simulate": 0.1}]}, "not told in one report"),
        ({"model": [{"name": "a", "price": 2}]}, "model.url"),
        ({"vectors": {"pooling": ["sum"]}}, "vectors.pooling"),
        ({"tests": {"hypotheses": ["H9"]}}, "tests.hypotheses"),
        ({"data": {"frames": {"en": ["no hole"]}}}, "one {} each"),
    ],
)
def test_recipes_that_cannot_be_followed(table: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(match)):
        build(StudyRecipe, table)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"kategory": "x"}, "unknown key 'kategory'"),
        ({"start": 90}, "does not lie in"),
        ({"category": 3}, "not of type str"),
        ({"category": "other"}, "one each"),
    ],
)
def test_spans_that_cannot_be_used(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = spans(tmp_path)
    first, *rest = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | row), *rest]), "utf-8")
    with pytest.raises(DatasetError, match=match):
        gather(Data(set="", spans=(str(path),)))


class Service:
    """As endpoint.py: one vector a text, layer −1, of an unknown revision."""

    def embed(
        self, items: Any, layers: Any = None, pooling: Any = None, *, progress: Any = None
    ) -> Embeddings:
        assert layers is None and pooling is None  # fields that others would ignore are not sent
        seeds = [zlib.crc32(item.text.encode()) for item in items]
        vectors = np.stack([np.random.default_rng(s).normal(size=(1, 24)) for s in seeds]).astype(np.float32)
        identity = issue(
            "endpoint", model="m", revision="unknown", dtype="unknown", layers=(-1,), pooling="own"
        )
        return Embeddings(vectors, (-1,), [item.id for item in items], identity)

    def estimate(self, items: Any) -> Estimate:
        return Estimate(len(items), 100, 2, None)


def test_a_service_has_one_layer_one_pooling_and_no_random_weights(tmp_path: Path) -> None:
    model = Model("m", url="http://x/v1")
    recipe = small(tmp_path, model, hypotheses=("H1", "H3", "geometry"))
    gathered = gather(recipe.data)
    maker = Maker(model.title, "studied", Service(), model)
    assert estimate(recipe, gathered, [maker])[0][1].texts == 36
    outcome = run(recipe, gathered=gathered, found=[maker])
    assert outcome.made[0].layers == (-1,) and list(outcome.made[0].concepts) == ["span"]
    page = report.write(outcome, tmp_path / "out", pictures=False).read_text("utf-8")
    assert "There is none: random weights" in page and "This backend has one pooling" in page


@pytest.mark.parametrize("name", ["hadal-mini", "simulated-0.2"])
def test_the_tables_of_the_page_are_those_of_the_results(name: str) -> None:
    page = (ROOT / "docs" / "probe.md").read_text("utf-8")
    found = json.loads((ROOT / "docs" / "results" / f"probe-nsm-{name}.json").read_text("utf-8"))
    lead = {"H1": "silhouette", "H2": "deixis", "H3": "balanced accuracy", "H4": "retrieval rank"}
    for v in found["verdicts"]:
        of = v["model"], v["language"], f"{v['hypothesis']}: {lead[v['hypothesis']]}"
        r = next(r for r in found["results"] if (r["model"], r["language"], r["name"]) == of)
        null = f"{r['null_mean']:.3f} [{r['null_low']:.3f}, {r['null_high']:.3f}]"
        head = f"| {v['hypothesis']} | {v['language']} | {v['status']} | {lead[v['hypothesis']]} "
        row = f"{head}| {r['statistic']:.3f} | {null}"
        assert row in page, row
    nothing = json.loads((ROOT / "docs" / "results" / "probe-nsm-simulated-0.json").read_text("utf-8"))
    assert {v["status"] for v in nothing["verdicts"]} == {"no evidence"}
