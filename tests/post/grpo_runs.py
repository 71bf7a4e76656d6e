"""What the tests of `hadal grpo` share: a recipe of three short steps, its run, and what it logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hadal.ops import exact_cpu
from hadal.post.grpo import grpo
from hadal.weights import load as load_weights

QUIET = Console(quiet=True)
needs_exact = pytest.mark.skipif(exact_cpu.status()[0] is None, reason=f"exact: {exact_cpu.status()[1]}")


def recipe(path: Path, start: Path, reward: str = "early", **sections: dict[str, Any]) -> Path:
    prompts = path.with_suffix(".jsonl")
    lines = [json.dumps({"prompt": f"Say {i}", "task": "say"}) for i in range(12)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table: dict[str, Any] = {
        "run": {"name": "try", "seed": 3},
        "model": {"start": str(start)},
        "tasks": [{"source": "jsonl", "path": str(prompts)}],
        "reward": [{"kind": "custom", "function": f"tests.post.small_rewards:{reward}"}],
        "objective": {"variant": "dr-grpo"},
        "sample": {"prompts": 4, "group": 4, "max_tokens": 12, "max_prompt_tokens": 40},
        "train": {"steps": 3, "max_pack_tokens": 160},
        "learning_rate": {"peak": 5e-3},
        "checkpoint": {"every_steps": 0, "keep": 9},
    }
    for name, values in sections.items():
        table[name] = table.get(name, {}) | values
    path = path.with_suffix(".json")
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def run(path: Path, out: Path, *overrides: str, **options: Any):
    return grpo(path, out=out, overrides=overrides, device="cpu", console=QUIET, **options)


def records(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_weights(folder).named_parameters())
