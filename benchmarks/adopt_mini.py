"""A newly trained hadal-mini: measured, compared with the one on board, put in its place with all that tells
of it.

    python benchmarks/adopt_mini.py measure RUN       # accuracy of 4,500 problems, into accuracy.json
    python benchmarks/adopt_mini.py compare RUN       # task by task; status 1 if the mean is lower
    python benchmarks/adopt_mini.py adopt RUN         # all below; refuses a lower mean
    python benchmarks/adopt_mini.py adopt R1 --pretrained RUN [--beside R1B …]

R1 is the folder of `hadal r1 recipes/r1/mini.toml`: hadal-mini becomes its stage `r1`, hadal-mini-dense its
stage `dense-distilled`, where that is finished; stages that it lacks are taken from the runs --beside it.
--pretrained is the run that its base came from, if that is not the model on board. RUN is the
folder of `hadal train recipes/mini.toml`, whole or without its checkpoints: a model without R1's stages. Of
its `export` and `export-ema` the one with the lower held-out loss is taken: never the one that does better in
the examination. `measure` needs what training needs, and runs on the card where the model was trained;
elsewhere it takes minutes. `adopt` without an accuracy.json beside the export measures first.

Written: hadal/assets/hadal-mini and hadal-mini-dense, docs/results/hadal-mini-* and stages-r1-mini.json,
docs/images/mini-training.png, the marked parts of docs/hadal-mini.md, docs/r1.md and docs/speculation.md,
README's sentence, the quantisation table. Then the tests that look at the models on board. What only a person
can rewrite is listed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adopt_r1

ROOT = Path(__file__).resolve().parents[1]
ON_BOARD = ROOT / "hadal" / "assets" / "hadal-mini"
RESULTS = ROOT / "docs" / "results"
PAGE, SPECULATION, README = (
    ROOT / name for name in ("docs/hadal-mini.md", "docs/speculation.md", "README.md")
)
WEIGHTS = "model.safetensors"
SAMPLES = 300
TESTS = """
test_docs.py config/test_docs.py engine/test_speculation.py engine/test_offload.py engine/test_defaults.py
cli/test_models.py ui/test_real_server.py bench/test_load.py data/test_documents.py data/test_puzzle_source.py
data/test_bpe.py data/test_prepare.py train/test_heldout.py train/test_recipe.py train/test_memory.py evals
weights/test_info.py weights/test_hub.py post/test_r1.py test_adopt_mini.py config plan/test_fit.py
""".split()
BY_HAND = (
    "docs/hadal-mini.md: what each run changed, and 'What it cannot do'; docs/lab-notes.md; CHANGELOG.md",
    "docs/speculation.md: the paragraph on the final norm tells of the model before",
    "docs/probe.md, docs/embeddings.md: figures of hadal-mini are of the weights that their files name",
    "'on one H100' in README.md and docs/hadal-mini.md, if R1's stages ran elsewhere; docs/cli.md's MODEL",
    "docs/images/chat.png, README's transcript: only if tests/test_docs.py finds another answer",
)


# --- a run ---
def facts(export: Path) -> dict[str, Any]:
    """What a run says of itself, from config.json; of a model with R1's stages, its pre-training."""
    return adopt_r1.told(export)


def chosen(run: Path) -> Path:
    """The export with the lower held-out loss."""
    there = [run / name for name in ("export", "export-ema") if (run / name / WEIGHTS).is_file()]
    if not there:
        raise SystemExit(f"{run} has neither export nor export-ema with {WEIGHTS}")
    losses = {export.name: facts(export)["heldout_loss"] for export in there}
    best = min(there, key=lambda export: losses[export.name])
    print(f"held-out loss: {losses}; taken: {best.name}")
    return best


def candidates(run: Path) -> dict[str, Path]:
    """What a run has for the package, hadal-mini first."""
    return adopt_r1.exports(run) if adopt_r1.is_r1(run) else {"train": chosen(run)}


def kept(export: Path) -> Path:
    """Where an export's accuracy lies."""
    return export.parent / "accuracy.json"


def digest(export: Path) -> str:
    return hashlib.sha256((export / WEIGHTS).read_bytes()).hexdigest()


# --- accuracy ---
def measure(export: Path, kept: Path, device: str) -> dict[str, Any]:
    """Accuracy of an export; kept in the file `kept` with the digest of its weights."""
    from hadal.engine import Engine
    from hadal.evals.puzzles import evaluate

    engine = Engine.load(str(export), device=device, max_num_seqs=256 if device == "cuda" else 64)
    tell = lambda done, of: print(f"{export.parent.name}: {done} of {of}", flush=True)  # noqa: E731
    report = dict(evaluate(engine, samples=SAMPLES, progress=tell))
    text = json.dumps({"weights": digest(export), "report": report}, ensure_ascii=False, indent=1)
    kept.write_text(text + "\n", "utf-8")
    print(f"{export.parent.name}: mean over tasks {report['accuracy']:.2%}")
    return report


def measured(export: Path, kept: Path, device: str) -> dict[str, Any]:
    """The accuracy of an export: found in `kept`, or measured."""
    if kept.is_file():
        found = json.loads(kept.read_text("utf-8"))
        if found["weights"] == digest(export):
            report: dict[str, Any] = found["report"]
            return report
        print(f"{kept} is of other weights: measured again")
    return measure(export, kept, device)


def compare(report: dict[str, Any]) -> bool:
    """Print both tables side by side; whether the mean is at least that of the model on board."""
    before = json.loads((RESULTS / "hadal-mini-accuracy.json").read_text("utf-8"))
    old = {row["task"]: row for row in before["tasks"]}
    for row in report["tasks"]:
        was = old[row["task"]]
        counts = (
            f"{was['correct']:>5}{row['correct']:>5} of {row['total']}{row['correct'] - was['correct']:>+5}"
        )
        print(f"{row['task']:<16}{counts}{was['length']:>7.0f}{row['length']:>5.0f} tokens")
    print(f"{'mean':<16}{before['accuracy']:.2%} {report['accuracy']:.2%}")
    return bool(report["accuracy"] >= before["accuracy"])


# --- the parts that tell of it ---
def between(path: Path, name: str, body: str) -> None:
    """Put `body` between the marks of `name` on a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text("utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{path} needs the marks {begin} and {end}, once each")
    head, rest = text.split(begin)
    path.write_text(f"{head}{begin}\n{body.strip()}\n{end}{rest.split(end)[1]}", "utf-8")


def replaced(path: Path, pattern: str, text: str) -> None:
    """Replace what `pattern` finds, which must stand on the page once."""
    page, count = re.subn(pattern, text, path.read_text("utf-8"))
    if count != 1:
        raise SystemExit(f"{path}: {pattern!r} is there {count} times, not once")
    path.write_text(page, "utf-8")


def assets(export: Path, section: str) -> None:
    """The model into the package, its card with the accuracy."""
    from hadal.train.export import set_accuracy

    complete(export)
    adopt_r1.fits(export, ON_BOARD)
    for path in sorted(export.iterdir()):
        if export.resolve() != ON_BOARD.resolve():
            shutil.copyfile(path, ON_BOARD / path.name)
    set_accuracy(ON_BOARD / "README.md", section)


def complete(export: Path) -> None:
    """Give the tokenizer of an export by an earlier trainer its post-processor, and the manifest its hash."""
    from hadal.text.processor import completed
    from hadal.weights.manifest import FileHash, hash_file, read_manifest, write_manifest

    text, path = completed(export), export / "tokenizer.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
        hashes = read_manifest(export) or {}
        write_manifest(export, hashes | {path.name: FileHash(path.stat().st_size, hash_file(path))})


def results(run: Path, report: dict[str, Any]) -> None:
    """What docs/results keeps of the run, and the picture of its curves."""
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    (RESULTS / "hadal-mini-accuracy.json").write_text(text, "utf-8")
    for name, target in (("recipe.json", "recipe.json"), ("metrics.jsonl", "training.jsonl"),
                         ("data/train/report.json", "data.json")):  # fmt: skip
        if (run / name).is_file():
            shutil.copyfile(run / name, RESULTS / f"hadal-mini-{target}")
    picture = ROOT / "docs" / "images" / "mini-training.png"
    script(["benchmarks/plot_training.py", str(RESULTS / "hadal-mini-training.jsonl"), str(picture)])


def told(lines: Sequence[dict[str, Any]], run: dict[str, Any], recipe: dict[str, Any]) -> str:
    """How the run went, from its log, what its export says, and its resolved recipe."""
    steps = [x for x in lines if x["kind"] == "step"]
    average = run.get("average") is not None
    held = [x for x in lines if x["kind"] == ("heldout_ema" if average else "heldout")]
    late = next((x for x in held if x["step"] >= 0.676 * run["steps"]), held[-1])
    early = next((x for x in steps if x["step"] >= 0.1 * run["steps"]), steps[-1])
    now, vio = held[-1], [x["max_violation"] for x in (steps[0], early, steps[-1])]
    train = recipe["train"]
    first = train.get("batch_tokens_start", 0)
    batch = (f"{first:,} to " if first else "") + f"{train['batch_tokens']:,}"
    what = f"{run['tokens'] / 1e6:.0f} million tokens in {run['steps']:,} steps of {batch}"
    dtype = "FP8" if train.get("fp8") else "BF16"
    rate = f"{run['tokens_per_second'] / 1e3:.0f} thousand tokens a second"
    minutes = f"{run['seconds'] / 60:.1f} minutes in all, from writing the data to the export to FP8"
    weights = " The weights are their moving average." if average else ""
    loss = f"from {late['loss']:.4f} to {now['loss']:.4f} nats a token"
    whole = f"from {late['exact']:.0%} to {now['exact']:.1%}"
    lead = "Its pre-training" if "then" in run else "The model on board"
    return f"""{lead}: {what}, products in {dtype}, at {rate}; {minutes}.{weights}

- The last third, where the rate falls, brings the held-out loss {loss}, and the share of held-out documents \
that greedy decoding writes without one wrong token {whole}.
- MaxVio, the overload of the busiest expert (mean over layers): {vio[0]:.2f} at first, {vio[1]:.2f} after a \
tenth, {vio[2]:.2f} at the end."""


def data_table(path: Path) -> str:
    """What the data pipeline read, dropped and kept."""
    from hadal.data.report import summary, tables

    report = json.loads(path.read_text("utf-8"))
    _, header, rows = tables(report)[0]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    exam = report["evaluations"]
    left = f"Of the {exam['texts']:,} questions of the examination {exam['remaining']} remain."
    return "\n".join([*lines, "", f"{summary(report)}. {left}"])


def acceptance(model: str) -> str:
    """The table of docs/speculation.md: how many drafts stand."""
    from hadal.engine import Engine, SamplingParams
    from hadal.evals.puzzles import problems

    asked = [one.prompt for one in problems(6, seed=0)]
    what = f"{len(asked)} held-out puzzles of all tasks and languages, answers of up to 200 tokens"
    lines = [f"Acceptance on {what}:", "",
             "| drafter | temperature 0: place 1, 2, 3 | tokens a step | temperature 1 | tokens a step |",
             "|---|---|---:|---|---:|"]  # fmt: skip
    drafters = (("mtp, 1 draft", "mtp", 1), ("mtp, 3 drafts", "mtp", 3), ("ngram, 3 drafts", "ngram", 3))
    for name, method, number in drafters:
        cells = [name]
        for temperature in (0.0, 1.0):
            engine = Engine.load(model, speculation=method, num_speculative_tokens=number,
                                 speculation_adaptive=False, speculation_max_batch=32,
                                 max_num_seqs=32)  # fmt: skip
            prompts = [engine.encode_chat([{"role": "user", "content": text}]) for text in asked]
            engine.generate(prompts, SamplingParams(temperature=temperature, max_tokens=200, seed=1))
            stats = engine.stats().speculation
            assert stats is not None and stats.tokens_per_step is not None
            shares = zip(stats.accepted_by_place, stats.drafted_by_place, strict=True)
            cells += [", ".join(f"{a / d:.1%}" for a, d in shares if d), f"{stats.tokens_per_step:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def script(command: Sequence[str]) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def better(report: dict[str, Any], force: bool) -> None:
    """Stop where the model on board has the higher mean."""
    if not compare(report) and not force:
        raise SystemExit("the model on board stays: it is better (--force takes the new one all the same)")


def adopt(run: Path, device: str, *, force: bool, samples: int) -> None:
    """A model without R1's stages, in an order that can be broken off and begun again."""
    from hadal.evals.puzzles import accuracy_section

    export = chosen(run)
    report = measured(export, kept(export), device)
    better(report, force)
    section = accuracy_section(report)  # type: ignore[arg-type]
    assets(export, section)
    results(run, report)
    between(PAGE, "accuracy", section)
    pages(time_taken(facts(ON_BOARD)["seconds"]), report, samples)


def adopt_stages(
    run: Path, beside: Sequence[Path], pretrained: Path, device: str, *, force: bool, samples: int
) -> None:
    """hadal-mini and hadal-mini-dense of runs of `hadal r1`, in an order that can be broken off."""
    from hadal.evals.puzzles import accuracy_section

    stages, exports = adopt_r1.stages_of(run, beside), adopt_r1.exports(run, beside)
    if "r1" not in exports:
        raise SystemExit(f"{run}: stage r1 is not finished; the same `hadal r1` goes on there")
    before = adopt_r1.pretraining(stages, pretrained, ON_BOARD)
    reports = {stage: measured(export, kept(export), device) for stage, export in exports.items()}
    better(reports["r1"], force)
    for export in exports.values():
        complete(export)
        adopt_r1.fits(export, ON_BOARD)
    for stage, export in exports.items():
        name, section = adopt_r1.STAGES[stage], accuracy_section(reports[stage])  # type: ignore[arg-type]
        text = adopt_r1.card(export, stages, stage, before, section)
        adopt_r1.place(export, ON_BOARD.with_name(name), stages, stage, before)
        (ON_BOARD.with_name(name) / "README.md").write_text(text, "utf-8")
        print(f"{name}: {reports[stage]['accuracy']:.2%} of the examination")
    results(pretrained, reports["r1"])
    between(PAGE, "accuracy", accuracy_section(reports["r1"]))  # type: ignore[arg-type]
    between(PAGE, "stages", adopt_r1.stages_section(stages))
    if "dense-distilled" in reports:
        dense = json.dumps(reports["dense-distilled"], ensure_ascii=False, indent=1) + "\n"
        (RESULTS / "hadal-mini-dense-accuracy.json").write_text(dense, "utf-8")
        between(PAGE, "dense", accuracy_section(reports["dense-distilled"]))  # type: ignore[arg-type]
    script(["benchmarks/r1_report.py", str(run), "--beside", *map(str, beside)])
    pages(time_taken(before["seconds"], adopt_r1.seconds(stages, "r1")), reports["r1"], samples)


def time_taken(pretraining: float, stages: float = 0.0) -> str:
    """What README and the page say of it; seconds."""
    if not stages:
        return f"on one GPU in {pretraining / 60:.1f} minutes"
    return f"on one GPU: {pretraining / 60:.1f} minutes of pre-training, {stages / 60:.1f} of R1's stages"


TIME_TAKEN = r"on one GPU(?: in [\d.]+ minutes|: [\d.]+ minutes of pre-training, [\d.]+ of R1's stages)"


def pages(took: str, report: dict[str, Any], samples: int) -> None:
    """What tells of the model on board beside its card. took: what `time_taken` says."""
    found = facts(ON_BOARD)
    log = (RESULTS / "hadal-mini-training.jsonl").read_text("utf-8").splitlines()
    recipe = json.loads((RESULTS / "hadal-mini-recipe.json").read_text("utf-8"))
    between(PAGE, "training", told([json.loads(line) for line in log], found, recipe))
    if (RESULTS / "hadal-mini-data.json").is_file():
        between(PAGE, "data", data_table(RESULTS / "hadal-mini-data.json"))
    for page in (PAGE, README):
        replaced(page, TIME_TAKEN, took)
    replaced(
        README, r"It solves [\d.]+% of the held-out", f"It solves {report['accuracy']:.1%} of the held-out"
    )
    between(SPECULATION, "acceptance", acceptance(str(ON_BOARD)))
    script(["benchmarks/quantisation.py", "--samples", str(samples)])
    script(["benchmarks/report.py"])
    script(["-m", "pytest", "-q", "-p", "no:xdist", *(f"tests/{name}" for name in TESTS)])
    print("\nBy hand:", *BY_HAND, sep="\n- ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "compare", "adopt"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", default="", help="of a run of `hadal r1`: r1 or dense-distilled alone")
    parser.add_argument(
        "--pretrained", type=Path, default=ROOT / "runs" / "hadal-mini",
        help="the run of `hadal train recipes/mini.toml` that a run of `hadal r1` began with",
    )  # fmt: skip
    parser.add_argument("--beside", nargs="*", type=Path, default=[], help="runs with stages that RUN lacks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--force", action="store_true", help="take a model with a lower mean, too")
    parser.add_argument("--samples", type=int, default=100, help="problems a task, of the quantisation table")
    args = parser.parse_args()
    run = args.run.resolve()
    if args.what == "measure":
        for stage, export in candidates(run).items():
            if args.only in ("", stage):
                measure(export, kept(export), args.device)
    elif args.what == "compare":
        export = next(iter(candidates(run).values()))
        sys.exit(0 if compare(measured(export, kept(export), args.device)) else 1)
    elif adopt_r1.is_r1(run):
        beside = [folder.resolve() for folder in args.beside]
        pretrained = args.pretrained.resolve()
        adopt_stages(run, beside, pretrained, args.device, force=args.force, samples=args.samples)
    else:
        adopt(run, args.device, force=args.force, samples=args.samples)


if __name__ == "__main__":
    main()
