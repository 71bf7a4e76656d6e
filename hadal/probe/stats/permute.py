"""What a null distribution exchanges: rows inside strata, groups as wholes, signs of pairs; and the largest
of many.

A permutation test is exact if, under the null, the exchanged units are exchangeable, whatever their
distribution (Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005). Permuting inside
strata (part of speech, length) keeps what the strata explain out of the test. Everything is drawn at once, as
arrays of indices [P, N].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Floats, Ints, StatsError
from .result import Draft, Interval, Null, Result

EXACT_UP_TO = 10_000  # arrangements that are enumerated instead of drawn, if the draws asked for are as many


@dataclass(frozen=True)
class Exchange:
    """P rearrangements of N units: `order_PN[p, i]` is the unit whose label (row, partner) unit i gets.
    `exact`: all that there are, the observed one among them."""

    order_PN: Ints
    exact: bool
    how: str

    @property
    def identity(self) -> Ints:
        return np.arange(self.order_PN.shape[1])[None]


@dataclass(frozen=True)
class Flips:
    """P patterns of signs ±1 of N pairs."""

    sign_PN: Floats
    exact: bool
    how: str


def permutations(n: int, draws: int, rng: np.random.Generator, strata: Ints | None = None) -> Exchange:
    """`draws` random permutations of n units, inside strata [N] if given; all of them if they are no more
    than draws. Refuses strata that leave fewer than 20 permutations: no p of theirs could reach .05."""
    stratum = np.zeros(n, np.int64) if strata is None else np.asarray(strata)
    if stratum.shape != (n,):
        raise StatsError(f"strata: {n} are needed, and the shape is {list(stratum.shape)}")
    blocks = [np.flatnonzero(stratum == s) for s in np.unique(stratum)]
    possible = math.prod(math.factorial(len(block)) for block in blocks)
    if possible < 20:
        raise StatsError(
            f"n = {n} in strata of {[len(b) for b in blocks]} has {possible} permutations, and p ≤ .05 needs "
            f"20; take more units, or coarser strata"
        )
    what = "units" if strata is None else f"units within {len(blocks)} strata"
    if possible <= min(draws, EXACT_UP_TO):
        return Exchange(_all(n, blocks), True, f"permuting {what}")
    order = np.tile(np.arange(n), (draws, 1))
    for block in blocks:
        if len(block) > 1:
            order[:, block] = block[np.argsort(rng.random((draws, len(block))), axis=1)]
    return Exchange(order, False, f"permuting {what}")


def _all(n: int, blocks: Sequence[Ints]) -> Ints:
    """Every permutation inside blocks [P, N]."""
    rows = []
    for arranged in itertools.product(*(itertools.permutations(block.tolist()) for block in blocks)):
        row = np.arange(n)
        for block, places in zip(blocks, arranged, strict=True):
            row[block] = places
        rows.append(row)
    return np.stack(rows)


def group_permutations(
    group: Ints, label: Ints, draws: int, rng: np.random.Generator, strata: Ints | None = None
) -> tuple[Ints, Exchange]:
    """Labels [P, N] exchanged between whole groups (all sentences of a lexeme, all occurrences of a word
    type). `strata` [G], by group in order of `np.unique(group)`: groups change labels inside their stratum
    only. Refuses a group of more than one label."""
    names, member = np.unique(group, return_inverse=True)
    first = np.array([np.flatnonzero(member == g)[0] for g in range(len(names))])
    by_group = label[first]
    if (label != by_group[member]).any():
        raise StatsError("a group holds units of different labels, and cannot be exchanged as a whole")
    exchange = permutations(len(names), draws, rng, strata)
    return by_group[exchange.order_PN][:, member], exchange


def sign_flips(
    n: int, draws: int, rng: np.random.Generator, how: str = "flipping the members of pairs"
) -> Flips:
    """`draws` random patterns of signs of n pairs, all 2ⁿ if they are no more. Refuses n < 5 (p ≤ .05 would
    be out of reach)."""
    if n < 5:
        raise StatsError(f"n = {n} pairs have {2**n} patterns of signs, and p ≤ .05 needs 20: take 5 or more")
    if 2**n <= min(draws, EXACT_UP_TO):
        return Flips(np.array(list(itertools.product((1.0, -1.0), repeat=n))), True, how)
    return Flips(rng.choice(np.array([-1.0, 1.0]), (draws, n)), False, how)


def arrangements(label: Ints, strata: Ints | None = None) -> float:
    """log10 of the number of different labelings that permuting inside strata can give."""
    stratum = np.zeros(len(label), np.int64) if strata is None else strata
    total = 0.0
    for s in np.unique(stratum):
        counts = np.unique(label[stratum == s], return_counts=True)[1]
        total += math.lgamma(counts.sum() + 1) - sum(math.lgamma(c + 1) for c in counts)
    return total / math.log(10)


@dataclass(frozen=True)
class Curve:
    """A statistic over layers with its null: the same rearrangements at every layer. `low_L`, `high_L`:
    pointwise 95% of the null; `band_L`: what the largest of all layers stays below in 95% of the null draws.
    p by the max statistic: the family of layers is corrected as one (Westfall & Young, 1993)."""

    name: str
    layers: tuple[int, ...]
    statistic_L: Floats
    null_mean_L: Floats
    low_L: Floats
    high_L: Floats
    band_L: Floats
    results: tuple[Result, ...]
    draft: Draft


def max_statistic(
    name: str,
    layers: Sequence[int],
    statistic_L: Floats,
    null_PL: Floats,
    how: str,
    *,
    n: int,
    unit: str,
    d: int,
    folds: int,
    exact: bool = False,
    intervals: Sequence[Interval | None] | None = None,
    note: str = "",
) -> Curve:
    """Layers tested together, against the largest of all layers.

    z_l = (t_l − mean_l)/sd_l, mean and sd over the null draws *and* the observed one, so that the observed
    row is exchangeable with the others; p_l = (1 + #{max over layers of z_null ≥ z_l})/(1 + draws). A draft
    of the largest z (the layer in its note) stands for the curve in a family. Larger statistics are
    evidence."""
    observed, null = np.asarray(statistic_L, float), np.asarray(null_PL, float)
    if null.ndim != 2 or null.shape[1:] != observed.shape or len(layers) != len(observed):
        raise StatsError(f"{name}: {len(layers)} layers, statistics {observed.shape}, null {null.shape}")
    pool = null if exact else np.concatenate([observed[None], null])
    mean, sd = pool.mean(0), pool.std(0)
    if (sd <= 1e-12).any():
        raise StatsError(
            f"{name}: the null does not vary at layer {layers[int(sd.argmin())]}: {how} changes nothing"
        )
    z, z_null = (observed - mean) / sd, (null - mean) / sd
    top = z_null.max(1)
    results = []
    for i, layer in enumerate(layers):
        single = Null.sampled(float(observed[i]), null[:, i], how, exact=exact)
        joint = Null.sampled(float(z[i]), top, how, exact=exact)
        results.append(
            Result(
                family=name,
                name=f"{name}, layer {layer}",
                statistic=float(observed[i]),
                null_mean=single.mean,
                null_low=single.low,
                null_high=single.high,
                draws=single.draws,
                exchanged=single.how,
                n=n,
                unit=unit,
                d=d,
                folds=folds,
                effect=(float(observed[i]) - single.mean) / single.sd,
                effect_name="standard deviations of the null",
                p=min(single._p, joint._p),
                p_corrected=joint._p,
                p_floor=joint._floor,
                correction="max statistic over layers",
                comparisons=len(layers),
                alpha=0.05,
                interval=None if intervals is None else intervals[i],
                note=note,
            )
        )
    best = int(z.argmax())
    draft = Draft(
        f"{name}, best layer",
        float(z[best]),
        Null.sampled(float(z[best]), top, how, exact=exact),
        n,
        unit,
        d,
        folds,
        note=f"largest at layer {layers[best]}: {observed[best]:.3f}; the statistic is its z, against the "
        f"largest z of all {len(layers)} layers",
    )
    low, high = np.quantile(null, [0.025, 0.975], axis=0)
    band = null.mean(0) + float(np.quantile(top, 0.95)) * null.std(0)
    return Curve(name, tuple(layers), observed, null.mean(0), low, high, band, tuple(results), draft)
