"""The figures of a run of `hadal r1`, for docs/r1.md.

python benchmarks/r1_report.py runs/r1-cpu          # docs/results/stages-r1-cpu.json, its section of the page
python benchmarks/r1_report.py runs/a --beside runs/b     # stages that a lacks are taken from b
python benchmarks/r1_report.py                      # the page alone, from what is kept
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "r1.md"
RECIPE = "recipes/r1/mini.toml"
KEPT = ("kind", "title", "seconds", "facts", "measured", "digest")


def gathered(run: Path, beside: Sequence[Path] = ()) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """The finished stages of a run, and each one's folder; those that it lacks from the runs beside it.

    A stage that read a file or a model which another stage made counts as made of it. `apart`: what it is
    made of is not what these stages are, such as a base that was trained anew.
    """
    stages: dict[str, dict[str, Any]] = {}
    folders: dict[str, Path] = {}
    for folder in (run, *beside):
        for name, entry in json.loads((folder / "manifest.json").read_text("utf-8"))["stages"].items():
            if entry["finished"] and name not in stages:
                stages[name], folders[name] = entry, folder / name
    made = {entry["digest"]: name for name, entry in stages.items()}
    for entry in stages.values():
        material = entry["material"]
        read = {made[digest]: digest for digest in material["files"].values() if digest in made}
        inputs = material["inputs"] | read
        material["inputs"] = {name: digest for name, digest in inputs.items() if name in stages}
        entry["apart"] = any(stages[name]["digest"] != made for name, made in material["inputs"].items())
    order = list(tomllib.loads((ROOT / RECIPE).read_text("utf-8"))["stages"])
    names = sorted(stages, key=lambda name: order.index(name) if name in order else -1)
    return {name: stages[name] for name in names}, folders


def result(run: Path, device: str, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """What is kept of a run: machine (this one, or that of RUN/machine.json), recipe's name, figures of each
    stage."""
    import common

    told = run / "machine.json"
    machine = json.loads(told.read_text("utf-8")) if told.is_file() else common.machine(device)
    stages = {
        name: {key: entry[key] for key in KEPT if key in entry}
        for name, entry in gathered(run, beside)[0].items()
    }  # fmt: skip
    recipe = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    return {"machine": machine, "recipe": recipe, "stages": stages}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def section(found: dict[str, Any]) -> list[str]:
    """Tables of a result: the stages with a model, by task, and the data sets."""
    stages = found["stages"]
    models = {name: s for name, s in stages.items() if s.get("measured")}
    k = next(iter(models.values()))["measured"]["settings"]["samples"]
    lines = [
        f"### {found['recipe']}", "",
        f"| model | how | operations | pass@1 | cons@{k} | length | language | form | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, s in models.items():
        row = s["measured"]["all"]
        cells = [
            percent(row["pass@1"]),
            percent(row["cons"]),
            f"{row['length']:.0f}",
            percent(row["language"]),
        ]
        cells += [percent(row["form"]), f"{s['seconds']:.0f}"]
        done = s["facts"].get("operations")  # a mean of weights has none to speak of
        lines.append(f"| {name} | {s['kind']} | {f'{done:.1e}' if done else ''} | {' | '.join(cells)} |")
    lines += ["", f"By task, pass@1 / cons@{k} / mean length:", "", *by_task(models)]
    lines += ["", "| data | sampled (tokens) | kept (rows) | dropped |", "|---|---:|---:|---|"]
    for name, s in stages.items():
        if s["kind"] == "rejection":
            facts = s["facts"]
            dropped = ", ".join(f"{why} {n:,}" for why, n in facts["dropped"].items())
            lines.append(f"| {name} | {facts['sampled_tokens']:,} | {facts['rows']:,} | {dropped} |")
    heads = [s["facts"] for s in stages.values() if s["kind"] == "preference"]
    for f in heads:
        right = f"The preference head is right on {percent(f['accuracy'])}"
        lines += ["", f"{right} of {f['held_out_pairs']} pairs of unseen prompts."]
    m = found["machine"]
    where = m.get("gpu") or f"{m['cpu']}, {m['threads']} of {m['cores']} cores"
    total = sum(s["seconds"] + s.get("measured", {}).get("seconds", 0.0) for s in stages.values())
    return [
        *lines,
        "",
        f"{where}; torch {m['torch']}; {m['date']}; {total / 60:.0f} minutes, measuring included.",
    ]


def by_task(models: dict[str, Any]) -> list[str]:
    """A line a model; of many tasks, a line a task."""
    tasks = list(next(iter(models.values()))["measured"]["tasks"])
    cells = {
        (name, task): f"{percent(row['pass@1'])} / {percent(row['cons'])} / {row['length']:.0f}"
        for name, s in models.items()
        for task, row in s["measured"]["tasks"].items()
    }
    if len(tasks) > 8:
        lines = [f"| task | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
        return lines + [f"| {task} | {' | '.join(cells[name, task] for name in models)} |" for task in tasks]
    lines = [f"| model | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    return lines + [f"| {name} | {' | '.join(cells[name, task] for task in tasks)} |" for name in models]


def markers(name: str) -> tuple[str, str]:
    """What a result's section of the page stands between."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def page(text: str) -> str:
    """The page with the sections of all results that are kept."""
    for file in sorted(RESULTS.glob("stages-*.json")):
        if file.stem.startswith("r1-zero"):  # has a page of its own
            continue
        begin, end = markers(file.stem)
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{PAGE} has no place for {file.name}: it lacks {begin} and {end}")
        body = "\n".join(section(json.loads(file.read_text(encoding="utf-8"))))
        text = f"{head}{begin}\n{body}\n{end}{tail}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a run")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="that it ran on")
    parser.add_argument("--beside", nargs="*", type=Path, default=[], help="runs with stages that it lacks")
    given = parser.parse_args(arguments)
    if given.run is not None:
        found = result(given.run, given.device, given.beside)
        path = RESULTS / f"stages-{found['recipe']}.json"
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
