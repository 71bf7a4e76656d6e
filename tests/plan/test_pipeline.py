"""Bubbles by formula equal those of schedules that are carried out, operation by operation."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from hadal.plan.figures import PlanError
from hadal.plan.pipeline import KINDS, Kind, Timeline, Times, bubble, drawing, timeline


def test_the_figures_at_sixteen_stages() -> None:
    assert [bubble(kind, 16) for kind in KINDS] == [45, 15, 14, 14]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 8), (8, 20), (16, 40)])
def test_schedules_wait_as_long_as_the_formula_says(kind: Kind, stages: int, micro_batches: int) -> None:
    line = timeline(kind, stages, micro_batches)
    assert line.devices == (stages // 2 if kind == "dualpipev" else stages)
    for device in range(line.devices):
        assert line.idle(device) == pytest.approx(bubble(kind, stages)), device


@pytest.mark.parametrize("kind", ["1f1b", "dualpipe", "dualpipev"])
def test_other_durations(kind: Kind) -> None:
    """Overlapping shortens what overlaps; 1F1B waits as long at any durations."""
    times = Times(1.0, 2.0, 1.0, 2.5) if kind != "1f1b" else Times(1.13, 1.99, 0.48)
    line = timeline(kind, 8, 20, times)
    assert line.bubble == pytest.approx(bubble(kind, 8, times))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_out_done_twice_or_done_too_soon(kind: Kind) -> None:
    stages, count = 8, 16
    line = timeline(kind, stages, count)
    held(line, stages, count)


def held(line: Timeline, stages: int, count: int) -> None:
    """Each stage does each micro-batch once; nothing begins before what it reads has ended; a device does one
    thing at a time."""
    end: dict[tuple[str, int, int], float] = {}
    start: dict[tuple[str, int, int], float] = {}
    seen: Counter[tuple[str, int]] = Counter()
    two_ways = line.kind == "dualpipe"
    for done in line.done:
        for p in done.parts:
            number = p.batch + (p.way * count if two_ways else 0)
            op = "B" if p.op == "b" else p.op
            assert (op, p.stage, number) not in end
            start[op, p.stage, number], end[op, p.stage, number] = done.start, done.end
            seen[op, p.stage] += 1
    for stage in range(stages):
        assert seen["F", stage] == seen["B", stage] == count
    for (op, stage, number), begun in start.items():
        if op == "F" and stage:
            assert end["F", stage - 1, number] <= begun
        if op == "B":
            assert end["F", stage, number] <= begun
            assert stage == stages - 1 or end["B", stage + 1, number] <= begun
        if op == "W":
            assert end["B", stage, number] <= begun
    for device in range(line.devices):
        mine = sorted((d.start, d.end) for d in line.done if d.device == device)
        assert all(a[1] <= b[0] for a, b in pairwise(mine))


def test_weights_follow_each_backward_pass_that_leaves_them() -> None:
    for kind in KINDS:
        ops = Counter(p.op for d in timeline(kind, 8, 16).done for p in d.parts)
        assert ops["b"] == ops["W"]
        assert (ops["b"] > 0) == (kind != "1f1b")


def test_drawing() -> None:
    line = timeline("1f1b", 2, 2)
    assert drawing(line, 9) == ["0 FF··BB·BB", "1 ·FBBFBB··"]
    assert drawing(line, 18) == ["0 FFFF····BBBB··BBBB", "1 ··FFBBBBFFBBBB····"]
    narrow = drawing(timeline("dualpipe", 16, 40), 60)
    assert len(narrow) == 16 and {len(row) for row in narrow} == {63}
    assert any("X" in row for row in narrow) and any("w" in row for row in narrow)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="schedule is 'gpipe'"):
        bubble("gpipe", 4)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="even number"):
        bubble("dualpipe", 5)
    with pytest.raises(PlanError, match="at least 16"):
        timeline("dualpipe", 8, 12)
    with pytest.raises(PlanError, match="W is a part of B"):
        Times(1, 1, 1)
