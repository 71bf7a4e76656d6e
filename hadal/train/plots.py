"""Pictures of runs: curves over steps, and the load of every expert over time. PNG or SVG, by matplotlib
(the extra `train`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hadal.train.runs import Run, RunError, smooth

COLUMNS = 2
STRIPS = 200  # columns of a strip of load, at most
REINFORCED = (
    (("reward",), "reward, mean"),
    (("accuracy",), "share of right completions"),
    (("length", "length_max"), "length in tokens: mean, longest"),
    (("truncated",), "share of completions cut off"),
    (("entropy",), "entropy, nats a token"),
    (("kl",), "KL to the reference"),
    (("clipped",), "share of tokens clipped"),
    (("zero_variance",), "groups of equal rewards"),
    (("gap_max", "gap_mean"), "gap of log p: largest, mean"),
    (("mtp_loss",), "MTP loss, nats a token"),
    (("sample_tokens_per_second",), "tokens sampled a second"),
    (("tokens_per_second",), "tokens trained on a second"),
    (("mfu",), "MFU of training"),
)  # of `hadal grpo`, where a run has them; a second number is dashed
Panel = Callable[[Any, Sequence[Run], int], None]


def draw(runs: Sequence[Run], path: Path, width: int = 1) -> Path:
    """Curves of all runs over one another, and for each run with experts MaxVio by layer and a strip of load
    a layer. `width`: steps logged that a smoothed curve takes the mean of. Raises RunError where nothing was
    logged, or matplotlib is missing."""
    if not any(run.kind("step") for run in runs):
        raise RunError(f"no step has been logged in {', '.join(str(run.folder) for run in runs)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("pictures need matplotlib: pip install 'hadal[train]'") from None
    panels = _panels(runs)
    strips = [(run, g, name) for run in runs for g, name in enumerate(run.gates(len(run.load())))]
    rows, strip_rows = (-(-len(items) // COLUMNS) for items in (panels, strips))
    figure = Figure(figsize=(12, 2.9 * rows + 1.5 * strip_rows), layout="constrained")
    grid = figure.add_gridspec(rows + strip_rows, COLUMNS, height_ratios=[2.9] * rows + [1.5] * strip_rows)
    for number, panel in enumerate(panels):
        panel(figure.add_subplot(grid[number // COLUMNS, number % COLUMNS]), runs, width)
    below = [figure.add_subplot(grid[rows + n // COLUMNS, n % COLUMNS]) for n in range(len(strips))]
    _strips(figure, below, strips)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """What there is to draw."""
    panels: list[Panel] = [_loss]
    for key, label in (("loss", "held-out, nats a token"), ("bits_per_byte", "held-out, bits a byte")):
        if any(run.table("heldout", "domains", key) for run in runs):
            panels.append(_table("heldout", "domains", key, label))
    if any(run.kind("accuracy") for run in runs):
        panels.append(_table("accuracy", "tasks", "", "accuracy, greedy, held-out puzzles"))
    wanted: list[tuple[tuple[str, ...], str]] = [
        (("learning_rate",), "learning rate"),
        (("grad_norm",), "gradient norm"),
        (("max_violation",), "MaxVio, mean over gates"),
    ]
    wanted += REINFORCED if any(_reinforced(run) for run in runs) else ()
    panels += [_plain(keys, label) for keys, label in wanted if any(run.curve(keys[0])[0] for run in runs)]
    return panels + [_violations(run) for run in runs if run.load()]


def _reinforced(run: Run) -> bool:
    return bool(run.curve("reward")[0])


def _frame(axis: Any, label: str, *, legend: bool = True) -> None:
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if legend and axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, ncols=2)


def _line(axis: Any, curve: tuple[list[int], list[float]], width: int, **style: Any) -> None:
    """A curve; where it is smoothed, the values themselves faintly behind it."""
    steps, values = curve
    if width > 1:
        axis.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.3)
    axis.plot(steps, smooth(values, width), linewidth=1.2, **style)


def _loss(axis: Any, runs: Sequence[Run], width: int) -> None:
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        _line(axis, run.curve("loss"), width, color=colour, label=run.name)
        style = {"color": colour, "markersize": 3}
        held = run.curve("loss", "heldout")
        axis.plot(*held, "o--", label=f"{run.name}, held-out" if held[0] else None, **style)
        axis.plot(*run.curve("loss", "spike"), "x", color=colour)
    values = [v for run in runs for v in run.curve("loss")[1]]
    if min(values) > 0 and max(values) > 30 * min(values):
        axis.set_yscale("log")
    objective = all(_reinforced(run) for run in runs)
    _frame(axis, "loss of the objective" if objective else "loss, nats a token")


def _plain(keys: Sequence[str], label: str) -> Panel:
    def panel(axis: Any, runs: Sequence[Run], width: int) -> None:
        for number, run in enumerate(runs):
            for key, style in zip(keys, ("-", "--"), strict=False):
                span, shown = 1 if key == "learning_rate" else width, run.name if key == keys[0] else None
                _line(axis, run.curve(key), span, color=f"C{number % 10}", label=shown, linestyle=style)
        if keys[0] == "gap_max" and any(value > 0 for run in runs for value in run.curve(keys[0])[1]):
            axis.set_yscale("symlog", linthresh=1e-8)  # exact runs lie at 0
        _frame(axis, label, legend=len(runs) > 1)

    return panel


def _table(kind: str, name: str, key: str, label: str) -> Panel:
    """Of one run: each entry a colour, the whole black. Of several: each run a colour, its whole a thick
    line, its entries thin ones."""

    def panel(axis: Any, runs: Sequence[Run], width: int) -> None:
        alone = len(runs) == 1
        for number, run in enumerate(runs):
            entries = sorted(run.table(kind, name, key).items())
            for place, (entry, curve) in enumerate(entries):
                colour = _colour(place, len(entries)) if alone else f"C{number % 10}"
                look = {"linewidth": 1.0} if alone else {"linewidth": 0.6, "alpha": 0.4}
                axis.plot(*curve, color=colour, label=entry if alone else None, **look)
            whole = run.curve(key or "accuracy", kind)
            colour, shown = ("black", "all") if alone else (f"C{number % 10}", run.name)
            axis.plot(*whole, "o-", color=colour, linewidth=1.8, markersize=3, label=shown)
        if kind == "accuracy":
            axis.set_ylim(-0.03, 1.03)
        _frame(axis, label, legend=False)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)

    return panel


def _violations(run: Run) -> Panel:
    """MaxVio of each gate, from the loads between two records."""

    def panel(axis: Any, runs: Sequence[Run], width: int) -> None:
        steps, by_gate = run.violations()
        names = run.gates(len(by_gate))
        for number, values in enumerate(by_gate):
            colour = _colour(number, len(by_gate))
            _line(axis, (steps, values), width, color=colour, label=names[number])
        _frame(axis, f"MaxVio by layer, {run.name}" if len(runs) > 1 else "MaxVio by layer")

    return panel


def _colour(number: int, count: int) -> Any:
    """Ten colours that are told apart easily, or a scale where there are more."""
    from matplotlib import colormaps

    return f"C{number}" if count <= 10 else colormaps["turbo"](0.05 + 0.9 * number / (count - 1))


def _strips(figure: Any, axes: Sequence[Any], strips: Sequence[tuple[Run, int, str]]) -> None:
    """A strip for each gate: steps to the right, experts downwards; white is an even share."""
    image = None
    for axis, (run, gate, name) in zip(axes, strips, strict=True):
        spans, shares = run.load_over_time(STRIPS)
        experts = len(shares[gate][0])
        extent = (spans[0][0], max(spans[-1][1], spans[0][0] + 1), experts - 0.5, -0.5)
        columns = list(zip(*shares[gate], strict=True))
        look = {"cmap": "RdBu_r", "vmin": 0, "vmax": 2, "interpolation": "nearest"}
        image = axis.imshow(columns, aspect="auto", extent=extent, **look)
        axis.set_title(f"{run.name}: {name}", fontsize=8, pad=2)
        axis.set_ylabel("expert", fontsize=7)
        axis.tick_params(labelsize=7)
    if image is not None:
        label = "tokens of each expert; 1 is an even share"
        figure.colorbar(
            image, ax=list(axes), label=label, location="bottom", aspect=80, shrink=0.5, extend="max"
        )
