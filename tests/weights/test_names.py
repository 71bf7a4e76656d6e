"""The name table against the hub's own totals and spelled-out names."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest

from hadal.config import Fp8, ModelConfig, preset
from hadal.weights.names import expected_tensors, is_harmless, parameter_shapes, slots
from tests.weights import tiny


def totals(config: ModelConfig, **options: bool) -> tuple[int, int]:
    expected = expected_tensors(config, **options)
    return len(expected), sum(prod(e.shape) for e in expected.values())


def test_v3_totals_equal_the_hub() -> None:
    """91,991 tensors and 684,531,386,000 elements: main model, MTP module with its copies, FP32 scales."""
    config = preset("DeepSeek-V3").config
    assert totals(config) == (91_991, 684_531_386_000)
    assert totals(replace(config, fp8=None))[1] == 684_489_845_504
    assert totals(replace(config, fp8=None), with_mtp=False)[1] == 671_026_419_200


def test_v2_lite_totals_equal_the_hub() -> None:
    assert totals(preset("DeepSeek-V2-Lite").config) == (5_291, 15_706_484_224)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("DeepSeek-V2", 235_741_434_880),
        ("deepseek-moe-16b-base", 16_375_728_128),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("DeepSeek-R1-Distill-Qwen-14B", 14_770_033_664),
        ("DeepSeek-R1-Distill-Qwen-32B", 32_763_876_352),
        ("DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
        ("DeepSeek-R1-Distill-Llama-70B", 70_553_706_496),
    ],
)
def test_other_totals(name: str, elements: int) -> None:
    assert totals(preset(name).config)[1] == elements


def test_v3_names_shapes_and_dtypes() -> None:
    table = expected_tensors(preset("DeepSeek-V3").config)
    at = {name: (e.shape, e.dtype) for name, e in table.items()}
    layer = "model.layers.3."
    assert at["model.embed_tokens.weight"] == ((129280, 7168), "float")
    assert at["lm_head.weight"] == ((129280, 7168), "float")
    assert at["model.layers.0.mlp.gate_proj.weight"] == ((18432, 7168), "fp8")
    assert at["model.layers.0.mlp.gate_proj.weight_scale_inv"] == ((144, 56), "scale")
    assert at[layer + "self_attn.kv_a_proj_with_mqa.weight"] == ((576, 7168), "fp8")
    assert at[layer + "self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ((5, 56), "scale")
    assert at[layer + "self_attn.q_a_layernorm.weight"] == ((1536,), "float")
    assert at[layer + "mlp.gate.weight"] == ((256, 7168), "float")
    assert at[layer + "mlp.gate.e_score_correction_bias"] == ((256,), "float32")
    assert at[layer + "mlp.experts.255.down_proj.weight_scale_inv"] == ((56, 16), "scale")
    assert at[layer + "mlp.shared_experts.up_proj.weight"] == ((2048, 7168), "fp8")
    mtp = "model.layers.61."
    assert at[mtp + "eh_proj.weight"] == ((7168, 14336), "float")
    assert at[mtp + "embed_tokens.weight"] == ((129280, 7168), "float")
    assert at[mtp + "shared_head.head.weight"] == ((129280, 7168), "float")
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        assert at[f"{mtp}{norm}.weight"] == ((7168,), "float")
    assert mtp + "eh_proj.weight_scale_inv" not in at and layer + "mlp.gate.weight_scale_inv" not in at
    assert "model.layers.62.enorm.weight" not in at and "model.layers.2.mlp.gate.weight" not in at


def test_where_tensors_live() -> None:
    table = slots(preset("DeepSeek-V3").config)
    up = table["model.layers.60.mlp.experts.7.up_proj.weight"]
    assert (up.parameter, up.index, up.row) == ("layers.60.mlp.experts.gate_up_proj", 7, 2048)
    mtp = table["model.layers.61.mlp.experts.7.down_proj.weight"]
    assert (mtp.parameter, mtp.index, mtp.row) == ("mtp.0.block.mlp.experts.down_proj", 7, 0)
    assert table["model.layers.61.shared_head.norm.weight"].parameter == "mtp.0.norm.weight"
    head = table["model.layers.61.shared_head.head.weight"]
    assert head.copy and not head.optional and head.parameter == "lm_head.weight"
    qwen = slots(preset("DeepSeek-R1-Distill-Qwen-7B").config)
    value = qwen["model.layers.2.self_attn.v_proj.bias"]
    assert value.parameter == "layers.2.self_attn.qkv_proj.bias"
    assert (value.row, value.shape) == (28 * 128 + 4 * 128, (512,))
    assert "model.layers.2.self_attn.q_proj.bias" not in slots(preset("DeepSeek-R1-Distill-Llama-8B").config)


def test_tied_head_is_an_optional_copy() -> None:
    head = slots(tiny.QWEN2_TIED)["lm_head.weight"]
    assert head.copy and head.optional and head.parameter == "embed_tokens.weight"
    assert "lm_head.weight" not in expected_tensors(tiny.QWEN2_TIED)
    assert "lm_head.weight" not in parameter_shapes(tiny.QWEN2_TIED)
    mtp_head = slots(tiny.V3_TIED)["model.layers.3.shared_head.head.weight"]
    assert mtp_head.parameter == "embed_tokens.weight" and not mtp_head.optional


@pytest.mark.parametrize("name", tiny.ALL)
def test_slots_tile_every_parameter_exactly_once(name: str) -> None:
    """No row of any parameter is left unfilled or filled twice; the sizes agree with the configuration."""
    config = tiny.ALL[name]
    shapes = parameter_shapes(config)
    covered = {p: [0] * prod(s[:2] if len(s) == 3 else s[:1]) for p, s in shapes.items()}
    for slot in slots(config).values():
        if slot.copy:
            continue
        rows = shapes[slot.parameter][1] if slot.index is not None else 0
        start = (slot.index or 0) * rows + slot.row
        for row in range(start, start + slot.shape[0]):
            covered[slot.parameter][row] += 1
    assert all(count == 1 for rows in covered.values() for count in rows)
    n = config.parameters()
    assert sum(prod(s) for s in shapes.values()) == n.main + n.mtp_unique


@pytest.mark.parametrize("name", ["v3", "v2-lite", "qwen2"])
def test_fp8_adds_scales_for_the_matrices_alone(name: str) -> None:
    config = tiny.ALL[name]
    plain, fp8 = expected_tensors(config), expected_tensors(replace(config, fp8=Fp8()))
    added = set(fp8) - set(plain)
    assert not set(plain) - set(fp8)
    assert {a.removesuffix("_scale_inv") for a in added} == {k for k, e in fp8.items() if e.dtype == "fp8"}
    assert sum(prod(fp8[a].shape) for a in added) == replace(config, fp8=Fp8()).parameters().fp8_scales


def test_harmless_extras() -> None:
    assert is_harmless("model.layers.0.self_attn.rotary_emb.inv_freq") and is_harmless("rotary_emb.inv_freq")
    assert not is_harmless("model.layers.0.self_attn.q_proj.lora_A") and not is_harmless("inv_freq")


def test_the_table_needs_no_torch() -> None:
    code = "import sys, hadal.weights.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
