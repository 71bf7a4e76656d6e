"""What of a run of `hadal r1 recipes/r1/mini.toml` goes on board, and what tells of it: for adopt_mini.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAGES = {"r1": "hadal-mini", "dense-distilled": "hadal-mini-dense"}  # stage: the name on board


def is_r1(run: Path) -> bool:
    """Whether a folder is a run of `hadal r1`, and not one of `hadal train`."""
    return (run / "manifest.json").is_file()


def stages_of(run: Path) -> dict[str, dict[str, Any]]:
    """The stages of a run, as its manifest has them."""
    found: dict[str, dict[str, Any]] = json.loads((run / "manifest.json").read_text("utf-8"))["stages"]
    return found


def finished(stages: Mapping[str, Any], stage: str) -> bool:
    return bool(stages.get(stage, {}).get("finished"))


def exports(run: Path) -> dict[str, Path]:
    """The models of a run that are for the package, by the stage that made each."""
    stages = stages_of(run)
    there = {name: run / name / "export" for name in STAGES if finished(stages, name)}
    if "r1" not in there:
        raise SystemExit(f"{run}: stage r1 is not finished; the same `hadal r1` goes on there")
    return there
