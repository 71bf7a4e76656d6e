"""The figures of an evaluation: pass@k, the majority's vote, and how sure they are.

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1): of n samples of a problem, c
right, the chance that k drawn without replacement hold a right one is

    pass@k = 1 − C(n − c, k) / C(n, k)

cons@k is the share of problems whose most frequent answer is right (hadal/post/vote.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

RESAMPLES = 4000
_DRAWS = 2_000_000  # problems drawn by the bootstrap, at most


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of `samples`, `right` of them right, hold a right one. Raises ValueError."""
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(
            f"pass@{k} of {samples} samples, {right} right: 1 ≤ k ≤ samples, 0 ≤ right ≤ samples"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_up_to(samples: int) -> list[int]:
    """1, 2, 4 … and `samples` itself: the k for which pass@k is told."""
    return sorted({1 << i for i in range(samples.bit_length())} | {samples})


def wilson(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share by Wilson (1927), (low, high), for k of n:
    (k + z²/2)/(n + z²) ± z/(n + z²) · √(k(n − k)/n + z²/4). Raises ValueError."""
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is no share")
    centre = (correct + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * (correct * (total - correct) / total + z * z / 4) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean of one value a problem, over problems drawn anew."""
    if not values:
        raise ValueError("no problem, no interval")
    rng, total = random.Random(seed), len(values)
    resamples = max(200, min(RESAMPLES, _DRAWS // total))
    means = sorted(math.fsum(rng.choices(values, k=total)) / total for _ in range(resamples))
    return means[int(0.025 * resamples)], means[min(resamples - 1, int(0.975 * resamples))]


def interval(values: Sequence[float]) -> tuple[float, float, str]:
    """(low, high, name) of the mean of one share a problem: Wilson's where every share is 0 or 1, and where
    all are equal, of which a bootstrap would make an interval without width; else a bootstrap over
    problems."""
    if len(set(values)) == 1 or all(value in (0.0, 1.0) for value in values):
        return *wilson(math.fsum(values), len(values)), "wilson"
    return *bootstrap(values), "bootstrap"
