"""pass@k against all subsets, the vote on hand-made cases, intervals."""

from __future__ import annotations

import itertools
import math

import pytest

from hadal.evals.statistics import bootstrap, interval, pass_at_k, powers_up_to, wilson
from hadal.post.vote import vote


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(samples: int) -> None:
    for right in range(samples + 1):
        verdicts = [index < right for index in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(verdicts, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_against_the_published_product() -> None:
    """1 − Π_{i=n−c+1}^{n} (1 − k/i), as the paper computes it (arXiv 2107.03374, figure 3)."""
    for n, c, k in ((200, 3, 100), (200, 150, 10), (64, 1, 64), (100, 0, 10)):
        product = 1.0 if n - c < k else 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(0.0 if c == 0 else product)
    for wrong in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError, match="1 ≤ k ≤ samples"):
            pass_at_k(*wrong)
    assert powers_up_to(1) == [1] and powers_up_to(6) == [1, 2, 4, 6] and powers_up_to(8) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("groups", "right", "expected"),
    [
        ([0, 0, 1], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1], [True, False], 0.5),
        ([1, 0], [False, True], 0.5),
        ([0, 1, 2, 2, 1, 0], [True, False, False, False, False, True], 1 / 3),
        ([None, None, 3], [False, False, True], 1.0),
        ([None, 3, 4, 4], [False, True, False, False], 0.0),
        ([None, None], [False, False], 0.0),
        ([5], [True], 1.0),
    ],
)
def test_the_vote(groups: list[int | None], right: list[bool], expected: float) -> None:
    assert vote(groups, right) == pytest.approx(expected)


def test_intervals() -> None:
    assert interval([1.0, 0.0, 1.0, 1.0]) == (*wilson(3, 4), "wilson")
    assert interval([0.5] * 10) == (*wilson(5, 10), "wilson")
    low, high, kind = interval([0.25, 0.5, 0.75, 1.0] * 50)
    assert kind == "bootstrap"
    error = 1.96 * math.sqrt(5 / 64 / 200)  # the variance of the four values is 5/64
    assert low == pytest.approx(0.625 - error, abs=0.006) and high == pytest.approx(0.625 + error, abs=0.006)
    assert bootstrap([0.0, 0.25, 1.0]) == bootstrap([0.0, 0.25, 1.0])
    with pytest.raises(ValueError, match="no problem"):
        bootstrap([])
