"""Runs on the disk, read back: what `metrics.jsonl` and `recipe.json` of a run's folder say.

Needs no torch, so that a list of runs is there at once. A line that a dying process left half is skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIVE_SECONDS = 180  # a log that was written to so recently belongs to a run that goes on
RECENT_LOADS = 10


class RunError(ValueError):
    """No run where one was asked for; the message says where."""


@dataclass
class Run:
    """One run. `records` by kind, in the log's order."""

    folder: Path
    recipe: dict[str, Any]
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    written: float = 0.0  # when the log last changed, seconds of the epoch

    @property
    def name(self) -> str:
        return self.folder.name

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return self.records.get(kind, [])

    def curve(self, key: str, kind: str = "step") -> tuple[list[int], list[float]]:
        """(steps, values) of a number in the records of a kind."""
        pairs = [(r["step"], float(r[key])) for r in self.kind(kind) if isinstance(r.get(key), int | float)]
        return [s for s, _ in pairs], [v for _, v in pairs]

    @property
    def state(self) -> str:
        """ "finished", "time" or "signal" (both can be resumed), "running", or "broken off"."""
        last = max((r["step"] for rs in self.records.values() for r in rs), default=0)
        stops = self.kind("stop")
        if stops and stops[-1]["step"] >= last:
            return str(stops[-1]["reason"])
        return "running" if time.time() - self.written < LIVE_SECONDS else "broken off"

    def load(self) -> list[list[float]]:
        """Tokens of each gate and expert against an even share, over the last loads logged; [] when dense."""
        recent = [r["load"] for r in self.kind("load")[-RECENT_LOADS:] if r["load"] and r["load"][0]]
        recent = [load for load in recent if len(load) == len(recent[-1])]
        rows = [[sum(column) for column in zip(*gate, strict=True)] for gate in zip(*recent, strict=True)]
        return [[count * len(row) / max(1, sum(row)) for count in row] for row in rows]

    def gates(self, count: int) -> list[str]:
        """Names of the first `count` gates: the layer of each, then MTP modules; numbers without a recipe."""
        model = self.recipe.get("model", {})
        first, layers = int(model.get("first_k_dense_replace", 0)), int(model.get("num_hidden_layers", 0))
        if not layers:
            return [f"gate {g}" for g in range(count)]
        names = (f"layer {g}" if g < layers else f"MTP {g - layers + 1}" for g in range(first, first + count))
        return list(names)

    def summary(self) -> dict[str, Any]:
        """The run in numbers; None for what was not measured."""
        step, held = (self.kind("step") or [{}])[-1], (self.kind("heldout") or [{}])[-1]
        rates = sorted(self.curve("tokens_per_second")[1])
        tokens, planned = step.get("tokens", 0), self.recipe.get("train", {}).get("tokens")
        return {
            "name": self.name,
            "folder": str(self.folder),
            "state": self.state,
            "step": step.get("step", 0),
            "tokens": tokens,
            "planned_tokens": planned,
            "loss": step.get("loss"),
            "mtp_loss": step.get("mtp_loss"),
            "heldout_loss": held.get("loss"),
            "max_violation": step.get("max_violation"),
            "learning_rate": step.get("learning_rate"),
            "tokens_per_second": rates[len(rates) // 2] if rates else None,
            "mfu": step.get("mfu"),
            "spikes": len(self.kind("spike")),
            "checkpoint": (self.kind("checkpoint") or [{}])[-1].get("step"),
        }


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


def read(folder: Path) -> Run:
    """The run in `folder`. Raises RunError where there is none."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise RunError(f"{folder} holds no run (no metrics.jsonl); `hadal runs` lists those in ./runs")
    run = Run(folder, _recipe(folder / "recipe.json"), written=log.stat().st_mtime)
    for record in _records(log):
        run.records.setdefault(str(record["kind"]), []).append(record)
    return run


def find(folder: Path) -> list[Run]:
    """The run in `folder`, or those one level below it, the latest written last."""
    if is_run(folder):
        return [read(folder)]
    if not folder.is_dir():
        raise RunError(f"no folder {folder}; `hadal train RECIPE` makes runs in ./runs")
    runs = [read(path) for path in folder.iterdir() if is_run(path)]
    return sorted(runs, key=lambda run: (run.written, run.name))


def _records(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
            yield record


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recipe if isinstance(recipe, dict) else {}
