"""Bootstrap intervals: concepts are drawn with replacement, as counts of how often each was drawn.

A statistic is a function of such counts, [B, N] -> [B]; pairs of a concept with its own copy are left out by
the statistic, since they would pull distances to zero. Methods: percentile, or BCa, which corrects for bias
and for a spread that changes with the parameter (Efron, JASA 82, 1987; Efron & Tibshirani, 1993, ch. 14):

    α₁ = Φ(z₀ + (z₀ + z_α)/(1 − a(z₀ + z_α)))

z₀ from the share of draws below the estimate, a from the jackknife. Assumes concepts independent of one
another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from .arrays import Floats, Ints, StatsError
from .result import Interval

Statistic = Callable[[Floats], Floats]


def resample(n: int, draws: int, rng: np.random.Generator, strata: Ints | None = None) -> Floats:
    """How often each of n units was drawn, [B, N]; inside strata, whose sizes stay, if given."""
    weight = np.zeros((draws, n))
    stratum = np.zeros(n, np.int64) if strata is None else np.asarray(strata)
    for s in np.unique(stratum):
        block = np.flatnonzero(stratum == s)
        weight[:, block] = rng.multinomial(len(block), np.full(len(block), 1 / len(block)), size=draws)
    return weight


def interval(
    statistic: Statistic,
    n: int,
    draws: int,
    rng: np.random.Generator,
    *,
    unit: str,
    method: Literal["bca", "percentile"] = "bca",
    level: float = 0.95,
    strata: Ints | None = None,
) -> Interval:
    """The interval of `statistic` over n units. Refuses n < 5, where no bootstrap is one. Draws at which the
    statistic is undefined (NaN) are left out, and told; more than a tenth of them is an error. BCa where z₀
    is infinite (the estimate lies outside all draws) is not defined: percentile then, and the method says
    so."""
    if n < 5 or draws < 99:
        raise StatsError(f"a bootstrap over n = {n} {unit} with {draws} draws is none: take 5 and 99 or more")
    values = statistic(resample(n, draws, rng, strata))
    found = values[np.isfinite(values)]
    if len(found) < 0.9 * draws:
        raise StatsError(f"the statistic is undefined in {draws - len(found)} of {draws} bootstrap draws")
    note = f"{len(found)} draws over {unit}" + ("" if strata is None else " within strata")
    alphas = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        adjusted = _bca(statistic, n, found, alphas)
        if adjusted is None:
            note = f"{note}; BCa is not defined here"
            method = "percentile"
        else:
            alphas = adjusted
    low, high = (float(q) for q in np.quantile(found, alphas))
    return Interval(low, high, f"{level:.0%} {'BCa' if method == 'bca' else 'percentile'}, {note}")


def _bca(statistic: Statistic, n: int, found: Floats, alphas: Floats) -> Floats | None:
    """The quantiles of the draws to take, or None where they are not defined."""
    from scipy.stats import norm

    estimate = float(statistic(np.ones((1, n)))[0])
    share = float((found < estimate).mean() + 0.5 * (found == estimate).mean())
    jack = statistic(np.ones((n, n)) - np.eye(n))
    if not 0 < share < 1 or not np.isfinite(jack).all():
        return None
    z0, spread = float(norm.ppf(share)), jack.mean() - jack
    cube = float((spread**2).sum()) ** 1.5
    a = float((spread**3).sum()) / (6 * cube) if cube > 0 else 0.0
    z = z0 + norm.ppf(alphas)
    if (1 - a * z <= 0).any():
        return None
    return np.asarray(norm.cdf(z0 + z / (1 - a * z)), np.float64)
