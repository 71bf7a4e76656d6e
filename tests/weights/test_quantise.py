"""Load-time quantisation: what is packed, what it holds and costs, what the model computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hadal.config import Fp8, preset
from hadal.config.packing import packed_bytes
from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.ops.packed import KINDS, Kind, pack
from hadal.weights import WeightsError, load, save
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
@pytest.mark.parametrize("name", ["v3", "v2-lite", "qwen2-tied", "llama"])
@torch.no_grad()
def test_the_packed_model_computes_what_its_dequantised_twin_does(name: str, kind: Kind) -> None:
    config = tiny.ALL[name]
    model, twin = random_model(config), random_model(config)
    quantise_model(model, kind)
    weights = {n: t for n, t in dequantised(model).items() if n in twin.state_dict()}
    twin.load_state_dict(weights)
    token_T = torch.arange(40) % config.vocab_size
    a = model.logits(model(token_T, Context.packed([25, 15])))
    b = twin.logits(twin(token_T, Context.packed([25, 15])))
    assert (a - b).norm() / b.norm() < 0.03  # activations in eight bits, the head of a tied model too


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_folder_is_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save(random_model(tiny.V3), tmp_path / "m")
    edit(tmp_path / "m" / "model.safetensors", lambda t: t[name][5].fill_(float("nan")))
    with pytest.raises(WeightsError, match=r"experts\.3\.up_proj\.weight holds NaN"):
        load(tmp_path / "m", quantize=kind)


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    save(random_model(tiny.V3), tmp_path / "m")
    with pytest.raises(WeightsError, match="quantize is 'int3'; use one of fp8, int8, int4"):
        load(tmp_path / "m", quantize="int3")


def test_a_packed_model_is_not_saved_by_mistake(tmp_path: Path) -> None:
    model = quantise_model(random_model(tiny.QWEN2), "int8")
    with pytest.raises(WeightsError, match="is packed in int8"):
        save(model, tmp_path / "m")
