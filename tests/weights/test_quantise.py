"""Load-time quantisation: what is packed, what it holds and costs, what the model computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hadal.config import ConfigError, Fp8, preset
from hadal.config.packing import packed_bytes
from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.ops.packed import KINDS, Kind, pack
from hadal.weights import WeightsError, convert, load, save
from hadal.weights.quantise import packed_shapes, packed_weights, quantise_model
from tests.weights import tiny
from tests.weights.helpers import edit, random_model


def dequantised(model: Transformer) -> dict[str, Tensor]:
    packed = packed_weights(model)
    state = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in packed}
    return state | {n: p.dequantise() for n, p in packed.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", tiny.ALL)
def test_loaded_packed_is_the_quantised_weight(name: str, kind: Kind, tmp_path: Path) -> None:
    model = random_model(tiny.ALL[name])
    save(model, tmp_path / "m", max_shard_bytes=150_000)
    loaded = load(tmp_path / "m", quantize=kind)
    found, plain = dequantised(loaded), dict(model.state_dict())
    if model.lm_head is None and kind != "fp8":
        plain["lm_head.weight"] = plain["embed_tokens.weight"]
    assert set(found) == set(plain)
    shapes = packed_shapes(model.config, kind)
    for parameter, tensor in found.items():
        if parameter not in shapes:
            assert torch.equal(tensor, plain[parameter]), parameter
            continue
        shape, rows = shapes[parameter]
        own: Kind = "int8" if parameter.startswith("lm_head") else kind
        assert tuple(tensor.shape) == shape
        expected = pack(plain[parameter], own, rows=rows if own == "fp8" else None).dequantise()
        assert torch.equal(tensor, expected), parameter
    never = ("embed_tokens", "norm", "gate.", "kv_b_proj", "eh_proj", "bias")
    assert not any(part in parameter for parameter in shapes for part in never)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_in_memory_equals_quantised_at_load(kind: Kind, tmp_path: Path) -> None:
    for config in (tiny.V3, tiny.QWEN2_TIED):
        model = random_model(config)
        folder = save(model, tmp_path / f"{config.model_type}")
        left, right = dequantised(quantise_model(model, kind)), dequantised(load(folder, quantize=kind))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("fp8", [Fp8(), Fp8(scale_fmt="ue8m0")])
@pytest.mark.parametrize("name", ["v3", "v2", "qwen2"])
def test_published_fp8_blocks_are_taken_over(name: str, fp8: Fp8, tmp_path: Path) -> None:
    """Not one value changes: "fp8" on an FP8 folder equals the dequantised model exactly."""
    save(random_model(tiny.ALL[name]), tmp_path / "m", fp8=fp8)
    plain, packed = load(tmp_path / "m"), load(tmp_path / "m", quantize="fp8")
    found = dequantised(packed)
    assert len(packed_weights(packed)) > 5
    for parameter, tensor in plain.state_dict().items():
        assert torch.equal(found[parameter], tensor), parameter


def test_other_blocks_are_quantised_anew(tmp_path: Path) -> None:
    save(random_model(tiny.V3), tmp_path / "m", fp8=Fp8(weight_block_size=(64, 32)))
    plain, packed = load(tmp_path / "m").state_dict(), dequantised(load(tmp_path / "m", quantize="fp8"))
    for parameter, tensor in plain.items():
        assert (packed[parameter] - tensor).norm() <= 0.05 * tensor.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["v3", "v2-lite", "qwen2-tied", "moe-16b"])
def test_bytes_are_known_beforehand(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hadal.ops.dispatch._kernels_ready", lambda: False)
    model = quantise_model(random_model(tiny.ALL[name], dtype=torch.bfloat16), kind)
    real = sum(t.nbytes for t in model.state_dict().values())
    known = packed_bytes(model.config, kind)
    assert real == known if kind != "fp8" else 1 <= real / known < 1.05  # tiny widths make smaller blocks
    if model.config.num_nextn_predict_layers:
        assert packed_bytes(model.config, kind, mtp=False) < known


def test_sizes_of_published_models() -> None:
    lite = preset("deepseek-v2-lite").config
    assert 8.2e9 < packed_bytes(lite, "int4") < 9.6e9
    assert 15.7e9 < packed_bytes(lite, "int8") < 16.8e9
    v3 = replace(preset("deepseek-v3").config, num_nextn_predict_layers=0)
    assert 671e9 < packed_bytes(v3, "fp8") < 676e9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", ["v3", "v2-lite", "qwen2", "llama"])
@torch.no_grad()
def test_the_packed_model_computes_what_its_dequantised_twin_does(
    name: str, kernels: bool, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding with the references; with the kernels to what activations in eight bits cost. (Where that
    chooses other experts than the twin, random weights say nothing: only dense models are compared then.)"""
    config = tiny.ALL[name]
    if not kernels:
        monkeypatch.setattr("hadal.ops.dispatch._kernels_ready", lambda: False)
    elif config.moe is not None:
        pytest.skip("routing of random weights")
    model, twin = random_model(config), random_model(config)
    quantise_model(model, kind)
    twin.load_state_dict(dequantised(model))
    token_T = torch.arange(40) % config.vocab_size
    a = model.logits(model(token_T, Context.packed([25, 15])))
    b = twin.logits(twin(token_T, Context.packed([25, 15])))
    assert (a - b).norm() / b.norm() < (0.05 if kernels else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_folder_is_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save(random_model(tiny.V3), tmp_path / "m")
    edit(tmp_path / "m" / "model.safetensors", lambda t: t[name][5].fill_(float("nan")))
    with pytest.raises(WeightsError, match=r"experts\.3\.up_proj\.weight holds NaN"):
        load(tmp_path / "m", quantize=kind)


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    save(random_model(tiny.V3), tmp_path / "m")
    with pytest.raises(ConfigError, match="quantize is 'int3'; use one of fp8, int8, int4"):
        load(tmp_path / "m", quantize="int3")


def test_a_packed_model_is_not_saved_by_mistake(tmp_path: Path) -> None:
    model = quantise_model(random_model(tiny.QWEN2), "int8")
    with pytest.raises(WeightsError, match="is packed in int8"):
        save(model, tmp_path / "m")


# --- integers in folders ---


@pytest.mark.parametrize("ints", ["int8", "int4"])
@pytest.mark.parametrize("name", ["v3", "v2-lite", "qwen2-tied", "llama"])
def test_integer_folders(name: str, ints: Literal["int8", "int4"], tmp_path: Path) -> None:
    """Written once, read three ways: packed as stored, dequantised, and converted back."""
    model = random_model(tiny.ALL[name])
    plain = save(model, tmp_path / "plain")
    made = convert(plain, tmp_path / "ints", ints=ints, dtype=torch.float32, max_shard_bytes=100_000)
    assert load(made, verify="full", quantize="off").config.ints is not None
    in_memory = dequantised(load(plain, quantize=ints))
    as_stored = load(made)
    assert {p.kind for p in packed_weights(as_stored).values()} <= {ints, "int8"}
    found = dequantised(as_stored)
    assert found.keys() == in_memory.keys()
    assert all(torch.equal(found[n], in_memory[n]) for n in found), "stored and in memory are the same codes"
    off = load(made, quantize="off").state_dict()
    back = load(convert(made, tmp_path / "back", dtype=torch.float32)).state_dict()
    for n, tensor in off.items():
        assert torch.equal(back[n], tensor), n
        if not n.startswith("lm_head"):
            assert torch.equal(found[n], tensor), n
    smaller = sum(f.stat().st_size for f in made.glob("*.safetensors"))
    assert smaller < sum(f.stat().st_size for f in plain.glob("*.safetensors"))


def test_integer_folder_is_what_other_loaders_expect(tmp_path: Path) -> None:
    """compressed-tensors' pack-quantized: words of little-endian codes plus half of their range."""
    model = random_model(tiny.QWEN2)
    made = convert(save(model, tmp_path / "plain"), tmp_path / "ints", ints="int4", dtype=torch.bfloat16)
    stored = load_file(made / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    words, scale = stored[name + "_packed"], stored[name + "_scale"]
    assert stored[name + "_shape"].tolist() == [176, 96] and name not in stored
    assert words.dtype == torch.int32 and words.shape == (176, 12) and scale.shape == (176, 3)
    codes = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).flatten(1) - 8
    weight = codes.float() * scale.float().repeat_interleave(32, 1)
    packed = dequantised(load(made))["layers.1.mlp.gate_up_proj.weight"][176:]
    assert torch.equal(weight, packed)
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and settings["format"] == "pack-quantized"
    assert (
        settings["config_groups"]["group_0"]["weights"]["num_bits"] == 4 and "lm_head" in settings["ignore"]
    )


def test_wider_groups_of_others_are_split(tmp_path: Path) -> None:
    """A scale a row, as `channel` has it, is repeated over our groups without loss."""
    made = convert(save(random_model(tiny.LLAMA), tmp_path / "plain"), tmp_path / "ints", ints="int8")
    config = json.loads((made / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights |= {"strategy": "channel", "group_size": None}
    (made / "config.json").write_text(json.dumps(config))

    def one_scale(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name][:, :1].clone()

    edit(made / "model.safetensors", one_scale)
    packed, plain = dequantised(load(made)), load(made, quantize="off").state_dict()
    for name, tensor in plain.items():
        if not name.startswith("lm_head"):
            assert torch.equal(packed[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "naive-quantized"}, "format is 'naive-quantized'"),
        ({"config_groups": {}}, "exactly one config_groups"),
        ({"weights": {"symmetric": False}}, "weights.symmetric is False; supported: True"),
        ({"weights": {"num_bits": 3}}, "num_bits is 3; supported: 4 or 8"),
        ({"weights": {"group_size": 33}}, "group_size is 33; multiples of 32"),
        ({"weights": {"actorder": "group"}}, "actorder is 'group'"),
    ],
)
def test_other_integer_formats_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = convert(save(random_model(tiny.QWEN2), tmp_path / "plain"), tmp_path / "ints", ints="int4")
    config = json.loads((made / "config.json").read_text())
    q = config["quantization_config"]
    q["config_groups"]["group_0"]["weights"] |= change.pop("weights", {})
    q |= change
    (made / "config.json").write_text(json.dumps(config))
    (made / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(made)


def test_faults_of_integer_folders(tmp_path: Path) -> None:
    plain = save(random_model(tiny.QWEN2), tmp_path / "plain")
    name = "model.layers.0.mlp.up_proj.weight"

    def folder(change: Callable[[dict[str, Tensor]], Any]) -> Path:
        made = convert(plain, tmp_path / "ints", ints="int4", overwrite=True)
        edit(made / "model.safetensors", change)
        return made

    with pytest.raises(WeightsError, match=r"up_proj\.weight_scale has NaN"):
        load(folder(lambda t: t[name + "_scale"].fill_(float("nan"))))
    with pytest.raises(WeightsError, match=re.escape("weight_shape says [7, 96]")):
        load(folder(lambda t: t[name + "_shape"].__setitem__(0, 7) or 1))
    with pytest.raises(WeightsError, match=r"missing tensor model\.layers\.0\.mlp\.up_proj\.weight_scale"):
        load(folder(lambda t: t.pop(name + "_scale")))
    with pytest.raises(WeightsError, match="4-bit integers already"):
        convert(folder(lambda t: 1), tmp_path / "twice", ints="int8")
    with pytest.raises(WeightsError, match="not both"):
        convert(plain, tmp_path / "both", ints="int8", fp8=True)
