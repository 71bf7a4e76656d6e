"""Bytes of a step, counted on live tensors: as by arithmetic on the configuration, and less when packed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from hadal.bench import work
from hadal.bench.models import random_engine
from hadal.bench.offline import run
from hadal.config import ModelConfig, preset
from hadal.engine import Engine
from hadal.model.transformer import Transformer
from hadal.plan import speed
from tests.bench.conftest import DENSE, MOE, make_engine


@pytest.mark.parametrize(("config", "dtype"), [(MOE, torch.float32), (DENSE, torch.bfloat16)])
def test_live_bytes_are_those_of_the_arithmetic(config: ModelConfig, dtype: torch.dtype) -> None:
    found = work.step_work(make_engine(config, dtype))
    width = dtype.itemsize
    for batch, context in ((1, 100), (3, 17)):
        wanted = speed.step_bytes(config, context, bytes_per_weight=width, bytes_per_value=width, batch=batch)
        assert found.bytes(batch, context) == pytest.approx(wanted, abs=width)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-r1-distill-qwen-1.5b"])
def test_published_shapes_on_the_meta_device(name: str) -> None:
    config = preset(name).config
    (blocks, routed), head, mtp = work.weight_bytes(Transformer(config, dtype=torch.bfloat16, device="meta"))
    moe, always = config.moe, blocks + head
    assert mtp == (0, 0) and head == 2 * config.vocab_size * config.hidden_size
    assert routed == (2 * speed.routed_parameters(config) * moe.n_routed_experts if moe else 0)
    count = config.parameters()
    assert always + routed == 2 * (count.main - count.embedding)
    if moe:
        per_token = always + routed * moe.num_experts_per_tok // moe.n_routed_experts
        assert per_token == speed.weight_bytes_per_step(config, 2)


def test_routing_is_measured(moe_engine: Engine) -> None:
    assert work.measured_experts(moe_engine, 1) == 2, "one token touches as many as it chooses"
    many = work.measured_experts(moe_engine, 64)
    assert many is not None and 4 < many <= 8
    assert work.measured_experts(make_engine(DENSE), 4) is None


def test_drafting_reads_the_mtp_module_and_more_experts() -> None:
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2}
    plain = work.step_work(random_engine(MOE, name="plain", **options))
    drafting = work.step_work(
        random_engine(
            MOE, name="drafts", speculation="mtp", num_speculative_tokens=2,
            speculation_forced_acceptance=0.5, **options,
        )
    )  # fmt: skip
    assert (drafting.always, drafting.routed) == (plain.always, plain.routed)
    assert (plain.drafts, plain.draft_always, plain.draft_routed) == (0, 0, 0)
    expert = 4 * 3 * 32 * 24
    assert (drafting.drafts, drafting.draft_routed) == (2, 8 * expert)
    head = 4 * 512 * 32
    count = replace(MOE, num_nextn_predict_layers=1).parameters().mtp_unique
    assert drafting.draft_always == head + 4 * count - 8 * expert
    read = plain.always + plain.touched(3) / 8 * plain.routed
    read += 2 * (drafting.draft_always + 2 * expert)
    assert drafting.bytes(1, 0) == pytest.approx(read)


def test_touched_experts_scale_the_bytes() -> None:
    found = speed.StepWork(always=1000, routed=800, experts=8, chosen=2, cache_per_token=4.0)
    assert found.bytes(1, 0) == 1000 + 200
    assert found.bytes(2, 10, touched=3.0) == 1000 + 300 + 80
    assert found.touched(2) == pytest.approx(8 * (1 - 0.75**2))
    assert speed.StepWork(1000, 0, 0, 0, 4.0).bytes(2, 10) == 1080


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_packed_random_weights_are_fewer_bytes_and_give_finite_answers(kind: str) -> None:
    config = ModelConfig(
        model_type="qwen2", vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, attention=DENSE.attention, max_position_embeddings=128, eos_token_id=(1,),
    )  # fmt: skip
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2}
    plain = work.step_work(random_engine(config, name="plain", **options))
    engine = random_engine(config, name="packed", quantize=kind, **options)
    packed = work.step_work(engine)
    assert packed.always < plain.always * (0.5 if kind == "fp8" else 0.35)
    assert packed.cache_per_token == plain.cache_per_token

    assert run(engine, 2, 8, 4, random.Random(0)).tokens == 8
