"""`hadal sft`: fine-tunes a model on conversations."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from hadal.cli import options as o
from hadal.cli.outcome import command, tell
from hadal.cli.terminal import print_json


def sft(
    recipe: o.Recipe,
    resume: o.Resume = False,
    override: o.Overrides = None,
    out: o.RunFolder = None,
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
    tell(outcome, json, command("sft", recipe, override, out, "--resume"))
