"""`hadal runs` on logs written by hand: states, numbers, charts, pictures, faults."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from hadal.cli.outcome import command, tell
from hadal.cli.runs import chart, shade
from hadal.train.main import Outcome
from tests.cli.helpers import hadal

Capture = pytest.CaptureFixture[str]


def write_run(
    folder: Path,
    steps: int = 8,
    reason: str | None = "finished",
    age: float = 1000.0,
    domains: bool = False,
) -> Path:
    folder.mkdir(parents=True)
    model = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    (folder / "recipe.json").write_text(json.dumps({"train": {"tokens": 1600}, "model": model}))
    records = []
    for step in range(1, steps + 1):
        values = {"loss": 8.0 / step, "mtp_loss": 9.0, "learning_rate": 1e-3 * step, "max_violation": 0.25,
                  "tokens_per_second": 1234.0, "mfu": 0.3}  # fmt: skip
        records.append({"kind": "step", "step": step, "tokens": 200 * step, **values})
        records.append({"kind": "load", "step": step, "load": [[5, 5, 5, 5], [0, 0, 8, 12], [2, 6, 6, 6]]})
    for step in range(2, steps + 1, 2) if domains else ():
        scores = {
            name: {"loss": 3.0 / step, "bits_per_byte": 2.0 / step, "exact": 0.5}
            for name in ("books", "code")
        }
        records.append(
            {"kind": "heldout", "step": step, "loss": 3.0 / step, "bits_per_byte": 2.0, "domains": scores}
        )
        tasks = {"addition": 1.0, "digits": step / 100}
        records.append({"kind": "accuracy", "step": step, "accuracy": 0.5, "tasks": tasks})
    records += [
        {"kind": "heldout", "step": steps, "loss": 1.5}
        | ({"domains": scores, "bits_per_byte": 2.0} if domains else {}),
        {"kind": "checkpoint", "step": steps, "path": "x"},
    ]
    if reason:
        records.append({"kind": "stop", "step": steps, "reason": reason})
    log = folder / "metrics.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "st')  # killed while writing
    os.utime(log, (time.time() - age, time.time() - age))
    return folder


def test_several_runs_are_a_line_each(tmp_path: Path, capsys: Capture) -> None:
    write_run(tmp_path / "old", reason="time", age=3000)
    write_run(tmp_path / "done")
    write_run(tmp_path / "dead", steps=4, reason=None, age=500)
    write_run(tmp_path / "alive", steps=2, reason=None, age=0)
    (tmp_path / "something-else").mkdir()
    shown = hadal(capsys, "runs", str(tmp_path))
    assert shown.status == 0
    lines = shown.out.splitlines()
    assert [Path(line.split()[0]).name for line in lines[1:]] == ["old", "done", "dead", "alive"]
    for line, words in zip(lines[1:], ("time", "finished", "broken off", "running"), strict=True):
        assert words in line
    assert "1.0000" in lines[2] and "1.5000" in lines[2] and "100%" in lines[2]
    assert "50%" in lines[3]


def test_one_run_is_told_with_its_curves_and_load(tmp_path: Path, capsys: Capture) -> None:
    shown = hadal(capsys, "runs", str(write_run(tmp_path / "one")))
    for part in ("1,234 tokens/s, MFU 30.0%", "step 8", "loss, steps 1 to 8", "learning rate, steps", "1.6K"):
        assert part in shown.out
    rows = {
        line[:9].strip(): line[10:]
        for line in shown.out[: shown.out.index("MaxVio by layer")].splitlines()
        if line[:9].strip()[:5] in ("layer", "MTP 1")
    }
    assert rows == {"layer 1": "▒▒▒▒", "layer 2": "  ▓█", "MTP 1": "░▒▒▒"}


def test_json_has_numbers_curves_and_load(tmp_path: Path, capsys: Capture) -> None:
    write_run(tmp_path / "one")
    (tmp_path / "one" / "recipe.json").unlink()
    (run,) = json.loads(hadal(capsys, "runs", str(tmp_path), "--json").out)
    assert run["planned_tokens"] is None
    assert "gate 2 ░▒▒▒" in hadal(capsys, "runs", str(tmp_path)).out
    assert (run["name"], run["state"], run["step"], run["tokens"]) == ("one", "finished", 8, 1600)
    assert (run["loss"], run["heldout_loss"], run["checkpoint"], run["spikes"]) == (1.0, 1.5, 8, 0)
    assert run["curves"]["loss"]["value"][:2] == [8.0, 4.0]
    assert run["load"][1] == [0.0, 0.0, 1.6, 2.4]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_runs_are_drawn(tmp_path: Path, capsys: Capture, ending: str) -> None:
    pytest.importorskip("matplotlib")
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=5)
    picture = tmp_path / "new" / f"both.{ending}"
    assert hadal(capsys, "runs", str(one), str(two), "--plot", str(picture)).status == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(data) > 10_000


def test_a_dense_run_and_an_empty_one(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    shown = hadal(capsys, "runs", str(tmp_path / "new"))
    assert shown.status == 0 and "running" in shown.out and "load" not in shown.out
    shown = hadal(capsys, "runs", str(tmp_path / "new"), "--plot", str(tmp_path / "x.png"))
    assert shown.status == 1 and "no step has been logged" in shown.err


def test_domains_and_tasks_are_told(tmp_path: Path, capsys: Capture) -> None:
    shown = hadal(capsys, "runs", str(write_run(tmp_path / "one", domains=True)))
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["held-out", "1.5000,", "2.0000", "bits", "a", "byte"] in lines
    assert ["books", "0.3750", "0.2500", "50.0%", "-"] in lines
    assert ["digits", "-", "-", "-", "8.0%"] in lines
    assert "50.0%" in next(line for line in shown.out.splitlines() if line.startswith("accuracy"))


def test_load_over_time_of_a_layer(tmp_path: Path, capsys: Capture) -> None:
    folder = write_run(tmp_path / "one")
    with (folder / "metrics.jsonl").open("a") as log:  # a collapse: everything to the first expert of layer 1
        log.write("\n" + json.dumps({"kind": "load", "step": 9, "load": [[9, 0, 0, 0]] * 3}) + "\n")
    shown = hadal(capsys, "runs", str(folder), "--layer", "1", "--layer", "MTP 1")
    text = shown.out[shown.out.index("layer 1: load of each expert") :].splitlines()
    assert text[0].endswith("steps 1 to 9")
    assert [line[10:] for line in text[1:5]] == ["▒" * 8 + "█"] + ["▒" * 8 + " "] * 3
    assert text[6].startswith("MTP 1: load")
    assert text[7][10:] == "░" * 8 + "█"
    violations = [line for line in shown.out.splitlines() if line.startswith("  layer 1")][1].split()
    assert (violations[2], violations[-1]) == ("0.00", "3.00")  # E/K − 1 where one of four takes all
    every = hadal(capsys, "runs", str(folder), "--layer", "all").out
    assert every.count("load of each expert over time") == 3
    wrong = hadal(capsys, "runs", str(folder), "--layer", "0")
    assert wrong.status != 0 and "layer 1, layer 2, MTP 1" in wrong.err.replace("\n", " ")


def test_runs_are_compared_side_by_side(tmp_path: Path, capsys: Capture) -> None:
    one, two = write_run(tmp_path / "one", domains=True), write_run(tmp_path / "two", steps=4, domains=True)
    lines = hadal(capsys, "runs", str(one), str(two), "--compare").out.splitlines()
    found = {name: values for name, *values in (re.split(r" {2,}", line.strip()) for line in lines)}
    assert found["step"] == ["8", "4"]
    assert found["loss"] == ["1.0000", "2.0000"]
    assert found["code, bits/byte"] == ["0.2500", "0.5000"]
    assert found["addition"] == ["100.0%", "100.0%"]


def test_domains_accuracy_and_load_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hadal.train import plots
    from hadal.train.runs import read

    rich, plain = read(write_run(tmp_path / "rich", domains=True)), read(write_run(tmp_path / "plain"))
    assert len(plots._panels([rich])) == len(plots._panels([plain])) + 3
    for width, runs in ((1, [rich]), (3, [rich, plain])):
        assert plots.draw(runs, tmp_path / "x.png", width).stat().st_size > 30_000


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    from hadal.train.runs import cuts, smooth

    assert smooth([4.0, 2.0, 6.0, 0.0], 2) == [4.0, 3.0, 4.0, 3.0]
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]
    assert smooth([], 3) == []
    assert (cuts(7, 3), cuts(2, 5), cuts(0, 5)) == ([0, 2, 5, 7], [0, 1, 2], [0])


def test_nothing_there_is_told(tmp_path: Path, capsys: Capture) -> None:
    assert "No runs there" in hadal(capsys, "runs", str(tmp_path)).err
    shown = hadal(capsys, "runs", str(tmp_path / "nowhere"))
    assert shown.status == 1 and "nowhere" in shown.err and len(shown.err.splitlines()) == 1


def test_a_chart_spans_its_values_and_averages_many() -> None:
    rising = chart([float(i) for i in range(1000)], width=10, height=2)
    assert [len(line) for line in rising] == [20, 20]
    assert rising[0].split()[0] == "949.5" and rising[1].split()[0] == "49.5"
    assert rising[1][10] == "▁" and rising[0][-1] == "█"
    assert chart([3.0, 3.0], height=1) == ["        3 ▁▁"]


def test_shades_mean_what_the_legend_says() -> None:
    assert [shade(x) for x in (0, 0.5, 0.75, 1.25, 1.3, 2, 2.1)] == [" ", "░", "▒", "▒", "▓", "▓", "█"]


def test_a_run_that_ends_between_two_logged_steps_is_told_to_its_end(tmp_path: Path, capsys: Capture):
    """With log.every_steps = 4 a run of 30 steps logs step 28 last; what it has done is 30 steps."""
    folder = write_run(tmp_path / "runs" / "between", steps=6, reason=None)  # its last line is half there
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write("\n" + json.dumps({"kind": "stop", "step": 8, "tokens": 1600, "reason": "finished"}) + "\n")
    (told,) = json.loads(hadal(capsys, "runs", str(folder), "--json").out)
    assert (told["state"], told["step"], told["tokens"]) == ("finished", 8, 1600)
    assert told["loss"] == 8.0 / 6


@pytest.mark.parametrize("name", ["both.xyz", "both", "."])
def test_pictures_that_cannot_be_drawn_are_refused(tmp_path: Path, capsys: Capture, name: str):
    """Without an ending, matplotlib would draw into another file than the one that is named."""
    folder = write_run(tmp_path / "a")
    refused = hadal(capsys, "runs", str(folder), "--plot", str(tmp_path / name))
    assert refused.status == 2 and ".png or .svg" in refused.err
    assert list(tmp_path.iterdir()) == [folder]


def test_the_line_that_takes_up_a_run_names_its_folder_and_values():
    line = command("train", Path("a b.toml"), ["train.tokens=5"], Path("/tmp/try"), "--resume")
    assert line == "hadal train 'a b.toml' --set train.tokens=5 --out /tmp/try --resume"
    assert command("sft", Path("a.toml"), None, None, "--resume") == "hadal sft a.toml --resume"


def test_a_run_that_was_stopped_says_how_to_go_on(capsys: Capture):
    ended = Outcome("time", 3, 1500, Path("runs/a"), Path("runs/a/export"), 2.5)
    tell(ended, False, "hadal grpo a.toml --resume", tokens="tokens sampled")
    said = "time at step 3, 1.5K tokens sampled: runs/a/export\n`hadal grpo a.toml --resume` goes on.\n"
    assert capsys.readouterr().out == said
    tell(ended, True, "")
    assert json.loads(capsys.readouterr().out) == {
        "finished": False, "reason": "time", "step": 3, "tokens": 1500, "loss": 2.5, "folder": "runs/a",
        "export": "runs/a/export"}  # fmt: skip


def write_grpo_run(folder: Path) -> Path:
    folder.mkdir()
    records = [
        {"kind": "step", "step": step, "tokens": 100 * step, "loss": -0.1, "reward": step / 4,
         "accuracy": 0.5, "length": 10.0 * step, "length_max": 20 * step, "kl": None,
         "entropy": 2.0 / step, "gap_max": 0.0, "sample_tokens_per_second": 50.0,
         "tokens_per_second": 70.0, "mfu": 0.2}
        for step in range(1, 4)
    ]  # fmt: skip
    records.append({"kind": "stop", "step": 3, "reason": "finished"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_a_run_of_reinforcement_learning(tmp_path: Path, capsys: Capture) -> None:
    """Its own numbers, each over time; a column of rewards where a run has them; no panel without a curve."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from hadal.train import plots
    from hadal.train.runs import read

    run = write_grpo_run(tmp_path / "rl")
    out = hadal(capsys, "runs", str(run)).out
    assert re.search(r"reward +0\.750", out) and re.search(r"accuracy +50\.0%", out)
    assert re.search(r"entropy +2 █▃▁ 0\.6667", out) and re.search(r"gap_max +0 ▁▁▁ 0", out)
    assert "clipped" not in out and "kl " not in out
    panels = plots._panels([read(run)])
    axes = [Figure().add_subplot() for _ in panels]
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, [read(run)], 1)
    assert len(axes) == 9 and all(axis.lines for axis in axes)
    assert axes[0].get_ylabel() == "loss of the objective"
    write_run(tmp_path / "usual")
    header, *rows = hadal(capsys, "runs", str(tmp_path)).out.splitlines()
    assert "REWARD" in header and len(rows) == 2
    assert "REWARD" not in hadal(capsys, "runs", str(tmp_path / "usual"), str(tmp_path / "usual")).out
    assert json.loads(hadal(capsys, "runs", str(run), "--json").out)[0]["curves"]["reward"]["value"] == [
        0.25,
        0.5,
        0.75,
    ]
