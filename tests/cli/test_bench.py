"""`hadal bench`: its kinds, their JSON, what is meant without a kind, faults in one line, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hadal.bench import ceilings, kernels
from hadal.cli.bench import BENCH
from tests.cli.helpers import ROOT, hadal

Capture = pytest.CaptureFixture[str]
SMALL = ("--prompt", "12", "--output", "4", "--repeats", "1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceilings are measured in tests of their own."""
    found = ceilings.Ceilings(3e9, 4e9, 5e9, {"float32": 1e11, "bfloat16": 5e10, "int8": 4e11})
    monkeypatch.setattr(ceilings, "measure", lambda device: found)
    monkeypatch.setattr(ceilings, "BUDGET_S", 0.0)
    monkeypatch.setattr(kernels, "POOL_BYTES", {"cpu": 1 << 16})


def document(capsys: Capture, *arguments: str) -> dict[str, Any]:
    shown = hadal(capsys, "bench", *arguments, "--json")
    assert shown.status == 0, shown.err
    found: dict[str, Any] = json.loads(shown.out)
    assert found["machine"]["cpu"]["cores"] >= 1 and found["versions"]["torch"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}Z", found["date"])
    if found["ceilings"] is not None:
        assert found["ceilings"]["bandwidth"] == 5e9
        assert found["ceilings"]["matmul"]["int8"] == 4e11
        assert found["neighbours_cores"] >= 0
    return found


@pytest.mark.parametrize("kind", list(BENCH.kinds))
def test_each_kind_teaches(kind: str, capsys: Capture) -> None:
    shown = hadal(capsys, "bench", kind, "--help")
    assert shown.status == 0
    assert f"Usage: hadal bench {kind}" in shown.out
    assert re.search(rf"Examples:\n    hadal bench {kind}", shown.out)
    assert shown.out.index("Examples:") < shown.out.index("Options:")
    listed = hadal(capsys, "bench", "--help").out
    assert re.search(rf"^  {kind} +\S.*[^.]\.$", listed, re.M), "its first sentence fits its line"


def test_latency(tiny_folder: Path, capsys: Capture) -> None:
    found = document(capsys, "latency", str(tiny_folder), *SMALL)
    assert (found["model"], found["dtype"], found["quantize"]) == ("tiny", "float32", None)
    result = found["result"]
    assert result["decode_ceiling"] == pytest.approx(5e9 / result["step_bytes"])
    assert result["decode_share"] == pytest.approx(result["decode_rate"] / result["decode_ceiling"])
    assert 0 < result["ttft_floor_s"] < result["ttft_p50_s"] <= result["ttft_p95_s"]
    start = result["startup"]
    parts = start["import_s"] + start["load_s"] + start["first_token_s"]
    assert start["total_s"] == pytest.approx(parts) and start["load_s"] > 0
    shown = hadal(capsys, "bench", "latency", str(tiny_folder), *SMALL, "--threads", "1")
    assert "time to first token" in shown.out and "start to first token" in shown.out
    assert "memory 5.0 GB/s" in shown.err


@pytest.mark.parametrize(("cores", "told"), [(3.2, "Other processes used 3.2 cores"), (0.1, "")])
def test_a_busy_machine_is_told(
    cores: float, told: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from hadal.bench.neighbours import Neighbours

    monkeypatch.setattr(Neighbours, "cores", lambda self: cores)
    shown = hadal(capsys, "bench", "latency", str(tiny_folder), *SMALL)
    assert (told in shown.err) and ("Other processes" in shown.err) == bool(told)


@pytest.mark.parametrize("words", [("throughput",), ()], ids=["named", "without a kind"])
def test_throughput(words: tuple[str, ...], tiny_folder: Path, capsys: Capture) -> None:
    found = document(capsys, *words, str(tiny_folder), "--batch", "3", "--batch", "1", *SMALL)
    assert [r["batch"] for r in found["results"]] == [1, 3]
    for result in found["results"]:
        for key in ("first_token_s", "prefill_rate", "prefill_ceiling", "output_rate", "decode_rate"):
            assert result[key] > 0, key
        wanted = result["batch"] * 5e9 / result["step_bytes"]
        assert result["decode_ceiling"] == pytest.approx(wanted)
        assert result["experts_measured"] >= 2
    shown = hadal(capsys, "bench", *words, str(tiny_folder), "--batch", "2", *SMALL)
    assert "OF CEILING" in shown.out and "Experts of a layer that a step touches: " in shown.err
    too_long = hadal(capsys, "bench", *words, str(tiny_folder), "--prompt", "5000")
    assert too_long.status == 2
    assert "5064 tokens" in too_long.err


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_random_weights_need_no_weights(
    quantize: str | None, tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    more = ("--quantize", quantize) if quantize else ()
    found = document(capsys, str(tmp_path), "--random", "--batch", "2", *SMALL, *more)
    assert found["model"].endswith("(random weights)")
    assert found["quantize"] == quantize and found["exact"] is False


def test_kernels(tiny_folder: Path, capsys: Capture) -> None:
    found = document(
        capsys, "kernels", str(tiny_folder), "--context", "70", "--kind", "float32", "--kind", "int4"
    )
    assert {row["operation"] for row in found["results"]} == {
        "linear",
        "experts",
        "MLA decode",
        "gate",
        "RMS norm",
    }
    assert {row["kind"] for row in found["results"]} == {"float32", "int4"}
    for row in found["results"]:
        assert row["seconds"] > 0 and row["share"] > 0 and row["bound"] in ("memory", "compute")
    shown = hadal(capsys, "bench", "kernels", str(tiny_folder), "--only", "norm")
    assert shown.out.count("RMS norm") == 4 and "linear" not in shown.out


def test_serve_starts_a_server_of_its_own(tiny_folder: Path, capsys: Capture) -> None:
    load = ("--rate", "20", "--rate", "inf", "--requests", "4", "--prompt", "3-9", "--output", "5")
    load += ("--slo-ttft", "60000", "--slo-token", "60000")
    found = document(capsys, "serve", str(tiny_folder), *load)
    assert found["server"]["own"] is True and found["server"]["model"] == "tiny"
    assert [r["ok"] for r in found["results"]] == [4, 4], [r["faults"] for r in found["results"]]
    for result in found["results"]:
        assert result["output_tokens"] == 20
        assert set(result["ttft"]) == set(result["itl"]) == {"p50", "p90", "p95", "p99"}
        assert result["output_ceiling"] > 0 and result["goodput"] > 0
    with pytest.raises(OSError):
        import urllib.request

        urllib.request.urlopen(found["server"]["url"] + "/health", timeout=2)


def test_serve_with_random_weights_and_a_file(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "12 + 35?", "max_tokens": 3}\n')
    more = ("--random", "--dataset", str(file), "--rate", "inf", "--requests", "2")
    shown = hadal(capsys, "bench", "serve", str(tmp_path), *more)
    assert shown.status == 0, shown.err
    assert "-random (float32 on cpu) at http://127.0.0.1:" in shown.out
    assert "2/2" in shown.out and "Good: first token within 1.0 s" in shown.err


@pytest.mark.parametrize(
    ("arguments", "expected", "status"),
    [
        (["latncy"], "Did you mean 'latency'?", 2),
        (["serve", "--rate", "0"], "--rate 0 is no rate; give requests a second above 0", 2),
        (["serve", "--rate", "-3"], "is no rate", 2),
        (["serve", "--rate", "many"], "is no rate", 2),
        (["serve", "--prompt", "9-3"], "--prompt 9-3 is no length", 2),
        (["serve", "--url", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1 ", 1),
        (["serve", "--url", "ftp://x"], "'ftp://x' is no server's address", 1),
        (["serve", "no-such-model"], "no-such-model", 1),
        (["kernels", "--only", "matmul"], "--only matmul is unknown; use linear", 2),
        (["kernels", "--kind", "int3"], "--kind int3 is unknown; use float32", 2),
        (["kernels", "deepseek-r1-distill-qwen-1.5b", "--only", "experts"], "it has no experts", 2),
        (["throughput", "--batch", "0"], "--batch", 2),
        (["latency", "./nowhere"], "nowhere", 1),
    ],
)
def test_faults_are_one_line(arguments: list[str], expected: str, status: int, capsys: Capture) -> None:
    shown = hadal(capsys, "bench", *arguments)
    faults = [line for line in shown.err.splitlines() if line.startswith("hadal: ")]
    assert shown.status == status, shown.err
    assert len(faults) == 1 and expected in faults[0], shown.err


def test_a_server_that_cannot_load_says_why(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    shown = hadal(capsys, "bench", "serve", str(broken), "--requests", "1")
    assert shown.status == 1
    assert "model.safetensors" in shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err


def test_ctrl_c_ends_it_and_its_server(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "hadal", "bench", "serve", str(tiny_folder)]
    load = ["--rate", "2", "--requests", "1000", "--seconds", "300", "--output", "4", "--prompt", "4"]
    child = subprocess.Popen(
        [*command, *load], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (below := _children(child.pid)):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.2)
        time.sleep(4)
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    # Python ends itself by the signal where Ctrl-C met a dataclass being made; a shell sees 130 in both cases
    assert child.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err
    assert not [pid for pid in below if _alive(pid)], "its server outlived it"


def _children(pid: int) -> list[int]:
    import psutil

    return [
        p.pid for p in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())
    ]


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
