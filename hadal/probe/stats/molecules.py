"""H4, is a molecule linear in primes: the vector of a concept from the counts of primes in its explication.

    ŷ_i = b + W·x_i, ridge, fitted without the concept i, λ chosen by leaving one concept out among the others

x_i: counts of primes (W is learned), or the sum of the primes' own vectors (W maps it on). Two statistics,
both of concepts that the fit has not seen: R² = 1 − Σ|y_i − ŷ_i|²/Σ|y_i − ȳ₋ᵢ|², where ȳ₋ᵢ is the mean of the
training concepts (so 0 is "no better than a mean", and noise lies below); and the rank of the true concept
among all by cosine to ŷ_i, as a share: 0 the first, ½ chance, 1 the last. Null: explications shuffled among
concepts, with the whole nested cross-validation made again. All folds' smoothers are computed once; a shuffle
is a permuted Gram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import Floats, Ints, StatsError, matrix, pieces
from .bootstrap import interval
from .linear import linear_kernel
from .permute import permutations
from .result import Draft, Null

RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


MOST = 250  # concepts; the inner forms take R·N³ floats


@dataclass(frozen=True)
class Nested:
    """Smoothers of a nested leave-one-out. `outer_RNN[r, i]`: weights of the other rows' targets in the
    prediction of i at penalty r; `inner_NRM[i, r]`: the quadratic form, flat, whose sum with the Gram matrix
    of the targets is the inner leave-one-out error at r with concept i away; `mean_NN`: weights of the mean
    of the others."""

    outer_RNN: Floats
    inner_NRM: NDArray[np.float32]
    mean_NN: Floats


def nest(kernel_NN: Floats, ridges: tuple[float, ...] = RIDGES) -> Nested:
    """All fits, of cost R·N⁴: seconds for 100 concepts. `linear.fit_weights` at all penalties at once, by the
    eigenvectors of the centred kernel."""
    n = len(kernel_NN)
    if n > MOST:
        raise StatsError(f"n = {n} concepts: the nested fits are kept at once, for {MOST} at most")
    outer = np.zeros((len(ridges), n, n))
    inner = np.zeros((n, len(ridges), n, n), np.float32)
    for i in range(n):
        train = np.delete(np.arange(n), i)
        inside, across = kernel_NN[np.ix_(train, train)], kernel_NN[i, train]
        mean = inside.mean(0)
        value, vector = np.linalg.eigh(inside - mean[None] - mean[:, None] + mean.mean())
        if value.sum() <= 0:
            raise StatsError("all explications but one are the same: nothing can be learned from them")
        pull_RM = 1 / (value + np.array(ridges)[:, None] * value.sum() / (n - 1))
        asked = (across - across.mean() - mean + mean.mean()) @ vector
        outer[:, i, train] = (asked * pull_RM) @ vector.T + 1 / (n - 1)
        smooth = np.einsum("im,rm,jm->rij", vector, value * pull_RM, vector, optimize=True) + 1 / (n - 1)
        inner[i][np.ix_(np.arange(len(ridges)), train, train)] = _left_out(smooth)
    return Nested(outer, inner.reshape(n, len(ridges), n * n), (1 - np.eye(n)) / (n - 1))


def _left_out(smooth_RMM: Floats) -> Floats:
    """Forms Q [R, M, M] with Σ Q∘Gram = Σ over training rows |y − ŷ fitted without it|². With the smoother S
    of the whole training set, what is left out has the residual (y − S·y)_i/(1 − S_ii); exact at equal λ."""
    rest = np.eye(smooth_RMM.shape[1]) - smooth_RMM
    error = rest / np.diagonal(rest, axis1=1, axis2=2)[:, :, None]
    return np.asarray(np.matmul(error.transpose(0, 2, 1), error), np.float64)


def scores(nested: Nested, gram_NN: Floats, order_PN: Ints) -> tuple[Floats, Floats]:
    """(R² [P], mean rank as a share [P]) with the targets in the given orders."""
    r2, rank = [], []
    for piece in pieces(len(order_PN), 8 * gram_NN.size):
        order = order_PN[piece]
        gram = gram_NN[order[:, :, None], order[:, None, :]]
        weight = _chosen(nested, gram)
        cross, middle = np.matmul(weight, gram), np.matmul(nested.mean_NN, gram)
        own, mean = _diagonal(gram), (middle * nested.mean_NN).sum(2)
        error = own - 2 * _diagonal(cross) + (cross * weight).sum(2)
        r2.append(1 - error.sum(1) / (own - 2 * _diagonal(middle) + mean).sum(1))
        rank.append(_ranks(nested, gram, weight).mean(1))
    return np.concatenate(r2), np.concatenate(rank)


def _diagonal(form_PNN: Floats) -> Floats:
    return np.diagonal(form_PNN, axis1=1, axis2=2)


def _chosen(nested: Nested, gram_PNN: Floats) -> Floats:
    """Weights [P, N, N] of the outer predictions, each at the penalty that its inner loop chose."""
    n = gram_PNN.shape[1]
    forms = nested.inner_NRM.reshape(-1, n * n)
    error = gram_PNN.reshape(len(gram_PNN), -1).astype(np.float32) @ forms.T
    best = error.reshape(len(gram_PNN), n, -1).argmin(2)
    return np.asarray(nested.outer_RNN[best, np.arange(n)], np.float64)


def _ranks(nested: Nested, gram_PNN: Floats, weight_PNN: Floats) -> Floats:
    """Share of the other concepts' vectors that lie nearer to the prediction than its own, by cosine about
    the training mean, [P, N]; a tie is half."""
    cross, middle = np.matmul(weight_PNN, gram_PNN), np.matmul(nested.mean_NN, gram_PNN)
    mean = (middle * nested.mean_NN).sum(2)[:, :, None]
    pull = cross - (weight_PNN * middle).sum(2)[:, :, None] - middle + mean
    far = _diagonal(gram_PNN)[:, None] - 2 * middle + mean
    near = pull / np.sqrt(np.maximum(far, 1e-30))
    own, n = _diagonal(near)[:, :, None], gram_PNN.shape[1]
    nearer = (near > own) + 0.5 * ((near == own) & ~np.eye(n, dtype=bool))
    return np.asarray(nearer.sum(2) / (n - 1), np.float64)


def molecules(
    primes_NF: ArrayLike, vectors_ND: ArrayLike, draws: int, rng: np.random.Generator, *, bootstraps: int = 0,
    name: str = "H4",
) -> list[Draft]:  # fmt: skip
    """R² out of sample and retrieval rank of concepts, one row each, from their explications, against
    shuffled explications. `primes_NF`: counts of primes, or the composed vectors. `bootstraps` > 0 gives a
    percentile interval of the mean rank over concepts (the fits stay; what varies is which concepts are
    asked)."""
    y, x = matrix(vectors_ND, "concept vectors", 8), matrix(primes_NF, "explications", 8)
    if len(x) != len(y):
        raise StatsError(f"{len(x)} explications for n = {len(y)} vectors")
    nested = nest(linear_kernel(x))
    y = y - y.mean(0)
    gram = np.asarray(y @ y.T / np.square(y).sum() * len(y), np.float64)
    exchange = permutations(len(y), draws, rng)
    r2, rank = (float(v[0]) for v in scores(nested, gram, exchange.identity))
    null_r2, null_rank = scores(nested, gram, exchange.order_PN)
    how = f"{exchange.how}: explications among concepts"
    spread = None
    if bootstraps:
        ranks = _ranks(nested, gram[None], _chosen(nested, gram[None]))[0]
        spread = interval(
            lambda count: count @ ranks / count.sum(1),
            len(y),
            bootstraps,
            rng,
            unit="concepts",
            method="percentile",
        )
    one = (len(y), "concepts", y.shape[1], -1)
    return [
        Draft(
            f"{name}: R² out of sample",
            r2,
            Null.sampled(r2, null_r2, how, exact=exchange.exact),
            *one,
            effect=r2,
            effect_name="R² out of sample",
            note=f"{x.shape[1]} features; nested cross-validation",
        ),
        Draft(
            f"{name}: retrieval rank",
            rank,
            Null.sampled(rank, null_rank, how, tail="less", exact=exchange.exact),
            *one,
            spread,
            0.5 - rank,
            "below the rank of chance, as a share",
            note="0 is first, 0.5 is chance",
        ),
    ]
