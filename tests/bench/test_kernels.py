"""Cases of every format and operation run here, and count bytes and FLOP as worked out by hand."""

from __future__ import annotations

import pytest
import torch

from hadal.bench import kernels
from hadal.bench.ceilings import Ceilings
from hadal.config import ModelConfig, preset
from hadal.ops.packed import Packed
from tests.bench.conftest import DENSE, MOE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "POOL_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_every_case_runs(config: ModelConfig, slow_machine: Ceilings) -> None:
    rows = [
        kernels.run(case, slow_machine, CPU, budget_s=0.0)
        for case in kernels.cases(config, CPU, kinds=kernels.KINDS, context=70)
    ]
    found = {(row.operation, row.kind) for row in rows}
    decode = "MLA decode" if config is MOE else "GQA decode"
    wanted = {("linear", kind) for kind in kernels.KINDS}
    wanted |= {(name, kind) for name in (decode, "RMS norm") for kind in kernels.FLOATS}
    if config is MOE:
        wanted |= {("experts", kind) for kind in kernels.KINDS} | {("gate", kind) for kind in kernels.FLOATS}
    assert found == wanted
    assert all(row.seconds > 0 and row.share > 0 for row in rows)


def test_v2_lite_counts_by_hand(slow_machine: Ceilings) -> None:
    lite = preset("deepseek-v2-lite").config
    linear = next(kernels.cases(lite, CPU, groups=("linear",), kinds=("bfloat16",)))
    assert linear.shape == "1 × 2048 → 3072"
    assert linear.nbytes == 2 * (3072 * 2048 + 2048 + 3072)
    assert linear.flops == 2 * 3072 * 2048
    *_, many = kernels.cases(lite, CPU, groups=("linear",), kinds=("int8",))
    groups = 2048 // 128
    assert many.nbytes == 3072 * 2048 + 2 * 3072 * groups + 256 * (2048 + 3072) * 4
    one, batch = kernels.cases(lite, CPU, groups=("attention",), kinds=("bfloat16",), context=1024)
    assert one.shape == "1 × 16 heads × 1024"
    assert one.nbytes == 2 * (1024 * 576 + 16 * (576 + 512))
    assert batch.flops == 16 * 2 * 16 * 1024 * (576 + 512)


def test_experts_count_what_is_touched(slow_machine: Ceilings) -> None:
    one = next(kernels.cases(MOE, CPU, groups=("experts",), kinds=("float32",)))
    assert one.shape == "1 × 2 of 8, 32 × 24"
    assert one.nbytes == 4 * (2 * 3 * 32 * 24 + 2 * 32)
    assert one.flops == 2 * 2 * 3 * 32 * 24
    fewer = next(kernels.cases(MOE, CPU, groups=("experts",), kinds=("float32",), memory=4 * 4 * 3 * 32 * 24))
    assert "2 of 4" in fewer.shape, "a layer that does not fit is timed with fewer experts"


def test_the_bound_is_the_slower_of_the_two(slow_machine: Ceilings) -> None:
    def row(nbytes: float, flops: float, kind: str) -> kernels.Row:
        case = kernels.Case("x", "y", kind, nbytes, flops, lambda: None)
        return kernels.run(case, slow_machine, CPU, budget_s=0.0)

    assert row(2e6, 0, "float32").bound == "memory"
    assert row(2e6, 2e8, "float32").bound == "compute"
    assert row(2e6, 2e8, "int8").bound == "memory", "8-bit products are four times as fast on this machine"


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_random_codes_are_finite(kind: str) -> None:
    weight = kernels.random_weight((64, 96), kind, CPU)
    assert isinstance(weight, Packed)
    values = weight.dequantise()
    assert bool(values.isfinite().all())
    assert 0.002 < values.std() < 0.2
    assert abs(float(values.mean())) < 0.2 * float(values.std())
