"""`hadal grpo`: trains a model by rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import go_on, human_count, print_json, say


def grpo(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/grpo-smoke.toml.")
    ],
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
    """Train a model by rewards, by a recipe.

    Each step samples groups of completions from the very weights that are trained, judges them, and makes
    those that beat their group likelier. The model that comes out lies in FOLDER/export, completions with
    their rewards in FOLDER/samples.jsonl.

    Examples:
        hadal grpo recipes/grpo-smoke.toml
        hadal grpo recipes/grpo-smoke.toml --set objective.variant=dapo --set train.exact=true
        hadal grpo recipes/grpo-smoke.toml --resume
    """
    from hadal.post.grpo import grpo as run

    outcome = run(recipe, resume=resume, overrides=override or [], out=out, device=device)
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
    tokens = human_count(outcome.tokens)
    say(f"{outcome.reason} at step {outcome.step}, {tokens} tokens sampled: {outcome.export}")
    if not outcome.finished:
        say(go_on("grpo", recipe, out, override))
