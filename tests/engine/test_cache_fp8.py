"""The latent cache in FP8: near the plain one, the same however a prompt is cut, small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hadal.config import Mla, ModelConfig, preset
from hadal.engine import Engine, EngineError, SamplingParams
from hadal.model.context import Cache
from hadal.model.transformer import Transformer
from tests.weights import tiny
from tests.weights.helpers import random_model

FP8 = torch.float8_e4m3fn
CONFIG = replace(tiny.V3, attention=Mla(40, 128, 24, 16, 20), num_nextn_predict_layers=0)
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=3)


def engine(model: Transformer, **options: object) -> Engine:
    return Engine(model, max_model_len=200, max_num_seqs=4, page_size=16, **options)  # type: ignore[arg-type]


def test_bytes_of_an_entry() -> None:
    v3 = preset("deepseek-v3").config
    assert Cache.bytes_per_page(v3, 64, FP8) == 656 * 64 * 61
    assert Cache.bytes_per_page(v3, 64, torch.bfloat16) == 1152 * 64 * 61
    assert Cache(CONFIG, 3, 16, FP8, "cpu").layers[0].shape == (3, 16, 128 + 4 + 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_the_plain_cache(dtype: torch.dtype) -> None:
    model, prompt = random_model(CONFIG, dtype=dtype), list(range(3, 90))
    plain, packed = (
        engine(model, cache_dtype=kind).generate([prompt], GREEDY)[0] for kind in ("auto", "fp8")
    )
    assert plain.logprobs and packed.logprobs
    assert abs(plain.logprobs[0].logprob - packed.logprobs[0].logprob) < 0.1
    assert packed.logprobs[0].logprob != plain.logprobs[0].logprob, "the cache is what is read"


@pytest.mark.parametrize("budget", [7, 16, 40])
def test_chunks_and_prefix_hits_change_nothing(budget: int) -> None:
    model, prompt = random_model(CONFIG), list(range(3, 90))
    whole = engine(model, cache_dtype="fp8").generate([prompt], GREEDY)[0]
    cut = engine(model, cache_dtype="fp8", max_num_batched_tokens=budget)
    for _ in range(2):  # the second time from the prefix cache
        again = cut.generate([prompt], GREEDY)[0]
        assert again.token_ids == whole.token_ids
        assert whole.logprobs and again.logprobs
        for a, b in zip(whole.logprobs, again.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4
    assert cut.stats().prefix_hits > 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (tiny.QWEN2, {"cache_dtype": "fp8"}, "this model has grouped-query attention"),
        (tiny.V3, {"cache_dtype": "fp8"}, "latent rank in multiples of 128, got 48"),
        (CONFIG, {"cache_dtype": "int3"}, "cache_dtype is 'int3'; use auto or fp8"),
        (CONFIG, {"cache_dtype": "fp8", "exact": True}, "exact mode keeps the cache in the model's dtype"),
    ],
)
def test_refusals(config: ModelConfig, options: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine(random_model(config), **options)
