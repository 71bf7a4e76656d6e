"""`hadal eval --tasks`: benchmarks of lm-eval, with a model loaded here or through a server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hadal.cli.terminal import CliError, bar, human_seconds, note, print_json, table

if TYPE_CHECKING:
    from hadal.cli.evaluate import Asked, Load

CONCURRENT = 16  # requests that a server gets at once


def run(asked: Asked, load: Load) -> None:
    """Load the tasks, then the model; ask, keep, tell."""
    from hadal.cli.evaluate_sets import going_on
    from hadal.evals import folder as folders
    from hadal.evals import harness

    names = [name.strip() for name in str(asked.tasks).split(",") if name.strip()]
    tasks = harness.load_tasks(names, asked.include)
    from hadal.evals.harness_models import Kept

    model, described = _served(asked) if asked.server is not None else _here(asked, load)
    chat = asked.chat is True
    settings = {
        **described,
        "suite": "lm-eval",
        "tasks": names,
        "few_shot": asked.few_shot,
        "limit": asked.limit,
        "chat": chat,
        "thinking": asked.think,
        "system": asked.system,
        "max_tokens": asked.max_tokens,
        "seed": asked.seed,
        "versions": folders.versions(),
        "date": folders.now(),
    }
    kept = None if asked.out is None else folders.Folder(asked.out, settings, resume=asked.resume)
    answers = harness.Answers(kept.answers if kept else None)
    started = time.perf_counter()
    try:
        with going_on(kept), bar("evaluating", unit_bytes=False, quiet=asked.json) as update:
            rows, samples = harness.run_tasks(
                tasks,
                Kept(model, answers, update),
                fewshot=asked.few_shot,
                limit=asked.limit,
                chat=chat,
                system=asked.system,
                max_tokens=asked.max_tokens,
                seed=asked.seed,
            )
    finally:
        answers.close()
    seconds = time.perf_counter() - started
    report = {"results": rows, "settings": settings, "seconds": round(seconds, 3)}
    if kept is not None:
        kept.finish(report, samples)
    if asked.json:
        print_json(report)
        return
    cells = [
        (row["task"], row["metric"], row["filter"], f"{row['value']:.4f}",
         "–" if row["stderr"] is None else f"± {row['stderr']:.4f}", row["problems"] or "–", row["fewshot"])
        for row in rows
    ]  # fmt: skip
    table(("TASK", "METRIC", "FILTER", "VALUE", "ERROR", "PROBLEMS", "EXAMPLES"), cells, right=(3, 4, 5, 6))
    note(f"in {human_seconds(seconds)}")
    if kept is not None:
        note(f"kept: {kept.path}")


def _here(asked: Asked, load: Load) -> tuple[Any, dict[str, Any]]:
    from hadal.evals.harness_models import EngineLM

    engine, described = load()
    return EngineLM(engine, thinking=asked.think), described


def _served(asked: Asked) -> tuple[Any, dict[str, Any]]:
    """A server's model. Raises CliError where the server does not answer, or has no such model."""
    from hadal.cli.speaker import Http
    from hadal.evals.harness_models import ServerChat, ServerText

    http = Http(str(asked.server), asked.api_key)
    listed = {str(entry["id"]): entry for entry in http.get("/v1/models").get("data", [])}
    if not listed:
        raise CliError(f"{http.url} serves no model; start one with `hadal serve MODEL`")
    name = asked.model or next(iter(listed))
    if name not in listed:
        raise CliError(f"{http.url} serves {', '.join(listed)}, not {name!r}; leave the name out", 2)
    if asked.think is not None:
        raise CliError("--think goes with a model loaded here; the server's own way is taken", 2)
    longest = int(listed[name].get("max_model_len") or 2048)
    kind = ServerChat if asked.chat is True else ServerText
    model = kind(http.url, name, key=asked.api_key, max_length=longest, concurrent=CONCURRENT)
    return model, {"model": name, "server": http.url, "max_model_len": longest}
