"""`hadal train`: runs a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import human_count, print_json, say


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/mini.toml.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one value of the recipe; may be given again."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of the run; default: runs/NAME.")
    ] = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Train a model by a recipe.

    Prints its rate as it goes; Ctrl-C or SIGTERM end it with a checkpoint, and --resume goes on from there,
    bit for bit. The model that comes out lies in FOLDER/export, ready for `hadal run`.

    Examples:
        hadal train recipes/mini.toml
        hadal train recipes/mini.toml --set train.max_minutes=5 --out /tmp/try
        hadal train recipes/mini.toml --resume
    """
    from hadal.evals.in_training import examine
    from hadal.train.main import train as run

    outcome = run(recipe, resume=resume, overrides=override or [], out=out, device=device, examine=examine)
    if json:
        print_json(
            {
                "finished": outcome.finished,
                "reason": outcome.reason,
                "step": outcome.step,
                "tokens": outcome.tokens,
                "loss": outcome.loss,
                "folder": str(outcome.folder),
                "export": str(outcome.export),
            }
        )
        return
    say(f"{outcome.reason} at step {outcome.step}, {human_count(outcome.tokens)} tokens: {outcome.export}")
    if not outcome.finished:
        say(f"`hadal train {recipe} --resume` goes on.")
