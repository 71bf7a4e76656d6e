"""The traps of a published study, each shown to be rejected: R² in the sample, biased CKA, n that is not
told, the best of many correlations, purity and squares at the level of noise, one more comparison
afterwards."""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge

import hadal.probe.stats
from hadal.probe.stats import (
    Draft,
    Family,
    Interval,
    Null,
    Result,
    StatsError,
    clustering,
    corners,
    debiased_cka,
    geometry,
    interval,
    largest_correlation,
    molecules,
    purity,
)
from hadal.probe.stats.linear import group_folds, linear_kernel, out_of_fold


def draft(statistic: float = 1.0, **changed: object) -> Draft:
    null = np.random.default_rng(0).normal(size=99)
    base = Draft("a test", statistic, Null.sampled(statistic, null, "permuting units"), 20, "concepts", 8, 0)
    return replace(base, **changed)  # type: ignore[arg-type]


def test_r2_of_noise_is_one_in_the_sample_and_not_above_zero_here() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(105, 2048)), rng.normal(size=105)
    assert Ridge(1.0).fit(x, y).score(x, y) > 0.999
    weight = out_of_fold(linear_kernel(x), group_folds(np.arange(105), 5, rng), 1 / 2048)
    assert 1 - np.square(y - weight @ y).sum() / np.square(y - y.mean()).sum() < 0.0
    assert (np.diag(weight) == 0).all()


def test_nested_r2_of_noise_is_not_above_zero() -> None:
    rng = np.random.default_rng(1)
    r2, rank = molecules(rng.normal(size=(30, 400)), rng.normal(size=(30, 64)), 99, rng)
    assert r2.statistic < 0.02 and abs(rank.statistic - 0.5) < 0.1
    family = Family("H4", "confirmatory")
    family.add(r2, rank)
    assert not any(result.significant for result in family.results())


def test_no_function_fits_and_tells_on_the_same_rows() -> None:
    names = [
        name
        for module in pkgutil.iter_modules(hadal.probe.stats.__path__, "hadal.probe.stats.")
        for name, _ in inspect.getmembers(__import__(module.name, fromlist=["x"]), inspect.isfunction)
    ]
    assert "out_of_fold" in names and len(names) > 50
    assert not [
        n for n in names if "r2" in n or "in_sample" in n or "biased_cka" in n.replace("debiased_cka", "")
    ]
    kernel, all_rows = linear_kernel(np.random.default_rng(0).normal(size=(12, 3))), np.arange(12)
    with pytest.raises(StatsError, match="trains on rows that it tests"):
        out_of_fold(kernel, [(all_rows, all_rows)], 1.0)
    with pytest.raises(StatsError, match="tested never or more than once"):
        out_of_fold(kernel, [(all_rows[:6], all_rows[6:])], 1.0)


def test_cka_of_noise_is_large_if_biased_and_zero_here() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(65, 896)), rng.normal(size=(65, 4096))
    k, l = (v @ v.T for v in (x - x.mean(0), y - y.mean(0)))  # noqa: E741
    assert (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()) == pytest.approx(0.959, abs=0.01)
    assert abs(debiased_cka(x, y)) < 0.02
    family = Family("layers", "exploratory")
    family.add(*geometry(x, y, 99, rng))
    assert not any(result.significant for result in family.results())


def test_undefined_n_d_folds_or_statistic_is_refused() -> None:
    with pytest.raises(TypeError, match="folds"):
        Draft("a test", 1.0, draft().null, 20, "concepts", 8)  # type: ignore[call-arg]
    for changed, complaint in (
        ({"n": 0}, "undefined"),
        ({"d": 0}, "undefined"),
        ({"folds": 1}, "folds"),
        ({"unit": ""}, "of what"),
        ({"statistic": float("nan")}, "undefined for these data"),
        ({"effect": 1.0, "effect_name": ""}, "needs a name"),
    ):
        with pytest.raises(StatsError, match=complaint):
            draft(**changed)
    with pytest.raises(StatsError, match="n = 3; this needs"):
        clustering(np.eye(3), [0, 0, 1], 99, np.random.default_rng(0))
    with pytest.raises(StatsError, match="n = 3; this needs"):
        debiased_cka(np.eye(3), np.eye(3))
    with pytest.raises(StatsError, match="not finite"):
        debiased_cka(np.full((6, 2), np.nan), np.eye(6))


def test_the_best_of_many_correlations_is_paid_for() -> None:
    """n = 5: among 400 pairs of noise one has |r| > .95, p < .01 by itself. All 120 permutations are made."""
    rng = np.random.default_rng(0)
    found = largest_correlation(rng.normal(size=(5, 20)), rng.normal(size=(5, 20)), 999, rng)
    assert found.statistic > 0.95 and found.null.draws == 120
    family = Family("correlations", "exploratory")
    family.add(found)
    (result,) = family.results()
    assert result.p_corrected is not None and result.p_corrected > 0.2 and not result.significant


def test_purity_and_squares_of_noise_are_told_beside_noise() -> None:
    rng = np.random.default_rng(3)
    found = purity(rng.normal(size=(60, 64)), np.arange(60) % 16, 99, rng)
    assert (
        found.descriptive and found.null.low <= found.statistic <= found.null.high and found.null.mean > 0.25
    )
    sign, squares = corners(rng.normal(size=(20, 4, 32)))
    assert sign.null.mean == 1 / 2 and squares.null.mean == 1 / 3
    family = Family("as published", "confirmatory")
    family.add(found, sign, squares)
    told = family.results()
    assert told[0].p is None and told[0].p_corrected is None and told[1].comparisons == 2
    assert not any(result.significant for result in told) and "descriptive" in told[0].sentence()


def test_nothing_uncorrected_or_without_a_null_is_told() -> None:
    family = Family("one", "confirmatory")
    family.add(draft())
    (result,) = family.results()
    for changed, complaint in (
        ({"p_corrected": None}, "corrected for its family"),
        ({"exchanged": ""}, "without its null"),
        ({"null_mean": float("nan")}, "without its null"),
        ({"correction": ""}, "name the correction"),
        ({"p_corrected": 0.0, "p": 0.5}, "cannot be corrected"),
    ):
        with pytest.raises(StatsError, match=complaint):
            replace(result, **changed)  # type: ignore[arg-type]
    assert not [name for name in vars(draft()) if name.startswith("p")]
    with pytest.raises(TypeError):
        Result(family="x", name="y", statistic=1.0)  # type: ignore[call-arg]


def test_a_family_is_closed_when_told_and_knows_what_it_cannot_find() -> None:
    family = Family("many", "confirmatory")
    family.add(*(draft(9.0).named(f"test {i}") for i in range(6)))
    results = family.results()
    assert all(r.p == 0.01 and r.p_corrected == pytest.approx(0.06) for r in results)  # Holm over 6
    assert all("cannot reach p" in r.note and not r.significant for r in results)
    with pytest.raises(StatsError, match="another family"):
        family.add(draft().named("one more"))
    with pytest.raises(StatsError, match="empty"):
        Family("none", "exploratory").results()
    with pytest.raises(StatsError, match="in it already"):
        twice = Family("twice", "exploratory")
        twice.add(draft(), draft())
    with pytest.raises(StatsError, match="confirmatory or exploratory"):
        Family("x", "hopeful")  # type: ignore[arg-type]


def test_nulls_in_which_nothing_changes_are_refused() -> None:
    with pytest.raises(StatsError, match="does not vary"):
        Null.sampled(1.0, np.ones(99), "permuting units")
    with pytest.raises(StatsError, match="fewer than 20 labelings"):
        clustering(
            np.random.default_rng(0).normal(size=(12, 4)),
            [0] * 6 + [1] * 6,
            99,
            np.random.default_rng(0),
            strata=[0] * 6 + [1] * 6,
        )
    with pytest.raises(StatsError, match="bootstrap over n = 4"):
        interval(lambda w: w.sum(1), 4, 99, np.random.default_rng(0), unit="concepts")
    with pytest.raises(StatsError, match="is none"):
        Interval(1.0, 0.0, "percentile")
