"""Saving beside the training: the copy is of its moment, errors come back, one save at a time."""

import threading

import pytest
import torch

from hadal.train import state
from hadal.train.saver import Saver


@pytest.fixture
def saver(tmp_path):
    made = Saver(tmp_path, keep=3)
    yield made
    made.close()


@pytest.fixture
def slow(monkeypatch):
    """Saves that wait to be let go."""
    gate, real = threading.Event(), state.save

    def waiting(*args, **kwargs):
        assert gate.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(state, "save", waiting)
    return gate


def test_what_is_saved_is_what_was_there_at_the_start(saver, slow, tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    assert saver.start(1, tensors, {"x": 1}) is None
    assert saver.poll() is None  # still on its way
    tensors["a"].add_(100)  # the next step
    slow.set()
    assert saver.wait().step == 1
    assert saver.wait() is None  # told once
    loaded, meta = state.load(state.latest(tmp_path))
    assert loaded["a"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert loaded["b"].dtype == torch.bfloat16
    assert meta["x"] == 1


def test_the_next_save_waits_and_tells_of_the_one_before(saver, slow, tmp_path):
    value = torch.zeros(1)
    saver.start(1, {"a": value}, {})
    threading.Timer(0.1, slow.set).start()
    value.fill_(2.0)
    assert saver.start(2, {"a": value}, {}).step == 1
    assert saver.wait().step == 2
    values = [state.load(c)[0]["a"].item() for c in state.checkpoints(tmp_path)]
    assert values == [0.0, 2.0]


def test_an_error_of_the_thread_comes_back(saver, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(state, "save_file", full)
    saver.start(1, {"a": torch.zeros(1)}, {})
    with pytest.raises(OSError, match="no space left"):
        saver.wait()
    monkeypatch.undo()
    saver.start(2, {"a": torch.zeros(1)}, {})
    assert saver.wait().step == 2
