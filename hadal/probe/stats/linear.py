"""Ridge regression as a matrix of weights on the training targets: out-of-fold predictions of all folds are
A·Y.

Neither A nor the folds know the targets, so a permutation of the targets costs one matrix product, and whole
cross-validations run under a thousand permutations. With training rows t, K = X·Xᵀ centred on their mean,

    A[test, t] = 1/n + K[test, t]·(K[t, t] + λ·I)⁻¹·(I − 11ᵀ/n),      λ = ridge · trace(K[t, t])/n

an unpenalised intercept, and a penalty relative to the mean eigenvalue, so that no scale matters. There is no
function that predicts a row from a fit which saw it: R² in the sample of 105 rows of noise in 2048 dimensions
is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, Ints, StatsError, matrix

Fold = tuple[Ints, Ints]  # rows of training, rows of test


def fit_weights(kernel_NN: Floats, train: Ints, test: Ints, ridge: float) -> Floats:
    """[test, train] weights of the training targets in the predictions of the test rows."""
    n = len(train)
    inside, across = kernel_NN[np.ix_(train, train)], kernel_NN[np.ix_(test, train)]
    mean = inside.mean(0)
    centred = inside - mean[None] - mean[:, None] + mean.mean()
    across = across - across.mean(1, keepdims=True) - mean[None] + mean.mean()
    scale = float(np.trace(centred)) / n
    if scale <= 0:
        raise StatsError(f"all {n} training rows are the same: nothing can be learned from them")
    solved = np.linalg.solve(centred + ridge * scale * np.eye(n), across.T).T
    return np.asarray(solved - solved.mean(1, keepdims=True) + 1 / n, np.float64)


def out_of_fold(kernel_NN: Floats, folds: Sequence[Fold], ridge: float) -> Floats:
    """A [N, N]: row i holds the weights with which other rows' targets predict row i. Every row is tested
    exactly once, and no fold trains on what it tests."""
    n = len(kernel_NN)
    weights, seen = np.zeros((n, n)), np.zeros(n, np.int64)
    for train, test in folds:
        if np.intersect1d(train, test).size:
            raise StatsError("a fold trains on rows that it tests")
        if len(train) < 3:
            raise StatsError(f"a fold trains on n = {len(train)} rows; 3 are the least")
        weights[np.ix_(test, train)] = fit_weights(kernel_NN, train, test, ridge)
        seen[test] += 1
    if (seen != 1).any():
        raise StatsError(f"{int((seen != 1).sum())} rows are tested never or more than once")
    return weights


def linear_kernel(x_ND: ArrayLike, *, scaled: bool = False) -> Floats:
    """X·Xᵀ of centred columns, of variance 1 if `scaled` (else a few outlier dimensions are all that counts).
    Means and variances of all rows: they know no targets."""
    x = matrix(x_ND, "features")
    x = x - x.mean(0)
    if scaled:
        sd = x.std(0)
        x = x[:, sd > 0] / sd[sd > 0]
    return np.asarray(x @ x.T, np.float64)


def group_folds(group: Ints, folds: int, rng: np.random.Generator) -> list[Fold]:
    """Whole groups into folds at random, blind to labels: folds that were stratified by the true labels would
    treat these otherwise than permuted ones. `folds` −1 leaves one group out at a time."""
    names = np.unique(group)
    parts = len(names) if folds == -1 else folds
    if not 2 <= parts <= len(names):
        raise StatsError(f"{len(names)} groups in {folds} folds: 2 folds are the least, and a group each")
    place = rng.permutation(np.arange(len(names)) % parts)
    fold = place[np.searchsorted(names, group)]
    return [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(parts)]


def disjoint_folds(
    lexeme: Ints, template: Ints, folds: int, rng: np.random.Generator, lemmas: Sequence[frozenset[str]] = ()
) -> list[Fold]:
    """Folds without lexical overlap: a cell tests the sentences of some lexemes in some templates, and trains
    on sentences of other lexemes in other templates; if `lemmas` are given, on those that share none with any
    tested one. Refuses what leaves a cell with fewer than 10 sentences to train on."""
    by_word, by_template = group_folds(lexeme, folds, rng), _template_folds(template, folds, rng)
    cells = []
    for _, words in by_word:
        for _, forms in by_template:
            test = np.intersect1d(words, forms)
            if not len(test):
                continue
            apart = ~np.isin(lexeme, lexeme[test]) & ~np.isin(template, template[test])
            apart[words] = apart[forms] = False
            if lemmas:
                tested = frozenset().union(*(lemmas[i] for i in test))
                apart &= np.array([not (tested & lemma) for lemma in lemmas])
            train = np.flatnonzero(apart)
            if len(train) < 10:
                raise StatsError(
                    f"{len(train)} sentences share no lexeme, template or lemma with the {len(test)} of "
                    f"a fold; 10 are the least: write more templates, or take more folds"
                )
            cells.append((train, test))
    return cells


def _template_folds(template: Ints, folds: int, rng: np.random.Generator) -> list[Fold]:
    """One template alone (all sentences free) makes one block, which is left to the lexemes."""
    names = np.unique(template)
    if len(names) < 2:
        raise StatsError("one template for all sentences: group by lexeme alone (group_folds)")
    return group_folds(template, min(folds, len(names)), rng)
