"""Every way in which a folder can be wrong is refused, naming the file, the tensor and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hadal.config import ConfigError
from hadal.weights import WeightsError, load, save
from hadal.weights.header import read_header
from tests.weights import tiny
from tests.weights.helpers import edit, random_model, rewrite_header

NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    model = random_model(tiny.V3)
    save(model, folder / "plain")
    save(model, folder / "fp8", fp8=True)
    save(model, folder / "sharded", max_shard_bytes=400_000)
    return folder


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return make


def single(folder: Path) -> Path:
    return folder / "model.safetensors"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def _poke(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[flat.numel() // 2] = value

    return change


def _set(
    name: str, make: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return change


SCALE = DOWN + "_scale_inv"
EDITS = {
    "missing": ("plain", lambda t: t.pop(DOWN), rf"missing tensor {DOWN};"),
    "missing two": ("plain", lambda t: (t.pop(DOWN), t.pop(NORM)), r"missing tensor .* and 1 more"),
    "extra": (
        "plain",
        lambda t: t.update({"model.layers.9.x": torch.ones(2)}),
        r"extra tensor model\.layers\.9\.x",
    ),
    "renamed": ("plain", lambda t: t.update({DOWN + "s": t.pop(DOWN)}), rf"missing tensor {DOWN}"),
    "misshapen": (
        "plain",
        _set(NORM, lambda x: x[:-1].clone()),
        rf"{NORM} has shape \[143\].* needs \[144\]",
    ),
    "transposed": ("plain", _set(DOWN, lambda x: x.T.contiguous()), rf"{DOWN} has shape \[136, 144\]"),
    "integers": (
        "plain",
        _set(NORM, lambda x: x.to(torch.int32)),
        rf"{NORM} has dtype I32, expected BF16 or F16",
    ),
    "double": ("plain", _set(NORM, lambda x: x.double()), rf"{NORM} has dtype F64"),
    "gate bias in BF16": (
        "plain",
        _set("model.layers.1.mlp.gate.e_score_correction_bias", lambda x: x.bfloat16()),
        r"e_score_correction_bias has dtype BF16, expected F32; rounded gate biases",
    ),
    "FP8 without config": ("plain", _set(DOWN, lambda x: x.to(torch.float8_e4m3fn)), r"quantization_config"),
    "BF16 in an FP8 folder": (
        "fp8",
        _set(DOWN, lambda x: x.to(torch.bfloat16)),
        rf"{DOWN} has dtype BF16, .*F8_E4M3",
    ),
    "E5M2": ("fp8", _set(DOWN, lambda x: x.float().to(torch.float8_e5m2)), rf"{DOWN} has dtype F8_E5M2"),
    "scale missing": ("fp8", lambda t: t.pop(SCALE), rf"missing tensor {SCALE}; config.json promises FP8"),
    "scale shape": (
        "fp8",
        _set(SCALE, lambda x: torch.ones(1, 1)),
        rf"{SCALE} has shape \[1, 1\].* needs \[2, 2\]",
    ),
    "scale transposed": (
        "fp8",
        _set("model.layers.0.mlp.gate_proj.weight_scale_inv", lambda x: torch.ones(1, 2)),
        r"gate_proj.weight_scale_inv has shape \[1, 2\].* needs \[2, 2\]",
    ),
    "scale dtype": ("fp8", _set(SCALE, lambda x: x.bfloat16()), rf"{SCALE} has dtype BF16, expected F32"),
    "scale NaN": ("fp8", _poke(SCALE, float("nan")), rf"{SCALE} has NaN"),
    "scale negative": ("fp8", _poke(SCALE, -1.0), rf"{SCALE} has NaN, infinite or negative"),
    "FP8 NaN": ("fp8", _poke(DOWN, float("nan")), rf"{DOWN} holds NaN"),
    "NaN": ("plain", _poke(DOWN, float("nan")), rf"model.safetensors: {DOWN} holds NaN or infinity"),
    "NaN in a norm": ("plain", _poke(NORM, float("nan")), rf"{NORM} holds NaN"),
    "infinity": ("plain", _poke("lm_head.weight", float("-inf")), r"lm_head.weight holds NaN or infinity"),
    "NaN in the gate bias": (
        "plain",
        _poke("model.layers.1.mlp.gate.e_score_correction_bias", float("nan")),
        r"e_score_correction_bias holds NaN",
    ),
    "NaN in a copy": (
        "plain",
        _poke("model.layers.3.shared_head.head.weight", float("nan")),
        r"shared_head\.head\.weight differs from lm_head\.weight.*with_mtp=False",
    ),
    "scales without config": (
        "plain",
        lambda t: t.update({SCALE: torch.ones(2, 2)}),
        r"extra tensor .*scale_inv",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_wrong_tensors(case: str, copy: Callable[[str], Path]) -> None:
    kind, change, message = EDITS[case]
    folder = copy(kind)
    edit(single(folder), change)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_overflow_in_the_target_dtype_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    edit(single(folder), _poke(DOWN, 1e30))
    load(folder, dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match=rf"{DOWN} holds NaN or infinity \(read as torch.float16\)"):
        load(folder, dtype=torch.float16)


@pytest.mark.parametrize("cut", [0, 4, 9, 1000, -1])
def test_truncated(cut: int, copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    (folder / "manifest.json").unlink()
    raw = single(folder).read_bytes()
    single(folder).write_bytes(raw[:cut])
    with pytest.raises(WeightsError, match=r"model\.safetensors is (truncated|not a whole safetensors file)"):
        load(folder)


def test_truncated_shard_is_named_with_both_sizes(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    (folder / "manifest.json").unlink()
    shard = shards(folder)[2]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(
        WeightsError, match=rf"{shard.name} is truncated: {size - 7:,} bytes instead of {size:,}"
    ):
        load(folder)


def _entry(table: dict[str, object], name: str) -> dict[str, object]:
    value = table[name]
    assert isinstance(value, dict)
    return value


HEADERS: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "garbage": (lambda t: b"\x00\xff garbage", "not JSON"),
    "deep": (lambda t: b"[" * 200_000, "not JSON"),
    "list": (lambda t: b"[1, 2]", "JSON list, not an object"),
    "dtype": (lambda t: _entry(t, NORM).update(dtype="F6_E3M2"), f"{NORM} has dtype 'F6_E3M2'"),
    "dtype not text": (lambda t: _entry(t, NORM).update(dtype=[1]), "has dtype"),
    "shape": (lambda t: _entry(t, NORM).update(shape=[12.5]), f"{NORM} has shape"),
    "negative": (lambda t: _entry(t, NORM).update(shape=[-144]), f"{NORM} has shape"),
    "huge": (lambda t: _entry(t, NORM).update(shape=[2**62, 2**62]), "needs .* bytes"),
    "bool": (lambda t: _entry(t, NORM).update(shape=[True]), f"{NORM} has shape"),
    "key": (lambda t: _entry(t, NORM).update(more=1), f"entry of {NORM} is malformed"),
    "no dict": (lambda t: t.update({NORM: 3}), f"entry of {NORM} is malformed"),
    "duplicate": (
        lambda t: b'{"a":1,"b":2,"a":3}',
        "lists 'a' twice",
    ),
    "overlap": (
        lambda t: _entry(t, NORM).update(data_offsets=_entry(t, NORM.replace(".1.", ".2."))["data_offsets"]),
        "overlaps|leaves a gap",
    ),
    "past the end": (lambda t: _entry(t, NORM).update(data_offsets=[10**12, 10**12 + 576]), "gap"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_headers(case: str, copy: Callable[[str], Path]) -> None:
    change, message = HEADERS[case]
    folder = copy("plain")
    rewrite_header(single(folder), change)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_too_many_tensors(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("plain")
    monkeypatch.setattr("hadal.weights.header.MAX_TENSORS", 20)
    with pytest.raises(WeightsError, match=r"lists \d+ tensors; at most 20"):
        load(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes_give_a_weights_error(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw if len(raw) % 2 else raw)
    try:
        assert read_header(file) == {}
    except WeightsError as error:
        assert "x.safetensors" in str(error)


INDEXES: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "escape": (lambda m: m.update({NORM: "../model-00001-of-00002.safetensors"}), "not a plain"),
    "absolute": (lambda m: m.update({NORM: "/etc/passwd"}), "not a plain"),
    "backslash": (lambda m: m.update({NORM: "..\\x.safetensors"}), "not a plain"),
    "pickle": (lambda m: m.update({NORM: "pytorch_model.bin"}), "not a plain"),
    "number": (lambda m: m.update({NORM: 3}), "not a plain"),  # type: ignore[dict-item]
    "missing file": (lambda m: m.update({NORM: "model-00099-of-00099.safetensors"}), "is missing, .*index"),
    "wrong shard": (lambda m: m.update({NORM: m["lm_head.weight"]}), f"{NORM} is in model-.* but .* says"),
    "missing entry": (lambda m: m.pop(NORM), f"{NORM} is in .* says nowhere"),
    "phantom": (lambda m: m.update({"ghost": m[NORM]}), "ghost is missing from model-"),
    "empty": (lambda m: m.clear(), "no weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_wrong_index(case: str, copy: Callable[[str], Path]) -> None:
    change, message = INDEXES[case]
    folder = copy("sharded")
    (folder / "manifest.json").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_missing_extra_and_doubled_shards(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    (folder / "manifest.json").unlink()
    first, second = shards(folder)[:2]
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(WeightsError, match=rf"{first.name} is missing"):
        load(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(WeightsError, match="is in model-00001"):
        load(folder)
    first.write_bytes(kept)
    (folder / "extra.safetensors").write_bytes(kept)
    with pytest.raises(WeightsError, match=r"extra\.safetensors is not named by"):
        load(folder)


def test_manifest_names_file_and_both_hashes(copy: Callable[[str], Path]) -> None:
    """A flipped bit, and a shard swapped for one of the same shapes, are found by SHA-256 alone."""
    import hashlib

    folder = copy("sharded")
    shard = shards(folder)[1]
    raw = bytearray(shard.read_bytes())
    expected = hashlib.sha256(raw).hexdigest()
    raw[-3] ^= 1
    shard.write_bytes(raw)
    load(folder)  # the headers are fine
    with pytest.raises(WeightsError, match="is corrupt") as caught:
        load(folder, verify="full")
    for part in (str(shard), expected, hashlib.sha256(raw).hexdigest()):
        assert part in str(caught.value)


def test_manifest_sizes_and_missing_files_are_checked_always(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(WeightsError, match=rf"{shard.name} has .* bytes, manifest.json says"):
        load(folder)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"listed in manifest\.json but missing"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"version": 2, "files": {}}', '{"version": 1, "files": {"../x": {}}}']
)
def test_malformed_manifest(text: str, copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(WeightsError, match=r"manifest\.json is malformed"):
        load(folder)


def test_full_verification_needs_hashes(copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    (folder / "manifest.json").unlink()
    with pytest.raises(WeightsError, match="no known SHA-256"):
        load(folder, verify="full")
    with pytest.raises(WeightsError, match="verify is 'none'"):
        load(folder, verify="none")  # type: ignore[arg-type]


def test_folders_that_are_none(copy: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        load(tmp_path / "empty")
    folder = copy("plain")
    single(folder).rename(folder / "pytorch_model.bin")
    (folder / "manifest.json").unlink()
    with pytest.raises(WeightsError, match="pickle"):
        load(folder)
    (folder / "pytorch_model.bin").rename(folder / "model-x.safetensors")
    with pytest.raises(WeightsError, match="fetch the index"):
        load(folder)
    (folder / "model-x.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        load(folder)


def test_wrong_config(copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"kv_lora_rnk": 3}))
    with pytest.raises(ConfigError, match=r"config\.json: .*kv_lora_rnk.*kv_lora_rank"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(WeightsError, match="missing tensor"):
        load(folder)
    for text in ("[1]", "{", "x" * 2_000_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"config\.json"):
            load(folder)


def test_saving_refuses_nan_and_keeps_what_was_there(tmp_path: Path) -> None:
    model = random_model(tiny.QWEN2)
    save(model, tmp_path / "m")
    before = single(tmp_path / "m").read_bytes()
    bad = random_model(tiny.QWEN2, seed=1)
    with torch.no_grad():
        bad.state_dict()["norm.weight"][3] = float("nan")
    for fp8 in (False, True):
        with pytest.raises(WeightsError, match=r"model\.norm\.weight holds NaN"):
            save(bad, tmp_path / "m", overwrite=True, fp8=fp8)
    assert single(tmp_path / "m").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "no half-written folder stays"
    with pytest.raises(WeightsError, match="exists already"):
        save(model, tmp_path / "m")
    save(random_model(tiny.QWEN2, seed=2), tmp_path / "m", overwrite=True)
    assert single(tmp_path / "m").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with torch.no_grad():
        bad.state_dict()["norm.weight"][3] = 1e30
    with pytest.raises(WeightsError, match=r"model\.norm\.weight holds NaN or infinity in torch\.float16"):
        save(bad, tmp_path / "half", dtype=torch.float16)


def test_saving_without_space_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hadal.weights.writer as writer

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightsError, match=r"saving needs [\d,]+ bytes and .* has 1,000 free"):
        save(random_model(tiny.QWEN2), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_write_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hadal.weights.writer as writer

    def full(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._HashingFile, "write", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        save(random_model(tiny.QWEN2), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_originals_are_whole(originals: Path) -> None:
    """The faults above come from the edits: untouched, every folder loads, and an edit of nothing changes
    nothing.
    """
    for name in ("plain", "fp8", "sharded"):
        load(originals / name, verify="full")
    assert (
        load_file(originals / "plain/model.safetensors").keys()
        == read_header(originals / "plain/model.safetensors").keys()
    )
