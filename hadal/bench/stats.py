"""Percentiles of a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 … 100), linear between neighbours as NumPy does by default; NaN of nothing."""
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile lies between 0 and 100, not at {q}")
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """{"p50": …, "p90": …, "p95": …, "p99": …}."""
    return {f"p{q}": percentile(values, q) for q in PERCENTILES}
