"""What each kind of stage does, what it costs, and what names its result.

Training is done by `hadal train`, `hadal sft` and `hadal grpo` themselves, on a recipe of their own that lies
in the stage's folder as stage.json: the same runs, checkpoints and metrics, and the same way to go on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hadal.config import ConfigError, ModelConfig
from hadal.model.transformer import Transformer
from hadal.post import average, preference, rejection
from hadal.post.grpo import grpo
from hadal.post.r1_measure import measure
from hadal.post.r1_recipe import DATA_KINDS, MARK, MeasureRecipe, R1Recipe, RecipeError, Stage, resolved
from hadal.post.rewards.model import RewardModel
from hadal.post.sft import Base, sft
from hadal.post.sft_recipe import BaseRecipe
from hadal.post.worked import write_conversations, write_prompts
from hadal.text.tokenizer import Tokenizer
from hadal.train.flops import flops_per_token
from hadal.train.main import Outcome, device_of, train
from hadal.train.sources import ON_BOARD
from hadal.weights import WeightsError, hub
from hadal.weights import save as save_weights
from hadal.weights.layout import read_config

UNMEASURED = ("init", "preference")
MEAN_TOKENS = 64  # of a conversation, for an estimate before there is one


@dataclass(frozen=True)
class Job:
    """A stage to be made. made: what it is to make; places, digests: of the stages that it names."""

    stage: Stage
    recipe: R1Recipe
    folder: Path
    made: Path
    places: Mapping[str, str]
    digests: Mapping[str, str]
    resume: bool
    device: str
    console: Console

    def say(self, text: str) -> None:
        self.console.print(f"{self.stage.name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def place(self, value: str) -> str:
        """Where what a table names lies: a stage's result, or as it is."""
        return str(resolved(value, self.places))


@dataclass(frozen=True)
class Made:
    """facts: plain figures for tables: tokens trained and sampled, operations, rows."""

    finished: bool
    facts: dict[str, Any] = field(default_factory=dict)


def is_measured(stage: Stage) -> bool:
    """Whether its model is asked problems: random weights and preference heads are not."""
    return stage.makes_model and stage.kind not in UNMEASURED


# --- digests ---
def digest(made: Path) -> str:
    """What names a result: of a folder its model files, of a file its bytes; empty where there is none."""
    if made.is_dir():
        return hub.digest(made)
    return hashlib.sha256(made.read_bytes()).hexdigest() if made.is_file() else ""


def files_of(stage: Stage, beside: Path) -> dict[str, str]:
    """Digests of files and models that a stage names and that no stage makes."""
    table, found = stage.table, {}
    names = [*table.get("data", {}).get("files", []), *table.get("data", {}).get("heldout_files", [])]
    names += [one["path"] for one in table.get("tasks", []) if isinstance(one, Mapping) and one.get("path")]
    for name in names:
        if not name.startswith(MARK):
            path = Path(name).expanduser()
            found[name] = digest(path if path.is_file() else beside / name)
    start = (
        table.get("model", {}).get("start") if isinstance(table.get("model"), Mapping) else table.get("model")
    )
    for one in (start, *table.get("models", [])):
        if isinstance(one, str) and not one.startswith(MARK):
            found[one] = hub.digest(_folder(stage, one))
    return found


def _folder(stage: Stage, name: str) -> Path:
    """Of a model that no stage makes."""
    try:
        return Path(hub.resolve(name))
    except WeightsError as error:
        if "/" in name or "\\" in name:  # a path, as in recipes that begin with what another recipe has made
            raise RecipeError(
                f"stages.{stage.name} begins with {name}, and there is no such folder: make it first (see "
                "the head of the recipe), or name another model with --set"
            ) from None
        raise RecipeError(f"stages.{stage.name}: {error}") from None


# --- making ---
def _init(job: Job) -> Made:
    recipe = job.stage.recipe
    source = ON_BOARD if recipe.tokenizer == "hadal-mini" else Path(recipe.tokenizer)
    tokenizer = Tokenizer.load(source)
    table = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids),
             "vocab_size": -(-tokenizer.vocab_size // 64) * 64, "initializer_range": recipe.std}  # fmt: skip
    try:
        config = ModelConfig.from_hf(table | dict(recipe.model))
    except ConfigError as error:
        raise RecipeError(f"stages.{job.stage.name}.model: {error}") from None
    torch.manual_seed(recipe.seed)
    model = Transformer(config).init_weights(recipe.seed, recipe.std)
    with tempfile.TemporaryDirectory(prefix="hadal-r1-") as side:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, Path(side) / name)
        save_weights(model, job.made, dtype=torch.float32, files_from=side, overwrite=True)
    return Made(True, {"parameters": config.parameters().main, "active": config.parameters().active})


def _average(job: Job) -> Made:
    recipe = job.stage.recipe
    folders = [Path(hub.resolve(job.place(name))) for name in recipe.models]
    average.write(folders, job.made, recipe.format, recipe.name or job.stage.name, job.stage.title)
    count = read_config(job.made).parameters()
    return Made(True, {"parameters": count.main, "active": count.active})


def _worked(job: Job) -> Made:
    r = job.stage.recipe
    rows = write_conversations(job.made, r.tasks, r.count, r.seed, r.faults, r.examined)
    return Made(True, {"rows": sum(rows.values()), "tasks": rows})


def _prompts(job: Job) -> Made:
    r = job.stage.recipe
    rows = write_prompts(job.made, r.tasks, r.count, r.seed, examined=r.examined)
    return Made(True, {"rows": sum(rows.values()), "tasks": rows})


def _own_recipe(job: Job) -> Path:
    """The recipe of a stage's own verb, in its folder. Files are looked for here, then beside the recipe."""
    table = resolved(job.stage.table, job.places)
    table = {key: value for key, value in table.items() if key not in ("kind", "preference")}
    if job.stage.kind == "sft":
        table["data"] = {**table["data"]}
        for key in ("files", "heldout_files"):
            names = table["data"].get(key, [])
            table["data"][key] = [_beside(name, job.recipe.beside) for name in names]
    if job.stage.kind == "grpo":
        table["tasks"] = [
            {**one, "path": _beside(one["path"], job.recipe.beside)} if one.get("path") else one
            for one in table["tasks"]
        ]
    path = job.folder / "stage.json"
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _beside(name: str, beside: Path) -> str:
    here = Path(name).expanduser()
    return str(here if here.is_file() or not (beside / name).is_file() else beside / name)


def ended(outcome: Outcome) -> bool:
    """Whether a run is over: at its last step, or at `train.max_minutes`, which is a stage's budget here."""
    return outcome.reason in ("finished", "time")


def _train(job: Job) -> Made:
    outcome = train(
        _own_recipe(job), resume=job.resume, out=job.folder, device=job.device, console=job.console
    )
    return Made(ended(outcome), _trained(job.made, outcome.tokens) if ended(outcome) else {})


def _sft(job: Job) -> Made:
    outcome = sft(_own_recipe(job), resume=job.resume, out=job.folder, device=job.device, console=job.console)
    if not ended(outcome):
        return Made(False)
    join_files(job)
    return Made(True, _trained(job.made, outcome.tokens))


def join_files(job: Job) -> None:
    """The stage's data set in one file of its own, rows in the order of the files."""
    names = resolved(job.stage.table["data"]["files"], job.places)
    with (job.folder / f"{job.stage.name}.jsonl").open("w", encoding="utf-8") as whole:
        for name in names:
            path = Path(_beside(name, job.recipe.beside))
            if path.suffix != ".gz":
                whole.write(path.read_text(encoding="utf-8"))


def _trained(export: Path, tokens: int) -> dict[str, Any]:
    config = read_config(export)
    n = config.parameters()
    return {"parameters": n.main, "active": n.active, "trained_tokens": tokens, "sampled_tokens": 0,
            "operations": flops_per_token(config) * tokens}  # fmt: skip


def _grpo(job: Job) -> Made:
    measured = None
    if job.stage.table.get("preference"):
        export = Path(job.place(job.stage.table["preference"]))
        base = Base.of(BaseRecipe(str(export)))
        on = str(device_of(job.device))
        measured = preference.scorer(export, base.template, base.tokenizer, on)
    outcome = grpo(
        _own_recipe(job), resume=job.resume, out=job.folder, device=job.device, console=job.console,
        model=measured,
    )  # fmt: skip
    if not ended(outcome):
        return Made(False)
    steps = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["kind"] == "step"]
    fed = sum(step["fed_tokens"] for step in steps)
    config = read_config(job.made)
    n, each = config.parameters(), flops_per_token(config)
    scored = fed if any(step["kl"] is not None for step in steps) else 0  # the reference reads them, too
    facts = {"parameters": n.main, "active": n.active, "trained_tokens": fed,
             "sampled_tokens": outcome.tokens,
             "operations": each * (fed + (outcome.tokens + scored) / 3), "steps": len(steps),
             "reward": [steps[0]["reward"], steps[-1]["reward"]],
             "length": [steps[0]["length"], steps[-1]["length"]]}  # fmt: skip
    return Made(True, facts)


@contextmanager
def opened(folder: Path, device: str, longest: int, seats: int) -> Iterator[Any]:
    """An engine for a stage's model."""
    from hadal.engine import Engine
    from hadal.engine.memory import release
    from hadal.model.context import Cache

    config = read_config(folder)
    longest = min(longest, config.max_position_embeddings)
    pages = -(-longest // 64)
    on = device_of(device)
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    page = Cache.bytes_per_page(config, 64, dtype)
    engine = Engine.load(
        folder, device=str(on), max_model_len=longest, max_num_seqs=seats, page_size=64,
        cache_bytes=(pages * seats + 2) * page, speculation="off",
    )  # fmt: skip
    try:
        yield engine
    finally:
        del engine
        release()


def measured(export: Path, recipe: MeasureRecipe, device: str) -> dict[str, Any]:
    """The figures of a stage's model."""
    with opened(export, device, recipe.max_tokens + 256, recipe.max_seqs) as engine:
        return measure(engine, recipe)


def _rejection(job: Job) -> Made:
    table = {key: value for key, value in resolved(job.stage.table, job.places).items() if key != "kind"}
    tasks = [
        {**one, "path": _beside(one["path"], job.recipe.beside)} if one.get("path") else one
        for one in table["tasks"]
    ]
    from hadal.data.strict import build

    recipe = build(rejection.RejectionRecipe, {**table, "tasks": tasks})
    folder = Path(hub.resolve(recipe.model))
    begun = time.perf_counter()
    told = [begun]

    def tell(done: int) -> None:
        if time.perf_counter() - told[0] > 5 or done == recipe.prompts:
            told[0] = time.perf_counter()
            rate = done / max(1e-9, told[0] - begun)
            left = (recipe.prompts - done) / max(rate, 1e-9)
            job.say(f"{done:,} of {recipe.prompts:,} prompts × {recipe.samples}, {left:.0f} s left")

    with opened(folder, job.device, recipe.max_tokens + 512, recipe.max_seqs) as engine:
        report = rejection.sampled(job.stage.name, job.folder, recipe, engine, hub.digest(folder), tell)
    dropped = ", ".join(f"{n:,} {why}" for why, n in report["dropped"].items()) or "none"
    job.say(f"{report['kept']:,} of {report['samples']:,} samples kept; dropped: {dropped}")
    if not report["kept"]:
        where = job.folder / "samples.jsonl"
        raise RecipeError(f"stages.{job.stage.name} kept no sample ({dropped}); they lie in {where}")
    config = read_config(folder)
    facts = {"rows": report["kept"], "sampled_tokens": report["tokens"], "trained_tokens": 0,
             "operations": flops_per_token(config) / 3 * report["tokens"]}  # fmt: skip
    return Made(True, facts | {"dropped": report["dropped"]})


def _preference(job: Job) -> Made:
    recipe = job.stage.recipe
    start = Path(job.place(recipe.model))
    base = Base.of(BaseRecipe(str(start)))
    torch.manual_seed(recipe.seed)
    pairs = preference.pairs_of(preference.pool_of(job.place(recipe.pool)), recipe.pairs, recipe.seed)
    preference.write_pairs(job.folder / f"{job.stage.name}.jsonl", pairs)
    from hadal.weights import load as load_weights

    model = RewardModel(
        load_weights(start, dtype=torch.float32, device=device_of(job.device), quantize="off")
    )
    encode = preference.encoder(base.template, base.tokenizer)

    def tell(step: int, steps: int, loss: float) -> None:
        if step % 25 == 0 or step == steps:
            job.say(f"step {step}/{steps}, loss {loss:.4f}")

    report = preference.train(model, pairs, encode, recipe, tell)
    (job.folder / preference.REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if job.made.exists():
        shutil.rmtree(job.made)
    model.save(job.made, files_from=start)
    job.say(f"right on {report['accuracy']:.1%} of {report['held_out_pairs']:,} pairs of unseen prompts")
    return Made(True, _trained(job.made, report["tokens"]) | {
        "rows": len(pairs), "accuracy": report["accuracy"], "held_out_pairs": report["held_out_pairs"]
    })  # fmt: skip


MAKERS: Mapping[str, Callable[[Job], Made]] = {
    "init": _init, "average": _average, "worked": _worked, "prompts": _prompts, "train": _train, "sft": _sft,
    "grpo": _grpo, "rejection": _rejection, "preference": _preference,
}  # fmt: skip


# --- what it will cost ---
@dataclass(frozen=True)
class Cost:
    """Tokens trained on and sampled, at most; seconds; whether a run of this very stage told them."""

    trained: float
    sampled: float
    seconds: float
    known: bool

    def text(self) -> str:
        if not (self.trained or self.sampled or self.seconds >= 1):
            return "seconds"
        parts = [
            f"{n / 1e6:.2f}M {what}"
            for n, what in ((self.trained, "trained"), (self.sampled, "sampled"))
            if n
        ]
        about = "took" if self.known else "about"
        return ", ".join([*parts, f"{about} {self.seconds / 60:.1f} min"])


def cost(
    stage: Stage,
    recipe: R1Recipe,
    entry: Mapping[str, Any],
    done: Sequence[Mapping[str, Any]],
    made: Callable[[Stage], Path],
) -> Cost:
    """An estimate; what the same stage took before, where it was done. Measuring counts, too."""
    facts = entry.get("facts") or {}
    if entry.get("finished"):
        seconds = entry["seconds"] + (entry.get("measured") or {}).get("seconds", 0.0)
        return Cost(facts.get("trained_tokens", 0), facts.get("sampled_tokens", 0), seconds, True)
    trained, sampled = _tokens(stage, recipe, made)
    asked = 0
    if is_measured(stage):
        m = recipe.measure
        asked = len(m.tasks) * m.count * m.samples * min(m.max_tokens, MEAN_TOKENS)
    rates = recipe.estimate
    learn = _rate(done, "trained_tokens", ("train", "sft")) or rates.train_tokens_per_second
    draw = _rate(done, "sampled_tokens", ("rejection",)) or rates.sample_tokens_per_second
    return Cost(trained, sampled + asked, trained / learn + (sampled + asked) / draw, False)


def _rate(done: Sequence[Mapping[str, Any]], key: str, kinds: Sequence[str]) -> float:
    chosen = [e for e in done if e["kind"] in kinds and e.get("seconds")]
    tokens = sum((e.get("facts") or {}).get(key, 0) for e in chosen)
    seconds = sum(e["seconds"] for e in chosen)
    return float(tokens / seconds) if seconds else 0.0


def _tokens(stage: Stage, recipe: R1Recipe, made: Callable[[Stage], Path]) -> tuple[float, float]:
    """(trained, sampled): for samples half of their limit is reckoned."""
    r = stage.recipe
    if stage.kind == "train":
        return float(r.train.tokens), 0.0
    if stage.kind == "sft":
        rows = sum(_rows(name, recipe, made) for name in r.data.files)
        return r.train.epochs * rows * MEAN_TOKENS, 0.0
    if stage.kind == "grpo":
        drawn = r.train.steps * r.sample.prompts * r.sample.group * r.sample.max_tokens / 2
        return drawn * r.train.epochs, drawn
    if stage.kind == "rejection":
        return 0.0, r.prompts * r.samples * r.max_tokens / 2
    if stage.kind == "preference":
        return r.epochs * r.pairs * 2 * MEAN_TOKENS, 0.0
    return 0.0, 0.0


def _rows(name: str, recipe: R1Recipe, made: Callable[[Stage], Path]) -> float:
    if not name.startswith(MARK):
        path = Path(_beside(name, recipe.beside))
        return path.stat().st_size / 300 if path.is_file() else 0.0
    stage = recipe.stage(name[1:])
    path = made(stage)
    if path.is_file():
        with path.open("rb") as lines:
            return sum(1 for _ in lines)
    assert stage.kind in DATA_KINDS
    r = stage.recipe
    return float(r.prompts * r.samples / 2 if stage.kind == "rejection" else r.count)
