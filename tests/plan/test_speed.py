"""Bytes that a step reads and FLOP of a prefill, against figures worked out by hand."""

from __future__ import annotations

import pytest

from hadal.config import preset
from hadal.plan import speed

V3 = preset("deepseek-v3").config
LITE = preset("deepseek-v2-lite").config
QWEN = preset("deepseek-r1-distill-qwen-1.5b").config


def test_a_dense_model_reads_all_but_the_embedding() -> None:
    count = QWEN.parameters()
    assert speed.weight_bytes_per_step(QWEN, 2) == 2 * (count.main - count.embedding)
    assert speed.weight_bytes_per_step(QWEN, 2, batch=64) == speed.weight_bytes_per_step(QWEN, 2)


def test_v3_reads_its_active_parameters_at_batch_1() -> None:
    assert (
        speed.weight_bytes_per_step(V3, 1) == 36_625_618_432
    )  # docs: activated with the head, without the embedding


def test_a_large_batch_reads_nearly_all_experts() -> None:
    count = V3.parameters()
    everything = count.main - count.embedding
    many = speed.weight_bytes_per_step(V3, 1, batch=4096)
    assert 0.999 * everything < many <= everything
    assert speed.routed_parameters(V3) == 44_040_192 * 58


def test_expected_experts_against_a_simulation() -> None:
    import random

    draw, experts, chosen, batch = random.Random(0), 16, 4, 5
    seen = [len({e for _ in range(batch) for e in draw.sample(range(experts), chosen)}) for _ in range(4000)]
    formula = experts * (1 - (1 - chosen / experts) ** batch)
    assert sum(seen) / len(seen) == pytest.approx(formula, rel=0.01)


def test_the_cache_counts() -> None:
    with_cache = speed.step_bytes(V3, 1000, bytes_per_weight=1, bytes_per_value=2, batch=3)
    assert with_cache - speed.weight_bytes_per_step(V3, 1, batch=3) == 3 * 1000 * 70_272


def test_prefill_flops_of_v2_lite() -> None:
    config = preset("deepseek-v2-lite").config
    flops = speed.prefill_flops(config, 1)
    attention = 2 * 16 * (192 + 128) * 1 * 27
    assert flops == 2 * config.parameters().active_core + attention


def test_v2_lite_by_hand() -> None:
    """Attention 2048·(16·192) + 2048·576 + 512 + 512·16·256 + 2048², two norms; one expert 3·2048·1408; gate
    64·2048; dense layer 3·2048·10944; head 102400·2048; final norm."""
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 2048 * 2048 + 2 * 2048
    expert = 3 * 2048 * 1408
    core = 27 * attention + 3 * 2048 * 10944 + 26 * (8 * expert + 64 * 2048) + 2048
    head = 102400 * 2048
    assert speed.weight_bytes_per_step(LITE, 2) == 2 * (core + head)
    touched = 64 * (1 - (58 / 64) ** 32)
    assert touched == pytest.approx(61.26, abs=0.01)
    more = 26 * (touched - 6) * expert
    assert speed.weight_bytes_per_step(LITE, 2, 32) == pytest.approx(2 * (core + head + more), rel=1e-9)
    cache = 32 * 640 * 27 * 576 * 2
    whole = speed.step_bytes(LITE, 640, bytes_per_weight=2, bytes_per_value=2, batch=32)
    assert whole == pytest.approx(2 * (core + head + more) + cache, rel=1e-9)
    pairs = 4000 * 4001 / 2
    assert speed.prefill_flops(LITE, 4000) == 2 * core * 4000 + 2 * 16 * (192 + 128) * pairs * 27


def test_qwen_by_hand() -> None:
    """1536 wide, 28 layers, 12 heads and 2 KV heads of 128, 8960 inside, vocabulary 151,936, untied."""
    attention = 2 * 1536 * 1536 + 2 * 256 * 1536 + (1536 + 2 * 256)
    layer = attention + 3 * 1536 * 8960 + 2 * 1536
    core = 28 * layer + 1536
    assert speed.weight_bytes_per_step(QWEN, 2) == 2 * (core + 151936 * 1536)
    cache = speed.step_bytes(QWEN, 100, bytes_per_weight=2, bytes_per_value=2, batch=4)
    assert cache - speed.weight_bytes_per_step(QWEN, 2, 4) == 4 * 100 * 28 * 2 * 256 * 2
    assert speed.prefill_flops(QWEN, 256) == 2 * core * 256 + 2 * 12 * 256 * (256 * 257 / 2) * 28
