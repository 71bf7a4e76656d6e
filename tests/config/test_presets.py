"""Exact figures of the released models: parameters, cache bytes per token, FP8 sizes (reports, hub)."""

from __future__ import annotations

import contextlib

import pytest

from hadal.config import PRESETS, ConfigError, ModelConfig, preset

COUNTS = {
    "DeepSeek-V3": 671_026_419_200,
    "DeepSeek-R1": 671_026_419_200,
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-moe-16b-base": 16_375_728_128,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
}
KV_BYTES = {
    "DeepSeek-V3": 70_272,
    "DeepSeek-V2": 69_120,
    "DeepSeek-V2-Lite": 31_104,
    "DeepSeek-R1-Distill-Qwen-1.5B": 28_672,
    "DeepSeek-R1-Distill-Qwen-7B": 57_344,
    "DeepSeek-R1-Distill-Llama-8B": 131_072,
    "DeepSeek-R1-Distill-Qwen-32B": 262_144,
}


@pytest.mark.parametrize("name,count", COUNTS.items())
def test_parameter_counts(name, count):
    assert preset(name).config.parameters().main == count


@pytest.mark.parametrize("name,size", KV_BYTES.items())
def test_cache_bytes_per_token(name, size):
    assert preset(name).config.kv_bytes_per_token(2) == size


def test_v3_in_parts():
    n = preset("deepseek-v3").config.parameters()
    assert (n.active_core, n.active_with_head, n.active) == (35_698_939_392, 36_625_618_432, 37_552_297_472)
    assert (n.embedding, n.head) == (926_679_040, 926_679_040)
    assert n.mtp_unique == 11_610_068_224 and n.mtp_unique + n.mtp_copies == 13_463_426_304
    assert n.main + n.mtp_unique + n.mtp_copies == 684_489_845_504
    assert n.fp8_scales == 41_540_496 and n.stored == 684_531_386_000


def test_v32_adds_the_indexer():
    dense, sparse = (
        preset("deepseek-v3.1").config.parameters(),
        preset("deepseek-v3.2-exp").config.parameters(),
    )
    assert sparse.main - dense.main == 61 * 13_959_424


def test_sizes():
    assert preset("deepseek-v2-lite").config.weight_bytes("bf16") / 2**30 == pytest.approx(29.26, abs=0.01)
    assert preset("deepseek-v3").config.weight_bytes("fp8") / 2**30 == pytest.approx(641.30, abs=0.03)


def test_softmax_scales():
    assert preset("deepseek-v3").config.softmax_scale == pytest.approx(0.1352338, abs=1e-7)
    assert preset("deepseek-v2-lite").config.softmax_scale == pytest.approx(0.1147214, abs=1e-7)


def test_yarn_ramp_of_v3():
    from hadal.ops.rope import frequencies

    rope = preset("deepseek-v3").config.rope
    f = frequencies(rope, 64)
    plain = [10000 ** (-2 * i / 64) for i in range(32)]
    assert f[10].item() == pytest.approx(plain[10]) and f[23].item() == pytest.approx(plain[23] / 40)
    assert plain[11] / 40 < f[11].item() < plain[11]


@pytest.mark.parametrize("name", PRESETS)
def test_published_form_round_trips(name):
    config = PRESETS[name].config
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_unknown_and_unsupported_settings_are_refused():
    good = preset("deepseek-v3").config.to_hf()
    for change, text in [
        ({"kv_lora_rnak": 3}, "kv_lora_rank"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "deepseek_v4"}, "deepseek_v3"),
        ({"topk_method": "magic"}, "noaux_tc"),
        ({"n_group": 7}, "n_group"),
        ({"rope_scaling": {"type": "dynamic"}}, "yarn"),
        ({"rope_scaling": {"type": "yarn", "facotr": 2}}, "factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "fp8"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok"),
        ({"hidden_size": "big"}, "hidden_size"),
    ]:
        with pytest.raises(ConfigError, match=text):
            ModelConfig.from_hf(good | change)
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        ModelConfig.from_hf({k: v for k, v in good.items() if k != "kv_lora_rank"})
    with pytest.raises(ConfigError, match="deepseek-v3"):
        preset("deepsek-v3")


WRONG = ("x", [1], None, -1, 0.5, {}, True, 0, {"type": [1]}, {"quant_method": []}, float("nan"), 10**30)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "DeepSeek-V2-Lite", "DeepSeek-R1-Distill-Qwen-1.5B"])
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_values_of_the_wrong_kind_are_refused_or_read(name: str, wrong: object) -> None:
    """A config.json comes from anywhere: whatever a key holds, the answer is settings or a ConfigError."""
    base = preset(name).config.to_hf()
    for key in base:
        with contextlib.suppress(ConfigError):
            ModelConfig.from_hf({**base, key: wrong})
    for table in ("quantization_config", "rope_scaling"):
        for key in base.get(table) or {}:
            with contextlib.suppress(ConfigError):
                ModelConfig.from_hf({**base, table: {**base[table], key: wrong}})


def test_a_value_of_the_wrong_kind_is_named() -> None:
    base = preset("deepseek-v3").config.to_hf()
    with pytest.raises(ConfigError, match=r"rms_norm_eps is 'small'.*a number is expected"):
        ModelConfig.from_hf({**base, "rms_norm_eps": "small"})
    with pytest.raises(ConfigError, match=r"n_group is 0\.5.*an integer, 0 or above is expected"):
        ModelConfig.from_hf({**base, "n_group": 0.5})
