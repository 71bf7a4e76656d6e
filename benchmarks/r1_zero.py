"""R1-Zero in minutes: a tiny base from nothing, reinforcement learning by rule rewards, and what changed.

    make r1-zero                                     one seed, less than ten minutes on two cores
    python benchmarks/r1_zero.py --seeds 1 2 3       each from texts and weights of its own
    make r1-zero ARGS="--recipes chain"              chain sums, the fast task: a few minutes
    python benchmarks/r1_zero.py --recipes h100      recipes/r1-zero/h100-*.toml, for one GPU

    texts         hadal/data/zero.py, by texts.toml
    base          `hadal train`, by base.toml: skills, then dilution
    rl            `hadal grpo`, by rl.toml
    examinations  held-out questions, after each

Everything lies in OUT, and what is finished is kept: the same line again goes on. Seeds may run side by side
with one OUT; a last call with all of them puts their results together. Results: OUT/r1-zero.json,
OUT/r1-zero.png (where matplotlib is installed), a table and samples on the terminal. With `--save` the result
goes to benchmarks/results, and its curves to docs/results, where later runs find them to be drawn beside
their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import torch

from hadal.cli.machine import usable_cores
from hadal.data import zero
from hadal.data.strict import build, read_toml
from hadal.engine import Engine, SamplingParams
from hadal.post import grpo_recipe, rewards
from hadal.post.grpo import grpo
from hadal.post.rewards import Completion
from hadal.train import recipe as train_recipe
from hadal.train.main import train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "r1-zero"
KEPT = ROOT / "docs" / "results"
CURVES = ("accuracy", "length", "tries", "precision")
TITLES = {
    "accuracy": "share of right answers",
    "length": "tokens of a completion",
    "tries": "tries of a completion",
    "precision": "verification precision: ✓ is right",
    "long": "share of answers that are worked out",
    "sound": "lists of running totals without an error",
}
CHAIN = ("accuracy", "length", "long", "sound")  # what is drawn of chain sums, which have nothing to verify
CHECKS = ("tries", "claims", "precision")  # rows of tables that chain sums have not


# --- recipes ---
@dataclass(frozen=True)
class SetRecipe:
    """A part of the base's texts: see hadal.data.zero.Mixture."""

    documents: int
    long: float
    patience: float = 1.0


@dataclass(frozen=True)
class PromptsRecipe:
    count: int


@dataclass(frozen=True)
class ExamRecipe:
    count: int
    samples: int = 4


@dataclass(frozen=True)
class TextsRecipe:
    """texts.toml. countdown, chain: how many numbers, from … to; a task of share 0 is left out."""

    skills: SetRecipe
    diluted: SetRecipe
    prompts: PromptsRecipe
    examination: ExamRecipe
    seed: int = 1
    top: int = 14
    within: int = 8
    countdown: tuple[int, int] = (3, 3)
    chain: tuple[int, int] = (5, 7)
    chain_share: float = 0.0

    def mixture(self, part: SetRecipe | None = None) -> zero.Mixture:
        shares = (("countdown", 1 - self.chain_share), ("chain", self.chain_share))
        found = zero.Mixture(
            tuple((name, share) for name, share in shares if share), self.countdown, self.chain, self.top,
            within=self.within,
        )  # fmt: skip
        return dataclasses.replace(found, long=part.long, patience=part.patience) if part else found


# --- what was written, judged ---
@dataclass
class Tally:
    """Completions counted one by one."""

    completions: int = 0
    right: int = 0
    tokens: int = 0
    long: int = 0  # that work something out
    tries: int = 0
    sound: int = 0  # tries with right totals, of the numbers given
    claims: int = 0  # tries that are called right
    true_claims: int = 0
    missed: int = 0  # tries that reach the target and are called wrong
    cut: int = 0

    def add(self, record: Mapping[str, Any], text: str, tokens: int, right: bool, cut: bool) -> None:
        trace = zero.read(text, record["numbers"], record["target"])
        self.completions += 1
        self.right += right
        self.tokens += tokens
        self.long += bool(trace.tries)
        self.tries += len(trace.tries)
        self.sound += sum(one.sound and one.numbers for one in trace.tries)
        self.claims += trace.claims
        self.true_claims += trace.true_claims
        self.missed += trace.missed
        self.cut += cut

    def numbers(self) -> dict[str, float | None]:
        n = self.completions
        return {
            "accuracy": self.right / n, "length": self.tokens / n, "long": self.long / n,
            "tries": self.tries / n, "sound": self.sound / self.tries if self.tries else None,
            "claims": self.claims / n,
            "precision": self.true_claims / self.claims if self.claims else None,
            "missed": self.missed / n, "cut": self.cut / n,
        }  # fmt: skip


def curves(samples: Path) -> list[dict[str, Any]]:
    """A record a step of what `hadal grpo` has sampled."""
    by_step: dict[int, Tally] = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        group = json.loads(line)
        tally = by_step.setdefault(group["step"], Tally())
        for one in group["completions"]:
            tally.add(
                group["record"],
                one["text"],
                one["tokens"],
                one["accuracy"] == 1.0,
                one["finish_reason"] == "length",
            )
    return [{"step": step, **tally.numbers()} for step, tally in sorted(by_step.items())]


@dataclass
class Examined:
    """A model on the held-out questions. greedy, sampled: numbers of a Tally; shown: a few answers."""

    greedy: dict[str, float | None]
    sampled: dict[str, float | None]
    shown: list[dict[str, Any]] = field(default_factory=list)


def examine(
    folder: Path, questions: Path, recipe: grpo_recipe.GrpoRecipe, samples: int, device: str
) -> Examined:
    """Held-out questions once greedily, `samples` times at temperature 1, judged by the recipe's rewards."""
    records = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    limit = recipe.sample.limit(1.0)
    engine = Engine.load(
        folder, device=device, max_num_seqs=recipe.sample.max_seqs,
        max_model_len=recipe.sample.longest, speculation="off",
    )  # fmt: skip
    found: dict[str, Any] = {}
    with rewards.Rewards(rewards.read(recipe.reward)) as judged:
        for name, count, temperature in (("greedy", 1, 0.0), ("sampled", samples, 1.0)):
            asked = [record for record in records for _ in range(count)]
            prompts = [engine.encode_chat([{"role": "user", "content": r["prompt"]}]) for r in asked]
            params = [
                SamplingParams(max_tokens=limit, temperature=temperature, seed=i) for i in range(len(asked))
            ]
            answers = engine.generate(prompts, params)
            totals = judged.score(
                [Completion(r, a.text, len(a.token_ids), a.finish_reason, True, a.token_ids)
                 for r, a in zip(asked, answers, strict=True)], 1.0,
            )  # fmt: skip
            tally = Tally()
            for record, answer, total in zip(asked, answers, totals, strict=True):
                right = total.accuracy == 1.0
                tally.add(record, answer.text, len(answer.token_ids), right, answer.finish_reason == "length")
            found[name] = tally.numbers()
            found["shown"] = [
                {"prompt": r["prompt"], "text": a.text, "right": t.accuracy == 1.0}
                for r, a, t in list(zip(asked, answers, totals, strict=True))[: 6 * count : count]
            ]  # fmt: skip
    return Examined(**found)


# --- the chain of one seed ---
@dataclass
class Study:
    """One seed, in a folder of its own. `prefix` of the recipes' names: "", "chain-" or "h100-"."""

    out: Path
    seed: int
    prefix: str
    device: str
    overrides: Mapping[str, Sequence[str]]
    minutes: float = 0.0  # for the whole of it: reinforcement learning ends in time; 0: no limit
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0  # of this process, over its threads

    def recipe(self, name: str) -> Path:
        return RECIPES / f"{self.prefix}{name}.toml"

    def go(self) -> dict[str, Any]:
        """Texts, base, reinforcement learning, examinations. What is there already is kept."""
        result = self.out / "result.json"
        if result.is_file():
            return dict(json.loads(result.read_text(encoding="utf-8")))
        with self.timed("texts"):
            texts = self.texts()
        with self.timed("base"):
            self.base(texts)
        recipe = self.rl_recipe()
        exam, samples = self.out / "data" / "examination.jsonl", texts.examination.samples
        exams = {}
        for name, folder in (
            ("skills", self.out / "base" / "export-main"),
            ("base", self.out / "base" / "export"),
        ):
            with self.timed("examinations"):
                exams[name] = examine(folder, exam, recipe, samples, self.device)
        recipe = self.in_time(recipe)
        with self.timed("rl"):
            written = self.out / "rl.json"
            written.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
            resumed = (self.out / "rl").exists()
            ended = grpo(written, out=self.out / "rl", resume=resumed, device=self.device)
        if not ended.finished and ended.reason != "time":
            raise SystemExit(f"stopped ({ended.reason}); the same line again goes on")
        with self.timed("examinations"):
            exams["rl"] = examine(self.out / "rl" / "export", exam, recipe, samples, self.device)
        found = {
            "seed": self.seed, "machine": common.machine(accelerator(self.device)),
            "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "threads": torch.get_num_threads(),
            "planned": recipe.train.steps, "curves": curves(self.out / "rl" / "samples.jsonl"),
            "steps": steps(self.out / "rl" / "metrics.jsonl"),
            "exams": {name: dataclasses.asdict(one) for name, one in exams.items()},
        }  # fmt: skip
        result.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return found

    def texts(self) -> TextsRecipe:
        """The tokenizer, the shards and the prompts."""
        given = self.overrides.get("texts", ())
        recipe = build(TextsRecipe, read_toml(self.recipe("texts"), given, "r1-zero/texts"))
        assert isinstance(recipe, TextsRecipe)
        seed, data, tokenizer = recipe.seed + 1000 * self.seed, self.out / "data", self.out / "tokenizer"
        if not (tokenizer / "tokenizer.json").is_file():
            zero.write_tokenizer(tokenizer)
        parts = {"skills": recipe.skills, "diluted": recipe.diluted}
        workers = 1 if recipe.chain_share == 1 else usable_cores()  # chains are written in a second
        for number, (name, part) in enumerate(parts.items()):
            zero.write_set(
                data / name,
                tokenizer,
                count=part.documents,
                seed=seed + number,
                mixture=recipe.mixture(part),
                workers=workers,
            )
        held = recipe.mixture(recipe.skills)
        zero.write_set(data / "held-out", tokenizer, count=200, seed=seed + 2, mixture=held, split="held-out")
        for name, count, split in (
            ("prompts", recipe.prompts.count, "train"),
            ("examination", recipe.examination.count, "held-out"),
        ):
            zero.write_prompts(
                data / f"{name}.jsonl", count=count, seed=seed, mixture=recipe.mixture(), split=split
            )
        return recipe

    def base(self, texts: TextsRecipe) -> None:
        """Skills, then dilution: one run of `hadal train` with a phase."""
        recipe = train_recipe.load(self.recipe("base"), self.overrides.get("base", ()))
        data = self.out / "data"
        (diluted,) = recipe.phases
        recipe = dataclasses.replace(
            recipe,
            run=dataclasses.replace(recipe.run, seed=self.seed),
            data=dataclasses.replace(
                recipe.data, tokenizer=str(self.out / "tokenizer"), path=str(data / "skills"),
                heldout_path=str(data / "held-out"),
            ),
            phases=(dataclasses.replace(diluted, path=str(data / "diluted")),),
        )  # fmt: skip
        written, folder = self.out / "base.json", self.out / "base"
        written.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
        if (folder / "export" / "config.json").is_file() and (
            folder / "export-main" / "config.json"
        ).is_file():
            return
        if not train(written, resume=folder.exists(), out=folder, device=self.device).finished:
            raise SystemExit("the base was stopped; the same line again goes on")

    def rl_recipe(self) -> grpo_recipe.GrpoRecipe:
        recipe = grpo_recipe.load(self.recipe("rl"), self.overrides.get("rl", ()))
        prompts = str(self.out / "data" / "prompts.jsonl")
        return dataclasses.replace(
            recipe,
            run=dataclasses.replace(recipe.run, seed=self.seed),
            model=dataclasses.replace(recipe.model, start=str(self.out / "base" / "export")),
            tasks=tuple(dataclasses.replace(task, path=prompts) for task in recipe.tasks),
            log=dataclasses.replace(recipe.log, samples=recipe.sample.prompts, samples_every=1),
        )

    def in_time(self, recipe: grpo_recipe.GrpoRecipe) -> grpo_recipe.GrpoRecipe:
        """With what `minutes` leaves, once the last examination, as long as the first, has its share."""
        if not self.minutes:
            return recipe
        left = self.minutes - (sum(self.seconds.values()) + self.seconds["examinations"]) / 60
        return dataclasses.replace(
            recipe, train=dataclasses.replace(recipe.train, max_minutes=max(left, 0.1))
        )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begun, worked = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        self.cpu_seconds += time.process_time() - worked


def accelerator(device: str) -> str:
    return "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"


def steps(metrics: Path) -> list[dict[str, Any]]:
    """What the run logged a step, the keys that the page shows."""
    keys = ("step", "entropy", "gap_max", "zero_variance", "sample_tokens_per_second", "tokens_per_second",
            "sample_seconds", "train_seconds", "truncated")  # fmt: skip
    records = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [{key: record.get(key) for key in keys} for record in records if record["kind"] == "step"]


# --- what is shown ---
def smooth(values: Sequence[float | None], width: int = 5) -> list[float | None]:
    """Means over `width` steps before and at each; None where there is none."""
    found: list[float | None] = []
    for end in range(1, len(values) + 1):
        some = [v for v in values[max(0, end - width) : end] if v is not None]
        found.append(fmean(some) if some else None)
    return found


def draw(
    runs: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    path: Path,
    keys: Sequence[str] = CURVES,
) -> bool:
    """Four curves over steps, each seed a line; kept runs grey. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for key, axis in zip(keys, axes, strict=True):
        for number, run in enumerate([*kept, *runs]):
            steps_ = [record["step"] for record in run["curves"]]
            raw = [record[key] for record in run["curves"]]
            live = number >= len(kept)
            color = f"C{number - len(kept)}" if live else "0.7"
            if live:
                axis.plot(
                    steps_,
                    [float("nan") if v is None else v for v in raw],
                    color=color,
                    linewidth=0.6,
                    alpha=0.3,
                )
            label = f"seed {run['seed']}" + ("" if live else ", kept")
            line = [float("nan") if v is None else v for v in smooth(raw)]
            axis.plot(steps_, line, color=color, linewidth=1.4, label=label)
        if key not in ("length", "tries"):
            axis.set_ylim(0, 1.02)
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(TITLES[key], fontsize=10)
        axis.set_xlabel("step of reinforcement learning", fontsize=8)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


ROWS = (
    ("accuracy, greedy", "greedy", "accuracy", "{:.0%}"),
    ("accuracy, temperature 1", "sampled", "accuracy", "{:.0%}"),
    ("tokens", "sampled", "length", "{:.1f}"), ("worked out", "sampled", "long", "{:.0%}"),
    ("tries", "sampled", "tries", "{:.1f}"), ("sound tries", "sampled", "sound", "{:.0%}"),
    ("says ✓", "sampled", "claims", "{:.0%}"), ("✓ is right", "sampled", "precision", "{:.0%}"),
    ("cut off", "sampled", "cut", "{:.0%}"),
)  # fmt: skip
STAGES = {"skills": "after skills", "base": "base (diluted)", "rl": "after RL"}


def table(runs: Sequence[Mapping[str, Any]], prefix: str = "") -> tuple[list[str], list[list[str]]]:
    """Held-out questions, stage by stage; the mean over seeds and, from three on, their deviation."""
    rows = []
    for title, way, key, form in ROWS:
        if prefix == "chain-" and key in CHECKS:
            continue
        row = [title]
        for stage in STAGES:
            values = [run["exams"][stage][way][key] for run in runs]
            some = [value for value in values if value is not None]
            text = form.format(fmean(some)) if some else "–"
            if len(some) > 2:
                text += f" ± {form.format(stdev(some))}"
            row.append(text)
        rows.append(row)
    return ["held-out questions", *STAGES.values()], rows


def show(runs: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """The summary on the terminal."""
    columns, rows = table(runs, prefix)
    wide = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print()
    for row in [columns, *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, wide, strict=True))
            )
        )
    last = runs[-1]
    for stage in ("base", "rl"):
        print(f"\n{STAGES[stage]}, temperature 1, seed {last['seed']}:")
        for one in last["exams"][stage]["shown"][:3]:
            mark = "right" if one["right"] else "wrong"
            print(f"  {one['prompt']}   [{mark}]")
            print("\n".join(f"      {line}" for line in one["text"].splitlines() if line.strip()))
    for run in runs:
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in run["seconds"].items())
        print(f"seed {run['seed']}: {sum(run['seconds'].values()):.0f} s ({parts})")


def result(runs: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    """The table in the form of benchmarks/results."""
    last = [run["curves"][-1]["step"] for run in runs]
    cut = [f"seed {run['seed']} {n}" for run, n in zip(runs, last, strict=True) if n < run.get("planned", n)]
    early = f" Steps of reinforcement learning that time allowed: {', '.join(cut)}." if cut else ""
    columns, rows = table(runs, prefix)
    walls = ", ".join(f"{sum(run['seconds'].values()):.0f}" for run in runs)
    cpus = ", ".join(f"{run['cpu_seconds']:.0f}" for run in runs)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return {
        "machine": runs[-1].get("machine") or common.machine("cpu"),
        "title": f"R1-Zero in minutes (recipes/r1-zero/{prefix}*.toml), seeds {seeds}: mean ± deviation",
        "columns": columns, "rows": rows,
        "notes": f"A seed, from texts to the last examination, took {walls} s of wall clock and {cpus} s of "
        f"processor time, with {runs[0]['threads']} thread(s).{early}",
    }  # fmt: skip


def kept_runs(name: str) -> list[dict[str, Any]]:
    path = KEPT / f"{name}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["runs"]) if path.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--recipes", default="cpu", help="cpu, or what names in recipes/r1-zero begin with: chain, h100"
    )
    parser.add_argument("--out", type=Path, default=None, help="default: runs/r1-zero")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], dest="overrides",
                        metavar="RECIPE:SECTION.KEY=VALUE", help="such as rl:train.steps=20")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.0,
                        help="of each seed; reinforcement learning ends in time for its exam")  # fmt: skip
    parser.add_argument("--save", action="store_true", help="keep result and curves in the repository")
    args = parser.parse_args()
    prefix = "" if args.recipes == "cpu" else f"{args.recipes}-"
    name = "r1-zero" if args.recipes == "cpu" else f"r1-zero-{args.recipes}"
    keys = CHAIN if prefix == "chain-" else CURVES
    device = "cpu" if args.recipes in ("cpu", "chain") and args.device == "auto" else args.device
    out = args.out or Path("runs") / name
    if args.threads:
        torch.set_num_threads(args.threads)
    overrides: dict[str, list[str]] = {}
    for text in args.overrides:
        where, colon, what = text.partition(":")
        if not colon or where not in ("texts", "base", "rl"):
            parser.error(f"--set {text}: RECIPE is texts, base or rl")
        overrides.setdefault(where, []).append(what)
    runs = []
    for seed in args.seeds:
        folder = out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        runs.append(Study(folder, seed, prefix, device, overrides, args.minutes).go())
        kept = [run for run in kept_runs(name) if run["seed"] not in args.seeds]
        (out / "r1-zero.json").write_text(
            json.dumps({"runs": runs}, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        drawn = draw(runs, kept, out / "r1-zero.png", keys)
    show(runs, prefix)
    print(out / "r1-zero.png" if drawn else "no picture: it needs matplotlib (pip install 'hadal[train]')")
    if args.save:
        found = result(runs, prefix)
        common.save(name.replace("-", "_"), found)
        KEPT.mkdir(parents=True, exist_ok=True)
        (KEPT / f"{name}.json").write_text(
            json.dumps({"runs": runs}, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        draw(runs, [], ROOT / "docs" / "images" / f"{name}.png", keys)
    return 0


if __name__ == "__main__":
    sys.exit(main())
