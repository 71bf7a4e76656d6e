"""Whole runs: the smoke recipe falls and loads in the engine; stopping, resuming and refusing."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hadal.train import export as exporting
from hadal.train import state
from hadal.train.main import train
from hadal.train.recipe import RecipeError
from hadal.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "recipes" / "mini-smoke.toml"
SHORT = ["train.tokens=3072", "train.batch_tokens=512", "log.heldout_tokens=512", "log.every_steps=1",
         "log.heldout_every_steps=0"]  # fmt: skip


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    """Puzzle shards that the short runs of this file share."""
    return tmp_path_factory.mktemp("puzzles")


@pytest.fixture
def short(puzzles):
    """`train` on six short steps of the smoke recipe."""

    def run(out, *overrides, **options):
        options.setdefault("console", Console(quiet=True))
        every = [*SHORT, f"data.path={puzzles}", *overrides]
        return train(SMOKE, out=out, overrides=every, device="cpu", **options)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, puzzles):
    """Six steps that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    train(
        SMOKE, out=out, overrides=[*SHORT, f"data.path={puzzles}"], device="cpu", console=Console(quiet=True)
    )
    return out


def _records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _tensors(folder):
    return state.load(state.latest(folder / "checkpoints"))


# --- the whole way ---
def test_the_smoke_recipe_learns_and_its_export_loads_in_the_engine(tmp_path):
    console = Console(record=True, width=200, force_terminal=False)
    outcome = train(SMOKE, out=tmp_path, device="cpu", console=console, overrides=["train.tokens=81920"])
    assert outcome.finished
    assert outcome.step == 40
    steps = _records(tmp_path, "step")
    assert [s["step"] for s in steps] == [10, 20, 30, 40]
    first, last = _records(tmp_path, "heldout")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert steps[-1]["mtp_loss"] < steps[0]["mtp_loss"] - 0.5
    assert last["loss"] < first["loss"] < 5.0  # ln 1024 = 6.9 at the start
    assert last["documents"] >= 20
    assert len(_records(tmp_path, "load")[0]["load"]) == 2  # one layer with experts, and the MTP module
    assert "tok/s" in console.export_text()

    from hadal.engine import Engine, SamplingParams

    engine = Engine.load(outcome.export)
    done = engine.generate("3+4=", SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert len(done.token_ids) == 8
    card = (outcome.export / "README.md").read_text()
    assert "mini-smoke" in card
    assert "81,920 in 40 steps" in card
    config = json.loads((outcome.export / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["num_nextn_predict_layers"] == 1
    assert config["hadal"]["step"] == 40


def test_the_export_is_the_trained_model(short, tmp_path):
    from hadal import weights

    outcome = short(tmp_path / "run", "export.fp8=false")
    tensors, _ = _tensors(tmp_path / "run")
    model = weights.load(outcome.export, dtype=torch.float32, device="cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[f"master.{name}"]), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, tensors[f"buffer.{name}"]), name


def test_transformers_loads_the_export(short, tmp_path):
    transformers = pytest.importorskip("transformers")
    outcome = short(tmp_path / "run", "export.fp8=false")
    model = transformers.AutoModelForCausalLM.from_pretrained(outcome.export, dtype=torch.float32)
    tensors, _ = _tensors(tmp_path / "run")
    assert torch.equal(model.model.norm.weight, tensors["master.norm.weight"])
    token = torch.arange(12)
    from hadal import weights
    from hadal.model.context import Context

    ours = weights.load(outcome.export, dtype=torch.float32, device="cpu")
    want = model(token[None], use_cache=False).logits[0]
    torch.testing.assert_close(ours.logits(ours(token, Context.packed([12]))), want, rtol=0, atol=1e-4)


# --- stopping and going on ---
class Killed(BaseException):
    pass


def _die_at(monkeypatch, step):
    real = Trainer.step

    def deadly(self):
        if self.progress.step == step:
            raise Killed
        return real(self)

    monkeypatch.setattr(Trainer, "step", deadly)
    return lambda: monkeypatch.setattr(Trainer, "step", real)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_resumes_bit_for_bit(short, tmp_path, monkeypatch, dtype):
    """Six steps at once against a kill in the fifth step and a resumption from the third's checkpoint."""
    setting = [f"train.dtype={dtype}", "checkpoint.every_steps=3", "ema.rate=0.9"]
    short(tmp_path / "whole", *setting)
    revive = _die_at(monkeypatch, 4)
    with pytest.raises(Killed):
        short(tmp_path / "killed", *setting)
    revive()
    assert state.latest(tmp_path / "killed" / "checkpoints").step == 3
    outcome = short(tmp_path / "killed", *setting, resume=True)
    assert outcome.finished
    (want, want_meta), (got, meta) = _tensors(tmp_path / "whole"), _tensors(tmp_path / "killed")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert [meta[k] for k in ("step", "tokens", "position")] == [
        want_meta[k] for k in ("step", "tokens", "position")
    ]
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in _records(tmp_path / f, "step")] for f in
              ("whole", "killed")]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


DEATHS = [("state.save_file", 0), ("state._write_json", 0), ("os.fsync", 0), ("os.open", 1),
          ("state._write_json", 1), ("os.fsync", 3), ("os.rename", 0), ("os.fsync", 4), ("os.rename", 1),
          ("shutil.rmtree", 0)]  # fmt: skip
REPLACED = {("os.fsync", 4), ("os.rename", 1), ("shutil.rmtree", 0)}  # the new checkpoint is in its place


@pytest.mark.parametrize(("victim", "call"), DEATHS)
def test_a_run_killed_in_a_save_resumes_bit_for_bit(short, whole, tmp_path, monkeypatch, victim, call):
    """The second save dies before its n-th call of a function of the disk, while steps go on; the run goes on
    from the first, and ends as the run that nothing happened to."""
    module = {"os": os, "shutil": shutil, "state": state}[victim.split(".")[0]]
    name = victim.split(".")[1]
    real, calls, saves, save = getattr(module, name), [], [], state.save

    def deadly(*args, **kwargs):
        if len(saves) == 2 and threading.current_thread().name.startswith("hadal-saver"):
            calls.append(1)
            if len(calls) > call:
                raise Killed
        return real(*args, **kwargs)

    def counted(*args, **kwargs):
        saves.append(1)
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, deadly)
        patch.setattr(state, "save", counted)
        with pytest.raises(Killed):
            short(tmp_path / "run", "checkpoint.every_steps=2", "checkpoint.keep=1")
    at = 4 if (victim, call) in REPLACED else 2
    assert state.latest(tmp_path / "run" / "checkpoints").step == at
    assert short(tmp_path / "run", "checkpoint.every_steps=2", "checkpoint.keep=1", resume=True).finished
    _assert_equal_runs(tmp_path / "run", whole)


def _process(run, puzzles, *more):
    """`hadal.train` on six short steps, in a process of its own: neither threads nor what other tests
    loaded into this one may decide about bits."""
    command = [sys.executable, "-m", "hadal.train", str(SMOKE), "--out", str(run), "--device", "cpu", *more]
    for setting in (*SHORT, f"data.path={puzzles}", "checkpoint.every_steps=1", "checkpoint.keep=9"):
        command += ["--set", setting]
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, **one})


def _killed(root, puzzles):
    """A run that SIGKILL ended between its first checkpoint and its last step. On a busy machine a run may be
    done before we look: then another one is."""
    for attempt in range(5):
        run = root / f"run-{attempt}"
        process = _process(run, puzzles)
        deadline = time.monotonic() + 300
        while not state.checkpoints(run / "checkpoints"):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.communicate(timeout=60)
        if state.checkpoints(run / "checkpoints")[-1].step < 6:
            return run
    pytest.fail("five runs of six steps were done before they were killed")


def test_a_run_killed_by_sigkill_resumes_bit_for_bit(tmp_path, puzzles):
    undisturbed = tmp_path / "undisturbed"
    run = _killed(tmp_path, puzzles)
    for again in (_process(run, puzzles, "--resume"), _process(undisturbed, puzzles)):
        text = again.communicate(timeout=300)[1].decode()
        assert again.returncode == 0, text
    _assert_equal_runs(run, undisturbed)


def test_saving_beside_the_steps_or_between_them_is_the_same(short, whole, tmp_path):
    short(tmp_path / "run", "checkpoint.asynchronous=false", "checkpoint.every_steps=2")
    _assert_equal_runs(tmp_path / "run", whole)
    assert [r["step"] for r in _records(tmp_path / "run", "checkpoint")] == [2, 4, 6]


def test_a_spike_is_logged_with_its_batch(short, tmp_path, monkeypatch):
    real = Trainer.step

    def shaken(self):
        stats = real(self)
        return [replace(s, loss=99.0) if s.step == 5 else s for s in stats]

    monkeypatch.setattr(Trainer, "step", shaken)
    monkeypatch.setattr("hadal.train.spikes.FEWEST", 3)
    short(tmp_path / "run", "log.every_steps=4")
    (spike,) = _records(tmp_path / "run", "spike")
    assert (spike["step"], spike["loss"], spike["rows"]) == (5, 99.0, [4, 5])
    assert 4.0 < spike["usual"] < 8.0


def _assert_equal_runs(one, other):
    (got, meta), (want, want_meta) = _tensors(one), _tensors(other)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    for key in ("step", "tokens", "position", "recent_losses"):
        assert meta[key] == want_meta[key], key
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in _records(f, "step")] for f in (one, other)]
    assert losses[0] == losses[1]


def test_a_growing_batch_resumes_bit_for_bit(short, tmp_path, monkeypatch):
    setting = ["train.batch_tokens=2048", "train.batch_tokens_start=512", "train.batch_ramp=0.8",
               "train.micro_batch_tokens=512", "checkpoint.every_steps=2", "train.tokens=6144",
               f"data.path={tmp_path / 'puzzles'}"]  # fmt: skip
    whole = short(tmp_path / "whole", *setting)
    tokens = [r["tokens"] for r in _records(tmp_path / "whole", "step")]
    sizes = [b - a for a, b in zip([0, *tokens], tokens, strict=False)]
    assert sizes == [512, 512, 512, 512, 1024, 1024, 1536, 2048]
    assert tokens[-1] == whole.tokens >= 6144
    revive = _die_at(monkeypatch, 3)
    with pytest.raises(Killed):
        short(tmp_path / "killed", *setting)
    revive()
    assert short(tmp_path / "killed", *setting, resume=True).step == whole.step
    want, got = _tensors(tmp_path / "whole")[0], _tensors(tmp_path / "killed")[0]
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_the_moving_average_is_exported_beside_the_model(short, tmp_path):
    from hadal import weights

    outcome = short(tmp_path / "run", "export.fp8=false", "ema.rate=0.5")
    tensors, _ = _tensors(tmp_path / "run")
    model = weights.load(tmp_path / "run" / "export-ema", dtype=torch.float32, device="cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.{name}"]), name
    assert not torch.equal(tensors["ema.norm.weight"], tensors["master.norm.weight"])
    assert "moving average, rate 0.5" in (tmp_path / "run" / "export-ema" / "README.md").read_text()
    assert "moving average" not in (outcome.export / "README.md").read_text()
    (held,) = _records(tmp_path / "run", "heldout_ema")
    assert held["loss"] != _records(tmp_path / "run", "heldout")[-1]["loss"]


def test_two_runs_of_one_recipe_are_equal_and_another_seed_is_not(short, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        extra = [f"data.path={tmp_path / 'other'}"] if seed == 2 else []
        short(tmp_path / name, f"run.seed={seed}", *extra)
    a, b, c = (_tensors(tmp_path / name)[0] for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["master.norm.weight"], c["master.norm.weight"])


def test_the_time_limit_saves_exports_and_stops(short, tmp_path):
    console = Console(record=True, width=200, force_terminal=False)
    outcome = short(tmp_path / "run", "train.max_minutes=1e-6", console=console)
    assert (outcome.reason, outcome.finished) == ("time", False)
    assert "--resume" in console.export_text()
    assert (outcome.export / "model.safetensors").is_file()
    assert "Unfinished" in (outcome.export / "README.md").read_text()
    outcome = short(tmp_path / "run", resume=True)
    assert (outcome.reason, outcome.step) == ("finished", 6)
    assert "Unfinished" not in (outcome.export / "README.md").read_text()


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    command = [
        sys.executable,
        "-m",
        "hadal.train",
        str(SMOKE),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    for setting in (*SHORT, "train.tokens=2e5"):
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    (stop,) = _records(tmp_path / "run", "stop")
    assert stop["reason"] == "signal"
    assert stop["predicted_peak_bytes"] > 1e6
    assert state.latest(tmp_path / "run" / "checkpoints").step == stop["step"] < 390
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_ctrl_c_finishes_the_step_and_saves(short, tmp_path, monkeypatch):
    real, before = Trainer.step, signal.getsignal(signal.SIGINT)

    def interrupted(self):
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    outcome = short(tmp_path / "run")
    assert (outcome.reason, outcome.step) == ("signal", 3)
    assert state.latest(tmp_path / "run" / "checkpoints").step == 3
    assert signal.getsignal(signal.SIGINT) is before


# --- refusals ---
def test_a_folder_with_a_run_is_not_overwritten(short, tmp_path):
    short(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"holds a run at step 6.*--resume"):
        short(tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_folder_that_another_process_works_in_is_refused(short, tmp_path):
    code = ("import sys; from pathlib import Path; from hadal.train.opening import held\n"
            "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RecipeError, match=r"another process works in .*run; wait for its end"):
        short(tmp_path / "run")
    other.communicate("")
    assert short(tmp_path / "run", "train.max_minutes=0.0001").step >= 0  # the lock goes with its process


def test_resuming_with_another_recipe_is_refused(short, tmp_path):
    short(tmp_path / "run", "train.max_minutes=1e-6")
    with pytest.raises(RecipeError, match=r"learning_rate\.peak"):
        short(tmp_path / "run", "learning_rate.peak=1.0", resume=True)
    assert short(tmp_path / "run", "log.every_steps=2", resume=True).finished


def test_resuming_without_a_checkpoint_starts_and_says_so(short, tmp_path):
    said = io.StringIO()
    assert short(tmp_path / "run", resume=True, console=Console(file=said, width=200)).finished
    assert "run holds no checkpoint: the run begins anew" in said.getvalue().replace("\n", "")


def test_a_damaged_checkpoint_is_refused(short, tmp_path):
    short(tmp_path / "run", "train.max_minutes=1e-6")
    file = state.latest(tmp_path / "run" / "checkpoints").path / "tensors-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(state.CheckpointError, match="damaged"):
        short(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("model.vocab_size=8", r"vocab_size is 8; the tokenizer has"),
        ("model.max_position_embeddings=64", "train.context needs at least 512"),
        ("model.hiden_size=8", r"unknown key 'hiden_size'.*hidden_size"),
        ("data.tokenizer=/nowhere", "no tokenizer.json"),
        ("train.compile=true", "for a GPU"),
    ],
)
def test_models_that_do_not_fit_are_refused(short, tmp_path, override, match):
    with pytest.raises(RecipeError, match=match):
        short(tmp_path / "run", override)


def test_a_model_is_refused_before_its_data_are_written(short, tmp_path):
    with pytest.raises(RecipeError, match="unknown key 'hiden_size'"):
        short(tmp_path / "run", "model.hiden_size=8", f"data.path={tmp_path / 'puzzles'}")
    assert not (tmp_path / "puzzles").exists()


def test_a_device_that_is_not_there_is_refused(puzzles, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    with pytest.raises(RecipeError, match="no CUDA device"):
        train(SMOKE, out=tmp_path, device="cuda", console=Console(quiet=True))


# --- the model card ---
def test_the_accuracy_table_goes_into_the_card(short, tmp_path):
    card = short(tmp_path / "run").export / "README.md"
    assert "Not measured yet." in card.read_text()
    for table in ("| task | % |\n|---|---|\n| addition | 99 |", "| task | % |\n|---|---|\n| addition | 98 |"):
        exporting.set_accuracy(card, table)
        assert table in card.read_text()
    assert "Not measured yet." not in card.read_text()
    assert "addition | 99" not in card.read_text()
    card.write_text("no marks")
    with pytest.raises(ValueError, match="no accuracy section"):
        exporting.set_accuracy(card, "x")
