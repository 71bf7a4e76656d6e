"""`hadal runs`: training runs listed, told and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import fields, human_count, note, print_json, say, table

if TYPE_CHECKING:
    from hadal.train.runs import Run

WIDTH, HEIGHT = 72, 10
EIGHTHS = " ▁▂▃▄▅▆▇█"
REINFORCED = (
    "reward accuracy length length_max truncated entropy kl clipped ratio_max zero_variance gap_max gap_mean "
    "mtp_loss grad_norm sample_tokens_per_second tokens_per_second mfu"
).split()  # of `hadal grpo`
SHADES = " ░▒▓█"  # a share of 0, up to 0.75, up to 1.25, up to 2, more


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Runs, or folders of runs; default: ./runs."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=o.picture,
            metavar="FILE",
            help="Draw curves and load into a .png or .svg (needs hadal[train]).",
        ),
    ] = None,
    smooth: Annotated[
        int, typer.Option(min=1, metavar="N", help="Curves as means of the last N steps logged.")
    ] = 1,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of one run: load over time by expert, of a layer; or all."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Runs side by side, a column each.")] = False,
    json: o.Json = False,
) -> None:
    """List training runs, and plot them.

    Several runs: a line each. One run: its numbers, its curves, and how its experts are loaded.

    Examples:
        hadal runs
        hadal runs runs/hadal-mini
        hadal runs runs/hadal-mini --layer 3 --layer "MTP 1"
        hadal runs runs/a runs/b --compare
        hadal runs runs/a runs/b --smooth 10 --plot compared.png
        hadal runs --json
    """
    from hadal.train.runs import find

    found = [run for folder in folders or [Path("runs")] for run in find(folder)]
    if plot is not None:
        from hadal.train.plots import draw

        note(f"drawn: {draw(found, plot, smooth)}")
    if json:
        print_json([run.summary() | {"load": run.load(), "curves": _points(run)} for run in found])
    elif not found:
        note("No runs there. `hadal train RECIPE` makes one in ./runs.")
    elif compare:
        _compare(found)
    elif len(found) == 1:
        _tell(found[0], smooth)
        _loads(found[0], layer or [])
    else:
        _list(found)


def _points(run: Run) -> dict[str, dict[str, list[float]]]:
    names = {
        "loss": ("loss", "step"),
        "learning_rate": ("learning_rate", "step"),
        "heldout": ("loss", "heldout"),
        "bits_per_byte": ("bits_per_byte", "heldout"),
        "accuracy": ("accuracy", "accuracy"),
    }
    if run.curve("reward")[0]:
        names |= {key: (key, "step") for key in REINFORCED}
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
        held = (_number(s["heldout_loss"]), _number(s["bits_per_byte"], 3), _share(s["accuracy"]))
        numbers = (_number(s["loss"]), _number(s["reward"], 3), *held, _number(s["max_violation"], 2))
        rows.append((run.folder, s["state"], s["step"], human_count(s["tokens"]), share, *numbers, rate))
    header = (
        "RUN",
        "STATE",
        "STEP",
        "TOKENS",
        "DONE",
        "LOSS",
        "REWARD",
        "HELD-OUT",
        "BITS/BYTE",
        "ACCURACY",
        "MAXVIO",
        "TOK/S",
    )
    shown = [n for n in range(len(header)) if header[n] != "REWARD" or any(row[n] != "-" for row in rows)]
    cut = [tuple(row[n] for n in shown) for row in rows]
    table([header[n] for n in shown], cut, right=tuple(range(2, len(shown))))


def _compare(found: Sequence[Run]) -> None:
    """Numbers down, runs across."""
    summaries = [run.summary() for run in found]
    plain: list[tuple[str, str, int]] = [
        ("loss", "loss", 4),
        ("reward", "reward", 3),
        ("held-out loss", "heldout_loss", 4),
        ("held-out, bits/byte", "bits_per_byte", 4),
        ("MaxVio", "max_violation", 2),
    ]
    rows: list[tuple[str, ...]] = [("step", *(f"{s['step']:,}" for s in summaries))]
    rows += [(label, *(_number(s[key], digits) for s in summaries)) for label, key, digits in plain]
    for name in _entries(summaries, "domains"):
        values = [s["domains"].get(name, {}) for s in summaries]
        rows.append((f"  {name}, nats/token", *(_number(v.get("loss")) for v in values)))
        rows.append((f"  {name}, bits/byte", *(_number(v.get("bits_per_byte")) for v in values)))
    rows.append(("accuracy", *(_share(s["accuracy"]) for s in summaries)))
    for name in _entries(summaries, "tasks"):
        rows.append((f"  {name}", *(_share(s["tasks"].get(name)) for s in summaries)))
    rows.append(("tokens/s", *(_number(s["tokens_per_second"], 0) for s in summaries)))
    rows.append(("MFU", *(_share(s["mfu"]) for s in summaries)))
    shown = [row for row in rows if set(row[1:]) != {"-"}]
    table(("", *(s["name"] for s in summaries)), shown, right=tuple(range(1, 1 + len(found))))


def _entries(summaries: Sequence[dict[str, Any]], key: str) -> list[str]:
    return sorted({name for s in summaries for name in s[key]})


def _tell(run: Run, width: int) -> None:
    from hadal.train.runs import smooth

    s = run.summary()
    planned = f" of {human_count(s['planned_tokens'])}" if s["planned_tokens"] else ""
    rate = None if s["tokens_per_second"] is None else f"{s['tokens_per_second']:,.0f} tokens/s"
    if rate and s["mfu"] is not None:
        rate += f", MFU {s['mfu']:.1%}"
    bits = "" if s["bits_per_byte"] is None else f", {s['bits_per_byte']:.4f} bits a byte"
    fields(
        [
            ("run", run.folder),
            ("state", s["state"]),
            ("step", f"{s['step']:,}, {human_count(s['tokens'])} tokens{planned}"),
            ("loss", _number(s["loss"]) + (f", MTP {_number(s['mtp_loss'])}" if s["mtp_loss"] else "")),
            ("reward", None if s["reward"] is None else _number(s["reward"], 3)),
            ("held-out", None if s["heldout_loss"] is None else _number(s["heldout_loss"]) + bits),
            ("accuracy", None if s["accuracy"] is None else _share(s["accuracy"])),
            ("MaxVio", None if s["max_violation"] is None else _number(s["max_violation"], 2)),
            ("rate", rate),
            ("spikes", s["spikes"] or None),
            ("checkpoint", None if s["checkpoint"] is None else f"step {s['checkpoint']:,}"),
        ]
    )
    _domains(s)
    if s["reward"] is not None:
        _reinforced(run, width)
        return
    for title, key in (("loss", "loss"), ("learning rate", "learning_rate")):
        steps, values = run.curve(key)
        if len(values) > 1:
            say()
            say(f"{title}, steps {steps[0]:,} to {steps[-1]:,}")
            for line in chart(smooth(values, width)):
                say(line)


def _reinforced(run: Run, width: int) -> None:
    """Every number of a run of `hadal grpo` over time, a line each; reward and length as curves."""
    from hadal.train.runs import smooth

    steps = run.curve("reward")[0]
    for key in ("reward", "length"):
        say()
        say(f"{key}, steps {steps[0]:,} to {steps[-1]:,}")
        for line in chart(smooth(run.curve(key)[1], width)):
            say(line)
    say()
    say("first, over time (lowest to highest), last")
    for key in ("loss", *REINFORCED):
        values = smooth(run.curve(key)[1], width)
        if values:
            line = chart(values, WIDTH - 24, 1)[0][10:]
            say(f"{key:>24} {values[0]:9.4g} {line} {values[-1]:.4g}")


def _domains(s: dict[str, Any]) -> None:
    """Held-out numbers by domain, and right answers by task where they were asked for."""
    names = sorted(s["domains"].keys() | s["tasks"].keys())
    if not names:
        return
    say()
    rows = [
        (name, _number((d := s["domains"].get(name, {})).get("loss")), _number(d.get("bits_per_byte")),
         _share(d.get("exact")), _share(s["tasks"].get(name)))
        for name in names
    ]  # fmt: skip
    table(("DOMAIN", "NATS/TOKEN", "BITS/BYTE", "EXACT", "ACCURACY"), rows, right=(1, 2, 3, 4))


def _loads(run: Run, layers: Sequence[str]) -> None:
    """The load of every gate now, its MaxVio over time, and load over time by expert of the gates named."""
    load = run.load()
    if not load:
        return
    names = run.gates(len(load))
    say()
    say("load by gate and expert (░ below ¾ of an even share, ▒ about even, ▓ up to twice, █ more)")
    for name, row in zip(names, load, strict=True):
        say(f"{name:>9} {''.join(map(shade, row))}")
    steps, violations = run.violations()
    say()
    say(f"MaxVio by layer, steps {steps[0]:,} to {steps[-1]:,} (first, over time, last)")
    for name, values in zip(names, violations, strict=True):
        say(f"{name:>9} {values[0]:5.2f} {chart(values, WIDTH - 12, 1, low=0.0)[0][10:]} {values[-1]:.2f}")
    _strips(run, names, layers)


def _strips(run: Run, names: Sequence[str], layers: Sequence[str]) -> None:
    spans, shares = run.load_over_time(WIDTH)
    wanted = names if "all" in layers else [f"layer {x}" if x.isdigit() else x for x in layers]
    if unknown := [name for name in wanted if name not in names]:
        raise typer.BadParameter(f"{unknown[0]!r} has no gate; those with one: {', '.join(names)}, or all")
    for name in wanted:
        say()
        say(f"{name}: load of each expert over time, steps {spans[0][0]:,} to {spans[-1][1]:,}")
        for expert, row in enumerate(zip(*shares[names.index(name)], strict=True)):
            say(f"{expert:>9} {''.join(map(shade, row))}")


def chart(
    values: Sequence[float], width: int = WIDTH, height: int = HEIGHT, low: float | None = None
) -> list[str]:
    """A curve in block characters, its highest and lowest value at the left; means where values are many.
    `low`: where the lowest eighth stands, by default at the lowest value."""
    from hadal.train.runs import cuts

    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts(len(values), width))]
    low, high = min(means) if low is None else low, max(means)
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


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
