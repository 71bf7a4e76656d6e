"""The study of context extension stops where its main part has not learnt, and says what was found."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "long-context-smoke.toml"
TINY = ["train.tokens=1024", "train.batch_tokens=512", "log.heldout_tokens=512", "data.workers=1",
        "phases.512.tokens=1024", "phases.512.batch_tokens=1024", "phases.512.micro_batch_tokens=0",
        "phases.2k.tokens=2048", "phases.2k.batch_tokens=2048"]  # fmt: skip


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_context", ROOT / "benchmarks" / "long_context.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(
    study: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    *options: str,
) -> tuple[int, str]:  # fmt: skip
    line = ["--recipe", str(RECIPE), "--out", str(out), "--device", "cpu", "--from", "256", "--to", "512",
            "--depths", "2", "--samples", "1", *options]  # fmt: skip
    for override in TINY:
        line += ["--set", override]
    monkeypatch.setattr(sys, "argv", ["long_context.py", *line])
    return study.main(), capsys.readouterr().out


def test_it_stops_early_and_goes_on_where_it_stopped(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = call(study, tmp_path / "s", monkeypatch, capsys, "--require-exact", "0.5")
    assert status == 4 and "the main part finds 0.0% of held-out needles, --require-exact is 50.0%" in said
    assert not (tmp_path / "s" / "yarn").exists() and not (tmp_path / "s" / "needle.json").exists()
    status, said = call(study, tmp_path / "s", monkeypatch, capsys)
    assert status == 0 and "the same phases to 2K without YaRN" in said
    found = json.loads((tmp_path / "s" / "needle.json").read_text())
    assert list(found["grids"]) == ["base", "base-yarn", "yarn-512", "yarn-2k", "no-yarn-512", "no-yarn"]
    assert [e["step"] for e in found["heldout"]["yarn"]] == [2, 2, 3, 4]  # its own border again
    assert all({"one", "needles"} <= set(event) for event in found["heldout"]["base"])
