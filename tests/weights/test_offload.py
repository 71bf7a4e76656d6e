"""Experts in the files or in host memory: the same answers, and only what is routed to is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.config import Fp8
from hadal.model.context import Context
from hadal.model.offload import ExpertCache, OffloadedExperts, Weights
from hadal.model.transformer import Transformer
from hadal.weights import WeightsError, convert, load, save
from hadal.weights.offload import MappedExperts, expert_seconds
from tests.weights import tiny
from tests.weights.helpers import edit, random_model


def logits(model: Transformer, rows: int = 30) -> torch.Tensor:
    with torch.no_grad():
        token_T = torch.arange(rows) % model.config.vocab_size
        return model.logits(model(token_T, Context.packed([rows])))


def cache_of(model: Transformer) -> ExpertCache:
    return next(m.cache for m in model.modules() if isinstance(m, OffloadedExperts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model(tiny.V3), tmp_path / "m", max_shard_bytes=150_000)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_bytes", [0, 400_000, 1 << 30])
def test_answers_are_those_of_the_whole_model(
    place: Any, dtype: torch.dtype, cache_bytes: int, folder: Path
) -> None:
    whole = load(folder, dtype=dtype)
    parts = load(folder, dtype=dtype, offload=place, expert_cache_bytes=cache_bytes)
    assert cache_of(parts).source.copies == (place == "disk" and dtype == torch.bfloat16)
    for rows in (1, 30):
        a, b = logits(parts, rows), logits(whole, rows)
        assert (a - b).norm() / b.norm() < (1e-5 if dtype == torch.float32 else 0.02)
    taken = {n for n, _ in parts.named_parameters()}
    assert not any(".experts.gate_up" in n for n in taken)


@pytest.mark.parametrize("quantize", ["off", "int8", "int4", "fp8"])
@pytest.mark.parametrize("form", ["fp8", "int4", "plain"])
def test_quantised_folders_and_weights(
    form: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stored form with every form in memory. References: routing must not flip between the two."""
    monkeypatch.setattr("hadal.ops.dispatch._kernels_ready", lambda: False)
    folder = save(random_model(tiny.V3), tmp_path / "m", fp8=Fp8() if form == "fp8" else False)
    if form == "int4":
        folder = convert(folder, tmp_path / "int4", ints="int4", dtype=torch.float32)
    whole = load(folder, quantize=quantize)
    parts = load(folder, quantize=quantize, offload="disk", expert_cache_bytes=1 << 20)
    a, b = logits(parts), logits(whole)
    # stacked FP8 weights of this width have smaller blocks than one expert's matrices alone
    bound = 0.2 if quantize == "fp8" and form != "fp8" else 1e-5
    assert (a - b).norm() / b.norm() < bound


def test_hot_experts_stay_and_cold_ones_go(tmp_path: Path) -> None:
    class Counting:
        copies = True

        def __init__(self) -> None:
            self.asked: list[tuple[int, int]] = []

        def get(self, layer: int, expert: int) -> Weights:
            self.asked.append((layer, expert))
            return Weights(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4, 2))

    source = Counting()
    one = source.get(0, 0).nbytes
    source.asked.clear()
    cache = ExpertCache(source, torch.device("cpu"), 2 * one, cool_every=64)
    x = torch.ones(1, 4)
    for _ in range(5):
        cache.ffn(0, 1, x)
        cache.ffn(0, 2, x)
    assert source.asked == [(0, 1), (0, 2)] and cache.stats.hits == 8
    cache.ffn(3, 7, x)  # asked once: colder than both, computed where it lies
    assert len(cache) == 2 and cache.stats.on_host == 1 and cache.used_bytes == 2 * one
    for _ in range(20):
        cache.ffn(3, 7, x)
    assert source.asked.count((3, 7)) < 8, "it became hotter and replaced one"
    assert cache.used_bytes == 2 * one and cache.stats.hit_rate > 0.5


def test_only_routed_experts_are_read(folder: Path) -> None:
    model = load(folder, offload="disk")
    source = cache_of(model).source
    assert isinstance(source, MappedExperts)
    seen: set[tuple[int, int]] = set()
    get = source.get
    source.get = lambda layer, expert: (seen.add((layer, expert)), get(layer, expert))[1]  # type: ignore[method-assign]
    logits(model, rows=1)
    k, layers = tiny.V3.moe.num_experts_per_tok, 2  # type: ignore[union-attr]
    assert len(seen) == k * layers
    assert expert_seconds(cache_of(model)) > 0


def test_mtp_module_is_offloaded_too(folder: Path) -> None:
    whole, parts = load(folder), load(folder, offload="disk")
    token_T, ctx = torch.arange(12), Context.packed([12])
    with torch.no_grad():
        out = [m.mtp_forward(m(token_T, Context.packed([12])), token_T + 1, ctx) for m in (whole, parts)]
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)
    assert len(load(folder, offload="disk", with_mtp=False).mtp) == 0


def test_faults(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="offload is 'moon'; use cpu or disk"):
        load(folder, offload="moon")  # type: ignore[arg-type]
    dense = save(random_model(tiny.QWEN2), tmp_path / "dense")
    with pytest.raises(WeightsError, match="a qwen2 model has no experts"):
        load(dense, offload="disk")
    whole = save(random_model(tiny.V3), tmp_path / "nan")
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    edit(whole / "model.safetensors", lambda tensors: tensors[name][3].fill_(float("nan")))
    model = load(whole, offload="disk")
    with pytest.raises(WeightsError, match=r"experts\.5\.down_proj\.weight holds NaN"):
        for _ in range(3):
            logits(model, rows=100)
