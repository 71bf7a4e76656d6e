"""From finished runs to a result: means and deviations over seeds, paired differences, verdicts, curves.

    paired difference   arm − reference, both with the same seed: the same order of data
    interval            mean ± t · s/√n, two-sided 95%, n − 1 degrees of freedom
    verdict             a difference where the interval leaves out 0; else "no difference seen at this scale"

A run that failed is shown as failed; means are over the seeds that there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ablation_plan import Family, Planned, active_parameters, config_of, parameters

from hadal.train.runs import Run, read

Json = dict[str, Any]
LAST = 0.2  # share of the run over which its balance is averaged
FIRST = 0.1  # share of the run that a difference of curves leaves out: there the loss falls steeply
EMA = 0.9  # smoothing of the curves that are compared, per logged step
POINTS = 80  # of a curve that is kept for drawing
V3_BOUND = 0.0025  # relative difference of the loss that V3's FP8 keeps below (§3.3)
NONE_SEEN = "no difference seen at this scale"
# t quantiles, two-sided 95%, for 1, 2, … degrees of freedom
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
       2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A number of a run. `compared`: whether paired differences to the reference make sense."""

    title: str
    form: str = "{:.4f}"
    compared: bool = True

    def show(self, value: float) -> str:
        return self.form.format(value)


METRICS = {
    "heldout": Metric("held-out loss, nats a token"),
    "maxvio_train": Metric("MaxVio of a batch, last fifth of the run", "{:.3f}"),
    "maxvio_heldout": Metric("MaxVio of all held-out text", "{:.3f}"),
    "maxvio_sequence": Metric("MaxVio of a held-out row", "{:.3f}"),
    "draft_t0": Metric("drafts accepted by the engine, temperature 0", "{:.1%}"),
    "draft_t1": Metric("drafts accepted by the engine, temperature 1", "{:.1%}"),
    "forced_t0": Metric("agreement on held-out text (teacher-forced), temperature 0", "{:.1%}"),
    "forced_t1": Metric("Σ min(p, q) on held-out text (teacher-forced), temperature 1", "{:.1%}"),
    "curve_max": Metric("largest relative difference of the loss to BF16", "{:.3%}", compared=False),
    "curve_mean": Metric("mean of it", "{:.3%}", compared=False),
    "cache_bytes": Metric("cache, bytes a token (BF16)", "{:,.0f}", compared=False),
    "parameters": Metric("parameters", "{:,.0f}", compared=False),
    "active_parameters": Metric("active parameters", "{:,.0f}", compared=False),
}
CURVES = {"loss": "loss", "max_violation": "MaxVio"}


@dataclass
class Measured:
    """One arm with one seed: its numbers by metric, its curves, or why there are none."""

    values: dict[str, float] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    fault: str = ""


# --- one run ---
def measure(planned: Planned, folder: Path, fault: str = "") -> Measured:
    """What the run in `folder` gave. A fault, where it did not come to its end."""
    try:
        run = read(folder)
    except ValueError:
        return Measured(fault=fault or "was not started")
    if run.state != "finished" or not run.kind("heldout"):
        last = run.summary()["step"]
        return Measured(fault=fault or f"ended at step {last:,}: {run.state}")
    probe = folder / "probe.json"
    if not probe.is_file():
        return Measured(fault=fault or "was trained, but not measured afterwards")
    model = planned.recipe.model
    values = {
        "heldout": float(run.kind("heldout")[-1]["loss"]),
        "cache_bytes": config_of(model).kv_bytes_per_token(),
        "parameters": float(parameters(model)),
        "active_parameters": float(active_parameters(model)),
    }
    violations = run.curve("max_violation")[1]
    values["maxvio_train"] = fmean(violations[-max(1, round(LAST * len(violations))) :])
    values |= {key: float(value) for key, value in json.loads(probe.read_text("utf-8")).items()}
    return Measured(values, run.curve("tokens")[1], _curves(run))


def _curves(run: Run) -> dict[str, list[float]]:
    return {key: run.curve(key)[1] for key in CURVES}


def smooth(values: Sequence[float], rate: float = EMA) -> list[float]:
    """Exponential moving average, started at the first value."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else rate * out[-1] + (1 - rate) * value)
    return out


def curve_difference(arm: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """(largest, mean) |arm / reference − 1| of the smoothed curves, without the first tenth."""
    if len(arm) != len(reference) or not arm:
        raise ValueError(f"curves of {len(arm)} and {len(reference)} points cannot be compared")
    pairs = list(zip(smooth(arm), smooth(reference), strict=True))[int(FIRST * len(arm)) :]
    differences = [abs(a / b - 1) for a, b in pairs]
    return max(differences), fmean(differences)


# --- over seeds ---
def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences. ValueError for fewer than two."""
    n = len(differences)
    if n < 2:
        raise ValueError("an interval needs at least two seeds")
    mean, t = fmean(differences), T95[min(n - 1, len(T95)) - 1]
    half = t * stdev(differences) / sqrt(n)
    return mean, mean - half, mean + half


def spread(metric: Metric, values: Sequence[float]) -> str:
    """Mean ± deviation of the seeds; a number that no seed changes is shown alone."""
    if not values:
        return "–"
    if len(values) == 1 or len(set(values)) == 1:
        return metric.show(values[0])
    return f"{metric.show(fmean(values))} ± {metric.show(stdev(values))}"


def collect(family: Family, runs: Mapping[tuple[str, int], Measured], seeds: Sequence[int]) -> Json:
    """The result of a family from its runs by (arm, seed): tables, comparisons, verdicts, curves, faults."""
    if {"curve_max", "curve_mean"} & set(family.metrics):
        _add_curve_differences(family, runs, seeds)
    comparisons = _comparisons(family, runs, seeds)
    faults = [f"{arm}, seed {seed}: {m.fault}" for (arm, seed), m in runs.items() if m.fault]
    return {
        "family": family.name,
        "title": family.title,
        "question": family.question,
        "reference": family.reference,
        "seeds": list(seeds),
        "arms": {
            arm.name: {
                "title": arm.title,
                "values": {
                    m: [runs[arm.name, s].values.get(m) for s in seeds] for m in family.metrics
                },
            }
            for arm in family.arm
        },
        "columns": ["arm", *(METRICS[m].title for m in family.metrics)],
        "rows": [_row(family, arm.name, runs, seeds) for arm in family.arm],
        "comparisons": comparisons,
        "verdicts": [c["verdict"] for c in comparisons] + _bounds(family, runs, seeds),
        "faults": faults,
        "curves": {arm.name: _mean_curves([runs[arm.name, s] for s in seeds]) for arm in family.arm},
    }  # fmt: skip


def _add_curve_differences(
    family: Family, runs: Mapping[tuple[str, int], Measured], seeds: Sequence[int]
) -> None:
    for arm in family.arm:
        for seed in seeds:
            here, reference = runs[arm.name, seed], runs[family.reference, seed]
            if arm.name == family.reference or here.fault or reference.fault:
                continue
            largest, mean = curve_difference(here.curves["loss"], reference.curves["loss"])
            here.values |= {"curve_max": largest, "curve_mean": mean}


def _row(
    family: Family, arm: str, runs: Mapping[tuple[str, int], Measured], seeds: Sequence[int]
) -> list[str]:
    done = [runs[arm, seed] for seed in seeds if not runs[arm, seed].fault]
    title = family[arm].title
    if not done:
        return [f"{title}: **no run came to its end**", *("–" for _ in family.metrics)]
    if len(done) < len(seeds):
        title += f" (**{len(done)} of {len(seeds)} seeds**)"
    cells = [spread(METRICS[m], [r.values[m] for r in done if m in r.values]) for m in family.metrics]
    return [title, *cells]


def _comparisons(
    family: Family, runs: Mapping[tuple[str, int], Measured], seeds: Sequence[int]
) -> list[Json]:
    """Every arm against the reference in every metric that both have with at least one seed."""
    found = []
    for key in family.metrics:
        for arm in family.arm:
            if arm.name == family.reference or not METRICS[key].compared:
                continue
            pairs = [(runs[arm.name, s].values, runs[family.reference, s].values) for s in seeds]
            differences = [a[key] - b[key] for a, b in pairs if key in a and key in b]
            if differences:
                found.append(compare(family, arm.name, key, differences))
    return found


def compare(family: Family, arm: str, key: str, differences: Sequence[float]) -> Json:
    """One comparison with its verdict in words."""
    metric = METRICS[key]
    what = f"{metric.title}: {arm} − {family.reference}"
    out: Json = {"arm": arm, "metric": key, "differences": list(differences)}
    if len(differences) < 2:
        shown = _signed(metric, differences[0])
        return out | {"verdict": f"{what} = {shown} with one seed: no interval, no verdict"}
    mean, low, high = interval(differences)
    words = NONE_SEEN if low <= 0 <= high else f"{arm} is {'higher' if mean > 0 else 'lower'}"
    shown = f"{_signed(metric, mean)} [{_signed(metric, low)}, {_signed(metric, high)}]"
    return out | {"mean": mean, "low": low, "high": high, "verdict": f"{what} = {shown}: {words}"}


def _signed(metric: Metric, value: float) -> str:
    return metric.form.replace("{:", "{:+").format(value)


def _bounds(family: Family, runs: Mapping[tuple[str, int], Measured], seeds: Sequence[int]) -> list[str]:
    """What V3's bound says of the differences of curves."""
    found = []
    for arm in family.arm:
        values = [runs[arm.name, s].values for s in seeds]
        largest = [v["curve_max"] for v in values if "curve_max" in v]
        means = [v["curve_mean"] for v in values if "curve_mean" in v]
        if largest:
            kept = (
                "kept"
                if max(largest) < V3_BOUND
                else "kept in the mean"
                if max(means) < V3_BOUND
                else "not kept"
            )
            found.append(
                f"smoothed loss of {arm.name} against {family.reference}: at most {max(largest):.3%}, "
                f"in the mean {fmean(means):.3%} ({len(largest)} seeds); V3's bound of {V3_BOUND:.2%}: {kept}"
            )  # fmt: skip
    return found


def _mean_curves(runs: Sequence[Measured]) -> Json:
    """Mean and deviation over seeds of each curve, at POINTS steps at most."""
    done = [run for run in runs if not run.fault and run.tokens]
    length = min((len(run.tokens) for run in done), default=0)
    picked = range(0, length, -(-length // POINTS)) if length else range(0)
    out: Json = {"tokens": [done[0].tokens[i] for i in picked]}
    for key in CURVES:
        lines = [run.curves[key] for run in done if len(run.curves.get(key, [])) >= length]
        columns = [[line[i] for line in lines] for i in picked]
        out[key] = {
            "mean": [round(fmean(column), 5) for column in columns],
            "deviation": [round(stdev(column), 5) if len(column) > 1 else 0.0 for column in columns],
        }
    return out
