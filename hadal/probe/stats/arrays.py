"""Types of arrays, and what every array of numbers is checked for before it is counted with.

Letters of shapes: N concepts or sentences, D dimensions, L layers, K classes, P permutations, B bootstrap
draws, Q squares, G groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
CELLS = 4_000_000  # numbers that a step of a loop over permutations holds at most: 32 MB


class StatsError(ValueError):
    """A test cannot be made, or its result cannot be told, for the reason given."""


def matrix(values: ArrayLike, what: str, least: int = 3) -> Floats:
    """[N, D] in double precision. Refuses other ranks, fewer than `least` rows, what is not finite, and rows
    that are all the same, of which no statistic says anything."""
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise StatsError(f"{what} must be [n, d], and is of shape {list(array.shape)}")
    if len(array) < least:
        raise StatsError(f"{what}: n = {len(array)}; this needs at least {least}")
    if not np.isfinite(array).all():
        raise StatsError(f"{what} holds values that are not finite")
    if np.ptp(array, axis=0).max() == 0:
        raise StatsError(f"{what}: all {len(array)} rows are the same")
    return array


def codes(labels: ArrayLike, n: int, what: str = "labels") -> tuple[Ints, list[str]]:
    """Labels of any kind as numbers 0..K−1 [N], and their names. Refuses another length than n."""
    array = np.asarray(labels)
    if array.shape != (n,):
        raise StatsError(f"{what}: {n} are needed, and the shape is {list(array.shape)}")
    names, code = np.unique(array.astype(str), return_inverse=True)
    return code.astype(np.int64), [str(name) for name in names]


def one_hot(code: Ints, classes: int) -> Floats:
    """[..., N] -> [..., N, K]."""
    return np.eye(classes)[code]


def unit_rows(x: Floats, what: str = "vectors") -> Floats:
    """Rows of length 1. A row of zeros has no direction and is refused."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    if (norm == 0).any():
        raise StatsError(f"{what}: a row is zero and has no direction; leave it out, or centre otherwise")
    return np.asarray(x / norm, np.float64)


def pieces(total: int, cells: int) -> list[slice]:
    """Slices of 0..total whose work arrays, `cells` numbers a piece of one, stay below CELLS."""
    step = max(1, CELLS // max(1, cells))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
