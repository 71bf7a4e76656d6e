"""Latency and throughput of a tiny engine: counts, ceilings by the formula, and the arithmetic of a trace."""

from __future__ import annotations

import random

import pytest
import torch

from hadal.bench import offline
from hadal.bench.ceilings import Ceilings
from hadal.bench.models import random_engine
from hadal.bench.offline import Trace
from hadal.bench.work import step_work
from hadal.engine import Engine, EngineError
from hadal.plan.speed import prefill_flops
from tests.bench.conftest import MOE


def test_trace_arithmetic() -> None:
    """Two sequences; the second brings two tokens at once, as speculation does."""
    trace = Trace([[(1.0, 1), (1.5, 1), (2.5, 1)], [(2.0, 1), (3.0, 2)]], ended=3.0)
    assert (trace.first, trace.filled, trace.tokens) == (1.0, 2.0, 6)
    assert trace.decoded() == 3, "what came before the last first token is not decoding alone"
    assert trace.gaps() == [0.5, 1.0, 0.5, 0.5]
    assert trace.steps() == 3


def test_a_run_makes_what_was_asked_for(moe_engine: Engine) -> None:
    trace = offline.run(moe_engine, 3, 9, 5, random.Random(0))
    assert [sum(n for _, n in one) for one in trace.arrivals] == [5, 5, 5]
    assert 0 < trace.first <= trace.filled <= trace.ended
    moe_engine.check_integrity()


def test_latency_and_its_ceilings(moe_engine: Engine, slow_machine: Ceilings) -> None:
    seen: list[tuple[float, float]] = []
    found = offline.latency(
        moe_engine, slow_machine, prompt=10, output=8, repeats=2, progress=lambda *a: seen.append(a)
    )
    work = step_work(moe_engine)
    assert found.step_bytes == work.bytes(1, 14)
    assert found.tokens_per_step == 1.0
    assert found.decode_ceiling == pytest.approx(2e6 / found.step_bytes)
    assert found.prompt_flops == prefill_flops(moe_engine.config, 10)
    assert found.ttft_floor_s == pytest.approx(max(found.prompt_flops / 1e8, work.bytes(10, 0) / 2e6))
    assert 0 < found.per_token_p50_s <= found.per_token_p95_s
    assert set(found.startup) == {"first_token_s", "warm_up_s"}
    assert found.as_json()["decode_share"] == found.decode_rate / found.decode_ceiling
    assert seen == [(1, 2), (2, 2)]


def test_throughput_and_its_ceilings(moe_engine: Engine, slow_machine: Ceilings) -> None:
    found = offline.throughput(moe_engine, slow_machine, batch=3, prompt=10, output=6, repeats=2)
    assert found.experts_measured is not None and 2 <= found.experts_measured <= 6
    assert found.experts_even == pytest.approx(8 * (1 - 0.75**3))
    assert found.step_bytes == step_work(moe_engine).bytes(3, 13, found.experts_measured)
    assert found.decode_ceiling == pytest.approx(3 * 2e6 / found.step_bytes)
    assert 0 < found.output_rate < found.decode_rate
    assert found.as_json()["prefill_share"] == found.prefill_rate / found.prefill_ceiling


def test_speculation_is_told_and_lifts_the_ceiling(slow_machine: Ceilings) -> None:
    engine = random_engine(
        MOE, name="drafts", device="cpu", dtype="float32", max_model_len=64, max_num_seqs=2,
        speculation="mtp", speculation_forced_acceptance=1.0,
    )  # fmt: skip
    found = offline.latency(engine, slow_machine, prompt=8, output=9, repeats=2)
    assert found.acceptance == 1.0
    assert found.tokens_per_step == pytest.approx(2.0, abs=0.3), "the token, and a draft that stands"
    assert found.decode_ceiling == pytest.approx(found.tokens_per_step * 2e6 / found.step_bytes)
    many = offline.throughput(engine, slow_machine, batch=2, prompt=8, output=9, repeats=1)
    assert many.acceptance == 1.0 and 1.5 < many.tokens_per_step <= 2.2


def test_more_sequences_than_seats(moe_engine: Engine, slow_machine: Ceilings) -> None:
    found = offline.throughput(moe_engine, slow_machine, batch=9, prompt=6, output=4, repeats=1)
    assert found.batch == 9
    assert found.experts_even == pytest.approx(8 * (1 - 0.75**4)), "four seats, so four tokens a step"
    assert found.decode_rate > 0


def test_a_failing_engine_is_told(moe_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(moe_engine.runner, "run", broken)
    with pytest.raises(EngineError, match="no such luck"):
        offline.run(moe_engine, 1, 4, 2, random.Random(0))


def test_ceilings_choose_the_widest_use(slow_machine: Ceilings) -> None:
    assert slow_machine.bandwidth == 2e6
    assert slow_machine.matmul_for(torch.float32) == 1e8
    assert slow_machine.matmul_for(torch.bfloat16) == 1e8, "BF16 may go through FP32 where that is faster"
    assert slow_machine.matmul_for(torch.bfloat16, "int4") == 4e8
    assert slow_machine.matmul_for(torch.float32, "fp8") == 1e8, "no FP8 products were measured here"
