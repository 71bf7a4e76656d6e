"""`hadal data prepare`: from raw files to token shards, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hadal.cli import options as o
from hadal.cli.terminal import Bar, CliError, note, print_json, say

if TYPE_CHECKING:
    from hadal.data.tasks import Executor


def prepare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see docs/data.md.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of the shards; default: shards/NAME.")
    ] = None,
    override: o.Overrides = None,
    workers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Processes; 0: one a core. The shards are the same.")
    ] = 0,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Keep what the stages make there, for the next recipe on the same files."
        ),
    ] = None,
    executor: Annotated[
        Literal["local", "slurm", "ray"],
        typer.Option(help="Processes here, a Slurm job array a stage, or a Ray cluster."),
    ] = "local",
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --executor slurm: where its jobs run.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Make token shards by a recipe.

    Normalises, filters, removes copies and evaluation texts, mixes, tokenises. Ctrl-C leaves what is done,
    and the same line goes on. FOLDER appears when it is whole, with report.md in it.

    Examples:
        hadal data prepare recipes/data-example.toml
        hadal data prepare recipes/data-example.toml --set fim.rate=0.1 --out shards/fim
        hadal train recipes/mini.toml --set data.source=shards --set data.path=shards/example
    """
    from hadal.cli.data_report import show
    from hadal.data.prepare import prepare as make
    from hadal.data.recipe import load

    wanted = load(recipe, override or [])
    ran = _executor(executor, workers, partition)
    folder = out or Path("shards") / wanted.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    bars: dict[str, Bar] = {}

    def progress(title: str, done: int, total: int) -> None:
        if title not in bars:
            for bar in bars.values():
                bar.close()
            bars[title] = Bar(
                title, unit_bytes=title not in ("mixing", "finding duplicates", "writing shards")
            )
        bars[title].update(done, total)

    try:
        made = make(wanted, folder, base=recipe.parent, work=work, progress=progress, executor=ran)
    except KeyboardInterrupt:
        note("Stopped. The same line goes on from here.")
        raise
    finally:
        for bar in bars.values():
            bar.close()
    if json:
        print_json({"folder": folder, "fresh": made.fresh, **made.report})
        return
    show(made.report, samples=1)
    say(f"{folder}{'' if made.fresh else ' (was there already)'}; all samples in {folder / 'report.md'}")


def _executor(name: str, workers: int, partition: str | None) -> Executor:
    """What does the tasks. Refuses flags that do not belong together."""
    import os

    if (name == "slurm") != (partition is not None):
        raise CliError("--executor slurm and --partition NAME belong together", 2)
    if name == "local":
        from hadal.data.tasks import Local

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Local(workers or cores)
    from hadal.data.clusters import Ray, Slurm

    return Slurm(partition, workers=workers) if partition else Ray(workers=workers)
