"""The rate's arithmetic: bytes per token, shares, ceilings."""

from __future__ import annotations

import json
import time

import pytest
import torch

from hadal.cli import machine, meter
from hadal.cli.meter import Rate
from hadal.config import preset

V3 = preset("deepseek-v3").config
QWEN = preset("deepseek-r1-distill-qwen-1.5b").config


def test_a_dense_model_reads_all_but_the_embedding() -> None:
    count = QWEN.parameters()
    assert meter.weight_bytes_per_step(QWEN, 2) == 2 * (count.main - count.embedding)
    assert meter.weight_bytes_per_step(QWEN, 2, batch=64) == meter.weight_bytes_per_step(QWEN, 2)


def test_v3_reads_its_active_parameters_at_batch_1() -> None:
    assert (
        meter.weight_bytes_per_step(V3, 1) == 36_625_618_432
    )  # docs: activated with the head, without the embedding


def test_a_large_batch_reads_nearly_all_experts() -> None:
    count = V3.parameters()
    everything = count.main - count.embedding
    many = meter.weight_bytes_per_step(V3, 1, batch=4096)
    assert 0.999 * everything < many <= everything
    assert meter.routed_parameters(V3) == 44_040_192 * 58


def test_expected_experts_against_a_simulation() -> None:
    import random

    draw, experts, chosen, batch = random.Random(0), 16, 4, 5
    seen = [len({e for _ in range(batch) for e in draw.sample(range(experts), chosen)}) for _ in range(4000)]
    formula = experts * (1 - (1 - chosen / experts) ** batch)
    assert sum(seen) / len(seen) == pytest.approx(formula, rel=0.01)


def test_the_cache_counts() -> None:
    with_cache = meter.step_bytes(V3, 1000, bytes_per_weight=1, bytes_per_value=2, batch=3)
    assert with_cache - meter.weight_bytes_per_step(V3, 1, batch=3) == 3 * 1000 * 70_272


def test_prefill_flops_of_v2_lite() -> None:
    config = preset("deepseek-v2-lite").config
    flops = meter.prefill_flops(config, 1)
    attention = 2 * 16 * (192 + 128) * 1 * 27
    assert flops == 2 * config.parameters().active_core + attention


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
