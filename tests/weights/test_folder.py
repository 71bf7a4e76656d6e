"""Round trips: save → load → equal, in every architecture, dtype and number format."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hadal.config import Fp8, ModelConfig
from hadal.ops.fp8 import dequantise_blocks, quantise_blocks
from hadal.text import Tokenizer
from hadal.weights import WeightsError, convert, load, save
from hadal.weights.layout import open_folder
from hadal.weights.names import expected_tensors, slots
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer
from tests.weights import tiny
from tests.weights.helpers import random_model, same


@pytest.mark.parametrize("name", tiny.ALL)
def test_save_load_equal(name: str, tmp_path: Path) -> None:
    model = random_model(tiny.ALL[name])
    save(model, tmp_path / "m", max_shard_bytes=150_000)
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 3
    back = load(tmp_path / "m", verify="full")
    same(model, back)
    assert back.config == model.config and not back.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_in_files_and_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(tiny.V3, dtype=dtype)
    save(model, tmp_path / "m")
    same(model, load(tmp_path / "m", dtype=dtype))
    wide = load(tmp_path / "m", dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), wide[name])
    bias = "layers.1.mlp.gate.e_score_correction_bias"
    assert load(tmp_path / "m", dtype=torch.bfloat16).state_dict()[bias].dtype == torch.float32
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["model.norm.weight"].dtype == dtype


@pytest.mark.parametrize("name", ["v3", "v2", "v2-lite", "moe-16b", "qwen2", "llama"])
@pytest.mark.parametrize("fp8", [Fp8(), Fp8(scale_fmt="ue8m0"), Fp8(weight_block_size=(64, 32))])
def test_fp8_folders(name: str, fp8: Fp8, tmp_path: Path) -> None:
    """Exactly the published matrices are quantised, and what is loaded is their block-wise dequantisation."""
    model = random_model(tiny.ALL[name])
    save(model, tmp_path / "m", fp8=fp8, max_shard_bytes=100_000)
    back = load(tmp_path / "m").state_dict()
    opened = open_folder(tmp_path / "m")
    assert opened.config.fp8 == fp8
    for published, slot in slots(model.config).items():
        if slot.copy:
            continue
        original = _rows(model.state_dict(), slot)
        if slot.kind == "matrix":
            q, scale = quantise_blocks(original, fp8.weight_block_size, fp8.scale_fmt == "ue8m0")
            want = dequantise_blocks(q, scale, fp8.weight_block_size)
            assert opened.stored[published].dtype == "F8_E4M3"
            assert opened.stored[published + "_scale_inv"].dtype == "F32"
        else:
            want = original if slot.kind == "float32" else original.bfloat16().float()
            assert opened.stored[published].dtype == ("F32" if slot.kind == "float32" else "BF16")
        assert torch.equal(_rows(back, slot), want), published


def _rows(state: dict[str, torch.Tensor], slot: object) -> torch.Tensor:
    parameter = state[slot.parameter]  # type: ignore[attr-defined]
    if slot.index is not None:  # type: ignore[attr-defined]
        parameter = parameter[slot.index]  # type: ignore[attr-defined]
    return parameter[slot.row : slot.row + slot.shape[0]]  # type: ignore[attr-defined]


def test_files_are_readable_by_safetensors_and_complete(tmp_path: Path) -> None:
    model = random_model(tiny.V3)
    save(model, tmp_path / "m", fp8=True, max_shard_bytes=120_000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    seen: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(tmp_path / "m" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert index["weight_map"][name] == shard
                seen[name] = tuple(file.get_slice(name).get_shape())
    expected = expected_tensors(replace(tiny.V3, fp8=Fp8()))
    assert seen == {name: e.shape for name, e in expected.items()}
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "m").glob("model-*")}
    assert index["metadata"]["total_size"] < sum(sizes.values())


def test_mtp_copies_are_written_and_checked(tmp_path: Path) -> None:
    model = random_model(tiny.V3)
    save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(
        stored["model.layers.3.embed_tokens.weight"], model.state_dict()["embed_tokens.weight"]
    )
    assert torch.equal(stored["model.layers.3.shared_head.head.weight"], model.state_dict()["lm_head.weight"])


def test_without_mtp(tmp_path: Path) -> None:
    """`with_mtp=False` gives the main model alone, from a folder with the MTP module or without it."""
    model = random_model(tiny.V3)
    save(model, tmp_path / "m")
    main = load(tmp_path / "m", with_mtp=False)
    assert main.config.num_nextn_predict_layers == 0
    assert {k for k in model.state_dict() if not k.startswith("mtp.")} == set(main.state_dict())
    save(main, tmp_path / "main")
    config = json.loads((tmp_path / "main/config.json").read_text())
    assert "num_nextn_predict_layers" not in config
    (tmp_path / "main/manifest.json").unlink()
    (tmp_path / "main/config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    same(main, load(tmp_path / "main", with_mtp=False))
    with pytest.raises(WeightsError, match=r"model\.layers\.3\..*with_mtp=False"):
        load(tmp_path / "main")


def test_tied_head(tmp_path: Path) -> None:
    from tests.weights.helpers import edit

    model = random_model(tiny.QWEN2_TIED)
    save(model, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    assert "lm_head.weight" not in load_file(file)
    edit(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same(model, load(tmp_path / "m"))
    edit(file, lambda t: t["lm_head.weight"].mul_(1.5))
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        load(tmp_path / "m")


@pytest.mark.parametrize("config", [tiny.V3, tiny.QWEN2], ids=["v3", "qwen2"])
def test_convert_there_and_back(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config, dtype=torch.bfloat16)
    save(model, tmp_path / "bf16", max_shard_bytes=100_000)
    (tmp_path / "bf16/tokenizer.json").write_text("{}")
    convert(tmp_path / "bf16", tmp_path / "fp8", fp8=True, max_shard_bytes=70_000)
    assert (tmp_path / "fp8/tokenizer.json").read_text() == "{}"
    save(model, tmp_path / "direct", fp8=True)
    same(load(tmp_path / "fp8", verify="full"), load(tmp_path / "direct"))
    convert(tmp_path / "fp8", tmp_path / "back", dtype=torch.float32, verify=True)
    assert open_folder(tmp_path / "back").config.fp8 is None
    same(load(tmp_path / "fp8"), load(tmp_path / "back"))
    with pytest.raises(WeightsError, match="FP8 blocks already"):
        convert(tmp_path / "fp8", tmp_path / "again", fp8=True)


def test_scales_may_live_in_another_shard_than_their_matrix(tmp_path: Path) -> None:
    model = random_model(tiny.V3)
    save(model, tmp_path / "m", fp8=True, max_shard_bytes=1)  # one tensor a shard
    weight_map = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.self_attn.o_proj.weight"
    assert weight_map[name] != weight_map[name + "_scale_inv"]
    save(model, tmp_path / "one", fp8=True)
    same(load(tmp_path / "m"), load(tmp_path / "one"))


def test_large_tensors_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of a few rows (and odd alignments) the result is the same as in one."""
    model = random_model(tiny.V3)
    save(model, tmp_path / "one", fp8=Fp8(weight_block_size=(16, 24)))
    whole = load(tmp_path / "one")
    monkeypatch.setattr("hadal.weights.mapped.PIECE_BYTES", 5000)
    monkeypatch.setattr("hadal.weights.writer.PIECE_BYTES", 5000)
    same(whole, load(tmp_path / "one"))
    save(model, tmp_path / "two", fp8=Fp8(weight_block_size=(16, 24)))
    one, two = (tmp_path / f / "model.safetensors" for f in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_misaligned_tensors(tmp_path: Path) -> None:
    """A BF16 tensor behind an odd number of FP8 bytes is not aligned in its file; it is read all the same."""
    odd = replace(
        tiny.QWEN2, hidden_size=3, intermediate_size=5, attention=replace(tiny.QWEN2.attention, head_dim=2)
    )
    model = random_model(odd)
    save(model, tmp_path / "m", fp8=True)
    opened = open_folder(tmp_path / "m")
    assert any(s.dtype == "BF16" and s.begin % 2 for s in opened.stored.values())
    head = load(tmp_path / "m").state_dict()["lm_head.weight"]
    assert torch.equal(head, model.state_dict()["lm_head.weight"].bfloat16().float())


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    model = random_model(tiny.V3)
    saved_bytes: list[tuple[int, int]] = []
    save(model, tmp_path / "m", fp8=True, progress=lambda done, total: saved_bytes.append((done, total)))
    read: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        read.append((done, total))
        threads.add(threading.current_thread().name)

    load(tmp_path / "m", progress=progress)
    for calls in (saved_bytes, read):
        assert [d for d, _ in calls] == sorted(d for d, _ in calls)
        assert calls[-1][0] == calls[-1][1] == calls[0][1]
    assert read[-1][1] == saved_bytes[-1][1]


def test_harmless_extras_are_left_alone(tmp_path: Path) -> None:
    from tests.weights.helpers import edit

    model = random_model(tiny.LLAMA)
    save(model, tmp_path / "m")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit(tmp_path / "m/model.safetensors", lambda t: t.update(extra))
    same(model, load(tmp_path / "m"))


def test_an_exported_tokenizer_puts_bos_in_other_programs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = make_tiny_tokenizer(tmp_path / "source")
    model = random_model(replace(tiny.QWEN2, vocab_size=512))
    save(model, tmp_path / "m", files_from=source)
    same(model, load(tmp_path / "m", verify="full"))
    for text in ("", "12 + 30", "<｜User｜>é"):
        ours = Tokenizer.load(tmp_path / "m").encode_with_controls(text)
        assert ours == Tokenizer.load(source).encode_with_controls(text), "ours adds nothing"
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
        assert theirs(text)["input_ids"] == [0, *ours]
    convert(tmp_path / "m", tmp_path / "c")
    assert (tmp_path / "c/tokenizer.json").read_bytes() == (tmp_path / "m/tokenizer.json").read_bytes()


def test_metadata_and_side_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"a": "é"}')
    (source / "secrets.txt").write_text("no")
    model = random_model(tiny.QWEN2)
    save(model, tmp_path / "m", metadata={"steps": 7}, files_from=source)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "m/config.json").read_text())["hadal"] == {"steps": 7}
    same(model, load(tmp_path / "m", verify="full"))
    convert(tmp_path / "m", tmp_path / "c")
    assert json.loads((tmp_path / "c/config.json").read_text())["hadal"] == {"steps": 7}
    switched = random_model(replace(tiny.V3, mtp_after_norm=False))
    save(switched, tmp_path / "s", metadata={"steps": 8, "mtp_after_norm": True})
    assert load(tmp_path / "s").config.mtp_after_norm is False, "metadata cannot change the model"
