"""`hadal data report`: what became of the documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import BOLD, DIM, paint, print_json, say, table

SHOWN, WIDTH = 12, 100  # rules and characters; report.md has all


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="That `hadal data prepare` made.")],
    samples: Annotated[int, typer.Option(min=0, max=3, metavar="N", help="Of what each rule dropped.")] = 2,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all shards and compare their hashes.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Counts at every stage, tokens by source, what was dropped.

    Examples:
        hadal data report shards/example
        hadal data report shards/example --verify
        hadal data report shards/example --json
    """
    from hadal.data.report import read_report
    from hadal.data.shards import read_manifest, verify_shards

    manifest = verify_shards(folder) if verify else read_manifest(folder)
    found = read_report(folder)
    if json:
        print_json({"folder": folder, **found})
        return
    show(found, samples)
    say(f"{len(manifest.shards)} shards {'agree with their hashes' if verify else 'in the manifest'}")


def show(found: Mapping[str, Any], samples: int) -> None:
    """A report on the terminal."""
    from hadal.data.report import dropped_rows, summary, tables

    for title, header, rows in tables(found):
        say(paint(title, BOLD))
        table(header, rows, right=range(1, len(header)))
        say()
    entries = dropped_rows(found)
    if entries and samples:
        say(paint("Dropped", BOLD))
        for entry in entries[:SHOWN]:
            say(f"{entry['count']:>8,}  {entry['source']}: {entry['stage']}, {entry['rule']}")
            for sample in entry["samples"][:samples]:
                for line in (f"{sample['name']}: {sample['why']}", sample["text"]):
                    if line:
                        say(paint(f"          {line[:WIDTH]}", DIM))
        if len(entries) > SHOWN:
            say(f"          and {len(entries) - SHOWN} rules more, in report.md")
        say()
    say(summary(found))
