"""Runs on the disk, read back: what `metrics.jsonl` and `recipe.json` of a run's folder say.

Needs no torch, so that a list of runs is there at once. A line that a dying process left half is skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
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
        loads = [load for _, load in self._loads()[-RECENT_LOADS:]]
        return [_shares(map(list, gate)) for gate in zip(*loads, strict=True)]

    def _loads(self) -> list[tuple[int, list[list[int]]]]:
        """(step, tokens of each gate and expert) of every load logged, of the shape of the last one."""
        found = [(r["step"], r["load"]) for r in self.kind("load") if r["load"] and r["load"][0]]
        return [(step, load) for step, load in found if _shape(load) == _shape(found[-1][1])]

    def load_over_time(self, columns: int) -> tuple[list[tuple[int, int]], list[list[list[float]]]]:
        """(stretches, share): `share[gate][column]` is each expert's load against an even one, in at most
        `columns` stretches of the run, (first step, last step) each; ([], []) when dense."""
        loads = self._loads()
        pieces = [loads[a:b] for a, b in pairwise(cuts(len(loads), columns))]
        spans = [(piece[0][0], piece[-1][0]) for piece in pieces]
        gates = range(len(loads[0][1])) if loads else range(0)
        return spans, [[_shares(load[g] for _, load in piece) for piece in pieces] for g in gates]

    def violations(self) -> tuple[list[int], list[list[float]]]:
        """(steps, MaxVio over time of each gate), from the loads logged: each over the steps since the one
        before."""
        loads = self._loads()
        gates = range(len(loads[0][1])) if loads else range(0)
        return [step for step, _ in loads], [
            [max(_shares([load[g]])) - 1 for _, load in loads] for g in gates
        ]

    def table(self, kind: str, name: str, key: str = "") -> dict[str, tuple[list[int], list[float]]]:
        """Curves of the entries of a table in the records of a kind, by entry: ("heldout", "domains", "loss")
        are losses by domain, ("accuracy", "tasks") shares of right answers by task."""
        curves: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.kind(kind):
            for entry, value in (record.get(name) or {}).items():
                number = value.get(key) if key else value
                if isinstance(number, int | float):
                    steps, values = curves.setdefault(entry, ([], []))
                    steps.append(record["step"])
                    values.append(float(number))
        return curves

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
        exam, stop = (self.kind("accuracy") or [{}])[-1], (self.kind("stop") or [{}])[-1]
        rates = sorted(self.curve("tokens_per_second")[1])
        last = max(step, stop, key=lambda record: record.get("tokens", 0))  # not every step is logged
        planned = self.recipe.get("train", {}).get("tokens")
        if planned is not None:
            planned += sum(phase["tokens"] for phase in self.recipe.get("phases", []))
        return {
            "name": self.name,
            "folder": str(self.folder),
            "state": self.state,
            "step": last.get("step", 0),
            "tokens": last.get("tokens", 0),
            "planned_tokens": planned,
            "loss": step.get("loss"),
            "reward": step.get("reward"),  # of `hadal grpo`
            "mtp_loss": step.get("mtp_loss"),
            "heldout_loss": held.get("loss"),
            "bits_per_byte": held.get("bits_per_byte"),
            "domains": held.get("domains") or {},
            "accuracy": exam.get("accuracy", step.get("accuracy")),
            "tasks": exam.get("tasks") or {},
            "max_violation": step.get("max_violation"),
            "learning_rate": step.get("learning_rate"),
            "tokens_per_second": rates[len(rates) // 2] if rates else None,
            "mfu": step.get("mfu"),
            "spikes": len(self.kind("spike")),
            "checkpoint": (self.kind("checkpoint") or [{}])[-1].get("step"),
        }


def cuts(count: int, pieces: int) -> list[int]:
    """Where to cut `count` values into at most `pieces` nearly equal stretches: 0, …, count."""
    pieces = min(count, pieces)
    return [round(i * count / pieces) for i in range(pieces + 1)] if pieces else [0]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values, at each; of fewer at the start. 1: the values themselves."""
    firsts = [max(0, i + 1 - width) for i in range(len(values))]
    return [sum(values[a : i + 1]) / (i + 1 - a) for i, a in enumerate(firsts)]


def _shares(counts: Iterable[Sequence[int]]) -> list[float]:
    """Loads of one gate, summed, against an even share."""
    row = [sum(column) for column in zip(*counts, strict=True)]
    return [count * len(row) / max(1, sum(row)) for count in row]


def _shape(load: Sequence[Sequence[int]]) -> tuple[int, int]:
    return len(load), len(load[0])


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
