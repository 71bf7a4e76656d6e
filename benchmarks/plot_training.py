"""The curves of a training run, drawn from its metrics.jsonl: loss, held-out loss, balance of the experts.

python benchmarks/plot_training.py docs/results/hadal-mini-training.jsonl docs/images/mini-training.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#1f6f8b", "#d9822b", "#3c8d5a", "#8a939b"


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of kind "step" and of kind "heldout"."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [x for x in lines if x["kind"] == "step"], [x for x in lines if x["kind"] == "heldout"]


def draw(steps: list[dict[str, Any]], held: list[dict[str, Any]], target: Path) -> None:
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 2, 2), layout="constrained"
    )
    x = [s["tokens"] / 1e6 for s in steps]
    x_held = np.interp([h["step"] for h in held], [s["step"] for s in steps], x)  # batches may grow
    top.semilogy(x, [s["loss"] for s in steps], color=BLUE, lw=1.2, label="training, next token")
    top.semilogy(
        x, [s["mtp_loss"] for s in steps], color=GREY, lw=1.0, label="training, token after next (MTP)"
    )
    top.semilogy(
        x_held, [h["loss"] for h in held], "o-", color=ORANGE, ms=4, lw=1.2, label="held-out, next token"
    )
    top.set_ylabel("loss, nats a token")
    middle.plot(x_held, [100 * h["exact"] for h in held], "o-", color=GREEN, ms=4, lw=1.2)
    middle.set_ylabel("held-out documents\nwritten whole, %")
    middle.set_ylim(0, 100)
    bottom.plot(x, [s["max_violation"] for s in steps], color=BLUE, lw=1.2, label="mean over layers")
    bottom.plot(x, [s["max_violation_worst"] for s in steps], color=GREY, lw=1.0, label="worst layer")
    bottom.set_ylabel("MaxVio")
    bottom.set_ylim(0)
    bottom.set_xlabel("million tokens")
    for axes in (top, bottom):
        axes.legend(frameon=False)
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    draw(*read(args.metrics), args.png)
    print(f"written: {args.png}")


if __name__ == "__main__":
    main()
