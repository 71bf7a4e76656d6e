"""The ablations of the DeepSeek reports, in small: every arm and seed a run of `hadal.train`, then tables.

    python benchmarks/ablations.py balance mtp precision attention --seeds 1,2,3 --device cuda --jobs 6
    python benchmarks/ablations.py balance --overlay recipes/ablations/tiny.toml --device cpu --jobs 2
    python benchmarks/ablations.py mtp --data shards/mine --tokenizer tokenizers/mine
    python benchmarks/ablations.py balance --collect-only       # tables and plots again, from what is in OUT

OUT holds a folder a run (recipe, metrics, probe.json) and, a family, ablation_FAMILY.json. The same line
again goes on where it stopped: finished runs are kept, broken ones resumed. Runs that several families share
are run once. All runs read the same shards: puzzles, written once, or a folder of `hadal data prepare`.
Checkpoints and weights of a finished run are deleted (--keep: not). docs/ablations.md tells the method.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ablation_plan import FAMILIES, Family, Planned, family, overlay, plan, to_toml
from ablation_tables import Measured, collect, measure
from common import machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from hadal.cli.machine import usable_cores
from hadal.data.documents import write_puzzles
from hadal.data.shards import ShardError, read_manifest
from hadal.data.strict import RecipeError
from hadal.train.recipe import Recipe
from hadal.train.runs import is_run, read
from hadal.train.sources import ON_BOARD

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.3
GRACE_SECONDS = 60  # between SIGTERM, which saves, and SIGKILL

Json = dict[str, Any]


# --- data ---
def puzzles(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> Json:
    """Puzzle shards for runs such as `recipe`, written unless they are there; keys of a recipe that reads
    them."""
    for split, tokens in (("train", recipe.tokens_read), ("held-out", recipe.log.heldout_tokens)):
        say(f"puzzles: {tokens:,} tokens in {folder / split}")
        write_puzzles(folder / split, ON_BOARD, tokens=tokens, seed=0, split=split)
    return shards(folder / "train", folder / "held-out", "hadal-mini", mask=True)


def shards(train: Path, heldout: Path, tokenizer: str, *, mask: bool) -> Json:
    """Keys of a recipe that reads shards."""
    for path in (train, heldout):
        if not (path / "manifest.json").is_file():
            raise RecipeError(
                f"{path} holds no shards; `hadal data prepare` makes them, with heldout.share > 0"
            )
    return {
        "data.source": "shards",
        "data.path": str(train),
        "data.heldout_path": str(heldout),
        "data.tokenizer": tokenizer,
        "data.mask_documents": mask,
    }


def described(recipe_data: Json, title: str) -> Json:
    """What the data was, for the result: sizes, never paths."""
    train = read_manifest(Path(recipe_data["data.path"]))
    held = read_manifest(Path(recipe_data["data.heldout_path"]))
    return {
        "title": title,
        "tokens": train.tokens,
        "documents": train.documents,
        "heldout_tokens": held.tokens,
        "sha256": hashlib.sha256(
            "".join(s.bin_sha256 for s in train.shards + held.shards).encode()
        ).hexdigest(),
        "masked": recipe_data["data.mask_documents"],
    }


# --- running ---
@dataclass
class Job:
    """One run on its way: training, then the probe."""

    planned: Planned
    folder: Path
    task: TaskID
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    stage: str = "wait"  # "train", "probe", "done", "failed", "stopped"
    fault: str = ""


@dataclass
class Runner:
    """Runs jobs, `jobs` at once, until all have ended or the time is over."""

    out: Path
    device: str
    jobs: int
    deadline: float  # of time.monotonic(); infinity: none
    keep: bool
    console: Console
    threads: int = field(init=False)
    with_drafts: set[str] = field(default_factory=set)  # keys of the runs whose drafts some family asks for

    def __post_init__(self) -> None:
        self.threads = max(1, usable_cores() // self.jobs)

    def run(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Run each key once. Returns the fault of every key that did not come to its end."""
        columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("{task.fields[state]}"))  # fmt: skip
        faults: dict[str, str] = {}
        self.with_drafts = {p.key for p in planned if wants_drafts(p)}
        with Progress(*columns, console=self.console) as progress:
            unique = {p.key: p for p in reversed(planned)}  # the first family that asks gives the name
            ordered = [p for p in planned if unique.get(p.key) is p]
            total = progress.add_task("all runs", total=len(ordered), state="")
            waiting = [p for p in ordered if not self._finished(p)]
            progress.advance(total, len(ordered) - len(waiting))
            running: list[Job] = []
            try:
                while running or (waiting and time.monotonic() < self.deadline):
                    while waiting and len(running) < self.jobs and time.monotonic() < self.deadline:
                        running.append(self._start(waiting.pop(0), progress))
                    time.sleep(POLL_SECONDS)
                    if time.monotonic() >= self.deadline:
                        self._stop(running)
                    for job in list(running):
                        if self._advance(job, progress):
                            running.remove(job)
                            progress.advance(total)
                            if job.fault:
                                faults[job.planned.key] = job.fault
                                progress.console.print(f"{job.planned.label}: {job.fault}", markup=False)
            finally:
                self._stop(running)
        return faults | {p.key: "was not started: the time was over" for p in waiting}

    def folder(self, planned: Planned) -> Path:
        """Where the run with this key lies, whatever family made it."""
        return next(iter((self.out / "runs").glob(f"*-{planned.key}")), self.out / "runs" / name_of(planned))

    def _finished(self, planned: Planned) -> bool:
        probe = self.folder(planned) / "probe.json"
        if not probe.is_file() or not self._trained(probe.parent):
            return False
        return planned.key not in self.with_drafts or "draft_t0" in json.loads(probe.read_text("utf-8"))

    def _start(self, planned: Planned, progress: Progress) -> Job:
        folder = self.folder(planned)
        trained = self._trained(folder)
        if trained and not (folder / "export").is_dir():
            shutil.rmtree(folder)  # its weights are gone, and something new is asked of them
            trained = False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(to_toml(planned.table), encoding="utf-8")
        task = progress.add_task(planned.label, total=planned.recipe.steps, state="starts")
        job = Job(planned, folder, task)
        self._launch(job, "probe" if trained else "train")
        return job

    def _launch(self, job: Job, stage: str) -> None:
        """Start a stage of a job as a process of its own; what it says goes to a file."""
        folder, recipe = job.folder, job.planned.recipe
        if stage == "train":
            command = ["-m", "hadal.train", str(folder / "recipe.toml"), "--out", str(folder), "--resume"]
            target = folder / "train.log"
        else:
            command = [str(ROOT / "benchmarks" / "ablation_probe.py"), str(folder / "export")]
            command += ["--heldout", recipe.data.heldout_path, "--context", str(recipe.train.context)]
            command += ["--mask-documents"] if recipe.data.mask_documents else []
            command += ["--drafts"] if job.planned.key in self.with_drafts else []
            target = folder / "probe.tmp"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self.threads)}
        errors = folder / f"{stage}.errors.log"
        job.log, job.stage = target.open("wb"), stage
        with errors.open("wb") as stream:
            job.process = subprocess.Popen(
                [sys.executable, *command, "--device", self.device],
                env=environment, stdout=job.log, stderr=stream, cwd=ROOT,
            )  # fmt: skip

    def _advance(self, job: Job, progress: Progress) -> bool:
        """Look after a job; True when it has ended."""
        assert job.process is not None and job.log is not None
        code = job.process.poll()
        step, loss = latest(job.folder)
        progress.update(job.task, completed=step, state=f"{job.stage} {loss}")
        if code is None:
            return False
        job.log.close()
        stopped = job.stage == "stopped" or (
            job.stage == "train" and not code and not self._trained(job.folder)
        )
        if stopped:
            job.fault = f"stopped at step {step:,}: the time was over; the same line goes on"
        elif code:
            job.fault = (
                f"{job.stage} failed with status {code}: {last_line(job.folder / f'{job.stage}.errors.log')}"
            )
        elif job.stage == "train":
            self._launch(job, "probe")
            return False
        else:
            os.replace(job.folder / "probe.tmp", job.folder / "probe.json")
            self._tidy(job.folder)
        progress.update(job.task, visible=bool(job.fault), state=job.fault or "done")
        return True

    def _trained(self, folder: Path) -> bool:
        return is_run(folder) and read(folder).state == "finished"

    def _tidy(self, folder: Path) -> None:
        if not self.keep:
            for name in ("checkpoints", "export"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def _stop(self, running: Sequence[Job]) -> None:
        """End what runs, training with a checkpoint, and wait for it."""
        for job in running:
            if job.process is not None and job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM)
                job.stage = "stopped"
        end = time.monotonic() + GRACE_SECONDS
        for job in running:
            if job.process is None:
                continue
            try:
                job.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()


def wants_drafts(planned: Planned) -> bool:
    """Whether the family of a run measures the engine's drafts, and the run has an MTP module for them."""
    has = planned.recipe.model.get("num_nextn_predict_layers", 0) > 0
    return has and "draft_t0" in family(planned.family).metrics


def name_of(planned: Planned) -> str:
    return f"{planned.family}-{planned.arm}-s{planned.seed}-{planned.key}"


def latest(folder: Path) -> tuple[int, str]:
    """(last logged step, its loss) of a run; (0, "") before there is one."""
    if not is_run(folder):
        return 0, ""
    steps = read(folder).kind("step")
    return (steps[-1]["step"], f"{steps[-1]['loss']:.3f}") if steps else (0, "")


def last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else "it said nothing"


# --- results ---
def results(
    chosen: Sequence[Family], planned: Sequence[Planned], runner: Runner, faults: Mapping[str, str],
    seeds: Sequence[int], context: Json,
) -> list[Json]:  # fmt: skip
    """The result of every family, written to OUT/ablation_FAMILY.json."""
    made = []
    for one in chosen:
        runs: dict[tuple[str, int], Measured] = {}
        for p in planned:
            if p.family == one.name:
                runs[p.arm, p.seed] = measure(p, runner.folder(p), faults.get(p.key, ""))
        first = next(p for p in planned if p.family == one.name).recipe
        scale = {"tokens": first.tokens_read, "steps": first.steps,
                 "context": first.train.context, "batch_tokens": first.train.batch_tokens}  # fmt: skip
        result = {**context, **collect(one, runs, seeds), "scale": scale}
        file = runner.out / f"ablation_{one.name}.json"
        write(file, result)
        made.append(result)
        show(result, runner.console, file)
    return made


def show(result: Json, console: Console, file: Path) -> None:
    """A result on the terminal."""
    table = Table(*result["columns"], title=result["title"])
    for row in result["rows"]:
        table.add_row(*(cell.replace("**", "") for cell in row))
    console.print(table)
    for line in [*result["verdicts"], *(f"FAILED {fault}" for fault in result["faults"])]:
        console.print(f"  {line}", markup=False, highlight=False)
    console.print(f"written: {file}", markup=False)


def draw(made: Sequence[Json], folder: Path, console: Console) -> None:
    """Plots, where there is matplotlib."""
    try:
        import ablation_plots
    except ImportError:
        console.print(
            "no plots: matplotlib is missing; --collect-only draws them elsewhere, from the same folder"
        )
        return
    for result in made:
        console.print(f"drawn: {ablation_plots.draw(result, folder)}", markup=False)


def device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


def at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """What reads a number that must not lie below `least`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    return convert


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="+", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--arms", default="", help="only these of every family, and its reference")
    parser.add_argument("--device", default="auto", type=device_name, help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--jobs", type=at_least(1, int), default=1, help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument(
        "--minutes", type=at_least(0, float), default=0.0, help="stop then, cleanly; 0: no limit"
    )
    parser.add_argument("--data", default="puzzles", help="puzzles, or a folder of `hadal data prepare`")
    parser.add_argument("--tokenizer", default="hadal-mini", help="the one that wrote --data")
    parser.add_argument("--data-title", default="", help="what the text is, for the page")
    parser.add_argument("--overlay", type=Path, help="keys to change in every arm, such as tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--keep", action="store_true", help="checkpoints and exported weights, too")
    parser.add_argument("--collect-only", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def changes(args: argparse.Namespace) -> Json:
    """Dotted keys that lie between the base and the arms, those of the data apart."""
    made: Json = overlay(args.overlay) if args.overlay else {}
    for text in args.overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set {text!r} is not of the form section.key=value")
        try:
            made[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            made[key] = value
    return made


def data_of(args: argparse.Namespace, made: Json, console: Console) -> tuple[Json, Json]:
    """(keys of a recipe that reads the data, what the data is)."""
    if args.data == "puzzles":
        title = args.data_title or "number puzzles with worked solutions, written by this package"
        some = plan(family("balance"), [1], made)[0].recipe
        keys = puzzles(args.out / "data", some, lambda text: console.print(text, markup=False))
    else:
        folder = Path(args.data)
        title = args.data_title or f"shards of {folder.name}"
        keys = shards(folder, folder / "heldout", args.tokenizer, mask=False)
    return keys, described(keys, title)


def about(args: argparse.Namespace, made: Json, device: str, console: Console) -> tuple[Json, Json]:
    """(keys of the data, {machine, data, minutes}); the second is kept in OUT/about.json, so that results can
    be collected on another machine, and that runs on other data are not taken for these. Raises
    RecipeError."""
    file = args.out / "about.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() else None
    if args.collect_only:
        if known is None:
            raise RecipeError(f"{args.out} holds no ablations (no about.json); run them first, or give --out")
        return {}, known
    keys, data = data_of(args, made, console)
    if known is not None and {**known["data"], "title": ""} != {**data, "title": ""}:
        raise RecipeError(
            f"{args.out} holds runs on other data ({known['data']['title']}); give another --out"
        )
    minutes = known["minutes"] if known else 0.0
    now = {"machine": machine(device), "data": data, "minutes": minutes}
    write(file, now)
    return keys, now


def write(file: Path, table: Json) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def only(whole: Family, names: str) -> Family:
    """The family with some of its arms; "": with all."""
    wanted = set(names.split(",")) if names else {arm.name for arm in whole.arm}
    kept = tuple(arm for arm in whole.arm if arm.name in wanted | {whole.reference})
    return replace(whole, arm=kept)


def numbers(text: str) -> list[int]:
    """Seeds, "1,2,3". Raises RecipeError."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds is {text!r}; it must be whole numbers, such as 1,2,3") from None


def main(argv: Sequence[str] | None = None) -> int:
    args, console = arguments(argv), Console()
    started = time.monotonic()
    device = args.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        seeds = numbers(args.seeds)
        made = changes(args)
        keys, context = about(args, made, device, console)
        chosen = [only(family(name), args.arms) for name in args.families]
        by_family = [plan(one, seeds, made | keys) for one in chosen]
    except (RecipeError, ShardError) as error:
        console.print(f"ablations: {error}", markup=False)
        return 2
    # seed by seed, so that what is done when the time is over is whole comparisons
    planned = [p for seed in seeds for runs in by_family for p in runs if p.seed == seed]
    deadline = started + 60 * args.minutes if args.minutes else float("inf")
    runner = Runner(args.out, device, args.jobs, deadline, args.keep, console)
    faults: dict[str, str] = {}
    if not args.collect_only:
        faults = runner.run(planned)
        context["minutes"] = round(context["minutes"] + (time.monotonic() - started) / 60, 1)
        write(args.out / "about.json", context)
    found = results(chosen, planned, runner, faults, seeds, context)
    draw(found, args.out, console)
    return 1 if any(result["faults"] for result in found) else 0


if __name__ == "__main__":
    sys.exit(main())
