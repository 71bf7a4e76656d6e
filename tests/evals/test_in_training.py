"""Accuracy in the loop: the engine runs on the trainer's tensors, and leaves everything as it was."""

import gc
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hadal import weights
from hadal.data.puzzles import TASKS
from hadal.evals import puzzles
from hadal.evals.in_training import ExamError, examine
from hadal.model.context import Cache
from hadal.text.tokenizer import Tokenizer
from hadal.train.main import train
from hadal.train.recipe import RecipeError
from hadal.train.sources import ON_BOARD, Sources

SMOKE = Path(__file__).resolve().parents[2] / "recipes" / "mini-smoke.toml"
SHORT = ["train.tokens=2048", "train.batch_tokens=512", "log.heldout_tokens=512", "log.every_steps=1",
         "log.heldout_every_steps=0"]  # fmt: skip


@pytest.fixture(scope="module")
def sources():
    return Sources(None, None, Tokenizer.load(ON_BOARD), ON_BOARD)


@pytest.fixture(scope="module")
def mini():
    return weights.load(ON_BOARD, dtype=torch.float32, device="cpu")


@pytest.fixture
def two_tasks(monkeypatch):
    """Only two of the tasks, so that the tests stay short."""
    monkeypatch.setattr("hadal.evals.in_training.TASKS", ("addition", "digits"))
    real = puzzles.problems
    monkeypatch.setattr(
        "hadal.evals.in_training.problems", lambda each: real(each, 0, ("addition", "digits"))
    )


def test_it_gives_what_the_evaluation_of_the_exported_model_gives(mini, sources, two_tasks):
    from hadal.engine import Engine

    mini.requires_grad_(True)
    found = examine(mini, sources, 6, 256)
    engine = Engine.load("hadal-mini", device="cpu", dtype="float32")
    report = puzzles.evaluate(engine, samples=6, tasks=("addition", "digits"), max_tokens=256)
    assert dict(found.tasks) == {row["task"]: row["accuracy"] for row in report["tasks"]}
    assert found.accuracy == report["accuracy"] > 0.5  # the mini on board adds
    assert found.problems == 12
    assert found.unfinished == sum(row["unfinished"] for row in report["tasks"])


def test_it_sees_the_weights_of_the_moment(mini, sources, two_tasks):
    """The same tensors, changed in place: nothing derived from them is kept."""
    before = examine(mini, sources, 3, 64)
    matrix = (mini.lm_head or mini.embed_tokens).weight
    kept = matrix.detach().clone()
    with torch.no_grad():
        matrix.neg_()
    assert examine(mini, sources, 3, 64).accuracy == 0.0
    with torch.no_grad():
        matrix.copy_(kept)
    again = examine(mini, sources, 3, 64)
    assert (again.accuracy, again.tasks) == (before.accuracy, before.tasks)


def test_it_leaves_everything_as_it_was(mini, sources, two_tasks):
    mini.requires_grad_(True)
    mini.train()
    for parameter in mini.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: t.detach().clone() for name, t in mini.state_dict().items()}
    addresses = [p.data_ptr() for p in mini.parameters()]
    states = torch.get_rng_state(), random.getstate()
    others = {id(o) for o in gc.get_objects() if type(o) is Cache}  # of tests before this one
    examine(mini, sources, 3, 48)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert mini.training
    assert torch.is_grad_enabled()
    assert addresses == [p.data_ptr() for p in mini.parameters()]
    for name, tensor in mini.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for parameter in mini.parameters():
        assert parameter.requires_grad
        assert bool((parameter.grad == 1).all())
        parameter.grad = None
    gc.collect()
    left = [o for o in gc.get_objects() if type(o) is Cache and id(o) not in others]
    assert not left, "the cache is still there"


def test_a_failing_engine_is_told(mini, sources, two_tasks, monkeypatch):
    def broken(self, *args):
        raise ValueError("no room")

    monkeypatch.setattr("hadal.engine.runner.Runner.run", broken)
    with pytest.raises(ExamError, match="no room"):
        examine(mini, sources, 3, 8)


# --- in a run ---
def test_a_run_logs_accuracy_and_trains_the_same_numbers(tmp_path, two_tasks):
    """Every loss, gradient norm, parameter and moment of a run that is examined at each step equals, bit for
    bit, that of a run that is not."""
    from hadal.train import state

    quiet = Console(quiet=True)
    shared = [*SHORT, f"data.path={tmp_path / 'data'}"]
    exam = ["log.accuracy_every_steps=2", "log.accuracy_problems=1", "log.accuracy_max_tokens=8"]
    train(SMOKE, out=tmp_path / "plain", overrides=shared, device="cpu", console=quiet)
    train(
        SMOKE, out=tmp_path / "exam", overrides=[*shared, *exam], device="cpu", console=quiet, examine=examine
    )
    records = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "exam")
    }
    found = [r for r in records["exam"] if r["kind"] == "accuracy"]
    assert [r["step"] for r in found] == [2, 4]
    assert set(found[0]["tasks"]) == {"addition", "digits"}
    assert found[0]["problems"] == found[0]["unfinished"] == 2  # eight tokens are no answer
    numbers = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in records[name] if r["kind"] == "step"]
        for name in records
    ]
    assert numbers[0] == numbers[1]
    want, got = (state.load(state.latest(tmp_path / n / "checkpoints"))[0] for n in ("plain", "exam"))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_recipe_that_asks_for_accuracy_needs_someone_to_measure_it(tmp_path):
    with pytest.raises(RecipeError, match="in_training"):
        train(SMOKE, out=tmp_path, overrides=["log.accuracy_every_steps=1"], console=Console(quiet=True))


def test_the_program_needs_no_server_libraries():
    """`python -m hadal.train` where only torch, numpy, safetensors, tokenizers and rich are installed."""
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'pydantic', 'typer', 'huggingface_hub', 'llguidance',\n"
        "             'prometheus_client', 'matplotlib', 'datatrove', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import hadal.train.__main__, hadal.engine, torch\n"
        "from hadal.evals.in_training import examine\n"
        "from hadal.engine.engine import Engine\n"
        "from hadal import weights\n"
        "from hadal.train.sources import ON_BOARD, Sources\n"
        "from hadal.text.tokenizer import Tokenizer\n"
        "model = weights.load(ON_BOARD, dtype=torch.float32, device='cpu')\n"
        "print(examine(model, Sources(None, None, Tokenizer.load(ON_BOARD), ON_BOARD), 1, 2).problems)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(TASKS)
