"""Cards of an R1 run: figures in each model's card, a card beside each data set, the table of all stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hadal.post.r1_measure import KEYS, shown, table
from hadal.post.r1_recipe import DATA_KINDS, R1Recipe, Stage
from hadal.train.export import CARD, set_accuracy

WRITES_OWN_CARD = ("rejection",)


def line(found: Mapping[str, Any]) -> str:
    """The figures of a model in a line."""
    row, k = found["all"], found["settings"]["samples"]
    names = {"cons": f"cons@{k}", "length": "length", "language": "language consistency"}
    return ", ".join(f"{names.get(key, key)} {shown(key, row[key])}" for key in KEYS)


def write(recipe: R1Recipe, manifest: Mapping[str, Any], folder: Path, made: Callable[[Stage], Path]) -> None:
    """Bring all cards of a run up to its manifest."""
    for stage in recipe.stages:
        entry = manifest.get(stage.name)
        if entry is None or not entry["finished"]:
            continue
        if stage.kind in DATA_KINDS:
            if stage.kind not in WRITES_OWN_CARD:
                (folder / stage.name / CARD).write_text(data_card(stage, entry), encoding="utf-8")
            continue
        path = made(stage) / CARD
        if stage.kind in ("init", "preference"):
            path.write_text(plain_card(stage, entry), encoding="utf-8")
        elif entry.get("measured"):
            set_accuracy(path, table(entry["measured"]) + "\n\n" + origin(recipe, stage, entry))
    (folder / CARD).write_text(overview(recipe, manifest), encoding="utf-8")


def origin(recipe: R1Recipe, stage: Stage, entry: Mapping[str, Any]) -> str:
    """How a stage's model came about, in a paragraph."""
    inputs = ", ".join(f"{name} ({digest[:12]}…)" for name, digest in entry["material"]["inputs"].items())
    facts = entry.get("facts") or {}
    return (
        f"Stage `{stage.name}` (kind {stage.kind}) of the recipe {recipe.run.name}, made of "
        f"{inputs or 'nothing'}: {facts.get('trained_tokens', 0):,} tokens trained on, "
        f"{facts.get('sampled_tokens', 0):,} sampled, {entry['seconds']:.0f} s."
    )


def data_card(stage: Stage, entry: Mapping[str, Any]) -> str:
    """The card of worked conversations or prompts."""
    facts, section = entry["facts"], entry["material"]["section"]
    lines = [f"# {stage.name}", "", stage.title or f"Data of kind {stage.kind}.", "",
             f"{facts['rows']:,} rows, seed {section['seed']}, SHA-256 {entry['digest'][:16]}….", "",
             "| task | rows |", "|---|---|"]  # fmt: skip
    lines += [f"| {task} | {rows:,} |" for task, rows in sorted(facts["tasks"].items())]
    if "faults" in section:
        faults = section["faults"]
        said = f"Without work: {faults['direct']:.0%} of the rows; in a hurry: {faults['hurried']:.0%}; "
        said += "each line in a language drawn anew: "
        lines += ["", said + f"{faults['mixed']:.0%} (hadal/post/worked.py)."]
    return "\n".join([*lines, ""])


def plain_card(stage: Stage, entry: Mapping[str, Any]) -> str:
    """The card of random weights, or of a preference model."""
    facts = entry["facts"]
    if stage.kind == "init":
        said = f"Random weights: {facts['parameters']:,} parameters, {facts['active']:,} active per token."
    else:
        said = (
            f"A preference model: a scalar head, learnt from {facts['rows']:,} pairs; right on "
            f"{facts['accuracy']:.1%} of {facts['held_out_pairs']:,} pairs of unseen prompts. A rule made "
            "the pairs (hadal/post/preference.py), no person."
        )
    return "\n".join([f"# {stage.name}", "", stage.title or said, "", said, ""])


def overview(recipe: R1Recipe, manifest: Mapping[str, Any]) -> str:
    """The table of stages."""
    k = recipe.measure.samples
    lines = [
        f"# {recipe.run.name}", "", recipe.run.title or "A run of `hadal r1`.", "",
        f"| stage | kind | trained (tokens) | sampled (tokens) | operations | pass@1 | cons@{k} | length | "
        "language | form | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for stage in recipe.stages:
        entry = manifest.get(stage.name)
        if entry is None or not entry["finished"]:
            lines.append(f"| {stage.name} | {stage.kind} | | | | | | | | | not done |")
            continue
        facts, row = entry.get("facts") or {}, (entry.get("measured") or {}).get("all")
        figures = [shown(key, row[key]) if row else "" for key in KEYS if key != "cut"]
        tokens = [f"{facts[key]:,}" if facts.get(key) else "" for key in ("trained_tokens", "sampled_tokens")]
        done = f"{facts['operations']:.1e}" if facts.get("operations") else ""
        rows = f" ({facts['rows']:,} rows)" if facts.get("rows") else ""
        cells = [stage.name, stage.kind + rows, *tokens, done, *figures, f"{entry['seconds']:.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    by_task = [
        f"| {stage.name} | " + " | ".join(
            f"{shown('', row['pass@1'])} / {shown('', row['cons'])} / {shown('length', row['length'])}"
            for row in manifest[stage.name]["measured"]["tasks"].values()
        ) + " |"
        for stage in recipe.stages if (manifest.get(stage.name) or {}).get("measured")
    ]  # fmt: skip
    if by_task:
        names = [task.label for task in recipe.measure.tasks]
        lines += ["", f"By task: pass@1 / cons@{k} / mean length.", "",
                  f"| stage | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *by_task]  # fmt: skip
    lines += [
        "",
        "Operations: 6 a parameter and token for training, 2 for sampling and for scoring by a "
        "reference. Language: share of the reasoning's words that are of the prompt's language.",
    ]
    return "\n".join([*lines, ""])
