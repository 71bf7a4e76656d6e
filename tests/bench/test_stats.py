"""Percentiles against NumPy's."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from hadal.bench.stats import percentile, percentiles


def test_against_numpy() -> None:
    draw = random.Random(0)
    for count in (1, 2, 3, 10, 101):
        values = [draw.gauss(0, 1) for _ in range(count)]
        for q in (0, 1, 50, 90, 95, 99, 99.9, 100):
            assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-12)


def test_by_hand_and_at_the_edges() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([10, 20], 90) == 19
    assert percentiles([5.0]) == {"p50": 5.0, "p90": 5.0, "p95": 5.0, "p99": 5.0}
    assert math.isnan(percentile([], 50))
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1], 101)
