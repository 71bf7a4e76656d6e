"""`hadal runs`: training runs listed, told and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import fields, human_count, note, print_json, say, table

if TYPE_CHECKING:
    from hadal.train.runs import Run

WIDTH, HEIGHT = 72, 10
EIGHTHS = " ▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"  # a share of 0, up to 0.75, up to 1.25, up to 2, more


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Runs, or folders of runs; default: ./runs."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw curves and load into a .png or .svg (needs hadal[train])."),
    ] = None,
    json: o.Json = False,
) -> None:
    """List training runs, and plot them.

    Several runs: a line each. One run: its numbers, its curves, and how its experts are loaded.

    Examples:
        hadal runs
        hadal runs runs/hadal-mini
        hadal runs runs/a runs/b --plot compared.png
        hadal runs --json
    """
    from hadal.train.runs import find

    found = [run for folder in folders or [Path("runs")] for run in find(folder)]
    if plot is not None:
        from hadal.train.plots import draw

        note(f"drawn: {draw(found, plot)}")
    if json:
        print_json([run.summary() | {"load": run.load(), "curves": _points(run)} for run in found])
    elif not found:
        note("No runs there. `hadal train RECIPE` makes one in ./runs.")
    elif len(found) == 1:
        _tell(found[0])
    else:
        _list(found)


def _points(run: Run) -> dict[str, dict[str, list[float]]]:
    names = {
        "loss": ("loss", "step"),
        "learning_rate": ("learning_rate", "step"),
        "heldout": ("loss", "heldout"),
    }
    curves = {name: run.curve(*where) for name, where in names.items()}
    return {
        name: {"step": [float(s) for s in steps], "value": values} for name, (steps, values) in curves.items()
    }


def _list(found: Sequence[Run]) -> None:
    rows = []
    for run in found:
        s = run.summary()
        share = f"{s['tokens'] / s['planned_tokens']:.0%}" if s["planned_tokens"] else "-"
        rate = "-" if s["tokens_per_second"] is None else human_count(s["tokens_per_second"])
        numbers = (_number(s["loss"]), _number(s["heldout_loss"]), _number(s["max_violation"], 2))
        rows.append((run.folder, s["state"], s["step"], human_count(s["tokens"]), share, *numbers, rate))
    header = ("RUN", "STATE", "STEP", "TOKENS", "DONE", "LOSS", "HELD-OUT", "MAXVIO", "TOK/S")
    table(header, rows, right=tuple(range(2, len(header))))


def _tell(run: Run) -> None:
    s = run.summary()
    planned = f" of {human_count(s['planned_tokens'])}" if s["planned_tokens"] else ""
    rate = None if s["tokens_per_second"] is None else f"{s['tokens_per_second']:,.0f} tokens/s"
    if rate and s["mfu"] is not None:
        rate += f", MFU {s['mfu']:.1%}"
    fields(
        [
            ("run", run.folder),
            ("state", s["state"]),
            ("step", f"{s['step']:,}, {human_count(s['tokens'])} tokens{planned}"),
            ("loss", _number(s["loss"]) + (f", MTP {_number(s['mtp_loss'])}" if s["mtp_loss"] else "")),
            ("held-out", None if s["heldout_loss"] is None else _number(s["heldout_loss"])),
            ("MaxVio", None if s["max_violation"] is None else _number(s["max_violation"], 2)),
            ("rate", rate),
            ("spikes", s["spikes"] or None),
            ("checkpoint", None if s["checkpoint"] is None else f"step {s['checkpoint']:,}"),
        ]
    )
    for title, key in (("loss", "loss"), ("learning rate", "learning_rate")):
        steps, values = run.curve(key)
        if len(values) > 1:
            say()
            say(f"{title}, steps {steps[0]:,} to {steps[-1]:,}")
            for line in chart(values):
                say(line)
    if load := run.load():
        say()
        say("load by gate and expert (░ below ¾ of an even share, ▒ about even, ▓ up to twice, █ more)")
        for name, row in zip(run.gates(len(load)), load, strict=True):
            say(f"{name:>9} {''.join(map(shade, row))}")


def chart(values: Sequence[float], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """A curve in block characters, its highest and lowest value at the left; means where values are many."""
    columns = min(width, len(values))
    cuts = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    levels = [round((m - low) / ((high - low) or 1) * (8 * height - 1)) + 1 for m in means]
    lines = []
    for row in range(height - 1, -1, -1):
        label = f"{high:.4g}" if row == height - 1 else f"{low:.4g}" if row == 0 else ""
        lines.append(f"{label:>9} " + "".join(EIGHTHS[min(8, max(0, x - 8 * row))] for x in levels).rstrip())
    return lines


def shade(share: float) -> str:
    """One expert's load: `share` is 1 where it is even."""
    return SHADES[(share > 0) + (share >= 0.75) + (share > 1.25) + (share > 2)]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
