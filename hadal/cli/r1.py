"""`hadal r1`: the stages of DeepSeek-R1, one after another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.outcome import command
from hadal.cli.terminal import print_json, say, table


def r1(
    recipe: o.Recipe,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help="This stage alone; may be given again."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="With --stage: even if it is done.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, with tokens and time; do nothing.")
    ] = False,
    override: o.Overrides = None,
    out: o.RunFolder = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Go through the stages of R1, by a recipe.

    Cold start, reinforcement learning, rejection sampling, the base anew, reinforcement learning with a
    preference, distillation: each stage leaves a model or a data set with its card in FOLDER/STAGE. What is
    done stays; what was stopped goes on; what a changed recipe touches is made anew, told before it starts.

    Examples:
        hadal r1 recipes/r1/cpu.toml --dry-run
        hadal r1 recipes/r1/cpu.toml
        hadal r1 recipes/r1/cpu.toml --stage rejected --set stages.rejected.samples=8
    """
    from hadal.post import r1 as runner

    names, changes = stage or [], override or []
    if dry_run:
        folder, steps = runner.plan(recipe, stages=names, again=again, overrides=changes, out=out)
        _tell(folder, steps, json)
        return
    outcome = runner.r1(recipe, stages=names, again=again, overrides=changes, out=out, device=device)
    if json:
        found = {"finished": outcome.finished, "reason": outcome.reason, "ran": list(outcome.ran)}
        print_json({**found, "folder": str(outcome.folder), "stages": dict(outcome.stages)})
        return
    if outcome.finished:
        say(f"{len(outcome.ran)} stages made; the table: {outcome.folder / 'README.md'}")
        return
    again_with = (word for name in names for word in ("--stage", name))
    say(f"stopped; `{command('r1', recipe, changes, out, *again_with)}` goes on.")


def _tell(folder: Path, steps: list[Any], json: bool) -> None:
    """The plan, and what it will take."""
    busy = [step for step in steps if step.does not in ("keep", "measure")]
    seconds = sum(step.cost.seconds for step in busy)
    if json:
        rows = [
            {"stage": s.stage.name, "kind": s.stage.kind, "does": s.does, "why": s.why, **asdict(s.cost)}
            for s in steps
        ]
        print_json({"folder": str(folder), "seconds": seconds, "stages": rows})
        return
    table(
        ("stage", "kind", "does", "why", "cost"),
        [(s.stage.name, s.stage.kind, s.does, s.why, s.cost.text()) for s in steps],
    )
    say(f"{len(busy)} of {len(steps)} stages to do, about {seconds / 60:.0f} minutes, in {folder}")
