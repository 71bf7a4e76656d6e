"""Do two sets of vectors of the same concepts (layers, models, languages) have the same geometry: RSA and
debiased CKA.

- RSA (Kriegeskorte et al., Front. Syst. Neurosci. 2, 2008): Spearman's correlation of the two distance
  matrices' upper triangles; the null permutes the concepts of one (Mantel, Cancer Res. 27, 1967), not the
  pairs, which are not independent.
- CKA (Kornblith et al., ICML 2019) on the unbiased HSIC (Song et al., JMLR 13, 2012): HSIC₁ = ⟨K̃, L̃⟩/(n(n −
  3)) with U-centred Gram matrices (Székely & Rizzo, Ann. Stat. 42, 2014), CKA = HSIC₁(K, L)/√(HSIC₁(K,
  K)·HSIC₁(L, L)). Zero on average for independent data whatever n and d, where the biased form has .96 for
  noise of more dimensions than concepts (Murphy et al., arXiv 2405.01012). There is no biased form here.
- The largest |r| of many pairs of variables, against the largest of as many under permuted rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, Ints, StatsError, codes, matrix, pieces
from .bootstrap import Statistic, interval
from .clusters import cosine_distances, distance_ranks
from .permute import permutations
from .result import Draft, Null


def u_centred(gram_NN: Floats) -> Floats:
    """Ã: diagonal zero, rows summing to zero; a_ij − Σ_l a_il/(n − 2) − Σ_k a_kj/(n − 2) + Σ a/((n − 1)(n −
    2))."""
    n = len(gram_NN)
    if n < 4:
        raise StatsError(f"n = {n}: the unbiased HSIC divides by n − 3 and needs 4 or more")
    a = gram_NN - np.diag(np.diag(gram_NN))
    row = a.sum(1) / (n - 2)
    centred = a - row[:, None] - row[None] + a.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    return np.asarray(centred, np.float64)


def debiased_cka(x_ND: ArrayLike, y_NE: ArrayLike) -> float:
    """Linear CKA from the unbiased HSIC: at most 1, and 0 on average for independent data (so below 0 at
    times)."""
    return _measured(x_ND, y_NE, "debiased CKA")


def rsa(x_ND: ArrayLike, y_NE: ArrayLike) -> float:
    """Spearman's ρ of the cosine distances."""
    return _measured(x_ND, y_NE, "RSA")


def _measured(x_ND: ArrayLike, y_NE: ArrayLike, measure: str) -> float:
    a, b = _geometry(x_ND, measure), _geometry(y_NE, measure)
    return float(_mantel(a, b, np.arange(len(b))[None])[0])


def _geometry(x_ND: ArrayLike, measure: str) -> Floats:
    """A symmetric [N, N] with zero diagonal, of norm 1, of which the inner product with another is the
    measure."""
    x = matrix(x_ND, "vectors", 4)
    if measure == "RSA":
        rank = distance_ranks(cosine_distances(x))
        n = len(x)
        form = rank - rank.sum() / (n * (n - 1))
        np.fill_diagonal(form, 0.0)
    else:
        centred = x - x.mean(0)
        form = u_centred(centred @ centred.T)
    norm = float(np.linalg.norm(form))
    if norm <= 1e-12 * max(1.0, float(np.abs(x).max())):
        raise StatsError(f"{measure}: all pairs are equally far apart, and the measure is undefined")
    return np.asarray(form / norm, np.float64)


def _mantel(a_NN: Floats, b_NN: Floats, order_PN: Ints) -> Floats:
    """Σ_ij a_ij·b_π(i)π(j), [P]."""
    if len(a_NN) != len(b_NN):
        raise StatsError(
            f"{len(a_NN)} concepts against {len(b_NN)}: they must be the same, in the same order"
        )
    n, found = len(a_NN), []
    flat = a_NN.ravel()
    for piece in pieces(len(order_PN), 2 * n * n):
        order = order_PN[piece]
        found.append(b_NN[order[:, :, None], order[:, None, :]].reshape(len(order), -1) @ flat)
    return np.concatenate(found)


def _weighted(a_NN: Floats, b_NN: Floats) -> Statistic:
    """The measure under bootstrap counts of concepts: pairs weigh w_i·w_j, a concept with its copy
    nothing."""

    def value(weight_BN: Floats) -> Floats:
        found = []
        for weight in weight_BN:
            pair = np.outer(weight, weight)
            np.fill_diagonal(pair, 0.0)
            total = pair.sum()
            a, b = (v - (pair * v).sum() / total for v in (a_NN, b_NN))
            found.append((pair * a * b).sum() / np.sqrt((pair * a * a).sum() * (pair * b * b).sum()))
        return np.array(found)

    return value


def geometry(
    x_ND: ArrayLike,
    y_NE: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    *,
    strata: ArrayLike | None = None,
    bootstraps: int = 0,
    name: str = "geometry",
) -> list[Draft]:
    """RSA and debiased CKA of two sets of vectors of the same concepts, against the concepts of one permuted
    (inside strata, if given). `bootstraps` > 0: percentile intervals over concepts, of the geometry as it is
    (ranks and centring are those of all concepts)."""
    x, y = matrix(x_ND, "vectors", 6), matrix(y_NE, "vectors", 6)
    stratum = None if strata is None else codes(strata, len(x), "strata")[0]
    exchange = permutations(len(x), draws, rng, stratum)
    drafts = []
    for measure in ("RSA", "debiased CKA"):
        a, b = _geometry(x, measure), _geometry(y, measure)
        value = float(_mantel(a, b, exchange.identity)[0])
        null = Null.sampled(value, _mantel(a, b, exchange.order_PN), exchange.how, exact=exchange.exact)
        spread = None
        if bootstraps:
            spread = interval(_weighted(a, b), len(x), bootstraps, rng, unit="concepts", method="percentile")
        effect = "Spearman's ρ" if measure == "RSA" else "CKA"
        drafts.append(
            Draft(
                f"{name}: {measure}",
                value,
                null,
                len(x),
                "concepts",
                min(x.shape[1], y.shape[1]),
                0,
                spread,
                value,
                effect,
            )
        )
    return drafts


def table(sets: Mapping[str, ArrayLike], measure: str = "debiased CKA") -> tuple[list[str], Floats]:
    """[M, M] of a measure between all sets by name (layers, models, languages), for a heat map. What is
    claimed of a cell goes through `geometry` and a family."""
    if measure not in ("RSA", "debiased CKA"):
        raise StatsError(f"the measures are RSA and debiased CKA, not {measure!r}")
    forms = [_geometry(v, measure).ravel() for v in sets.values()]
    if len({len(form) for form in forms}) > 1:
        raise StatsError("the sets have different numbers of concepts")
    stack = np.stack(forms)
    return list(sets), np.asarray(stack @ stack.T, np.float64)


def largest_correlation(x_NA: ArrayLike, y_NB: ArrayLike, draws: int, rng: np.random.Generator) -> Draft:
    """The largest |Pearson r| over all A·B pairs of columns, against the largest of as many with the rows of
    one side permuted: looking at many pairs and telling the best is paid for here."""
    x, y = matrix(x_NA, "variables", 5), matrix(y_NB, "variables", 5)
    if len(x) != len(y):
        raise StatsError(f"{len(x)} rows against {len(y)}")
    unit = []
    for v in (x, y):
        centred = v - v.mean(0)
        norm = np.linalg.norm(centred, axis=0)
        if (norm == 0).any():
            raise StatsError(
                f"column {int((norm == 0).argmax())} does not vary: its correlation is undefined"
            )
        unit.append(centred / norm)
    exchange = permutations(len(x), draws, rng)
    value = float(np.abs(unit[0].T @ unit[1]).max())
    null = np.array([np.abs(unit[0].T @ unit[1][order]).max() for order in exchange.order_PN])
    pairs = x.shape[1] * y.shape[1]
    return Draft(
        "largest correlation",
        value,
        Null.sampled(value, null, exchange.how, exact=exchange.exact),
        len(x),
        "rows",
        pairs,
        0,
        None,
        value,
        "|r|",
        note=f"the best of {pairs} pairs",
    )
