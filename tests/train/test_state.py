"""Checkpoints: complete or absent, whatever the moment of death; damage is found and named."""

import os
import shutil

import pytest
import torch

from hadal.train import state


def _tensors(value):
    flat = torch.arange(10.0) + value  # two views of one buffer, as the optimizer gives
    return {"a": flat[:4].view(2, 2), "b": flat[4:], "c": torch.full((3,), value, dtype=torch.bfloat16)}


def _assert_holds(checkpoint, step):
    tensors, meta = state.load(checkpoint)
    assert checkpoint.step == meta["step"] == step
    for name, want in _tensors(step).items():
        assert torch.equal(tensors[name], want)
        assert tensors[name].dtype == want.dtype


def test_save_and_load(tmp_path):
    saved = state.save(tmp_path, 7, _tensors(7), {"tokens": 123, "recipe": {"x": [1]}})
    _assert_holds(state.latest(tmp_path), 7)
    assert state.load(saved)[1]["tokens"] == 123
    assert saved.path.name == "step-00000007"


def test_shards_keep_within_their_limit(tmp_path):
    tensors = {str(i): torch.full((2**17,), float(i)) for i in range(6)}  # half a MiB each
    saved = state.save(tmp_path, 1, tensors, {}, shard_mib=1)
    sizes = [f.stat().st_size for f in saved.path.glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) < 1.01 * 2**20
    loaded, _ = state.load(saved)
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        state.save(tmp_path, step, _tensors(step), {}, keep=2)
    assert [c.step for c in state.checkpoints(tmp_path)] == [10, 11]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_a_complete_step_stands_and_an_incomplete_one_is_replaced(tmp_path):
    first = state.save(tmp_path, 3, {"x": torch.zeros(1)}, {})
    state.save(tmp_path, 3, {"x": torch.ones(1)}, {})
    assert state.load(state.latest(tmp_path))[0]["x"].item() == 0.0
    (first.path / "manifest.json").unlink()
    assert state.latest(tmp_path) is None
    state.save(tmp_path, 3, {"x": torch.ones(1)}, {})
    assert state.load(state.latest(tmp_path))[0]["x"].item() == 1.0


def test_no_folder_means_no_checkpoint(tmp_path):
    assert state.latest(tmp_path / "nothing") is None


class Killed(BaseException):
    pass


CALLS = ["os.open", "os.rename", "os.fsync", "shutil.rmtree", "state.save_file", "state._write_json"]


@pytest.mark.parametrize("victim", CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_death_at_any_stage_leaves_only_complete_checkpoints(victim, when, tmp_path, monkeypatch):
    """Kill the save at the n-th call of each function it uses on the disk, for every n, before and after the
    call."""
    module = {"os": os, "shutil": shutil, "state": state}[victim.split(".")[0]]
    name = victim.split(".")[1]
    real = getattr(module, name)
    for fatal in range(100):
        root = tmp_path / str(fatal)
        state.save(root, 1, _tensors(1), {}, keep=1)
        calls = 0

        def deadly(*args, real=real, fatal=fatal, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fatal + 1 and when == "before":
                raise Killed
            result = real(*args, **kwargs)
            if calls == fatal + 1:
                raise Killed
            return result

        monkeypatch.setattr(module, name, deadly)
        died = False
        try:
            state.save(root, 2, _tensors(2), {}, keep=1)
        except Killed:
            died = True
        monkeypatch.setattr(module, name, real)
        found = state.checkpoints(root)
        assert found, f"{victim} call {fatal + 1}: nothing left to resume from"
        for checkpoint in found:
            _assert_holds(checkpoint, checkpoint.step)
        state.save(root, 3, _tensors(3), {}, keep=1)  # the next save works and clears the remains
        assert [p.name for p in root.iterdir()] == ["step-00000003"]
        if not died:
            assert fatal > 0, f"{victim} is never called"
            return
    pytest.fail("a save makes more calls than this test expects")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["tensors-00001.safetensors", "state.json"])
def test_damage_is_named(damage, name, tmp_path):
    saved = state.save(tmp_path, 5, _tensors(5), {})
    file = saved.path / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        if damage == "flip":
            data[-3] ^= 1
        else:
            del data[-3:]
        file.write_bytes(bytes(data))
    with pytest.raises(state.CheckpointError, match=rf"{name}.*delete .*step-00000005"):
        state.load(state.latest(tmp_path))


def test_another_format_is_refused(tmp_path):
    saved = state.save(tmp_path, 5, _tensors(5), {})
    manifest = saved.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(state.CheckpointError, match="format 99"):
        state.load(saved)


def test_a_state_that_is_not_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        state.save(tmp_path, 5, {}, {"loss": float("nan")})
