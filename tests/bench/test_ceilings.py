"""Measured ceilings are numbers of this world; the clock counts what it should."""

from __future__ import annotations

import time

import pytest
import torch

from hadal.bench import ceilings

CPU = torch.device("cpu")


@pytest.mark.parametrize("loop", ["copy", "triad", "read"])
def test_bandwidth(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "BUDGET_S", 0.02)
    assert 1e8 < getattr(ceilings, f"{loop}_bandwidth")(CPU, 1 << 22) < 1e13


def test_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "BUDGET_S", 0.02)
    found = ceilings.matmuls(CPU)
    assert set(found) == {"float32", "bfloat16", "int8"}
    assert all(1e8 < rate < 1e16 for rate in found.values())


def test_the_fastest_call_counts() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.02 if len(calls) == 3 else 0.004)

    best = ceilings.best_time(work, CPU, 0.03)
    assert 0.004 <= best < 0.02
    assert len(calls) >= 4


def test_the_better_of_two_measurements() -> None:
    one = ceilings.Ceilings(3.0, 2.0, 1.0, {"float32": 5.0, "int8": 1.0})
    two = ceilings.Ceilings(1.0, 4.0, 1.5, {"float32": 4.0, "int8": 9.0})
    assert one.best(two) == ceilings.Ceilings(3.0, 4.0, 1.5, {"float32": 5.0, "int8": 9.0})
    assert one.best(two).bandwidth == 4.0
