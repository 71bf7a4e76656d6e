"""The stages of R1 on a GPU: the small recipe of the CPU's tests, through the same code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hadal.post import rejection
from hadal.post.r1 import plan, r1
from tests.post.test_r1 import right_samples, table, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_stage_runs_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "draw", right_samples)
    path, out = write(tmp_path / "recipe.json", table()), tmp_path / "run"
    outcome = r1(path, out=out, device="cuda", console=Console(quiet=True))
    assert outcome.finished and outcome.ran == tuple(table()["stages"])
    assert {step.does for step in plan(path, out=out)[1]} == {"keep"}
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    assert all(0 <= stages[name]["measured"]["all"]["pass@1"] <= 1 for name in ("base", "rl", "student"))
