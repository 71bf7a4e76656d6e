"""The rate's line, and the machine's measured ceilings."""

from __future__ import annotations

import json
import time

import pytest
import torch

from hadal.cli import machine, meter
from hadal.cli.meter import Rate


def test_rate_line() -> None:
    rate = Rate.of(prompt=10, cached=4, completion=41, started=1.0, first=1.02, ended=1.22)
    assert rate.decode == pytest.approx(200)
    shown = Rate(10, 4, 41, 0.02, 0.22, 200.0, 0.14).line()
    assert shown == (
        "41 tokens · 200 tokens/s · first token after 20 ms · 14% of this machine's memory bandwidth"
        " · 4 of 10 prompt tokens from cache"
    )
    assert "processor's cache" in meter.share_text(1.7)
    assert meter.share_text(0.0123) == "1.2% of this machine's memory bandwidth"


def test_rate_of_nothing_claims_nothing() -> None:
    rate = Rate.of(prompt=3, cached=0, completion=0, started=1.0, first=None, ended=2.0)
    assert (rate.decode, rate.first_token) == (None, None)
    assert rate.line() == "0 tokens"


def test_bandwidth_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cpu")
    measured = machine.bandwidth(device)
    assert 1e8 < measured < 1e13
    record = tmp_path / "hadal" / "machine.json"
    assert record.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 1.0)
    assert machine.bandwidth(device) == measured
    assert machine.bandwidth(device, fresh=True) == 1.0
    stale = {
        key: {**entry, "at": time.time() - 40 * 86400, "value": 5.0}
        for key, entry in json.loads(record.read_text()).items()
    }
    record.write_text(json.dumps(stale))
    assert machine.bandwidth(device) == 1.0, "a record older than 30 days is measured again"
    record.write_text("not json")
    assert machine.bandwidth(device) == 1.0


def test_memory_respects_the_machine() -> None:
    found = machine.memory()
    assert 0 < found.available <= found.total
    assert machine.cpu().cores >= 1
