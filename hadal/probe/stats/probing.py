"""Probes with control tasks: what a linear probe finds, less what it could learn by heart; and the length of
a code.

- Selectivity (Hewitt & Liang, EMNLP 2019, arXiv 1909.03368): accuracy on the task minus accuracy on control
  tasks, which give every *type* (word) a random label of the same distribution. Types are in training and
  test alike, occurrences are not, so that a probe which memorises words does as well on the control. The
  control tasks are at the same time the permutation null of the task over types.
- MDL (Voita & Titov, EMNLP 2020, arXiv 2003.12298): the online code, in bits. The first block costs log₂K a
  label; each later block is coded by a probe of all before: Σ −log₂ p(y | x). Compression = uniform code /
  this code. The same control tasks give its null. Probe: multinomial logistic regression, L2, on r principal
  axes of all vectors (which know no labels), fitted for all control tasks at once by Nesterov's method at the
  bound of Böhning (1992), λ_max(XᵀX)/2.

Assumes types exchangeable under the null, and occurrences of a type alike.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, Ints, StatsError, codes, matrix, one_hot, pieces
from .linear import Fold, linear_kernel, out_of_fold
from .permute import group_permutations
from .predict import RIDGE, balanced_accuracy, predicted
from .result import Draft, Null

PORTIONS = (0.02, 0.05, 0.1, 0.2, 0.4, 1.0)  # of the data, at which the online code fits again
AXES = 32
STEPS = 20  # a portion; each goes on from the weights of the one before
DECAY = 0.01  # L2, a row


def occurrence_folds(kind: Ints, folds: int, rng: np.random.Generator) -> list[Fold]:
    """Every type's occurrences spread over all folds, so that each type is trained on and tested. Refuses
    types of fewer occurrences than 2."""
    counts = np.bincount(kind)
    if folds < 2 or counts[counts > 0].min() < 2:
        raise StatsError(
            f"{folds} folds and a type of {counts[counts > 0].min()} occurrences: 2 are the least of each"
        )
    fold = np.empty(len(kind), np.int64)
    for name in np.unique(kind):
        block = np.flatnonzero(kind == name)
        fold[block] = (rng.permutation(len(block)) + int(rng.integers(folds))) % folds
    return [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(folds) if (fold == f).any()]


def _tasks(
    labels: ArrayLike, types: ArrayLike, n: int, draws: int, rng: np.random.Generator
) -> tuple[Ints, Ints, int, Ints, str, bool]:
    """Label, controls [P, N], classes, types, how, exact."""
    label, names = codes(labels, n)
    kind = codes(types, n, "types")[0]
    if not 2 <= len(names) < kind.max() + 1:
        raise StatsError(f"{len(names)} classes of {kind.max() + 1} types: a control task would be the task")
    control, exchange = group_permutations(kind, label, draws, rng)
    return label, control, len(names), kind, "control tasks: labels exchanged between types", exchange.exact


def selectivity(
    x_ND: ArrayLike,
    labels: ArrayLike,
    types: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    *,
    folds: int = 5,
    name: str = "probe",
) -> Draft:
    """Balanced accuracy of the task minus the mean of the control tasks, in folds over occurrences. The null
    is that of control tasks, each minus the mean of all."""
    x = matrix(x_ND, "occurrences", 10)
    label, control, classes, kind, how, exact = _tasks(labels, types, len(x), draws, rng)
    weight = out_of_fold(linear_kernel(x, scaled=True), occurrence_folds(kind, folds, rng), RIDGE)
    accuracy = _accuracies(weight, label[None], classes)[0]
    controls = _accuracies(weight, control, classes)
    value = float(accuracy - controls.mean())
    return Draft(
        f"{name}: selectivity",
        value,
        Null.sampled(value, controls - controls.mean(), how, exact=exact),
        int(kind.max()) + 1,
        "types",
        x.shape[1],
        folds,
        effect=value,
        effect_name="accuracy above control tasks",
        note=f"accuracy {accuracy:.3f}, control tasks {controls.mean():.3f}, {len(x)} occurrences",
    )


def _accuracies(weight_NN: Floats, label_PN: Ints, classes: int) -> Floats:
    return np.concatenate([
        balanced_accuracy(predicted(weight_NN, label_PN[piece], classes), label_PN[piece], classes)
        for piece in pieces(len(label_PN), 4 * label_PN.shape[1] * classes)
    ])  # fmt: skip


def layer_selectivity(
    x_NLD: Floats, labels: ArrayLike, types: ArrayLike, draws: int, rng: np.random.Generator, folds: int = 5
) -> tuple[Floats, Floats, str, bool]:
    """Selectivity at every layer [L], and the same control tasks in the same folds, [P, L]."""
    label, control, classes, kind, how, exact = _tasks(labels, types, len(x_NLD), draws, rng)
    cells, values = occurrence_folds(kind, folds, rng), []
    tasks = np.concatenate([label[None], control])
    for layer in range(x_NLD.shape[1]):
        weight = out_of_fold(linear_kernel(x_NLD[:, layer], scaled=True), cells, RIDGE)
        accuracy = _accuracies(weight, tasks, classes)
        values.append(accuracy - accuracy[1:].mean())
    both = np.stack(values, 1)
    return both[0], both[1:], how, exact


def principal_axes(x_ND: Floats, axes: int) -> Floats:
    """Scores on the leading axes of standardised columns, of variance 1 on average [N, r]."""
    x = x_ND - x_ND.mean(0)
    sd = x.std(0)
    x = x[:, sd > 0] / sd[sd > 0]
    left, size, _ = np.linalg.svd(x, full_matrices=False)
    score = left[:, :axes] * size[:axes]
    return np.asarray(score / score.std(), np.float64)


def code_length(score_NR: Floats, label_PN: Ints, classes: int) -> Floats:
    """Bits of the online code of every labeling [P]; rows in the order in which they are coded."""
    n = len(score_NR)
    ends = sorted({max(classes, round(n * share)) for share in PORTIONS})
    bits = np.full(len(label_PN), ends[0] * np.log2(classes))
    design = np.concatenate([score_NR, np.ones((n, 1))], 1)
    for piece in pieces(len(label_PN), 4 * n * classes):
        label = label_PN[piece]
        weight = np.zeros((len(label), design.shape[1], classes))
        for start, end in itertools.pairwise(ends):
            weight = _logistic(design[:start], one_hot(label[:, :start], classes), weight)
            chance = _softmax(np.matmul(design[start:end], weight))
            picked = np.take_along_axis(chance, label[:, start:end, None], 2)[..., 0]
            bits[piece] -= np.log2(np.maximum(picked, 1e-300)).sum(1)
    return bits


def _softmax(logit: Floats) -> Floats:
    shifted = np.exp(logit - logit.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True), np.float64)


def _logistic(design_NR: Floats, target_PNK: Floats, weight_PRK: Floats) -> Floats:
    """P regressions on the same rows [P, R, K], from the weights of the portion before."""
    penalty = DECAY * len(design_NR)
    step = 1 / (np.linalg.eigvalsh(design_NR.T @ design_NR)[-1] / 2 + penalty)
    weight = ahead = weight_PRK
    momentum = 1.0
    for _ in range(STEPS):
        slope = np.matmul(design_NR.T, _softmax(np.matmul(design_NR, ahead)) - target_PNK) + penalty * ahead
        new, following = ahead - step * slope, (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead, weight = new + (momentum - 1) / following * (new - weight), new
        momentum = following
    return weight


def description_length(
    x_ND: ArrayLike,
    labels: ArrayLike,
    types: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    *,
    axes: int = AXES,
    name: str = "probe",
) -> Draft:
    """Compression of the labels by the online code, against control tasks. 1 is a code that learned nothing;
    below it, a probe that was surer than right."""
    x = matrix(x_ND, "occurrences", 10)
    label, control, classes, kind, how, exact = _tasks(labels, types, len(x), draws, rng)
    order = rng.permutation(len(x))
    score = principal_axes(x, min(axes, *x.shape))[order]
    uniform = len(x) * np.log2(classes)
    value = float(uniform / code_length(score, label[None, order], classes)[0])
    null = uniform / code_length(score, control[:, order], classes)
    return Draft(
        f"{name}: compression (MDL)",
        value,
        Null.sampled(value, null, how, exact=exact),
        int(kind.max()) + 1,
        "types",
        x.shape[1],
        0,
        effect=float((uniform / null).mean() - uniform / value),
        effect_name="bits saved against control tasks",
        note=f"{uniform / value:.0f} bits of {uniform:.0f}; online code over {len(PORTIONS)} portions; every "
        f"label is predicted from earlier ones alone; {score.shape[1]} principal axes",
    )
