"""Statistics against oracles (scikit-learn, SciPy, hand-worked cases), and the permutations and intervals
they stand on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.linear_model import Ridge
from sklearn.metrics import silhouette_score
from statsmodels.stats.multitest import multipletests

from hadal.probe.stats import (
    Family,
    Null,
    Sentences,
    StatsError,
    corners,
    debiased_cka,
    deixis,
    interval,
    isotopies,
    lexical_controls,
    matched_words,
    max_statistic,
    molecules,
    negation,
    rsa,
)
from hadal.probe.stats.arrays import one_hot
from hadal.probe.stats.clusters import anosim, anosim_resampled, cosine_distances, distance_ranks, silhouette
from hadal.probe.stats.linear import disjoint_folds, fit_weights, group_folds, linear_kernel, out_of_fold
from hadal.probe.stats.molecules import nest, scores
from hadal.probe.stats.permute import arrangements, group_permutations, permutations, sign_flips
from hadal.probe.stats.predict import balanced_accuracy, lexeme_groups, predicted
from hadal.probe.stats.probing import code_length, occurrence_folds, principal_axes
from hadal.probe.stats.result import adjust
from hadal.probe.stats.similarity import table
from hadal.probe.stats.squares import nearest_pairing, pair_rows


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# --- H1 ---


def test_silhouette_is_that_of_scikit_learn(rng: np.random.Generator) -> None:
    x, label = rng.normal(size=(30, 5)), rng.permutation(np.repeat(np.arange(5), [2, 1, 9, 8, 10]))
    distance = cosine_distances(x)
    orders = permutations(30, 50, rng).order_PN
    ours = silhouette(distance, one_hot(label[orders], 5))
    theirs = [silhouette_score(distance, label[order], metric="precomputed") for order in orders]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_anosim_is_the_formula_over_pairs(rng: np.random.Generator) -> None:
    x, label = rng.normal(size=(12, 4)), np.repeat([0, 1, 2], 4)
    distance = cosine_distances(x)
    pairs = [(i, j) for i in range(12) for j in range(i)]
    rank = scipy_stats.rankdata([distance[i, j] for i, j in pairs])
    same = np.array([label[i] == label[j] for i, j in pairs])
    wanted = (rank[~same].mean() - rank[same].mean()) / (len(pairs) / 2)
    assert anosim(distance_ranks(distance), one_hot(label, 3)[None])[0] == pytest.approx(wanted)
    assert anosim_resampled(distance, label, np.ones((1, 12)))[0] == pytest.approx(wanted)
    apart = np.eye(3)[label] + 0.01 * rng.normal(size=(12, 3))
    draws = rng.multinomial(12, np.full(12, 1 / 12), size=50).astype(float)
    assert anosim_resampled(cosine_distances(apart), label, draws).max() <= 1 + 1e-12


def test_copies_of_a_concept_are_no_neighbours(rng: np.random.Generator) -> None:
    """A concept drawn twice weighs twice and is not at distance zero from itself."""
    x, label = rng.normal(size=(12, 4)), np.repeat([0, 1, 2], 4)
    distance, weight = cosine_distances(x), rng.integers(0, 3, (1, 12)).astype(float)
    rows = np.repeat(np.arange(12), weight[0].astype(int))
    wanted = []
    for i in rows:
        mean = {k: [distance[i, j] for j in rows if j != i and label[j] == k] for k in range(3)}
        own = mean.pop(label[i])
        a, b = np.mean(own) if own else 0.0, min(np.mean(v) for v in mean.values() if v)
        wanted.append((b - a) / max(a, b) if own else 0.0)
    assert silhouette(distance, weight[:, :, None] * one_hot(label, 3))[0] == pytest.approx(np.mean(wanted))


def test_matched_words_are_near_and_taken_once(rng: np.random.Generator) -> None:
    feature, pool = rng.normal(size=(20, 2)), rng.normal(size=(500, 2))
    chosen = matched_words(feature, pool, 30, rng)
    assert all(len(set(row)) == 20 for row in chosen.tolist())
    far = np.linalg.norm(feature[None] - pool[chosen], axis=2)
    assert np.median(far) < 0.2 * np.median(np.linalg.norm(feature[:, None] - pool, axis=2))
    with pytest.raises(StatsError, match="twice as many"):
        matched_words(feature, pool[:30], 5, rng)


# --- H2 ---


def test_deixis_of_a_square_by_hand(rng: np.random.Generator) -> None:
    """life (1, 0), death (−1, 0), not-life (−1, 1), not-death (1, 1): the ideal square; turned: the echo."""
    ideal = np.array([[1.0, 0], [-1, 0], [-1, 1], [1, 1]])
    scale = rng.uniform(1, 2, (8, 1, 1))
    noisy = ideal * scale + 1e-3 * rng.normal(size=(8, 4, 2))
    assert deixis(noisy, 999, rng)[0].statistic == pytest.approx(1.0, abs=1e-3)
    assert deixis(noisy[:, [0, 1, 3, 2]], 999, rng)[0].statistic == pytest.approx(-1.0, abs=1e-3)
    assert (nearest_pairing(noisy) == 1).all() and (nearest_pairing(noisy[:, [0, 1, 3, 2]]) == 0).all()


def test_the_exact_chances_of_corners(rng: np.random.Generator) -> None:
    best = nearest_pairing(rng.normal(size=(6000, 4, 5)))
    assert scipy_stats.binomtest(int(best.sum()), 6000, 1 / 3).pvalue > 0.001
    for draft, chance in zip(corners(rng.normal(size=(30, 4, 5))), (1 / 2, 1 / 3), strict=True):
        wanted = scipy_stats.binomtest(round(draft.statistic * 30), 30, chance, alternative="greater").pvalue
        assert draft.null._p == pytest.approx(wanted) and draft.null.mean == chance


def test_the_operator_is_fitted_without_its_square(rng: np.random.Generator) -> None:
    corner = rng.normal(size=(9, 4, 6))
    source, target = corner[:, :2].reshape(18, 6), corner[:, 2:].reshape(18, 6)
    wanted = []
    for q in range(9):
        rest = np.delete(np.arange(18).reshape(9, 2), q, 0).ravel()
        penalty = np.square(source[rest] - source[rest].mean(0)).sum() / 16
        both = Ridge(penalty).fit(source[rest], target[rest]).predict(source[[2 * q, 2 * q + 1]])
        a, b = both[0] - both[1], target[2 * q] - target[2 * q + 1]
        wanted.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert negation(corner, 99, rng)[0].statistic == pytest.approx(np.mean(wanted))


def test_flipped_squares_are_the_flipped_data(rng: np.random.Generator) -> None:
    """The null of the operator, enumerated, equals refitting on data with exchanged members."""
    corner = rng.normal(size=(6, 4, 3))
    null = negation(corner, 64, rng)[0].null
    every = []
    for sign in sign_flips(6, 64, rng).sign_PN:
        turned = np.where((sign > 0)[:, None, None], corner, corner[:, [0, 1, 3, 2]])
        every.append(negation(turned, 64, rng)[0].statistic)
    assert null.mean == pytest.approx(np.mean(every)) and null.sd == pytest.approx(np.std(every))
    assert null.draws == 64 and "all" in null.how


def test_pairs_share_no_word(rng: np.random.Generator) -> None:
    x, names = rng.normal(size=(4, 3)), ["hot", "cold", "big", "small"]
    np.testing.assert_array_equal(pair_rows(x, names, [("big", "small")])[0], x[2:])
    with pytest.raises(StatsError, match="'hot' is unknown, or in two pairs"):
        pair_rows(x, names, [("hot", "cold"), ("big", "hot")])


# --- H3, linear ---


def test_weights_are_those_of_ridge(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(20, 7)), rng.normal(size=(20, 3))
    train, test = np.arange(15), np.arange(15, 20)
    centred = x[train] - x[train].mean(0)
    penalty = 0.3 * np.square(centred).sum() / 15
    wanted = Ridge(penalty).fit(x[train], y[train]).predict(x[test])
    np.testing.assert_allclose(fit_weights(linear_kernel(x), train, test, 0.3) @ y[train], wanted)


def test_folds_share_no_lexeme_template_or_lemma(rng: np.random.Generator) -> None:
    lexeme, template = np.repeat(np.arange(12), 4), np.tile(np.arange(4), 12)
    lemmas = tuple(frozenset({f"w{rng.integers(60)}"}) for _ in range(48))
    cells = disjoint_folds(lexeme, template, 3, rng, lemmas)
    assert sorted(i for _, test in cells for i in test) == list(range(48))
    for train, test in cells:
        assert not set(lexeme[train]) & set(lexeme[test]) and not set(template[train]) & set(template[test])
        assert not frozenset().union(*(lemmas[i] for i in train)) & frozenset().union(
            *(lemmas[i] for i in test)
        )
    with pytest.raises(StatsError, match="10 are the least"):
        disjoint_folds(lexeme[:12], template[:12], 2, rng)


def test_memorised_words_do_not_help(rng: np.random.Generator) -> None:
    """Vectors that are the lexeme's own and nothing else: right with words shared, at chance without."""
    label, lexeme = np.repeat(np.arange(3), 20), np.repeat(np.arange(15), 4)
    x = rng.normal(size=(15, 40))[lexeme] + 0.01 * rng.normal(size=(60, 40))
    (apart,) = isotopies(x, Sentences.of(label, lexeme, np.tile(np.arange(4), 15)), 99, rng, folds=4)
    weight = out_of_fold(linear_kernel(x), group_folds(np.arange(60), 5, rng), 1.0)
    shared = balanced_accuracy(predicted(weight, label[None], 3), label[None], 3)[0]
    assert shared > 0.95 and apart.statistic < 0.6 and apart.n == 15 and apart.unit == "lexemes"


def test_sentences_that_share_a_lemma_are_one_group() -> None:
    lemmas = [{"know"}, {"see", "look"}, {"know", "learn"}, {"say"}, {"look", "stare"}, {"learn", "teach"}]
    group = lexeme_groups([frozenset(words) for words in lemmas])
    assert group[0] == group[2] == group[5] and group[1] == group[4] and len(set(group)) == 3


def test_a_control_of_the_same_words_is_told_apart(rng: np.random.Generator) -> None:
    """Vectors of context alone, which sentence and control share: no difference, and p is 1."""
    label, lexeme = np.repeat(np.arange(3), 20), np.repeat(np.arange(15), 4)
    x = rng.normal(size=(60, 8))
    same = lexical_controls(x, Sentences.of(label, lexeme), x, 99, rng)
    assert same.statistic == 0.0 and same.null._p == 1.0
    meant = x + 4 * rng.normal(size=(3, 8))[label]
    assert lexical_controls(meant, Sentences.of(label, lexeme), x, 99, rng).null._p == 0.01


def test_balanced_accuracy_by_hand() -> None:
    found, label = np.array([[0, 0, 1, 1]]), np.array([[0, 0, 0, 1]])
    assert balanced_accuracy(found, label, 2)[0] == pytest.approx((2 / 3 + 1) / 2)
    counts = np.array([[1.0, 0, 3, 1]])
    assert balanced_accuracy(found, label, 2, counts)[0] == pytest.approx((1 / 4 + 1) / 2)


# --- H4 ---


def test_nested_cross_validation_is_that_of_a_loop(rng: np.random.Generator) -> None:
    x, y = rng.poisson(1.0, (8, 3)).astype(float), rng.normal(size=(8, 3))
    y += 0.5 * x @ rng.normal(size=(3, 3))
    ridges = (0.1, 10.0)

    def fitted(rows: np.ndarray, ridge: float) -> Ridge:
        return Ridge(ridge * np.square(x[rows] - x[rows].mean(0)).sum() / len(rows)).fit(x[rows], y[rows])

    error, spread, ranks = 0.0, 0.0, []
    for i in range(8):
        train = np.delete(np.arange(8), i)
        inner = []
        for ridge in ridges:
            penalty = (
                ridge * np.square(x[train] - x[train].mean(0)).sum() / 9
            )  # λ is that of the outer training set
            left = [
                np.square(y[j] - Ridge(penalty).fit(x[rest], y[rest]).predict(x[[j]])[0]).sum()
                for j in train for rest in [np.setdiff1d(train, [j])]
            ]  # fmt: skip
            inner.append(sum(left))
        guess, mean = fitted(train, ridges[int(np.argmin(inner))]).predict(x[[i]])[0], y[train].mean(0)
        error += np.square(y[i] - guess).sum()
        spread += np.square(y[i] - mean).sum()
        cos = [(guess - mean) @ (v - mean) / np.linalg.norm(v - mean) for v in y]
        ranks.append(sum(c > cos[i] for c in cos) / 7)
    centred = y - y.mean(0)
    r2, rank = scores(nest(linear_kernel(x), ridges), centred @ centred.T, np.arange(8)[None])
    assert r2[0] == pytest.approx(1 - error / spread) and rank[0] == pytest.approx(np.mean(ranks))


def test_a_linear_molecule_is_found(rng: np.random.Generator) -> None:
    primes = rng.poisson(1.0, (24, 6)).astype(float)
    r2, rank = molecules(primes, primes @ rng.normal(size=(6, 12)), 99, rng, bootstraps=199)
    assert r2.statistic > 0.95 and rank.statistic < 0.02 and rank.interval is not None


# --- geometry ---


def test_rsa_is_spearman_and_cka_is_one_for_rotations(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(15, 6)), rng.normal(size=(15, 9))
    upper = np.triu_indices(15, 1)
    wanted = scipy_stats.spearmanr(cosine_distances(x)[upper], cosine_distances(y)[upper]).statistic
    assert rsa(x, y) == pytest.approx(wanted)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert debiased_cka(x, 3 * x @ turn + 5) == pytest.approx(1.0)
    names, values = table({"x": x, "y": y})
    assert (
        names == ["x", "y"]
        and values[0, 1] == pytest.approx(debiased_cka(x, y))
        and values[0, 0] == pytest.approx(1)
    )


def test_cka_is_the_formula_of_song(rng: np.random.Generator) -> None:
    n = 9
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(n, 5))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        k, l = (v @ v.T * (1 - np.eye(n)) for v in (a, b))  # noqa: E741
        one = np.ones(n)
        total = (
            np.trace(k @ l)
            + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * one @ k @ l @ one
        )
        return float(total / (n * (n - 3)))

    assert debiased_cka(x, y) == pytest.approx(hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y)))


# --- probes ---


def test_every_type_is_trained_on_and_tested(rng: np.random.Generator) -> None:
    kind = np.repeat(np.arange(9), 5)
    for train, test in occurrence_folds(kind, 5, rng):
        assert set(kind[train]) == set(range(9)) == set(kind[test])
    with pytest.raises(StatsError, match="2 are the least"):
        occurrence_folds(np.array([0, 0, 1]), 2, rng)


def test_the_online_code_is_uniform_for_noise_and_short_for_order(rng: np.random.Generator) -> None:
    label = rng.integers(0, 4, (1, 200))
    noise = code_length(principal_axes(rng.normal(size=(200, 6)), 6), label, 4)[0]
    order = code_length(principal_axes(5 * np.eye(4)[label[0]] + rng.normal(size=(200, 4)), 4), label, 4)[0]
    assert noise > 0.97 * 400 and order < 0.35 * 400


# --- permutations, bootstrap, corrections ---


def test_permutations_stay_in_their_strata(rng: np.random.Generator) -> None:
    strata = np.array([0, 1, 0, 1, 1, 0, 2])
    found = permutations(7, 999, rng, strata)
    assert (
        found.exact and len(found.order_PN) == 36 and len({tuple(o) for o in found.order_PN.tolist()}) == 36
    )
    assert (strata[found.order_PN] == strata).all()
    many = permutations(30, 200, rng, np.arange(30) % 3)
    assert not many.exact and (many.order_PN % 3 == np.arange(30) % 3).all()
    assert (np.sort(many.order_PN, 1) == np.arange(30)).all()
    with pytest.raises(StatsError, match="has 8 permutations"):
        permutations(6, 99, rng, np.array([0, 0, 1, 1, 2, 2]))
    assert arrangements(np.array([0, 0, 1, 1])) == pytest.approx(math.log10(6))


def test_groups_change_labels_as_wholes(rng: np.random.Generator) -> None:
    group = np.repeat(np.arange(8), 3)
    label, _ = group_permutations(group, group // 2, 50, rng)
    assert (label.reshape(50, 8, 3).std(2) == 0).all() and (
        np.sort(label[:, ::3], 1) == np.arange(8) // 2
    ).all()
    with pytest.raises(StatsError, match="different labels"):
        group_permutations(group, np.arange(24), 50, rng)


def test_p_of_drawn_and_of_enumerated_nulls() -> None:
    null = np.arange(99.0)
    assert Null.sampled(98.0, null, "x")._p == 0.02 and Null.sampled(200.0, null, "x")._p == 0.01
    assert Null.sampled(98.0, null, "x", exact=True)._p == pytest.approx(1 / 99)
    assert Null.sampled(0.0, null, "x", tail="less")._p == 0.02
    assert Null.sampled(98.0, null, "x", tail="two-sided")._p <= 0.04


def test_corrections_by_hand() -> None:
    assert adjust([0.01, 0.04, 0.03], "holm") == pytest.approx([0.03, 0.06, 0.06])
    assert adjust([0.01, 0.04, 0.03], "fdr_bh") == pytest.approx([0.03, 0.04, 0.04])
    p = np.random.default_rng(0).uniform(size=30) ** 4
    p[3] = p[7]
    for method in ("holm", "fdr_bh"):
        np.testing.assert_allclose(adjust(p.tolist(), method), multipletests(p, method=method)[1], rtol=1e-12)
    with pytest.raises(StatsError, match="holm and fdr_bh"):
        adjust([0.5], "none")


def test_the_largest_of_layers_is_corrected(rng: np.random.Generator) -> None:
    """Five layers of noise and a copy of one: p of the copy stays, p of all pays for the number of layers."""
    null = rng.normal(size=(499, 5))
    found = max_statistic(
        "x", range(5), np.array([0.0, 0, 2.2, 0, 0]), null, "permuting", n=9, unit="concepts", d=3, folds=0
    )
    single = max_statistic(
        "x", [2], np.array([2.2]), null[:, 2:3], "permuting", n=9, unit="concepts", d=3, folds=0
    )
    p_all, p_one = found.results[2].p_corrected, single.results[0].p_corrected
    assert p_one is not None and p_all is not None and 2 * p_one < p_all < 12 * p_one
    family = Family("layers", "confirmatory")
    family.add(found.draft)
    assert family.results()[0].p == pytest.approx(p_all) and "layer 2" in family.results()[0].note
    assert (found.band_L > found.high_L).all()


def test_intervals_are_those_of_scipy(rng: np.random.Generator) -> None:
    x = rng.exponential(size=40)
    for method in ("bca", "percentile"):
        ours = interval(lambda w: w @ x / w.sum(1), 40, 4000, rng, unit="concepts", method=method)
        theirs = scipy_stats.bootstrap(
            (x,), np.mean, n_resamples=4000, method="BCa" if method == "bca" else method, rng=rng
        ).confidence_interval
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
        assert "concepts" in ours.method and ("BCa" in ours.method) == (method == "bca")


def test_an_interval_that_is_not_bca_says_so(rng: np.random.Generator) -> None:
    found = interval(lambda w: -np.square(w - 1).sum(1), 14, 199, rng, unit="squares")
    assert "percentile" in found.method and "BCa is not defined here" in found.method
