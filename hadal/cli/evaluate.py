"""`hadal eval`: how often a model is right: on puzzles, on a set with answers, on tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError, bar, human_seconds, note, print_json, say, table

if TYPE_CHECKING:
    from hadal.engine import Engine
    from hadal.evals.folder import Folder
    from hadal.evals.sets import Problem

PUZZLE_TOKENS = 768


@dataclass(frozen=True)
class Asked:
    """What was asked of the verb, beside the model and how it runs."""

    limit: int | None
    samples: int | None
    temperature: float | None
    top_p: float | None
    max_tokens: int | None
    seed: int
    chat: bool | None
    think: bool | None
    instruction: str | None
    extract: str | None
    timeout: float
    isolation: str
    out: Path | None
    resume: bool
    json: bool


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP + " Default: hadal-mini.")
    ] = None,
    suite: Annotated[
        Literal["puzzles"],
        typer.Option(help="puzzles: the seeded tasks that hadal-mini was trained on, unseen ones."),
    ] = "puzzles",
    problems: Annotated[
        Path | None,
        typer.Option(
            "--set", metavar="FILE", help="Problems with answers, JSONL: GSM8K's, HumanEval's or your own."
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="Tasks of lm-eval (needs hadal[eval]).")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --tasks: your own, as lm-eval's YAML files.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="URL", help="With --tasks: a running server's model."),
    ] = None,
    api_key: o.ApiKey = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Problems of each task. Puzzles: 200; else all there are."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Answers to each problem: pass@1 and cons@K. Of a set: 4."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Default: 0.6 as DeepSeek measures; one answer to a puzzle: 0.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Default: 0.95.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            metavar="N",
            help="Of an answer. Puzzles: 768; sets: 32,768 or what the context leaves; tasks: as they say.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of puzzles and samples; 0 is the held-out set of the model card.")
    ] = 0,
    few_shot: Annotated[
        int | None, typer.Option("--few-shot", min=0, metavar="N", help="With --tasks: examples.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="Ask in the chat template, or as text. Default: tasks as text."),
    ] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Reason first or not.")] = None,
    system: o.System = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="With --set: put behind each problem, instead of what its kind has."
        ),
    ] = None,
    extract: Annotated[
        str | None,
        typer.Option(
            metavar="RULE[,RULE]", help="With --set: where an answer stands (boxed,bold,last-number)."
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="With --set: for a program that a model wrote.")
    ] = 5.0,
    isolation: Annotated[
        Literal["seccomp", "limits"],
        typer.Option(help="With --set: what holds such a program; limits holds only what is not hostile."),
    ] = "seccomp",
    check: Annotated[
        bool, typer.Option("--check", help="With --set: judge the set's own answers, without a model.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep results.json and samples.jsonl there.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out holds.")] = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    offload: o.Offload = None,
    expert_cache_gb: o.ExpertCache = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", min=1, metavar="N", help="Answers that are made at once.")
    ] = 64,
    max_model_len: o.MaxModelLen = None,
    exact: o.Exact = False,
    yes: o.Yes = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Measure a model's accuracy, task by task.

    Puzzles are unseen ones, decoded greedily, with 95% intervals. A set (--set) is sampled as DeepSeek does:
    pass@1 is the mean over samples, cons@K the majority's answer. Tasks of lm-eval (--tasks) run here or
    through a server (--server), with the same score.

    Examples:
        hadal eval hadal-mini
        hadal eval hadal-mini --limit 50 --samples 16
        hadal eval deepseek-r1-distill-qwen-1.5b --set aime.jsonl --samples 64 --out runs/aime
        hadal eval --set HumanEval.jsonl.gz --check
        hadal eval qwen2.5-1.5b --tasks gsm8k,arc_easy --few-shot 5
        hadal eval --tasks my_task --include tasks --server http://127.0.0.1:11435 --chat
    """
    asked = Asked(
        limit, samples, temperature, top_p, max_tokens, seed, chat, think, instruction, extract, timeout,
        isolation, out, resume, json,
    )  # fmt: skip
    _check_flags(asked, problems, tasks, include=include, server=server, check=check, few_shot=few_shot)
    inference = o.Inference(
        device, dtype, quantize, max_model_len, max_num_seqs=max_num_seqs, exact=exact, offload=offload,
        expert_cache_gb=expert_cache_gb,
    )  # fmt: skip
    if check:
        assert problems is not None
        _check_set(problems, asked)
        return

    def load() -> tuple[Engine, dict[str, Any]]:
        from hadal.cli.loading import load_engine
        from hadal.evals.folder import described

        engine = load_engine(model or "hadal-mini", inference, yes=yes, force=force, quiet=json)
        return engine, {**described(engine), "quantize": quantize, "offload": offload}

    if tasks is not None:
        from hadal.cli import evaluate_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        wanted = evaluate_tasks.Wanted(names, include, few_shot, system, server, api_key, model)
        evaluate_tasks.run(wanted, asked, load)
    elif problems is not None:
        _set(problems, asked, load)
    elif samples is None and temperature is None and top_p is None and out is None:
        _puzzles(asked, *load())
    else:
        _sampled_puzzles(asked, load)


def _check_flags(
    asked: Asked, problems: Path | None, tasks: str | None, *, include: Path | None, server: str | None,
    check: bool, few_shot: int | None,
) -> None:  # fmt: skip
    """Refuse flags that would be left unheard."""
    if problems is not None and tasks is not None:
        raise typer.BadParameter("--set and --tasks are two evaluations; ask for one at a time")
    lonely = {
        "--include": include is not None,
        "--server": server is not None,
        "--few-shot": few_shot is not None,
    }
    for flag, given in lonely.items():
        if given and tasks is None:
            raise typer.BadParameter(f"{flag} goes with --tasks")
    of_sets = {
        "--check": check,
        "--instruction": asked.instruction is not None,
        "--extract": asked.extract is not None,
    }
    for flag, given in of_sets.items():
        if given and problems is None:
            raise typer.BadParameter(f"{flag} goes with --set")
    sampling = {"--samples": asked.samples, "--temperature": asked.temperature, "--top-p": asked.top_p}
    for flag, value in sampling.items():
        if value is not None and tasks is not None:
            raise typer.BadParameter(f"{flag} is for puzzles and sets; a task of lm-eval says how it samples")
    if asked.resume and asked.out is None:
        raise typer.BadParameter("--resume needs the --out that is to be taken up")


# --- puzzles ---


def _puzzles(asked: Asked, engine: Engine, model: dict[str, Any]) -> None:
    """One greedy answer to each, as in the model card."""
    from hadal.evals import puzzles

    kept = {name: model[name] for name in ("model", "device", "dtype")}
    kept |= {"quantize": model["quantize"]} if model["quantize"] else {}
    kept |= {"exact": "yes"} if model["exact"] else {}
    with bar("evaluating", unit_bytes=False, quiet=asked.json) as update:
        report = puzzles.evaluate(
            engine,
            samples=asked.limit or puzzles.SAMPLES,
            seed=asked.seed,
            max_tokens=asked.max_tokens or PUZZLE_TOKENS,
            settings=kept,
            progress=update,
        )
    if asked.json:
        print_json(report)
        return
    rows = [
        (
            row["task"],
            f"{100 * row['accuracy']:.1f}%",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['correct']}/{row['total']}",
            row["unfinished"],
        )
        for row in report["tasks"]
    ]
    table(("TASK", "ACCURACY", "95% INTERVAL", "CORRECT", "UNFINISHED"), rows, right=(1, 2, 3, 4))
    seconds = report["settings"]["seconds"]
    rate = report["settings"]["problems"] / seconds if seconds else 0.0
    say(f"mean over tasks: {100 * report['accuracy']:.1f}%")
    note(f"{report['settings']['problems']} problems in {human_seconds(seconds)}, {rate:.1f} a second")


def _sampled_puzzles(asked: Asked, load: Any) -> None:
    from hadal.evals.puzzles import SAMPLES, problems
    from hadal.evals.sets import puzzle_problems

    each = asked.limit or SAMPLES
    drawn = puzzle_problems(problems(each, asked.seed))
    source = {"suite": "puzzles", "problems_per_task": each, "problems": len(drawn)}
    _sample(drawn, source, asked, load, samples=1, greedy=True, longest=PUZZLE_TOKENS)


# --- sets ---


def _judging(asked: Asked, chat: bool = True) -> Any:
    from hadal.evals.judges import EXTRACT, Judging

    rules = tuple(rule.strip() for rule in asked.extract.split(",")) if asked.extract else EXTRACT
    return Judging(rules, "block" if chat else "raw", asked.timeout, asked.isolation)


def _read(path: Path, asked: Asked) -> tuple[list[Problem], dict[str, Any]]:
    from hadal.evals.sets import read_set, sha256_of

    drawn = read_set(path, instruction=asked.instruction, limit=asked.limit or 0)
    source = {"suite": "set", "file": path.name, "sha256": sha256_of(path), "problems": len(drawn)}
    return drawn, {**source, "kinds": sorted({problem.kind for problem in drawn})}


def _check_set(path: Path, asked: Asked) -> None:
    import time

    from hadal.evals.samples import own_solutions

    drawn, source = _read(path, asked)
    started = time.perf_counter()
    with bar("checking", unit_bytes=False, quiet=asked.json) as update:
        verdicts = own_solutions(drawn, _judging(asked), update)
    seconds = time.perf_counter() - started
    wrong = [(p, v) for p, v in zip(drawn, verdicts, strict=True) if not v.right]
    if asked.json:
        named = [{"name": p.name, "verdict": dict(v.details)} for p, v in wrong]
        print_json({**source, "right": len(drawn) - len(wrong), "seconds": seconds, "wrong": named})
    else:
        for problem, verdict in wrong:
            say(f"{problem.name}: {dict(verdict.details)}")
        say(f"{len(drawn) - len(wrong)} of {len(drawn)} own answers are judged right")
        note(f"in {human_seconds(seconds)}")
    if wrong:
        raise CliError(f"{len(wrong)} of the set's own answers are judged wrong; a model could not do better")


def _set(path: Path, asked: Asked, load: Any) -> None:
    from hadal.evals.samples import MAX_TOKENS

    drawn, source = _read(path, asked)
    _sample(drawn, source, asked, load, samples=4, greedy=False, longest=MAX_TOKENS)


def _sample(
    drawn: list[Problem], source: dict[str, Any], asked: Asked, load: Any, *, samples: int, greedy: bool,
    longest: int,
) -> None:  # fmt: skip
    """Sample, judge, tell. The verifiers start first: what they lack is known before a model is loaded."""
    from hadal.evals.judges import Judge
    from hadal.evals.samples import TEMPERATURE, TOP_P, Protocol

    count = asked.samples or samples
    usual = 0.0 if greedy and count == 1 else TEMPERATURE
    protocol = Protocol(
        count,
        usual if asked.temperature is None else asked.temperature,
        TOP_P if asked.top_p is None else asked.top_p,
        asked.max_tokens or longest,
        asked.seed,
        asked.chat is not False,
        asked.think,
    )
    protocol.params(drawn[0], 0, longest)  # refuses what is out of bounds
    with Judge([problem.kind for problem in drawn], _judging(asked, protocol.chat)) as judge:
        judge.check(drawn)
        engine, model = load()
        _run(drawn, source, asked, engine, model, protocol, judge)


def _run(
    drawn: list[Problem], source: dict[str, Any], asked: Asked, engine: Engine, model: dict[str, Any],
    protocol: Any, judge: Any,
) -> None:  # fmt: skip
    import time
    from dataclasses import asdict, replace

    from hadal.evals import folder as folders
    from hadal.evals import samples as s

    if engine.template is not None and engine.template.name == "plain" and asked.chat is None:
        protocol = replace(protocol, chat=False)
        judge.judging = replace(judge.judging, code="raw")
    settings = {
        **model,
        **source,
        "sampling": asdict(protocol),
        "judging": {k: v for k, v in asdict(judge.judging).items() if k != "workers"},
        "instruction": asked.instruction,
        "versions": folders.versions(),
        "date": folders.now(),
    }
    kept = None if asked.out is None else folders.Folder(asked.out, settings, resume=asked.resume)
    started = time.perf_counter()
    with s.Journal(kept.samples if kept else None) as journal:
        before = len(journal.entries)
        with going_on(kept), bar("sampling", unit_bytes=False, quiet=asked.json) as update:
            s.sample(engine, drawn, protocol, journal, update)
        fresh = list(journal.entries.values())[before:]
    sampled = time.perf_counter()
    with bar("judging", unit_bytes=False, quiet=asked.json) as update:
        results = s.judged(drawn, protocol, journal, judge, update)
    rows = s.rows(drawn, results, judge)
    spent = {"sampling": round(sampled - started, 3), "judging": round(time.perf_counter() - sampled, 3)}
    report = {"results": rows, "settings": settings, "seconds": spent}
    if kept is not None:
        kept.finish(report, s.sample_lines(drawn, protocol, results))
    if asked.json:
        print_json(report)
        return
    _tell(rows)
    tokens = sum(one.tokens for one in fresh)
    rate = f", {tokens / spent['sampling']:.0f} tokens/s" if fresh and spent["sampling"] else ""
    note(f"{len(fresh)} samples in {human_seconds(spent['sampling'])}{rate}; judged in "
         f"{human_seconds(spent['judging'])}")  # fmt: skip
    if kept is not None:
        note(f"kept: {kept.path}")


@contextmanager
def going_on(kept: Folder | None) -> Iterator[None]:
    """Say on Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if kept is not None:
            note(f"kept so far: {kept.path}; the same command with --resume goes on")
        raise


def _tell(rows: list[dict[str, Any]]) -> None:
    """The table of pass@1, cons@k and lengths."""
    k = rows[0]["samples"]
    columns = ["TASK", "PROBLEMS", "PASS@1", "95% INTERVAL"]
    if k > 1:
        columns += [f"CONS@{k}", f"PASS@{k}"]
    cells = []
    for row in rows:
        line: list[object] = [row["task"], row["problems"], _share(row["pass@1"])]
        line.append(f"{100 * row['low']:.1f} to {100 * row['high']:.1f}")
        if k > 1:
            cons = row["cons@k"]
            line += [_share(None if cons is None else cons["value"]), _share(row["pass@k"][str(k)])]
        line += [f"{row['length']:.0f}", _share(row["truncated"])]
        cells.append(line)
    table([*columns, "TOKENS", "TRUNCATED"], cells, right=range(1, len(columns) + 2))
    failures = rows[-1]["failures"]
    if failures:
        note(f"{failures} samples could not be judged and count as wrong; samples.jsonl says why")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"
