"""Reinforcement learning in exact mode beside the same run in ordinary mode: gap, reward, and what it costs.

    python benchmarks/exact_rl.py                             # hadal-mini on this CPU, two to four minutes
    python benchmarks/exact_rl.py --device cuda --dtype bfloat16 --steps 40 --set sample.prompts=32
    python benchmarks/exact_rl.py --plot docs/images/exact-rl.png

Both runs follow one recipe (recipes/grpo-smoke.toml) with one seed, in one process, a step of each in turn,
so that a neighbour's burst of work meets both. The gap is |log p of the trainer − log p of the sampler| over
the tokens of a step, before its update. The first step warms up and is left out of the times.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Timed, clock, machine, save
from rich.console import Console

from hadal.ops import exact_cpu
from hadal.post.grpo import open_run
from hadal.post.policy import GrpoStats

ROOT = Path(__file__).resolve().parent.parent
MODES = {"exact": "true", "ordinary": "false"}
LEAST = 3  # steps, whatever the time


def runs(asked: argparse.Namespace) -> dict[str, list[GrpoStats]]:
    """The steps of both modes."""
    found: dict[str, list[GrpoStats]] = {mode: [] for mode in MODES}
    now = clock(asked.device, asked.cpu_time)
    changes = [
        f"train.steps={asked.steps}",
        f"run.seed={asked.seed}",
        f"train.dtype={asked.dtype}",
        *asked.set,
    ]
    with tempfile.TemporaryDirectory() as folder:
        opened = {
            mode: open_run(
                asked.recipe, False, [*changes, f"train.exact={value}"], Path(folder) / mode, asked.device,
                Console(quiet=True),
            )
            for mode, value in MODES.items()
        }  # fmt: skip
        with opened["exact"] as exactly, opened["ordinary"] as ordinarily:
            for run in (exactly, ordinarily):
                run.policy.sampler.draw = Timed(run.policy.sampler.draw, now)  # type: ignore[method-assign]
            ends = math.inf
            for step in range(asked.steps):
                if step == 1:  # the first compiles
                    ends = now() + (asked.seconds or math.inf)
                if step >= LEAST and now() > ends:
                    break
                for mode, run in (("exact", exactly), ("ordinary", ordinarily)):
                    begin = now()
                    _, stats = run.policy.step()
                    whole, sampling = now() - begin, run.policy.sampler.draw.take()  # type: ignore[attr-defined]
                    found[mode].append(timed(stats, sampling, whole - sampling))
                    print(
                        f"step {stats.step:3} {mode:8} reward {stats.reward:.3f} gap "
                        f"{stats.gap_max or 0.0:.1e} {sampling:.1f} + {whole - sampling:.1f} s",
                        flush=True,
                    )  # fmt: skip
    return found


def timed(stats: GrpoStats, sampling: float, training: float) -> GrpoStats:
    """A step with its times as this script's clock has them."""
    sampled = stats.sample_seconds * stats.sample_tokens_per_second
    return replace(
        stats, sample_seconds=sampling, train_seconds=training, sample_tokens_per_second=sampled / sampling,
        tokens_per_second=stats.fed_tokens / training,
    )  # fmt: skip


def rows(found: dict[str, list[GrpoStats]]) -> list[list[str]]:
    """A mode a line, and what exact mode costs a token."""
    table, costs = [], {}
    for mode, steps in found.items():
        gaps = [s.gap_max for s in steps if s.gap_max is not None]
        means = [s.gap_mean for s in steps if s.gap_mean is not None]
        sampling = 1 / median(s.sample_tokens_per_second for s in steps[1:])
        training = 1 / median([s.tokens_per_second for s in steps[1:] if s.fed_tokens] or [math.nan])
        costs[mode] = sampling, training
        third = max(1, len(steps) // 3)
        first, last = (sum(s.reward for s in part) / third for part in (steps[:third], steps[-third:]))
        table.append(
            [mode, f"{max(gaps):.2g}", f"{sum(means) / len(means):.2g}", f"{first:.3f} → {last:.3f}",
             f"{1 / sampling:,.0f}", f"{1 / training:,.0f}"]
        )  # fmt: skip
    sampled, trained = (costs["exact"][i] / costs["ordinary"][i] for i in (0, 1))
    table.append(
        ["exact ÷ ordinary, seconds a token", "", "", "", f"**{sampled:.2f}×**", f"**{trained:.2f}×**"]
    )
    return table


def plot(found: dict[str, list[GrpoStats]], path: Path) -> None:
    """Gap and reward of both modes over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    gap, reward = figure.subplots(1, 2)
    for mode, steps in found.items():
        told = [(s.step, s.gap_max) for s in steps if s.gap_max is not None]
        gap.plot(*zip(*told, strict=True), "o-", markersize=3, label=mode)
        reward.plot([s.step for s in steps], [s.reward for s in steps], "o-", markersize=3, label=mode)
    gap.set_yscale("symlog", linthresh=1e-8)
    gap.set_ylabel("gap, largest of a step, nats")
    reward.set_ylabel("reward, mean")
    for axis in (gap, reward):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "grpo-smoke.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, help="after the first step no other begins after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread, busy machines")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="where the result goes; default benchmarks/results")
    parser.add_argument("--name", help="of the result; default exact_rl_DEVICE")
    parser.add_argument("--plot", type=Path, help="a picture of gap and reward")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.device == "cpu":
        exact_cpu.set_threads(asked.threads)
    found = runs(asked)
    result: dict[str, Any] = {
        "machine": {**machine(asked.device), "threads": asked.threads},
        "title": f"Reinforcement learning, exact and ordinary: {asked.recipe.stem}, {asked.dtype}",
        "columns": ["mode", "gap, largest", "gap, mean", "reward, first third → last", "tokens/s sampled",
                    "tokens/s trained"],
        "rows": rows(found),
        "notes": f"{len(found['exact'])} steps of each in turn, one seed; rates: medians without the first. "
        f"{'CPU seconds, not the wall clock. ' if asked.cpu_time else ''}{' '.join(asked.set)}".strip(),
        "curves": {
            mode: [{"step": s.step, "reward": s.reward, "gap_max": s.gap_max, "gap_mean": s.gap_mean,
                    "sample_seconds": s.sample_seconds, "train_seconds": s.train_seconds} for s in steps]
            for mode, steps in found.items()
        },
    }  # fmt: skip
    for row in result["rows"]:
        print("  ".join(row))
    save(asked.name or f"exact_rl_{asked.device}", result, asked.folder)
    if asked.plot is not None:
        plot(found, asked.plot)


if __name__ == "__main__":
    main()
