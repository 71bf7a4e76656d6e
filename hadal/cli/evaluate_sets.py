"""`hadal eval` on puzzles and on sets with answers: ask, judge, keep, tell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadal.cli.terminal import CliError, bar, human_seconds, note, print_json, say, table

if TYPE_CHECKING:
    from hadal.cli.evaluate import Asked, Load
    from hadal.engine import Engine
    from hadal.evals.folder import Folder
    from hadal.evals.judges import Judge, Judging
    from hadal.evals.samples import Protocol
    from hadal.evals.sets import Problem

PUZZLE_TOKENS = 768


# --- puzzles ---


def puzzles(asked: Asked, engine: Engine, model: dict[str, Any]) -> None:
    """One greedy answer to each, as in the model card."""
    from hadal.evals.puzzles import SAMPLES, evaluate

    kept = {name: model[name] for name in ("model", "device", "dtype")}
    kept |= {"quantize": model["quantize"]} if model["quantize"] else {}
    kept |= {"exact": "yes"} if model["exact"] else {}
    with bar("evaluating", unit_bytes=False, quiet=asked.json) as update:
        report = evaluate(
            engine,
            samples=asked.limit or SAMPLES,
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


def sampled_puzzles(asked: Asked, load: Load) -> None:
    from hadal.evals.puzzles import SAMPLES, problems
    from hadal.evals.sets import puzzle_problems

    each = asked.limit or SAMPLES
    drawn = puzzle_problems(problems(each, asked.seed))
    source = {"suite": "puzzles", "problems_per_task": each, "problems": len(drawn)}
    _sample(drawn, source, asked, load, samples=1, greedy=True, longest=PUZZLE_TOKENS)


# --- sets ---


def _judging(asked: Asked, chat: bool = True) -> Judging:
    from hadal.evals.judges import EXTRACT, Judging
    from hadal.post.rewards import RewardError
    from hadal.post.rewards.text import check_rules

    rules: tuple[str, ...] = EXTRACT
    if asked.extract is not None:
        rules = tuple(rule.strip() for rule in asked.extract.split(","))
        try:
            check_rules(rules)
        except RewardError as error:
            raise CliError(f"--{error}", 2) from None
    return Judging(rules, "block" if chat else "raw", asked.timeout, asked.isolation)


def _read(path: Path, asked: Asked) -> tuple[list[Problem], dict[str, Any]]:
    from hadal.evals.sets import read_set, sha256_of

    drawn = read_set(path, instruction=asked.instruction, limit=asked.limit or 0)
    source = {"suite": "set", "file": path.name, "sha256": sha256_of(path), "problems": len(drawn)}
    return drawn, {**source, "kinds": sorted({problem.kind for problem in drawn})}


def check(path: Path, asked: Asked) -> None:
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


def answers(path: Path, asked: Asked, load: Load) -> None:
    from hadal.evals.samples import MAX_TOKENS

    drawn, source = _read(path, asked)
    _sample(drawn, source, asked, load, samples=4, greedy=False, longest=MAX_TOKENS)


def _sample(
    drawn: list[Problem], source: dict[str, Any], asked: Asked, load: Load, *, samples: int, greedy: bool,
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
    protocol: Protocol, judge: Judge,
) -> None:  # fmt: skip
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
