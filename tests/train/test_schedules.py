"""The schedules at the marks that the V3 report states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.train.schedules import BatchRamp, Knobs, LearningRate, Schedule, learning_rate, stepwise

T, B = 10**12, 10**9
V3 = LearningRate(
    peak=2.2e-4,
    floor=2.2e-5,
    warmup_until=2000 * 3072 * 4096,
    constant_until=10 * T,
    cosine_until=14.3 * T,
    finals=((2.2e-5, 14.3 * T + 333 * B), (7.3e-6, 14.8 * T)),
)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (1000 * 3072 * 4096, 1.1e-4),
        (2000 * 3072 * 4096, 2.2e-4),
        (5 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 4.3 * T / 2, (2.2e-4 + 2.2e-5) / 2),
        (14.3 * T, 2.2e-5),
        (14.3 * T + 333 * B, 2.2e-5),
        (14.3 * T + 334 * B, 7.3e-6),
        (14.8 * T, 7.3e-6),
        (20 * T, 7.3e-6),
    ],
)
def test_v3_learning_rate_at_its_marks(tokens, rate):
    assert learning_rate(tokens, V3) == pytest.approx(rate)


@given(st.floats(0, 2e13), st.floats(0, 2e13))
def test_after_the_warmup_the_rate_never_rises(a, b):
    a, b = sorted((max(a, V3.warmup_until), max(b, V3.warmup_until)))
    assert learning_rate(a, V3) >= learning_rate(b, V3)


def test_the_cosine_meets_both_constants_without_a_jump():
    near = 1e-6 * T
    assert learning_rate(10 * T + near, V3) == pytest.approx(2.2e-4, rel=1e-9)
    assert learning_rate(14.3 * T - near, V3) == pytest.approx(2.2e-5, rel=1e-9)


def test_without_finals_the_floor_holds():
    shape = LearningRate(peak=1.0, floor=0.1, warmup_until=0, constant_until=0, cosine_until=10)
    assert [learning_rate(t, shape) for t in (0, 5, 10, 99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_marks_that_go_back_are_refused():
    with pytest.raises(ValueError, match="go back"):
        LearningRate(peak=1, floor=0, warmup_until=5, constant_until=4, cosine_until=9)


def test_stepwise_switches_after_its_mark():
    assert [stepwise(t, 0.3, 0.1, 10) for t in (0, 10, 11)] == [0.3, 0.3, 0.1]


def test_v3_bias_speed_and_mtp_weight():
    schedule = Schedule(V3, 0.001, 14.3 * T, 0.3, 0.1, 10 * T)
    assert schedule.at(9 * T) == Knobs(2.2e-4, 0.001, 0.3)
    assert schedule.at(12 * T).mtp_weight == 0.1
    assert schedule.at(12 * T).bias_speed == 0.001
    assert schedule.at(14.5 * T).bias_speed == 0.0


# --- the batch ---
V3_RAMP = BatchRamp(3072, 15360, 469 * B, 1)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(0, 3072), (234.5 * B, 9216), (469 * B, 15360), (10 * T, 15360)],
)
def test_v3_batch_at_its_marks(tokens, rows):
    assert V3_RAMP.rows(tokens) == rows


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.sampled_from([1, 64, 3072]))
def test_the_batch_never_shrinks_and_is_whole_micro_batches(a, b, granule):
    ramp = BatchRamp(3072, 15360, 469 * B, granule)
    a, b = sorted((a, b))
    assert 3072 <= ramp.rows(a) <= ramp.rows(b) <= 15360
    assert ramp.rows(a) % granule == 0


@pytest.mark.parametrize("ramp", [BatchRamp(4, 4, 0.0), BatchRamp(2, 8, 500.0, 2), BatchRamp(1, 9, 1e9)])
@pytest.mark.parametrize("tokens", [1, 100, 1000, 1001])
def test_steps_are_those_of_walking_through_the_run(ramp, tokens):
    seen = steps = 0
    while seen < tokens:
        seen, steps = seen + 10 * ramp.rows(seen), steps + 1
    assert ramp.steps(tokens, 10) == (steps, seen)


@pytest.mark.parametrize("sizes", [(0, 4, 1), (8, 4, 1), (3, 4, 2), (4, 4, 0)])
def test_impossible_ramps_are_refused(sizes):
    with pytest.raises(ValueError, match=r"multiples of|go down"):
        BatchRamp(sizes[0], sizes[1], 10.0, sizes[2])
