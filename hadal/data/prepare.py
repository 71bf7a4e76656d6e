"""`hadal data prepare`: from raw files to a folder of token shards, stage by stage.

    index → read → judge → tokenise → mix → pack → finish

Each stage is a row of tasks (hadal/data/tasks.py) whose folder is named after everything that its result
depends on: the input's hashes, the recipe's sections, the code. So a stopped run goes on where it was, a
changed recipe repeats only the stages that it touches, and a stale result is never taken for a fresh one.

The set is put together in OUT.partial and renamed to OUT when it is whole: OUT is finished, or not there.
The same input and recipe give the same shards and manifest, byte for byte, by any number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hadal.data.encoding import DocumentEncoder
from hadal.data.puzzle_source import generator_digest
from hadal.data.reading import InputFile, Piece, digest_of, input_files, pieces_of, sha256_of, size_of
from hadal.data.recipe import DataRecipe, Source
from hadal.data.report import funnel, markdown, merge
from hadal.data.shards import Manifest, ShardError, ShardFile, read_manifest, write_manifest
from hadal.data.strict import RecipeError
from hadal.data.tasks import Executor, Local, Task, results
from hadal.text.tokenizer import Tokenizer

ON_BOARD = Path(__file__).resolve().parents[1] / "assets" / "hadal-mini"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A finished set. fresh: made now, rather than found."""

    folder: Path
    manifest: Manifest
    report: dict[str, Any]
    fresh: bool


@dataclass
class _Run:
    """What the stages share."""

    recipe: DataRecipe
    base: Path
    work: Path
    executor: Executor
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: bool = False

    def stage(self, title: str, tasks: Sequence[Task]) -> list[Any]:
        """Do the tasks of a stage, tell how far it is, and give their results."""
        start, done, total = time.monotonic(), 0, sum(task.size for task in tasks)
        self.resumed |= any(task.done for task in tasks)

        def tick(amount: int) -> None:
            nonlocal done
            done = min(total, done + amount)
            self.progress(title, done, total)

        self.executor(tasks, tick)
        self.seconds[title] = self.seconds.get(title, 0.0) + time.monotonic() - start
        return results(tasks)

    def folder(self, name: str, key: str, number: int | None = None) -> str:
        """Where a task keeps its files."""
        place = self.work / f"{name}-{key}"
        return str(place if number is None else place / f"{number:05d}")


@dataclass(frozen=True)
class _Part:
    source: Source
    piece: Piece
    task: Task

    @property
    def folder(self) -> str:
        return self.task.folder


def digest(*values: Any) -> str:
    """16 hex digits of plain values."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def code_digest() -> str:
    """Of the sources that the stages are made of: another version may cut another way."""
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "text" / "tokenizer.py"]
    return digest([source.read_text(encoding="utf-8") for source in sources])


def tokenizer_folder(recipe: DataRecipe, base: Path) -> Path:
    """The tokenizer's folder. Raises RecipeError."""
    name = recipe.tokens.tokenizer
    folder = ON_BOARD if name == "hadal-mini" else (base / Path(name).expanduser()).resolve()
    if not (folder / "tokenizer.json").is_file():
        raise RecipeError(
            f"tokens.tokenizer: {folder} has no tokenizer.json; `hadal data tokenizer` makes one"
        )
    return folder


def prepare(
    recipe: DataRecipe, out: Path, *, base: Path | None = None, work: Path | None = None,
    executor: Executor | None = None, progress: Progress | None = None, workers: int = 1,
) -> Prepared:  # fmt: skip
    """Make the shards of a recipe in `out`. base: what the recipe's paths are relative to (default: here).

    work: where the stages keep their files, left there for the next time; default: beside `out`, removed at
    the end. Raises RecipeError, DataError, ShardError, TaskError; after any of them, and after Ctrl-C, the
    same call goes on.
    """
    started = time.monotonic()
    base = base or Path.cwd()
    run = _Run(recipe, base, work or out.with_name(out.name + ".work"), executor or Local(workers),
               progress or (lambda title, done, total: None))  # fmt: skip
    tokenizer = Tokenizer.load(tokenizer_folder(recipe, base))
    DocumentEncoder(tokenizer, bos=recipe.tokens.bos, fim_rate=recipe.fim.rate)  # refuses what does not fit
    inputs, evaluations = _inputs(run)
    made_by = _made_by(run, inputs, evaluations)
    if out.exists():
        return _found(out, made_by)
    index, index_result = _index(run, evaluations)
    parts = _read(run, inputs, index)
    read = [
        {"source": p.source.name, **r} for p, r in zip(parts, results([p.task for p in parts]), strict=True)
    ]
    judged, judgement = _judge(run, parts, read, index)
    tokenised, token_results = _tokenise(run, parts, read, judged)
    planned, plan = _mix(run, parts, tokenised)
    dtype = "uint16" if tokenizer.padded_vocab_size <= 1 << 16 else "uint32"
    shards = _pack(run, tokenised, planned, plan, dtype, index)
    if run.recipe.decontaminate.puzzles:
        index_result = {**index_result, "remaining": sum(r["leaks"] for r in results(shards))}
    dropped = merge([e for r in read for e in r["dropped"]] + judgement["dropped"])
    report = {
        "name": recipe.name,
        "sources": funnel([s.name for s in recipe.source], read, dropped),
        "mixture": plan["sources"], "heldout": plan["heldout"], "evaluations": index_result,
        "dropped": dropped, "seconds": {k: round(v, 3) for k, v in run.seconds.items()},
    }  # fmt: skip
    manifest = _finish(run, out, made_by, plan, shards, report)
    seconds = time.monotonic() - started
    if not run.resumed and isinstance(run.executor, Local) and seconds > 0:
        tokens = sum(r["tokens"] for r in token_results)
        report["tokens_per_minute_per_core"] = round(tokens / seconds * 60 / max(1, run.executor.workers))
        _write_report(out, report)
    if work is None:
        shutil.rmtree(run.work, ignore_errors=True)
    return Prepared(out, manifest, report, True)


def _inputs(run: _Run) -> tuple[dict[str, list[InputFile]], list[InputFile]]:
    """The files of every source, and of the evaluation sets, with their hashes."""
    found = {s.name: input_files(s, run.base) for s in run.recipe.source}
    settings = run.recipe.decontaminate
    evaluations = input_files(Source("evaluations", paths=settings.paths), run.base) if settings.paths else []
    total = sum(f.bytes for files in [*found.values(), evaluations] for f in files)
    done = 0

    def hashed(files: list[InputFile]) -> list[InputFile]:
        return [replace(f, sha256=digest_of(f, tick)) for f in files]

    def tick(amount: int) -> None:
        nonlocal done
        done += amount
        run.progress("hashing the input", done, total)

    return {name: hashed(files) for name, files in found.items()}, hashed(evaluations)


def _made_by(run: _Run, inputs: dict[str, list[InputFile]], evaluations: list[InputFile]) -> dict[str, Any]:
    """What the manifest says: enough to make the set again, nothing of this machine."""
    tokenizer = tokenizer_folder(run.recipe, run.base) / "tokenizer.json"

    def told(files: list[InputFile]) -> list[dict[str, Any]]:
        return [{"file": f.label, "bytes": f.bytes, "sha256": f.sha256} for f in files]

    made_by = {
        "generator": "hadal data prepare",
        "recipe": run.recipe.to_dict(),
        "tokenizer_sha256": sha256_of(tokenizer),
        "inputs": {name: told(files) for name, files in inputs.items()},
        "evaluations": told(evaluations),
    }
    plain: dict[str, Any] = json.loads(json.dumps(made_by))
    return plain


def _found(out: Path, made_by: dict[str, Any]) -> Prepared:
    """The set that lies at `out` already, if it is this one."""
    manifest = read_manifest(out)
    differs = [key for key, value in made_by.items() if manifest.made_by.get(key) != value]
    if differs:
        raise ShardError(
            f"{out} holds another set (it differs in {', '.join(differs)}); choose another --out"
        )
    return Prepared(out, manifest, json.loads((out / "report.json").read_text(encoding="utf-8")), False)


def _spec(piece: Piece) -> dict[str, Any]:
    return {"file": asdict(piece.file), "begin": piece.begin, "end": piece.end}


def _told(files: Sequence[InputFile]) -> list[tuple[str, str]]:
    return [(f.label, f.sha256) for f in files]


def _index(run: _Run, evaluations: list[InputFile]) -> tuple[str, dict[str, Any]]:
    """(folder of the index of the evaluation sets, what is in it); "" where there are none."""
    settings = asdict(run.recipe.decontaminate)
    if not evaluations and not settings["puzzles"]:
        return "", {"texts": 0, "ngrams": 0}
    settings["paths"] = []
    pieces = [piece for file in evaluations for piece in pieces_of(file)]
    generators = generator_digest() if settings["puzzles"] else ""
    folder = run.folder("index", digest(_told(evaluations), settings, code_digest(), generators))
    spec = {"pieces": [_spec(piece) for piece in pieces], "settings": settings}
    task = Task("hadal.data.steps:index_evaluations", folder, spec, max(1, sum(f.bytes for f in evaluations)))
    return folder, run.stage("reading evaluation sets", [task])[0]


def _read(run: _Run, inputs: dict[str, list[InputFile]], index: str) -> list[_Part]:
    recipe = run.recipe
    shared = {"keep": list(recipe.language.keep), "quality": asdict(recipe.quality), "index": index,
              "duplicates": asdict(recipe.duplicates)}  # fmt: skip
    parts = []
    code = code_digest()
    for source in recipe.source:
        for file in inputs[source.name]:
            shape: dict[str, Any] = {**shared, "source": source.name, "text": source.text, "id": source.id}
            made = "read_piece"
            if source.puzzles:
                shape |= {"seed": recipe.seed, "split": source.split, "documents": source.documents}
                made = "read_puzzles"
            key = digest(_told([file]), file.kind, shape, code)
            for number, piece in enumerate(pieces_of(file)):
                spec = {**shape, "piece": _spec(piece)}
                folder = run.folder("read", key, number)
                parts.append(
                    _Part(source, piece, Task(f"hadal.data.steps:{made}", folder, spec, size_of(piece)))
                )
    run.stage("reading and filtering", [p.task for p in parts])
    return parts


def _judge(run: _Run, parts: list[_Part], read: list[Any], index: str) -> tuple[str, dict[str, Any]]:
    spec = {"parts": [p.folder for p in parts], "sources": [p.source.name for p in parts],
            "duplicates": asdict(run.recipe.duplicates), "index": index}  # fmt: skip
    folder = run.folder("judge", digest([Path(p.folder).parts[-2:] for p in parts], spec["sources"]))
    task = Task("hadal.data.steps:judge", folder, spec, sum(r["documents"] for r in read))
    return folder, run.stage("finding duplicates", [task])[0]


def _tokenise(run: _Run, parts: list[_Part], read: list[Any], judged: str) -> tuple[list[Task], list[Any]]:
    recipe = run.recipe
    tokenizer = tokenizer_folder(recipe, run.base)
    files = [tokenizer / name for name in ("tokenizer.json", "tokenizer_config.json")]
    shared = {"seed": recipe.seed, "bos": recipe.tokens.bos, "split_rate": recipe.tokens.split_rate,
              "fim_rate": recipe.fim.rate, "heldout": recipe.heldout.share}  # fmt: skip
    key = digest(Path(judged).name, shared, [sha256_of(file) for file in files if file.is_file()])
    tasks, first = [], 0
    for number, (part, result) in enumerate(zip(parts, read, strict=True)):
        spec = {**shared, "part": part.folder, "judged": judged, "first": first, "source": part.source.name,
                "tokenizer": str(tokenizer), "puzzles": bool(part.source.puzzles)}  # fmt: skip
        tasks.append(
            Task("hadal.data.steps:tokenise", run.folder("tokens", key, number), spec, result["bytes"])
        )
        first += result["documents"]
    return tasks, run.stage("tokenising", tasks)


def _mix(run: _Run, parts: list[_Part], tokenised: list[Task]) -> tuple[str, dict[str, Any]]:
    recipe = run.recipe
    spec = {
        "parts": [task.folder for task in tokenised], "sources": [p.source.name for p in parts],
        "weights": {s.name: s.weight for s in recipe.source}, "mixture": asdict(recipe.mixture),
        "per_shard": recipe.tokens.per_shard,
    }  # fmt: skip
    settings = {key: spec[key] for key in ("sources", "weights", "mixture", "per_shard")}
    folder = run.folder("mix", digest([Path(t.folder).parts[-2:] for t in tokenised], settings))
    return folder, run.stage("mixing", [Task("hadal.data.steps:mix", folder, spec)])[0]


def _pack(
    run: _Run, tokenised: list[Task], planned: str, plan: dict[str, Any], dtype: str, index: str
) -> list[Task]:
    key = digest(Path(planned).name, dtype)
    shared = {"parts": [task.folder for task in tokenised], "plan": planned, "dtype": dtype, "exam": index,
              "tokenizer": str(tokenizer_folder(run.recipe, run.base))}  # fmt: skip
    tasks = [
        Task("hadal.data.steps:pack", run.folder("shards", key, number),
             {**shared, "name": s["name"], "begin": s["begin"], "end": s["end"]}, s["tokens"])
        for number, s in enumerate(plan["shards"])
    ]  # fmt: skip
    run.stage("writing shards", tasks)
    return tasks


def _nothing_left(report: Mapping[str, Any]) -> str:
    """Why there is nothing to write: what came in, and at which stages it went."""
    sources = report["sources"].values()
    gone = {stage: sum(s["dropped"][stage] for s in sources) for stage in next(iter(sources))["dropped"]}
    told = [f"{sum(s['read'] for s in sources):,} read"]
    told += [f"{count:,} dropped ({stage})" for stage, count in gone.items() if count]
    kept = sum(s["kept"] for s in sources)
    told += [f"{kept:,} kept, all of them held out"] if kept else []
    why = ", ".join(told)
    return f"no document is left to train on ({why}); loosen the filters, or give more text"


def _finish(
    run: _Run, out: Path, made_by: dict[str, Any], plan: dict[str, Any], shards: list[Task],
    report: dict[str, Any],
) -> Manifest:  # fmt: skip
    """Put the set together beside its place, and rename it."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    made: dict[bool, list[ShardFile]] = {False: [], True: []}
    for planned, task, result in zip(plan["shards"], shards, results(shards), strict=True):
        folder = partial / "heldout" if planned["heldout"] else partial
        folder.mkdir(parents=True, exist_ok=True)
        shard = ShardFile(**result["file"])
        for name in (shard.name + ".bin", shard.name + ".len"):
            _link(Path(task.folder) / name, folder / name)
        made[planned["heldout"]].append(shard)
    if not made[False]:
        raise ShardError(_nothing_left(report))
    if made[True]:
        facts = {**made_by, "sources": plan["heldout"]}
        write_manifest(partial / "heldout", Manifest(tuple(made[True]), facts))
    manifest = Manifest(tuple(made[False]), {**made_by, "sources": plan["sources"]})
    report["output"] = {
        "tokens": manifest.tokens, "documents": manifest.documents, "shards": len(manifest.shards),
        "fim_documents": sum(r["fim"] for r in results(shards)),
    }  # fmt: skip
    _write_report(partial, report)
    write_manifest(partial, manifest)
    os.replace(partial, out)
    return manifest


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    for name, text in (("report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n"),
                       ("report.md", markdown(report))):  # fmt: skip
        partial = folder / (name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name; copied where the file system has no links."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
