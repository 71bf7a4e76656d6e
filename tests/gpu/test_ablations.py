"""Every arm of every family on a GPU: two steps of the base recipe, then the probe with the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_arm_trains_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations

    line = [*ablations.FAMILIES, "--seeds=1", "--device=cuda", "--jobs=5", f"--out={tmp_path}",
            "--set=train.tokens=32768", "--set=log.heldout_tokens=16384",
            "--set=log.every_steps=1"]  # fmt: skip
    status = ablations.main(line)
    found = {f: json.loads((tmp_path / f"ablation_{f}.json").read_text()) for f in ablations.FAMILIES}
    assert [result["faults"] for result in found.values()] == [[], [], [], []]
    assert status == 0
    drafts = found["mtp"]["arms"]["on"]["values"]
    assert all(0 <= drafts[key][0] <= 1 for key in ("draft_t0", "draft_t1", "forced_t0", "forced_t1"))
    assert found["precision"]["arms"]["fp8"]["values"]["curve_max"][0] < 0.02
