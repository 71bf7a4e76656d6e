"""Engines whose experts are elsewhere: the same tokens, a word on the speed, and refusals."""

from __future__ import annotations

import pytest

from hadal.config import preset
from hadal.config.packing import expert_bytes, expert_count
from hadal.engine import Engine, EngineError, SamplingParams
from hadal.weights.offload import describe_offload

ASKED = [{"role": "user", "content": "What is 12 + 35?"}]
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_the_same_tokens(place: str) -> None:
    whole = Engine.load("hadal-mini", dtype="float32", max_model_len=256).chat(ASKED, GREEDY)
    engine = Engine.load("hadal-mini", dtype="float32", max_model_len=256, offload=place)
    assert engine.chat(ASKED, GREEDY).token_ids == whole.token_ids
    said = describe_offload(engine.model)
    assert ("in host memory" if place == "cpu" else "in the files") in said
    if place == "disk":  # FP8 blocks are dequantised on the way, so hot experts are worth keeping
        assert "MB kept on cpu" in said and "28 of them" in said and "tokens/s where none is hot" in said


def test_refusals() -> None:
    with pytest.raises(EngineError, match="exact mode has no operations on offloaded experts"):
        Engine.load("hadal-mini", max_model_len=256, offload="disk", exact=True)
    with pytest.raises(EngineError, match="expert_cache_gb is for offloaded experts"):
        Engine.load("hadal-mini", max_model_len=256, expert_cache_gb=1.0)


def test_sizes() -> None:
    config = preset("deepseek-v2-lite").config
    assert expert_count(config) == 26 * 64
    assert expert_bytes(config, None) == 3 * 2048 * 1408 * 2
    assert 0.5 < expert_bytes(config, "int4") / (3 * 2048 * 1408) < 0.6
    assert expert_count(preset("deepseek-r1-distill-qwen-1.5b").config) == 0
    assert expert_count(preset("deepseek-v3").config, mtp=False) == 58 * 256
