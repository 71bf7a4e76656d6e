"""What of a run of `hadal r1 recipes/r1/mini.toml` goes on board, and what tells of it: for adopt_mini.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1_report import RECIPE, gathered, percent

STAGES = {"r1": "hadal-mini", "dense-distilled": "hadal-mini-dense"}  # stage: the name on board
MAIN = ("base", "zero", "cold", "rl1", "sft", "rl2", "r1")
STUDENTS = ("dense-base", "dense-distilled", "dense-alone", "moe-base", "moe-distilled", "moe-alone")
LARGEST = 16 * 2**20  # bytes of a file in the repository
SUMMARY = {
    "hadal-mini": "A small reasoning model of the DeepSeek-V3 architecture for number puzzles, asked in "
    "English, French or Portuguese: pre-trained, then taken through the stages of DeepSeek-R1.",
    "hadal-mini-dense": "A small dense reasoning model of Qwen2's architecture for number puzzles, asked in "
    "English, French or Portuguese: taught by hadal-mini. It answers in its teacher's words, its teacher's "
    "name among them.",
}  # fmt: skip
ASIDE = {
    "base": "pre-trained, then spoilt: it answers at once, hurries, mixes languages",
    "zero": "R1-Zero: the base by rewards alone",
    "cold": "cold start, on 1,500 worked answers, half of mixed languages",
    "rl1": "reasoning by rewards",
    "sft": "the base anew, on accepted samples and general data",
    "rl2": "reinforcement learning on everything",
    "r1": "the mean, in the weights, of that and of what was pre-trained: **hadal-mini**",
    "dense-base": "a dense base",
    "dense-distilled": "taught by R1: **hadal-mini-dense**",
    "dense-alone": "by rewards alone",
    "moe-base": "a smaller MoE",
    "moe-distilled": "taught by R1",
    "moe-alone": "by rewards alone",
}


# --- the run ---
def is_r1(run: Path) -> bool:
    """Whether a folder is a run of `hadal r1`, and not one of `hadal train`."""
    return (run / "manifest.json").is_file()


def stages_of(run: Path, beside: Sequence[Path] = ()) -> dict[str, dict[str, Any]]:
    """The finished stages of a run, as its manifest has them, and of the runs beside it."""
    return gathered(run, beside)[0]


def exports(run: Path, beside: Sequence[Path] = ()) -> dict[str, Path]:
    """The models of a run that are for the package, by the stage that made each."""
    folders = gathered(run, beside)[1]
    there = {name: folders[name] / "export" for name in STAGES if name in folders}
    if not there:
        raise SystemExit(f"{run}: no stage of {', '.join(STAGES)} is finished; the same `hadal r1` goes on")
    return there


def way(stages: Mapping[str, Any], name: str) -> list[str]:
    """The stages that a stage is made of, itself among them, in the recipe's order."""
    wanted, open_ends = {name}, [name]
    while open_ends:
        new = set(stages[open_ends.pop()]["material"]["inputs"]) - wanted
        wanted |= new
        open_ends += new
    return [one for one in stages if one in wanted]


def seconds(stages: Mapping[str, Any], name: str) -> float:
    """What a stage and all that it is made of took, measuring left out."""
    return float(sum(stages[one]["seconds"] for one in way(stages, name)))


def pretraining(stages: Mapping[str, Any], pretrained: Path, on_board: Path) -> dict[str, Any]:
    """What the model that the run began with says of its training: it lies in the run `pretrained`, or is the
    one on board, or that one was made from it. Refuses any other."""
    from hadal.weights import hub

    began = {digest for stage in stages.values() for digest in stage["material"]["files"].values()}
    for export in (pretrained / "export-ema", pretrained / "export", on_board):
        if export.is_dir() and (digest := hub.digest(export)) in began:
            return told(export) | {"files": digest}
    if told(on_board).get("files") in began:  # an adoption that was broken off
        return told(on_board)
    raise SystemExit(
        f"--pretrained {pretrained} holds no model that the run began with ({', '.join(sorted(began))}); "
        "give the folder of that `hadal train recipes/mini.toml`"
    )


def told(export: Path) -> dict[str, Any]:
    """What an export says of its training in config.json; of a model with R1's stages, its pre-training."""
    found: dict[str, Any] = json.loads((export / "config.json").read_text("utf-8"))["hadal"]
    pretraining: dict[str, Any] = found.get("pretraining", found)
    return pretraining


# --- tables ---
def measured(stages: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The figures of those stages that have some."""
    return {name: stages[name]["measured"] for name in names if stages.get(name, {}).get("measured")}


def stage_table(stages: Mapping[str, Any], names: Sequence[str]) -> str:
    """A line a stage: what it is, and its figures over all tasks."""
    found = measured(stages, names)
    settings = next(iter(found.values()))["settings"]
    k = settings["samples"]
    lines = [f"| stage | | pass@1 | cons@{k} | mean length (tokens) | language | form |",
             "|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, one in found.items():
        row = one["all"]
        cells = [percent(row["pass@1"]), percent(row["cons"]), f"{row['length']:.0f}",
                 percent(row["language"]), percent(row["form"])]  # fmt: skip
        words = ASIDE[name] + " (of a base that was made anew)" * bool(stages[name].get("apart"))
        if name.endswith("-distilled") and stages.get("taught", {}).get("apart"):
            words += " (by R1 of an earlier run)"
        lines.append(f"| {name} | {words} | {' | '.join(cells)} |")
    problems = next(iter(found.values()))["all"]["problems"]
    return "\n".join([
        *lines, "",
        f"{problems} held-out problems, as many of each task, {k} samples each at temperature "
        f"{settings['temperature']:g}, top-p {settings['top_p']:g}, at most {settings['max_tokens']} tokens. "
        "Language: share of the reasoning's words that are of the prompt's language.",
    ])  # fmt: skip


def task_table(stages: Mapping[str, Any], names: Sequence[str]) -> str:
    """pass@1 / cons@k / mean length: a line a task, a column a stage."""
    found = measured(stages, names)
    k = next(iter(found.values()))["settings"]["samples"]
    lines = [f"pass@1 / cons@{k} / mean length:", "", f"| task | {' | '.join(found)} |",
             "|---" * (1 + len(found)) + "|"]  # fmt: skip
    for task in next(iter(found.values()))["tasks"]:
        rows = [one["tasks"][task] for one in found.values()]
        cells = [f"{percent(r['pass@1'])} / {percent(r['cons'])} / {r['length']:.0f}" for r in rows]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stages_section(stages: Mapping[str, Any]) -> str:
    """The part of docs/hadal-mini.md on the stages."""
    sampled = {name: stages[name]["facts"] for name in ("rejected", "taught") if name in stages}
    kept = [
        f"{name} {f['rows']:,} rows of {f['sampled_tokens']:,} sampled tokens" for name, f in sampled.items()
    ]
    minutes = seconds(stages, "r1") / 60
    return "\n\n".join([
        f"`{RECIPE}` took {minutes:.1f} minutes for the stages that `r1` is made of, measuring left out. "
        f"Kept of what was sampled: {'; '.join(kept)}. All figures: [the R1 recipe](r1.md).",
        stage_table(stages, (*MAIN, *STUDENTS)),
        task_table(stages, MAIN),
    ])  # fmt: skip


# --- cards ---
def about(export: Path) -> dict[str, str]:
    """Rows on the model itself."""
    from hadal.config import Gqa
    from hadal.weights.layout import read_config

    c = read_config(export)
    n, m = c.parameters(), c.moe
    shape = f"{c.model_type}: {c.num_hidden_layers} layers of width {c.hidden_size}"
    shape += f", {c.num_attention_heads} heads"
    if isinstance(c.attention, Gqa):
        shape += f", {c.attention.num_key_value_heads} of keys and values"
    if m is not None:
        shape += f", {m.n_routed_experts} routed experts ({m.num_experts_per_tok} per token)"
        shape += f" and {m.n_shared_experts} shared"
    shape += ", 1 MTP module" * (c.num_nextn_predict_layers == 1)
    parameters = f"{n.main + n.mtp_unique:,}"
    if m is not None:
        parameters += f" ({n.active:,} active per token; MTP {n.mtp_unique:,})"
    stored = "FP8 (E4M3, 128×128 blocks); embedding, head, norms, gates in BF16" if c.fp8 else "BF16"
    context = f"1,024 tokens in training, {c.max_position_embeddings:,} at most"
    return {"Architecture": shape, "Parameters": parameters, "Vocabulary": f"{c.vocab_size:,}",
            "Stored as": stored, "Context": context}  # fmt: skip


def history(export: Path, stages: Mapping[str, Any], stage: str, before: Mapping[str, Any]) -> dict[str, str]:
    """Rows on how it came about."""
    machine = json.loads((export / "config.json").read_text("utf-8"))["hadal"]
    facts = [stages[name]["facts"] for name in way(stages, stage)]
    trained, sampled = (sum(f.get(key, 0) for f in facts) for key in ("trained_tokens", "sampled_tokens"))
    first = (
        f"{before['tokens']:,} tokens of puzzles with worked solutions, {before['seconds'] / 60:.1f} minutes"
    )
    return {
        "Pre-trained" if stage == "r1" else "Its teacher's pre-training": first,
        "Then": f"stages {', '.join(way(stages, stage))} of `{RECIPE}`: {trained:,} tokens trained on, "
        f"{sampled:,} sampled, {seconds(stages, stage) / 60:.1f} minutes",
        "Machine": f"{machine['device']}, torch {machine['torch']}",
    }  # fmt: skip


def card(
    export: Path, stages: Mapping[str, Any], stage: str, before: Mapping[str, Any], accuracy: str
) -> str:
    """The model card. accuracy: the section of the examination, greedy."""
    from hadal.train.export import ACCURACY_BEGIN, ACCURACY_END, PUZZLE_LIMITS

    name = STAGES[stage]
    columns = MAIN if stage == "r1" else ("r1", "dense-base", "dense-distilled", "dense-alone")
    rows = about(export) | history(export, stages, stage, before)
    return "\n".join([
        f"# {name}", "", SUMMARY[name], "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), "",
        "## Accuracy on unseen problems", "", ACCURACY_BEGIN, accuracy.strip(), ACCURACY_END, "",
        "## By stage", "", stage_table(stages, columns), "", task_table(stages, columns), "",
        "## What it cannot do", "", PUZZLE_LIMITS, "",
        "## How it was made", "",
        "```bash", "hadal train recipes/mini.toml", f"hadal r1 {RECIPE}", "```", "",
        f"Stage `{stage}` of it; the pre-training's resolved recipe is docs/results/hadal-mini-recipe.json. "
        "Seeds are in the recipes, which reproduce it up to the order of floating-point sums on a GPU and to "
        "what fits into the stages' budgets of time.", "",
    ])  # fmt: skip


# --- into the package ---
def fits(export: Path, tokenizer: Path) -> None:
    """Refuse an export that the package cannot take. tokenizer: the folder of the one on board."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (export / name).read_bytes() != (tokenizer / name).read_bytes():
            raise SystemExit(f"{export / name} is not the one on board: the prompts of others would change")
    for path in sorted(export.iterdir()):
        if path.stat().st_size >= LARGEST:
            raise SystemExit(
                f"{path} has {path.stat().st_size:,} bytes; files of the repository have less than 16 MiB"
            )


def place(
    export: Path,
    target: Path,
    stages: Mapping[str, Any],
    stage: str,
    before: Mapping[str, Any],
) -> None:
    """The files of an export into the package: what config.json says of its making names no place of the
    machine where it was made."""
    from hadal.weights.manifest import FileHash, hash_file, write_manifest

    table = json.loads((export / "config.json").read_text("utf-8"))
    table["hadal"] = {
        "name": STAGES[stage], "trained_by": "hadal r1", "recipe": RECIPE, "stage": stage,
        "seconds": seconds(stages, stage), "device": table["hadal"]["device"],
        "torch": table["hadal"]["torch"],
        "pretraining": {**before, "then": RECIPE},
    }  # fmt: skip
    files = [path for path in sorted(export.iterdir()) if path.name not in ("manifest.json", "README.md")]
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, target / path.name)
    (target / "config.json").write_text(json.dumps(table, indent=2) + "\n", "utf-8")
    made = {
        path.name: FileHash((target / path.name).stat().st_size, hash_file(target / path.name))
        for path in files
    }
    write_manifest(target, made)
