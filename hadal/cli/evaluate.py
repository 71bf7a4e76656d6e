"""`hadal eval`: how often a model is right, by task."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from hadal.cli import options as o
from hadal.cli.terminal import bar, human_seconds, note, print_json, say, table


def evaluate(
    model: o.Model = "hadal-mini",
    suite: Annotated[
        Literal["puzzles"],
        typer.Option(help="puzzles: the seeded tasks that hadal-mini was trained on, unseen ones."),
    ] = "puzzles",
    samples: Annotated[int, typer.Option(min=1, help="Problems a task.")] = 200,
    seed: Annotated[
        int, typer.Option(help="Of the problems; the default is the held-out set of the model card.")
    ] = 0,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", min=1, metavar="N", help="An answer that is longer counts as wrong."),
    ] = 768,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    offload: o.Offload = None,
    expert_cache_gb: o.ExpertCache = None,
    exact: o.Exact = False,
    yes: o.Yes = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Measure a model's accuracy, task by task.

    On problems that it has not seen, decoded greedily, with 95% Wilson intervals.

    Examples:
        hadal eval hadal-mini
        hadal eval hadal-mini --samples 50 --json
    """
    from hadal.cli.loading import load_engine
    from hadal.evals import puzzles

    asked = o.Inference(
        device,
        dtype,
        quantize,
        max_num_seqs=64,
        exact=exact,
        offload=offload,
        expert_cache_gb=expert_cache_gb,
    )
    engine = load_engine(model, asked, yes=yes, force=force, quiet=json)
    settings = {"model": engine.name, "device": str(engine.device), "dtype": str(engine.dtype)}
    settings |= {"quantize": quantize} if quantize else {}
    settings |= {"exact": "yes"} if exact else {}
    with bar("evaluating", unit_bytes=False, quiet=json) as update:
        report = puzzles.evaluate(
            engine, samples=samples, seed=seed, max_tokens=max_tokens, settings=settings, progress=update
        )
    if json:
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
