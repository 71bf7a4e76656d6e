"""`hadal plan`: what it prints, pictures, JSON, this machine, and misuse."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hadal.cli import machine as here
from hadal.cli import plan_common
from hadal.cli.plan_common import amount, number
from hadal.config import preset
from tests.cli.helpers import hadal


def test_v3_on_colab_pro(capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "plan", "deepseek-v3", "--on", "A100-40GB, 52GB RAM")
    assert shown.status == 0
    first = shown.out.splitlines()[0]
    assert first == "deepseek-v3 on A100 40 GB, 52 GB of RAM: does not fit"
    for part in ("routed experts", "no FP8 units", "37B active", "What would fit", "not the same model"):
        assert part in shown.out
    assert "tokens/s" not in shown.out


def test_what_fits_has_three_speeds_and_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "plan", "deepseek-v2-lite", "--on", "h100")
    assert "fits" in shown.out.splitlines()[0]
    assert "Speed: pessimistic / typical / best" in shown.out and "decode is limited by" in shown.out
    assert shown.out.count("█") > 20 and "source: " in shown.out


def test_json_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "plan", "run", "deepseek-v3", "--on", "8xh200", "--batch", "8", "--json")
    found = json.loads(shown.out)
    assert found["fits"] and found["batch"] == 8 and found["memory"][0]["formula"]
    assert sum(part["value"] for part in found["memory"]) == pytest.approx(found["needed"]["value"])


def test_a_config_file_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(preset("deepseek-v2-lite").config.to_hf()), "utf-8")
    shown = hadal(capsys, "plan", str(file), "--on", "a100-80", "--context", "4096", "--json")
    assert json.loads(shown.out)["memory"][0]["value"] == 102400 * 2048 * 2
    file.write_text("{", "utf-8")
    assert "is no JSON" in hadal(capsys, "plan", str(file), "--on", "a100-80").err


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, line = tmp_path / "sweep.png", tmp_path / "line.svg"
    hadal(capsys, "plan", "deepseek-v2-lite", "--on", "h100", "--plot", str(sweep))
    hadal(capsys, "plan", "pipeline", "--stages", "4", "--schedule", "dualpipe", "--plot", str(line))
    assert sweep.read_bytes().startswith(b"\x89PNG") and b"<svg" in line.read_bytes()


def test_cost_training_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    lite = ("--on", "a100-80", "--in", "2e6", "--out", "500k", "--api", "deepseek-chat")
    shown = hadal(capsys, "plan", "cost", "deepseek-v2-lite", *lite)
    assert "cost here" in shown.out and "API (deepseek-chat" in shown.out and "2025-09-29" in shown.out
    shown = hadal(
        capsys, "plan", "training", "deepseek-v3", "--on", "2048xh800", "--tokens", "14.8T",
        "--mfu", "0.3894", "--pp", "16", "--ep", "64", "--schedule", "dualpipe",
    )  # fmt: skip
    for part in (
        "2,673,612 h",
        "$5,347,225",
        "54.39 days",
        "That leaves out",
        "failed",
        "DualPipe",
        "experts: 2",
    ):
        assert part in shown.out, part
    shown = hadal(capsys, "plan", "training", "hadal-mini", "--on", "h100", "--tokens", "2e9")
    for part in ("is possible", "in rows of 2,048, as long as it bears", "proposed: the only one"):
        assert part in shown.out, part
    shown = hadal(capsys, "plan", "cost", "deepseek-v2-lite", "--on", "h20", "--in", "1e6", "--out", "1")
    assert shown.status == 0 and "hours here" in shown.out and "dollars here are not told" in shown.out
    assert "--hourly" in shown.out
    shown = hadal(capsys, "plan", "pipeline", "--stages", "16")
    assert [line.split()[1] for line in shown.out.splitlines()[1:5]] == ["45", "15", "14", "14"]
    drawn = hadal(capsys, "plan", "pipeline", "--stages", "4", "--micro-batches", "8", "--schedule", "1f1b")
    assert "  0 FFFF" in drawn.out and "waits 9" in drawn.out
    assert "a100-40" in hadal(capsys, "plan", "devices").out
    assert "$87,072" in hadal(capsys, "plan", "accuracy").out
    assert len(json.loads(hadal(capsys, "plan", "accuracy", "--json").out)) > 60


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("[]", "not an object"), ("{", "no JSON"), ({"num_hidden_layers": 10**12}, "at most 10,000 layers")],
)
def test_a_config_that_is_none(
    content: str | dict[str, Any], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    whole = (
        content if isinstance(content, str) else json.dumps(preset("deepseek-v3").config.to_hf() | content)
    )
    path.write_text(whole)
    shown = hadal(capsys, "plan", str(path), "--on", "h100")
    assert shown.status == 2 and complaint in shown.err, shown.err


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["plan", "deepseek-v3", "--on", "h1000"], 2, "Did you mean h100"),
        (["plan", "deepseek-v33", "--on", "h100"], 2, "deepseek-v3"),
        (["plan", "trainin", "x"], 2, "Did you mean 'training'?"),
        (["plan", "deepseek-v3", "--on", "h100", "--plot", "x.pdf"], 2, ".png or .svg"),
        (["plan", "deepseek-v3", "--on", "h100", "--plot", "x.png"], 1, "no sweep to draw"),
        (["plan", "pipeline", "--plot", "x.png"], 2, "--schedule"),
        (["plan", "pipeline", "--stages", "5", "--schedule", "dualpipe"], 2, "even number"),
        (["plan", "training", "deepseek-v3", "--on", "h100", "--tokens", "lots"], 2, "no number of tokens"),
        (["plan", "cost", "deepseek-v2-lite", "--on", "h100", "--in", "1e400", "--out", "1"], 2, "no number"),
        (["plan", "training", "deepseek-v3", "--on", "h100", "--tokens", "1", "--sequence", "200000"], 2,
         "bears 1 to 163,840"),
    ],
)  # fmt: skip
def test_misuse(
    arguments: list[str], status: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = hadal(capsys, *arguments)
    assert shown.status == status and complaint in shown.err, shown.err


# --- this machine -------------------------------------------------------------------------------------------
def test_without_on_it_is_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(here, "gpus", list)
    monkeypatch.setattr(plan_common, "_smi", list)
    monkeypatch.setattr(here, "memory", lambda: here.Memory(16 * 10**9, 12 * 10**9))
    monkeypatch.setattr(here, "bandwidth", lambda device: 36e9)
    monkeypatch.setattr(here, "matmul_rate", lambda device, dtype: 0.4e12)
    found: dict[str, Any] = json.loads(hadal(capsys, "plan", "hadal-mini", "--json").out)
    assert found["fits"] and found["usable"]["value"] == pytest.approx(0.9 * 12e9)
    assert "measured here" in found["speeds"][0]["source"]


def test_gpus_of_this_machine_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "memory", lambda: here.Memory(10**12, 9 * 10**11))
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "Tesla T4": "t4",
        "NVIDIA L4": "l4",
        "NVIDIA H200": "h200",
    }
    for name, known in names.items():
        gpu = here.Gpu(name, "sm_90", 80 * 10**9, 70 * 10**9)
        monkeypatch.setattr(here, "gpus", lambda gpu=gpu: [gpu, gpu])
        machine = plan_common.machine_of(None)
        assert (machine.device.name, machine.count, machine.device.memory) == (known, 2, 70e9)


def test_gpus_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "NVIDIA H100 80GB HBM3, 81000\nNVIDIA H100 80GB HBM3, [N/A]\n"

    def asked(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "/usr/bin/nvidia-smi"
        return subprocess.CompletedProcess(command, 0, told, "")

    def refused(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        raise subprocess.CalledProcessError(9, command)

    monkeypatch.setattr(plan_common.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(plan_common.subprocess, "run", asked)
    assert plan_common._smi() == [("NVIDIA H100 80GB HBM3", 81000 * 2**20)]
    monkeypatch.setattr(plan_common.subprocess, "run", refused)
    assert plan_common._smi() == []
    monkeypatch.setattr(plan_common.shutil, "which", lambda name: None)
    assert plan_common._smi() == []


def test_numbers_and_amounts() -> None:
    assert (
        number("14.8T") == 14.8e12
        and number("500k") == 5e5
        and number("2e6") == 2e6
        and number("1,000") == 1000
    )
    assert (
        amount(31.4e9, "B") == "31.40 GB"
        and amount(5.2e6, "B") == "5.20 MB"
        and amount(0.0123, "s") == "12.3 ms"
    )
    assert (
        amount(5.576e6, "$") == "$5,576,000" and amount(0.322, "$") == "$0.322" and amount(45, "F") == "45 F"
    )
