"""The scripts of benchmarks/: the race against llama.cpp, its table, and the watch on neighbours."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from hadal.bench.neighbours import Neighbours

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return ROOT / "benchmarks"


@pytest.fixture
def race(scripts: Path) -> ModuleType:
    import race_llama_cpp

    return race_llama_cpp


def test_rates_by_hand(race: ModuleType) -> None:
    one = race.rates((1, 256, 48), {"prefill_s": 0.5, "decode_s": 2.0})
    assert one == {
        "batch 1, 256/48: decode": 47 / 2,
        "batch 1, 256/48: whole": 48 / 2.5,
        "prefill of 256": 512.0,
    }
    many = race.rates((16, 32, 48), {"prefill_s": 1.0, "decode_s": 4.0})
    assert many == {"batch 16, 32/48: decode": 16 * 47 / 4, "batch 16, 32/48: whole": 16 * 48 / 5}


def test_the_shapes_are_those_of_the_page(race: ModuleType) -> None:
    count = race.shapes()["ds-410m"].parameters()
    assert round(count.main / 1e6) == 410 and round(count.active_with_head / 1e6) == 135
    assert round(race.shapes()["qwen-0.5b"].parameters().main / 1e6) == 494


def test_a_lost_worker_is_told(race: ModuleType, tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexit 3\n")
    silent.chmod(0o755)
    with pytest.raises(SystemExit, match="ended with status 3 in 'about'"):
        race.Theirs(str(silent), 1)


def test_its_table(scripts: Path, tmp_path: Path) -> None:
    import report

    machine = {
        "cpu": "X",
        "threads": 4,
        "cores": 4,
        "torch": "2.13",
        "date": "2026-11-21",
        "llama-cpp-python": "0.3",
    }
    spread = {"median": 100.0, "min": 90.0, "max": 110.0}
    rows = {"prefill of 256": {"hadal": spread, "llama.cpp": {**spread, "median": 50.0}, "ratio": 2.0}}
    one = {"model": "m", "dtype": "int8 against Q8_0", "against": "llama.cpp", "rounds": 5, "rows": rows}
    (tmp_path / "race_llama_cpp_4t.json").write_text(json.dumps({"machine": machine, "races": [one]}))
    text = report.section(tmp_path)
    assert "| tokens a second | hadal | llama.cpp | ratio |" in text
    assert "| prefill of 256 | 100 | 50.0 | **2.00×** |" in text and "llama-cpp-python 0.3" in text
    assert "int8" not in report.summary(tmp_path), "the README's table is the race against transformers"


class Watched:
    """Neighbours that are as busy as a script says."""

    def __init__(self, scripts: Path, cores: list[float]) -> None:
        self.watch = Neighbours([os.getpid()])
        self.watch.cores = lambda: cores.pop(0)  # type: ignore[method-assign]


def test_disturbed_measurements_are_repeated(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda s: None)
    results = iter(["first", "second", "third"])
    watch = Watched(scripts, [2.0, 1.0, 0.1, 0.2]).watch  # measured; waited; quiet; measured
    assert watch.undisturbed(lambda: next(results), 60) == ("second", 0.2)


def test_without_patience_the_first_counts(scripts: Path) -> None:
    watch = Watched(scripts, [3.0]).watch
    assert watch.undisturbed(lambda: "only", 0) == ("only", 3.0)


def test_own_work_is_no_neighbour(scripts: Path) -> None:
    watch = Neighbours([os.getpid()])
    before = sum(os.times()[:2])
    watch.mark()
    total = watch._times()[1]
    while sum(os.times()[:2]) - before < 0.3:
        sum(range(10_000))
    import psutil

    t = psutil.cpu_times()
    everybody = t.user + t.nice + t.system + t.irq + t.softirq + t.steal
    assert watch._times()[1] == pytest.approx(everybody - sum(psutil.Process().cpu_times()[:2]), abs=0.2)
    assert watch._times()[1] >= total - 0.05


def test_scripts_explain_themselves(scripts: Path) -> None:
    import subprocess

    shown = subprocess.run(
        [sys.executable, str(scripts / "race_llama_cpp.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--llama-python" in shown.stdout and "llama-bench" in shown.stdout
