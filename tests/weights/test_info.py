"""`inspect` says what a model truly is, from a preset, a folder, or a configuration on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hadal.config import ConfigError
from hadal.weights import NotFoundError, inspect, save
from tests.weights import tiny
from tests.weights.helpers import random_model
from tests.weights.stub_hub import Repo, StubHub


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    from huggingface_hub import constants

    config = json.dumps(tiny.V3_FP8.to_hf()).encode()
    other = json.dumps({"model_type": "gpt2"}).encode()
    weights = {"model.safetensors": b"x"}
    repos = {
        "org/v3": Repo({"config.json": config} | weights),
        "org/gpt": Repo({"config.json": other} | weights),
    }
    with StubHub(repos) as server:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("hadal.weights.download.default_endpoint", lambda: server.url)
        yield server


def test_a_distill_is_not_r1(stub: StubHub) -> None:
    info = inspect("DeepSeek-R1-Distill-Qwen-1.5B")
    assert info.is_distill and info.base == "Qwen2.5-Math-1.5B" and "not R1" in info.title
    assert (info.parameters_total, info.kv_bytes_per_token) == (1_777_088_000, 28_672)
    assert (info.dtype, info.size_bytes, info.folder) == ("BF16", 3_554_176_000, None)
    assert not stub.log, "a preset needs no network"


def test_r1_itself() -> None:
    info = inspect("deepseek-ai/DeepSeek-R1")
    assert not info.is_distill and info.config.model_type == "deepseek_v3"
    assert info.parameters_total == 671_026_419_200 and info.parameters_active == 36_625_618_432
    assert info.parameters_mtp == 11_610_068_224 and info.kv_bytes_per_token == 70_272
    assert info.dtype == "FP8 blocks" and round(info.size_bytes / 2**30, 1) == 641.3, "as on the hub"


@pytest.mark.parametrize(("fp8", "dtype"), [(False, "FP32"), (True, "FP8 blocks")])
def test_a_folder(fp8: bool, dtype: str, tmp_path: Path) -> None:
    save(random_model(tiny.V3), tmp_path / "m", fp8=fp8)
    info = inspect(tmp_path / "m")
    assert (info.folder, info.dtype, info.preset) == (tmp_path / "m", dtype, None)
    assert info.size_bytes == (tmp_path / "m/model.safetensors").stat().st_size
    assert info.context == 256 and info.parameters_total == tiny.V3.parameters().main


def test_an_unknown_repository_gives_its_config_alone(stub: StubHub) -> None:
    info = inspect("org/v3")
    assert info.config == tiny.V3_FP8 and info.folder is None and info.dtype == "FP8 blocks"
    assert not stub.downloads("model.safetensors")
    with pytest.raises(ConfigError, match="gpt2"):
        inspect("org/gpt")


def test_names_that_are_none() -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'hadal-mini'"):
        inspect("hadal-min")
    with pytest.raises(NotFoundError, match="has no model org/nothing"):
        inspect("org/nothing")
