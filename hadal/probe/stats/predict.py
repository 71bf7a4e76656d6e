"""H3, is the isotopy of a sentence predictable from its vector, without shared words: a linear classifier
(ridge on one-hot classes, the largest wins) in cross-validation by lexeme and template.

Statistic: balanced accuracy, the mean over classes of the share predicted rightly; a blind guess has 1/K.
Null: labels exchanged between whole lexemes. Baseline: the same folds on a bag of words. The penalty is fixed
beforehand, so nothing is chosen that would need an inner loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, Ints, StatsError, codes, matrix, one_hot, pieces
from .bootstrap import interval
from .linear import Fold, disjoint_folds, fit_weights, group_folds, linear_kernel, out_of_fold
from .permute import Exchange, group_permutations, sign_flips
from .result import Draft, Null

RIDGE = 1.0  # times the mean eigenvalue; fixed beforehand


@dataclass(frozen=True)
class Sentences:
    """Labels, and what must not be shared between training and test. `template` None: by lexeme alone. Fields
    [N]; `lemmas` may name all content words of each sentence."""

    label: Ints
    classes: tuple[str, ...]
    lexeme: Ints
    template: Ints | None
    lemmas: tuple[frozenset[str], ...] = ()

    @staticmethod
    def of(
        labels: ArrayLike, lexemes: ArrayLike, templates: ArrayLike | None = None,
        lemmas: Sequence[frozenset[str]] = (),
    ) -> Sentences:  # fmt: skip
        n = len(np.asarray(labels))
        label, names = codes(labels, n)
        template = None if templates is None else codes(templates, n, "templates")[0]
        if lemmas and len(lemmas) != n:
            raise StatsError(f"lemmas of {len(lemmas)} sentences for n = {n}")
        return Sentences(label, tuple(names), codes(lexemes, n, "lexemes")[0], template, tuple(lemmas))

    def folds(self, folds: int, rng: np.random.Generator) -> list[Fold]:
        if self.template is None:
            return group_folds(self.lexeme, folds, rng)
        return disjoint_folds(self.lexeme, self.template, folds, rng, self.lemmas)

    def permuted(self, draws: int, rng: np.random.Generator) -> tuple[Ints, Exchange]:
        """Labels between lexemes of as many sentences, [P, N]: so classes keep their sizes."""
        return group_permutations(
            self.lexeme, self.label, draws, rng, np.unique(self.lexeme, return_counts=True)[1]
        )


def predicted(weight_NN: Floats, label_PN: Ints, classes: int) -> Ints:
    """The class of every row from the others' labels, [P, N]."""
    n = label_PN.shape[1]
    found = [
        np.matmul(weight_NN, one_hot(label_PN[piece], classes)).argmax(2)
        for piece in pieces(len(label_PN), 3 * n * classes)
    ]
    return np.concatenate(found).astype(np.int64)


def balanced_accuracy(
    found_PN: Ints, label_PN: Ints, classes: int, weight_BN: Floats | None = None
) -> Floats:
    """[P]; or of one prediction [1, N] under bootstrap counts, [B]."""
    hot = one_hot(label_PN, classes)
    right = (found_PN == label_PN).astype(float)
    if weight_BN is None:
        return np.asarray((np.einsum("pn,pnk->pk", right, hot) / hot.sum(1)).mean(1), np.float64)
    count = weight_BN @ hot[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = ((weight_BN * right) @ hot[0]) / count
    present = (count > 0).sum(1)
    return np.asarray(np.where(np.isnan(share), 0.0, share).sum(1) / present, np.float64)


def isotopies(
    x_ND: ArrayLike, sentences: Sentences, draws: int, rng: np.random.Generator, *, folds: int = 5,
    words_NV: ArrayLike | None = None, bootstraps: int = 0, name: str = "H3",
) -> list[Draft]:  # fmt: skip
    """Balanced accuracy without lexical overlap, against labels exchanged between lexemes; and, if a bag of
    words is given, the difference to it in the same folds, against exchanging the two models lexeme by
    lexeme. Intervals: over lexemes (percentile through counts of whole lexemes)."""
    x = matrix(x_ND, "sentence vectors", 10)
    classes, label = len(sentences.classes), sentences.label
    if len(label) != len(x):
        raise StatsError(f"{len(label)} labels for n = {len(x)} vectors")
    cells = sentences.folds(folds, rng)
    weight = out_of_fold(linear_kernel(x, scaled=True), cells, RIDGE)
    shuffled, exchange = sentences.permuted(draws, rng)
    found = predicted(weight, label[None], classes)
    value = float(balanced_accuracy(found, label[None], classes)[0])
    null = balanced_accuracy(predicted(weight, shuffled, classes), shuffled, classes)
    lexemes = int(sentences.lexeme.max()) + 1
    spread = None
    if bootstraps:
        spread = interval(
            lambda count: balanced_accuracy(found, label[None], classes, count[:, sentences.lexeme]), lexemes,
            bootstraps, rng, unit="lexemes", method="percentile",
        )  # fmt: skip
    draft = Draft(
        f"{name}: balanced accuracy",
        value,
        Null.sampled(value, null, f"{exchange.how}: labels of lexemes", exact=exchange.exact),
        lexemes,
        "lexemes",
        x.shape[1],
        folds,
        spread,
        value - 1 / classes,
        f"above the blind guess of 1/{classes}",
        note=f"{len(x)} sentences, {len(cells)} cells; training and test share no "
        + ("lexeme" if sentences.template is None else "lexeme and no template"),
    )
    if words_NV is None:
        return [draft]
    base = predicted(out_of_fold(linear_kernel(words_NV), cells, RIDGE), label[None], classes)
    return [draft, _paired(found[0], base[0], sentences, draws, rng, x.shape[1], folds, name)]


def _paired(
    found_N: Ints,
    base_N: Ints,
    sentences: Sentences,
    draws: int,
    rng: np.random.Generator,
    d: int,
    folds: int,
    name: str,
) -> Draft:
    """Difference of two classifiers' balanced accuracies; under the null the two are exchangeable, lexeme by
    lexeme. Assumes lexemes independent given the fits."""
    label, classes = sentences.label, len(sentences.classes)
    share = 1 / (classes * np.bincount(label, minlength=classes))[label]
    gain = share * ((found_N == label).astype(float) - (base_N == label))
    group = np.bincount(sentences.lexeme, gain).astype(np.float64)
    flips = sign_flips(len(group), draws, rng, "exchanging the two classifiers, lexeme by lexeme")
    value = float(group.sum())
    null = Null.of_flips(value, group, flips.sign_PN, flips.how, exact=flips.exact)
    return Draft(f"{name}: accuracy minus bag of words", value, null, len(group), "lexemes", d, folds,
                 effect=value, effect_name="difference of balanced accuracies")  # fmt: skip


def lexical_controls(
    x_ND: ArrayLike, sentences: Sentences, control_ND: ArrayLike, draws: int, rng: np.random.Generator, *,
    folds: int = 5, name: str = "H3",
) -> Draft:  # fmt: skip
    """Every sentence against its control, row by row: a sentence of the same other words that is of another
    isotopy or of none. How much more often is the sentence taken for its isotopy than the control, by fits
    that saw neither? Null: sentence and control exchanged, lexeme by lexeme."""
    x, control = matrix(x_ND, "sentence vectors", 10), matrix(control_ND, "control vectors", 10)
    if len(control) != len(x):
        raise StatsError(
            f"{len(control)} controls for n = {len(x)} sentences; each has one, in the same order"
        )
    n, label, classes = len(x), sentences.label, len(sentences.classes)
    mean, sd = x.mean(0), x.std(0)
    both = (np.concatenate([x, control])[:, sd > 0] - mean[sd > 0]) / sd[sd > 0]
    kernel, hot, gain = both @ both.T, one_hot(label, classes), np.zeros(n)
    cells = sentences.folds(folds, rng)
    for train, test in cells:
        for rows, sign in ((test, 1.0), (test + n, -1.0)):
            found = (fit_weights(kernel, train, rows, RIDGE) @ hot[train]).argmax(1)
            gain[test] += sign * (found == label[test])
    group = np.bincount(sentences.lexeme, gain / n).astype(np.float64)
    flips = sign_flips(len(group), draws, rng, "exchanging sentences and their controls, lexeme by lexeme")
    value = float(group.sum())
    null = Null.of_flips(value, group, flips.sign_PN, flips.how, exact=flips.exact)
    return Draft(
        f"{name}: sentences minus lexical controls",
        value,
        null,
        len(group),
        "lexemes",
        x.shape[1],
        folds,
        effect=value,
        effect_name="difference of shares taken for the isotopy",
        note=f"{n} pairs, {len(cells)} cells",
    )


def lexeme_groups(lemmas: Sequence[frozenset[str]]) -> Ints:
    """A number for each sentence, [N]: the same for two that share a lemma, directly or by way of others."""
    group = np.arange(len(lemmas))
    holder: dict[str, int] = {}
    for i, words in enumerate(lemmas):
        for word in words:
            if word in holder:
                group[group == group[i]] = group[holder[word]]
            holder[word] = i
    return np.unique(group, return_inverse=True)[1].astype(np.int64)


def layer_isotopies(
    x_NLD: Floats, sentences: Sentences, draws: int, rng: np.random.Generator, folds: int = 5
) -> tuple[Floats, Floats, str, bool]:
    """Balanced accuracy at every layer [L], and under the same permutations in the same folds [P, L]."""
    cells = sentences.folds(folds, rng)
    shuffled, exchange = sentences.permuted(draws, rng)
    labels, classes, values = np.concatenate([sentences.label[None], shuffled]), len(sentences.classes), []
    for layer in range(x_NLD.shape[1]):
        weight = out_of_fold(linear_kernel(x_NLD[:, layer], scaled=True), cells, RIDGE)
        values.append(balanced_accuracy(predicted(weight, labels, classes), labels, classes))
    both = np.stack(values, 1)
    return both[0], both[1:], f"{exchange.how}: labels of lexemes", exchange.exact
