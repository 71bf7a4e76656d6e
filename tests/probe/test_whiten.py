"""What takes anisotropy away is fitted elsewhere, and does what its formula says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hadal.probe.extract import ProbeError
from hadal.probe.identity import Embeddings, given, is_marked, simulation
from hadal.probe.whiten import Normaliser, fit, iso_score, shrunk_covariance

RNG = np.random.default_rng(5)
MIX = RNG.normal(size=(40, 40)) / 6


def narrow_cone(n: int, seed: int, source: str = "cone") -> Embeddings:
    """A common direction, two rogue dimensions, correlated rest."""
    x = np.random.default_rng(seed).normal(size=(n, 2, 40)) @ MIX
    x[..., 3] *= 50
    x[..., 7] *= 20
    return given(x + 10, (0, 1), [str(i) for i in range(n)], source)


def test_every_step_is_what_it_says() -> None:
    train, other = narrow_cone(800, 1), narrow_cone(800, 2)
    x = other.at(1).astype(float)
    centred = fit(train, ["centre"]).apply(other).at(1)
    np.testing.assert_allclose(centred, x - train.at(1).mean(0, dtype=float), atol=1e-4)
    z = fit(train, ["zscore"]).apply(other).at(1)
    spread = centred.std(0)
    np.testing.assert_allclose(np.delete(z, [3, 7], 1), np.delete(centred, [3, 7], 1), atol=1e-4)
    assert z.std(0)[[3, 7]] == pytest.approx(np.median(spread), rel=0.15)
    top = fit(train, ["top"]).apply(other).at(1)
    _, _, rows = np.linalg.svd(train.at(1) - train.at(1).mean(0), full_matrices=False)
    assert np.abs(top @ rows[0]).max() < 1e-3 and np.linalg.matrix_rank(top, tol=1e-3) == 39
    [matrix] = fit(train, ["whiten"]).matrix
    shrunk = shrunk_covariance(train.at(1).astype(float) - train.at(1).mean(0, dtype=float))[0]
    assert matrix is not None
    np.testing.assert_allclose(matrix[1] @ shrunk @ matrix[1], np.eye(40), atol=1e-3)
    np.testing.assert_allclose(fit(train, ["whiten"]).apply(train).vectors.mean(0), 0, atol=1e-3)


def test_steps_build_on_one_another_and_isotropy_grows() -> None:
    train, other = narrow_cone(800, 1), narrow_cone(800, 2)
    scores = [iso_score(other.at(0))]
    for steps in (["zscore"], ["zscore", "top"], ["centre", "zscore", "whiten"]):
        scores.append(iso_score(fit(train, steps).apply(other).at(0)))  # type: ignore[arg-type]
    assert scores[0] < 0.05 and scores[0] < scores[1] < scores[3] and scores[3] > 0.8


def test_iso_score_by_hand() -> None:
    assert iso_score(RNG.normal(size=(20_000, 10))) > 0.98
    line = np.zeros((50, 10))
    line[:, 4] = RNG.normal(size=50)
    assert iso_score(line) == pytest.approx(0, abs=1e-9)
    half = RNG.normal(size=(40_000, 10))
    half[:, 5:] = 0  # half of the dimensions: δ² = 2(10 − √50)/(2(10 − √10)), φ = 1/2, (10·φ − 1)/9
    assert iso_score(half) == pytest.approx((10 * 0.5 - 1) / 9, abs=0.01)
    with pytest.raises(ProbeError, match="same"):
        iso_score(np.ones((5, 5)))


def test_shrinkage_is_ledoit_and_wolfs() -> None:
    oracle = pytest.importorskip("sklearn.covariance")
    for n in (15, 60, 500):
        x = np.random.default_rng(n).normal(size=(n, 40)) @ MIX
        x -= x.mean(0)
        mine, rho = shrunk_covariance(x)
        theirs, expected = oracle.ledoit_wolf(x, assume_centered=True)
        assert rho == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)


def test_a_few_texts_of_many_dimensions_can_be_whitened() -> None:
    white = fit(narrow_cone(20, 1), ["whiten"]).apply(narrow_cone(50, 2))
    assert np.isfinite(white.vectors).all()


def test_saved_with_its_identity(tmp_path: Path) -> None:
    train, other = narrow_cone(50, 1), narrow_cone(30, 2)
    fitted = fit(train, ["centre", "zscore", "top", "whiten"])
    again = Normaliser.load(fitted.save(tmp_path / "n.safetensors"))
    assert np.array_equal(again.apply(other).vectors, fitted.apply(other).vectors)
    assert (again.identity, again.digest, again.count) == (train.identity, train.digest(), 50)
    [step] = again.apply(other).identity.steps
    assert "centre+zscore+top+whiten fitted on 50 texts" in step and train.digest()[:12] in step
    (tmp_path / "x").write_bytes(b"\x00" * 40)
    for wrong in ("x", "none"):
        with pytest.raises(ProbeError, match="no normaliser"):
            Normaliser.load(tmp_path / wrong)


def test_vectors_of_another_making_are_refused() -> None:
    fitted = fit(narrow_cone(50, 1))
    with pytest.raises(ProbeError, match="model 'cone'"):
        fitted.apply(narrow_cone(50, 2, "another"))
    with pytest.raises(ProbeError, match="layers"):
        fitted.apply(narrow_cone(50, 2).only((1,)))
    with pytest.raises(ProbeError, match="steps"):
        fitted.apply(fitted.apply(narrow_cone(50, 2)))
    with pytest.raises(ProbeError, match="too few"):
        fit(narrow_cone(9, 1))
    for wrong in (["max"], [], ["centre", "centre"]):
        with pytest.raises(ProbeError, match="step"):
            fit(narrow_cone(50, 1), wrong)  # type: ignore[arg-type]


def test_a_whitened_simulation_stays_marked() -> None:
    made = [simulation(RNG.normal(size=(50, 1, 32)), (0,), [str(i) for i in range(50)], {}) for _ in "ab"]
    white = fit(made[0], ["whiten"]).apply(made[1])
    assert is_marked(white.vectors) and white.identity.label().startswith("SIMULATION")
