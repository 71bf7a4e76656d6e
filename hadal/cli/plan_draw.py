"""Pictures of plans: a batch sweep, a pipeline's schedule. Drawn with matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hadal.cli.terminal import CliError
from hadal.plan.pipeline import NAMES, Timeline

COLOURS = {"F": "#4c78a8", "B": "#59a14f", "b": "#8cd17d", "W": "#f1ce63", "X": "#b07aa1"}
MEANING = {
    "F": "forward",
    "B": "backward",
    "b": "backward, inputs",
    "W": "backward, weights",
    "X": "forward and backward",
}


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise CliError("pictures need matplotlib: pip install 'hadal[train]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_sweep(found: dict[str, Any], path: Path) -> None:
    """Tokens a second, of all and of each sequence, by batch."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    batches = [row["batch"] for row in found["sweep"]]
    axes.plot(batches, [row["tokens_per_s"] for row in found["sweep"]], "o-", label="all")
    axes.plot(batches, [row["per_sequence"] for row in found["sweep"]], "s--", label="each sequence")
    axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="tokens/s (typical)")
    axes.set_xticks(batches, [f"{n:,}" for n in batches])
    axes.set_title(f"{found['model']} on {found['on']}, weights {found['weights']}, {found['layout']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def draw_timeline(line: Timeline, path: Path) -> None:
    """A row a device, each part with its micro-batch."""
    from matplotlib.patches import Patch

    figure = _figure(min(24.0, 2 + line.length / 6), 0.8 + 0.35 * line.devices)
    axes = figure.subplots()
    small = line.length <= 120
    for d in line.done:
        kind = "X" if len(d.parts) == 2 else d.parts[0].op
        axes.broken_barh(
            [(d.start, d.end - d.start)],
            (d.device - 0.45, 0.9),
            facecolors=COLOURS[kind],
            edgecolors="white",
            linewidth=0.5,
        )
        if small:
            text = "·".join(str(p.batch) for p in d.parts)
            axes.text((d.start + d.end) / 2, d.device, text, ha="center", va="center", fontsize=5)
    used = {"X" if len(d.parts) == 2 else d.parts[0].op for d in line.done}
    axes.set(xlim=(0, line.length), ylim=(line.devices - 0.5, -0.5), xlabel="time", ylabel="device")
    axes.set_title(f"{NAMES[line.kind]}: a step takes {line.length:g}, a device waits {line.bubble:g}")
    handles = [Patch(color=COLOURS[k], label=MEANING[k]) for k in COLOURS if k in used]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=5, fontsize=7)
    figure.savefig(path, dpi=150)
