"""The JSONL log: what it holds, how it goes on after a crash; the line that people see."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from hadal.train.metrics import JsonLines, Metrics
from hadal.train.schedules import Knobs
from hadal.train.trainer import StepStats


def _stats(step, loss=2.5):
    return StepStats(step, step * 100, Knobs(1e-3, 0.001, 0.3), loss, 3.0, 4.0, 0.7, 0.25, 0.5)


def _records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _metrics(folder, console=None, **kwargs):
    console = console or Console(quiet=True)
    return Metrics(
        folder,
        total_steps=10,
        total_tokens=1000,
        peak_flops=1e12,
        tensorboard=False,
        console=console,
        **kwargs,
    )


def test_a_step_is_logged_with_its_rates(tmp_path):
    metrics = _metrics(tmp_path)
    metrics.worked(5000, 1e9)
    metrics.step(_stats(1), load=[[3, 1]])
    metrics.event("heldout", 1, loss=1.5, exact=0.25)
    metrics.close()
    step, load, heldout = _records(tmp_path)
    assert (step["kind"], step["step"], step["tokens"], step["loss"]) == ("step", 1, 100, 2.5)
    assert step["learning_rate"] == 1e-3
    assert step["tokens_per_second"] > 0
    assert step["mfu"] == pytest.approx(step["tokens_per_second"] / 5000 * 1e9 / 1e12)
    assert load == {"kind": "load", "step": 1, "load": [[3, 1]]}
    assert heldout == {"kind": "heldout", "step": 1, "loss": 1.5, "exact": 0.25}


def test_resuming_drops_what_was_logged_beyond_the_checkpoint(tmp_path):
    first = _metrics(tmp_path)
    for step in (1, 2, 3):
        first.step(_stats(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # killed while writing
    second = _metrics(tmp_path, after_step=2)
    second.step(_stats(3, loss=9.0))
    second.close()
    assert [(r["step"], r["loss"]) for r in _records(tmp_path)] == [(1, 2.5), (2, 2.5), (3, 9.0)]


def test_the_line_tells_what_matters(tmp_path):
    console = Console(record=True, width=300, force_terminal=False)
    metrics = _metrics(tmp_path, console)
    metrics.worked(1000, 1e9)
    metrics.step(_stats(4))
    metrics.close()
    line = console.export_text()
    for part in (
        "step 4/10",
        "loss 2.5000",
        "mtp 3.0000",
        "tok/s",
        "MFU",
        "MaxVio 0.25",
        "grad 0.70",
        "left",
    ):
        assert part in line


def test_the_line_of_a_model_without_an_mtp_module_has_no_loss_of_one(tmp_path):
    console = Console(record=True, width=300, force_terminal=False)
    metrics = _metrics(tmp_path, console)
    metrics.step(replace(_stats(4), mtp_loss=0.0))
    metrics.close()
    assert "mtp" not in console.export_text()


def test_numbers_that_are_not_finite_never_reach_the_file(tmp_path):
    log = JsonLines(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        log.write({"loss": float("nan")})
    log.close()


def test_tensorboard_gets_the_curves(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path, total_steps=9, total_tokens=900, peak_flops=1e12, tensorboard=True,
                      console=Console(quiet=True))  # fmt: skip
    metrics.step(_stats(1))
    metrics.step(_stats(2, loss=2.0))
    metrics.event("heldout", 2, loss=1.5)
    metrics.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5), (2, 2.0)]
    assert events.Scalars("heldout/loss")[0].value == 1.5
