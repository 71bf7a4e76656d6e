"""`hadal train`: runs a recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.outcome import command, tell
from hadal.cli.terminal import print_json, say


def train(
    recipe: o.Recipe,
    resume: o.Resume = False,
    override: o.Overrides = None,
    out: o.RunFolder = None,
    device: o.Device = "auto",
    fp8_report: Annotated[
        bool,
        typer.Option("--fp8-report", help="Tell what FP8 does to every product of a step; train nothing."),
    ] = False,
    fp8_report_steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Report after N more steps, of which nothing is kept.")
    ] = 0,
    json: o.Json = False,
) -> None:
    """Train a model by a recipe.

    Prints its rate as it goes; Ctrl-C or SIGTERM end it with a checkpoint, and --resume goes on from there,
    bit for bit. The model that comes out lies in FOLDER/export, ready for `hadal run`.

    Examples:
        hadal train recipes/mini.toml
        hadal train recipes/mini.toml --set train.max_minutes=5 --out /tmp/try
        hadal train recipes/mini.toml --resume
        hadal train recipes/mini.toml --resume --fp8-report
    """
    if fp8_report:
        _report(
            recipe, fp8_report_steps, json, resume=resume, overrides=override or [], out=out, device=device
        )
        return
    from hadal.evals.in_training import examine
    from hadal.train.main import train as run

    outcome = run(recipe, resume=resume, overrides=override or [], out=out, device=device, examine=examine)
    tell(outcome, json, command("train", recipe, override, out, "--resume"))


def _report(recipe: Path, steps: int, json: bool, **options: Any) -> None:
    from hadal.train.fp8_report import fp8_report, lines

    report, path = fp8_report(recipe, steps=steps, **options)
    if json:
        print_json(asdict(report))
        return
    for line in lines(report):
        say(line)
    say()
    say(f"written: {path}")
