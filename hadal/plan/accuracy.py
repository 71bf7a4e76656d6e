"""The planner against what others published and what we measured: each case of data/published.toml.

Exact quantities must be exact. Times of our own engine must come within 20%, with efficiencies that were
fitted once to a class of devices; which cases they were fitted to is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from hadal.config import Mla, ModelConfig, Moe, Rope
from hadal.plan import cost, pipeline, pretraining
from hadal.plan.figures import data
from hadal.plan.known import config_of
from hadal.plan.layout import Layout
from hadal.plan.machines import Machine, parse
from hadal.plan.memory import CacheDtype, WeightDtype, cache_bytes_per_token, memory_bytes
from hadal.plan.roofline import (
    Work,
    ceiling,
    decode_step,
    efficiency,
    expert_parallel_bound,
    prefill,
)
from hadal.plan.training import TrainingShape, training_memory

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One published figure and our prediction of it. `tolerance` None: a known miss, `note` says why."""

    id: str
    what: str
    published: float
    unit: str
    source: str
    tolerance: float | None = None
    sample: str = ""
    note: str = ""
    result: tuple[Any, ...] = ()

    @property
    def predicted(self) -> float:
        return _predictions()[self.id]()

    @property
    def error(self) -> float:
        """Relative to what was published."""
        return self.predicted / self.published - 1

    @property
    def holds(self) -> bool:
        return self.tolerance is None or abs(self.error) <= self.tolerance


def cases() -> list[Case]:
    """All, in the file's order."""
    return [Case(**{**row, "result": tuple(row.get("result", ()))}) for row in data("published")["case"]]


def as_json() -> list[dict[str, Any]]:
    """The table."""
    return [
        {
            "id": c.id,
            "what": c.what,
            "predicted": c.predicted,
            "published": c.published,
            "unit": c.unit,
            "error": c.error,
            "tolerance": c.tolerance,
            "holds": c.holds,
            "sample": c.sample,
            "source": c.source,
            "note": c.note,
        }
        for c in cases()
    ]


# --- predictions --------------------------------------------------------------------------------------------
def _of(name: str) -> ModelConfig:
    return config_of(name)[1]


def _kv(name: str) -> Callable[[], float]:
    return lambda: cache_bytes_per_token(_of(name))


# Our benchmarks' model of 410M parameters (benchmarks/common.py), and the machine that they ran on: four
# cores, 37 GB/s by a copy, FP32 products at 0.48 TFLOP/s (`hadal doctor`).
SMALL = ModelConfig(
    "deepseek_v3", 32768, 1024, 3072, 12, 8, Mla(512, 512, 128, 64, 128), Rope(1e4),
    Moe(32, 1, 4, 256, 1, 1, "sigmoid", "noaux_tc", 1, 1, True, 1.0), max_position_embeddings=4096,
)  # fmt: skip
FOUR_CORES = "24GB RAM, bandwidth=37GB/s, fp32=0.481TFLOPS"


def _decode(
    config: ModelConfig,
    on: str,
    batch: int,
    context: int,
    dtype: WeightDtype = "bf16",
    cached: CacheDtype = "bf16",
    touched: float | None = None,
) -> Callable[[], float]:
    def rate() -> float:
        machine = parse(on)
        work = Work(config, dtype, cached, touched=touched)
        return decode_step(work, machine, batch, context, efficiency(machine.device.kind, "typical")).rate

    return rate


def _prefill(config: ModelConfig, on: str, tokens: int, dtype: WeightDtype = "bf16") -> Callable[[], float]:
    def rate() -> float:
        machine = parse(on)
        work = Work(config, dtype, "bf16")
        return prefill(work, machine, tokens, efficiency(machine.device.kind, "typical")).rate

    return rate


def _decode_unit(sequences: int = 88, drafts: int = 0, acceptance: float = 0.0) -> float:
    """Tokens a second of one sequence in DeepSeek's decode unit: 18 nodes, EP144, DP144."""
    machine = parse("144xh800, nodes=18")
    work = Work(_of("deepseek-v3"), "fp8", "bf16", Layout(1, 144, 1, 144), drafts, acceptance)
    of = efficiency("hopper", "typical")
    return decode_step(work, machine, sequences * 144, 4989, of).per_sequence


def _prefill_unit() -> float:
    """Input tokens a second of a node, those from the cache included: 4 nodes, EP32, 16K tokens a GPU."""
    machine = parse("32xh800, nodes=4")
    work = Work(_of("deepseek-v3"), "fp8", "bf16", Layout(1, 32, 1, 32))
    step = prefill(work, machine, 4096, efficiency("hopper", "typical"), prompts=4)
    return step.rate / 4 / (1 - 342 / 608)


def _train_peak(config: ModelConfig, recompute: tuple[str, ...]) -> float:
    shape = TrainingShape(4 * 4096, recompute=recompute, micro_batches=4)
    return training_memory(config, shape).peak / GIB


def _train_rate(config: ModelConfig) -> float:
    peak = parse("h100").device.flops["bf16"]
    return peak * efficiency("hopper", "typical").train / pretraining.flop_per_token(config, 4096)


def _h800() -> Machine:
    return parse("2048xh800")


@cache
def _predictions() -> dict[str, Callable[[], float]]:
    return {**_sizes(), **_training(), **_serving(), **_engine()}


def _sizes() -> dict[str, Callable[[], float]]:
    v3, lite = _of("deepseek-v3"), _of("deepseek-v2-lite")
    bf16 = memory_bytes(v3, "bf16", with_mtp=False)
    return {
        "v3-parameters": lambda: v3.parameters().main,
        "v3-stored": lambda: v3.parameters().stored,
        "v3-bf16": lambda: bf16,
        "v3-fp8": lambda: v3.weight_bytes("fp8", mtp=False),
        "v3-fp8-resident": lambda: memory_bytes(v3, "fp8", with_mtp=False),
        "lite-bf16": lambda: memory_bytes(lite, "bf16") / GIB,
        "v2-parameters": lambda: _of("deepseek-v2").parameters().main,
        "v3-bf16-cards": lambda: ceil(bf16 / parse("a100-80").device.memory),
        "kv-v3": _kv("deepseek-v3"),
        "kv-v2": _kv("deepseek-v2"),
        "kv-lite": _kv("deepseek-v2-lite"),
        "kv-405b": _kv("llama-3.1-405b"),
        "kv-72b": _kv("qwen2.5-72b"),
        "kv-qwen-1.5b": _kv("deepseek-r1-distill-qwen-1.5b"),
        "kv-qwen-7b": _kv("deepseek-r1-distill-qwen-7b"),
        "kv-llama-8b": _kv("deepseek-r1-distill-llama-8b"),
        "kv-qwen-32b": _kv("deepseek-r1-distill-qwen-32b"),
        "kv-v3-q8": lambda: cache_bytes_per_token(v3, "q8_0") * 32768 / 2**20,
    }


def _training() -> dict[str, Callable[[], float]]:
    v3, big = _of("deepseek-v3"), _of("llama-3.1-405b")
    peak, pairs = _h800().device.flops["bf16"], pretraining.flop_per_token
    total = 6.0 * big.parameters().main * 15.6e12
    stages = ((32768, 1920), (131072, 480))  # tokens a sequence, sequences a step; 1,000 steps each
    extension = sum(pairs(v3, length) * 1000 * rows * length for length, rows in stages)
    return {
        "v3-flop": lambda: pairs(v3, 4096),
        "v2-flop": lambda: pairs(_of("deepseek-v2"), 4096),
        "405b-flop": lambda: pairs(big, 4096),
        "72b-flop": lambda: pairs(_of("qwen2.5-72b"), 4096),
        "v3-hours": lambda: pretraining.run(v3, _h800(), 14.8e12, mfu=0.3894)["device hours"],
        "v3-hours-6nd": lambda: pretraining.device_hours(6 * 37e9 * 14.8e12, peak, 0.40),
        "v3-mfu": lambda: pretraining.implied_mfu(pairs(v3, 4096) * 14.8e12, 2664e3, peak),
        "v3-days-a-trillion": lambda: pretraining.run(v3, _h800(), 1e12, mfu=0.3894)["days"],
        "v3-cost": lambda: 2788e3 * cost.hourly(parse("h800")).value,
        "v3-extension": lambda: pretraining.device_hours(extension, peak, 0.3894),
        "405b-total": lambda: total,
        "405b-implied": lambda: pretraining.implied_mfu(total, 30.84e6, peak),
        "405b-hours": lambda: pretraining.device_hours(total, peak, 0.41),
        "r1-cost": lambda: (101e3 + 5e3 + 41e3) * cost.hourly(parse("h800")).value,
        "bubble-1f1b": lambda: pipeline.bubble("1f1b", 16),
        "bubble-zb1p": lambda: pipeline.bubble("zb1p", 16),
        "bubble-dualpipe": lambda: pipeline.bubble("dualpipe", 16),
    }


def _serving() -> dict[str, Callable[[], float]]:
    lite = Work(_of("deepseek-v2-lite"), "bf16", "bf16")
    pair, token = expert_parallel_bound(32, 9, 7000, 61, 50e9)
    return {
        "ep-pair": lambda: pair,
        "ep-token": lambda: token,
        "lite-ceiling-h100": lambda: ceiling(lite, parse("h100")),
        "lite-ceiling-h200": lambda: ceiling(lite, parse("h200")),
        "service-day": lambda: cost.service_day(226.75, 8, cost.hourly(parse("h800")).value),
        "decode-unit": lambda: _decode_unit() * 88 * 8,
        "decode-user": _decode_unit,
        "prefill-unit": _prefill_unit,
        "mtp-speedup": lambda: _decode_unit(1, 1, 0.875) / _decode_unit(1),
    }


def _engine() -> dict[str, Callable[[], float]]:
    lite, qwen = _of("deepseek-v2-lite"), _of("deepseek-r1-distill-qwen-1.5b")
    mini, half = _of("hadal-mini"), _of("qwen2.5-0.5b")
    found: dict[str, Callable[[], float]] = {}
    for name, config in (("lite", lite), ("qwen", qwen)):
        for batch, context in ((1, 256), (32, 640), (256, 640)):
            found[f"h100-{name}-{batch}"] = _decode(config, "h100", batch, context)
        for batch, context in ((1, 192), (32, 544)):
            found[f"h200-{name}-{batch}"] = _decode(config, "h200", batch, context)
        for on in ("h100", "h200"):
            found[f"{on}-{name}-prefill"] = _prefill(config, on, 4000)
    found["h100-lite-alike"] = _decode(lite, "h100", 32, 640, touched=6.0)
    found["h100-lite-int4-1"] = _decode(lite, "h100", 1, 256, "int4")
    found["h100-lite-int4-prefill"] = _prefill(lite, "h100", 4000, "int4")
    dtypes: tuple[WeightDtype, ...] = ("int8", "int4")
    for dtype in dtypes:
        for batch, context in ((1, 280), (16, 56)):
            found[f"cpu-410m-{dtype}-{batch}"] = _decode(SMALL, FOUR_CORES, batch, context, dtype, "fp32")
        found[f"cpu-410m-{dtype}-prefill"] = _prefill(SMALL, FOUR_CORES, 256, dtype)
    for batch, context in ((1, 152), (16, 56)):
        found[f"cpu-mini-{batch}"] = _decode(mini, FOUR_CORES, batch, context, "fp32", "fp32")
        found[f"cpu-qwen-{batch}"] = _decode(half, FOUR_CORES, batch, context)
    found["cpu-mini-prefill"] = _prefill(mini, FOUR_CORES, 256, "fp32")
    found["cpu-qwen-prefill"] = _prefill(half, FOUR_CORES, 256)
    seven = replace(lite, num_hidden_layers=7)
    found["train-lite-memory"] = lambda: _train_peak(seven, ("norm", "up", "swiglu"))
    found["train-qwen-memory"] = lambda: _train_peak(qwen, ("norm",))
    found["train-lite-rate"] = lambda: _train_rate(seven)
    found["train-qwen-rate"] = lambda: _train_rate(qwen)
    return found
