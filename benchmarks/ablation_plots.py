"""A family's curves, drawn from its result: loss and MaxVio over tokens, a mean over seeds in a band of ± one
deviation.

python benchmarks/ablation_plots.py benchmarks/results/ablation_*.json --out docs/images
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#1f6f8b", "#d9822b", "#3c8d5a", "#8e5ea2", "#8a939b")
LABELS = {"loss": "training loss, nats a token", "max_violation": "MaxVio, mean over gates"}
CLIP = 0.05  # share of the run whose steep beginning the axis of the loss may cut off


def draw(result: dict[str, Any], folder: Path, name: str = "") -> Path:
    """Write FOLDER/NAME.png (ablation-FAMILY by default) and return its path."""
    keys = ["loss", "max_violation"] if result["family"] == "balance" else ["loss"]
    figure, grid = plt.subplots(
        len(keys), 1, figsize=(8, 4 * len(keys)), sharex=True, squeeze=False, layout="constrained"
    )
    for key, axes in zip(keys, grid[:, 0], strict=True):
        for colour, (arm, curves) in zip(COLOURS, result["curves"].items(), strict=False):
            _line(axes, curves, key, arm, colour)
        axes.set_ylabel(LABELS[key])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    _limit(grid[0, 0], result["curves"].values())
    if "max_violation" in keys:
        grid[1, 0].set_ylim(0)
    grid[-1, 0].set_xlabel("million tokens")
    figure.suptitle(f"{result['title']}: mean of {len(result['seeds'])} seeds ± one deviation", fontsize=11)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name or 'ablation-' + result['family']}.png"
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return target


def _line(axes: Any, curves: dict[str, Any], key: str, arm: str, colour: str) -> None:
    x, mean, off = [t / 1e6 for t in curves["tokens"]], curves[key]["mean"], curves[key]["deviation"]
    if x:
        axes.plot(x, mean, color=colour, lw=1.3, label=arm)
        low, high = ([m + s * d for m, d in zip(mean, off, strict=True)] for s in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _limit(axes: Any, curves: Any) -> None:
    """Let the axis begin below the first steps, which would flatten all that follows."""
    later = [c["loss"]["mean"][max(1, round(CLIP * len(c["tokens"]))) :] for c in curves if c["tokens"]]
    values = [v for line in later for v in line]
    if values:
        margin = 0.05 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - margin, max(values) + margin)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    for file in args.results:
        result = json.loads(file.read_text("utf-8"))
        print(f"drawn: {draw(result, args.out, file.stem.replace('_', '-'))}")


if __name__ == "__main__":
    main()
