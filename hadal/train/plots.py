"""Pictures of runs: loss, learning rate and balance over steps, and the load of every expert. PNG or SVG, by
matplotlib (the extra `train`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hadal.train.runs import Run, RunError

PANELS = (
    ("loss", "loss, nats a token"),
    ("learning_rate", "learning rate"),
    ("max_violation", "MaxVio, mean over gates"),
)


def draw(runs: Sequence[Run], path: Path) -> Path:
    """Curves of all runs in three panels, and a heat map of the load of each run with experts. Raises
    RunError where nothing was logged, or matplotlib is missing."""
    if not any(run.kind("step") for run in runs):
        raise RunError(f"no step has been logged in {', '.join(str(run.folder) for run in runs)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("pictures need matplotlib: pip install 'hadal[train]'") from None
    loads = [(run, load) for run in runs if (load := run.load())]
    rows = len(PANELS) + len(loads)
    figure = Figure(figsize=(9, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for axis, (key, label) in zip(axes, PANELS, strict=False):
        _curves(axis, runs, key, label)
    for axis, (run, load) in zip(axes[len(PANELS) :], loads, strict=True):
        _heat(figure, axis, run, load)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _curves(axis: Any, runs: Sequence[Run], key: str, label: str) -> None:
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        axis.plot(*run.curve(key), color=colour, linewidth=1, label=run.name)
        if key == "loss":
            axis.plot(
                *run.curve("loss", "heldout"),
                "o--",
                color=colour,
                markersize=3,
                label=f"{run.name}, held-out",
            )
            steps, values = run.curve("loss", "spike")
            axis.plot(steps, values, "x", color=colour)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if key == "loss":
        values = [v for run in runs for v in run.curve(key)[1]]
        if min(values) > 0 and max(values) > 30 * min(values):
            axis.set_yscale("log")
        axis.legend(fontsize=8)


def _heat(figure: Any, axis: Any, run: Run, load: list[list[float]]) -> None:
    """Rows are gates, columns experts; 1 is an even share."""
    image = axis.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axis.set_yticks(range(len(load)), run.gates(len(load)), fontsize=7)
    axis.set_xlabel("expert")
    axis.set_title(f"{run.name}: tokens of each expert, 1 is an even share", fontsize=9)
    figure.colorbar(image, ax=axis)
