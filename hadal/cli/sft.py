"""`hadal sft`: fine-tunes a model on conversations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import go_on, human_count, print_json, say


def sft(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/sft-example.toml.")
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
    show: Annotated[
        int,
        typer.Option("--show", min=0, metavar="N", help="Print N rows, marked where trained; train nothing."),
    ] = 0,
    json: o.Json = False,
) -> None:
    """Fine-tune a model on conversations, by a recipe.

    Conversations pass through the model's own chat template; the loss is on what the assistant writes. All
    weights are trained, or low-rank adapters ([lora]). The model that comes out lies in FOLDER/export.

    Examples:
        hadal sft recipes/sft-smoke.toml
        hadal sft recipes/sft-example.toml --set 'data.files=["mine.jsonl"]' --show 3
        hadal sft recipes/sft-example.toml --set 'data.files=["mine.jsonl"]' --resume
    """
    if show:
        from hadal.post.sft import show as show_rows

        report = show_rows(recipe, show, overrides=override or [])
        if json:
            print_json(asdict(report))
        return
    from hadal.evals.in_training import examine
    from hadal.post.sft import sft as run

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
        say(go_on("sft", recipe, out, override))
