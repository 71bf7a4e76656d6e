"""`hadal needle`: whether a model finds a fact wherever it stands in a long context."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError, bar, has_colour, human_seconds, note, print_json, say

if TYPE_CHECKING:
    from hadal.evals.needle import Grid

First = Annotated[int, typer.Option("--from", min=64, metavar="N", help="The shortest length.")]
Last = Annotated[
    int | None,
    typer.Option("--to", min=64, metavar="N", help="The longest; default: all that the model takes."),
]
Haystack = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text to hide it in; may be given again. Default: puzzles."),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Text to complete instead of the chat template (base models).")
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, metavar="N", help="Of an answer, reasoning included.")
]
Plot = Annotated[
    Path | None,
    typer.Option(
        callback=o.picture,
        metavar="FILE",
        help="Draw a heat map into a .png or .svg (needs hadal[train]).",
    ),
]


def needle(
    model: o.Model = "hadal-mini",
    first: First = 1024,
    last: Last = None,
    depths: Annotated[int, typer.Option(min=2, help="Depths from 0 to 100%, evenly.")] = 11,
    samples: Annotated[int, typer.Option(min=1, help="Needles in each square of the grid.")] = 4,
    haystack: Haystack = None,
    plain: Plain = False,
    max_tokens: MaxTokens = 32,
    seed: Annotated[int, typer.Option(help="Of haystacks and needles.")] = 0,
    plot: Plot = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    offload: o.Offload = None,
    expert_cache_gb: o.ExpertCache = None,
    yes: o.Yes = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Find a needle in a haystack, by length and depth.

    Lengths double from --from to --to. A reasoning model needs more --max-tokens.

    Examples:
        hadal needle runs/long-context/export --plot needle.png
        hadal needle qwen2.5-1.5b --to 8192 --haystack essays.txt
        hadal needle hadal-mini --from 256 --samples 10 --json > grid.json
    """
    from hadal.cli.loading import load_engine
    from hadal.evals import needle as needles

    asked = o.Inference(
        device, dtype, quantize, max_model_len=last, max_num_seqs=16, offload=offload,
        expert_cache_gb=expert_cache_gb,
    )  # fmt: skip
    if last is not None and last < first:
        raise typer.BadParameter(f"--to is {last}; it must not be below --from {first}")
    engine = load_engine(model, asked, yes=yes, force=force, quiet=json)
    if first > engine.max_model_len:
        raise typer.BadParameter(f"--from is {first}; this model takes {engine.max_model_len} tokens at most")
    settings = {"model": engine.name, "device": str(engine.device), "dtype": str(engine.dtype)}
    settings |= {"quantize": quantize} if quantize else {}
    with bar("searching", unit_bytes=False, quiet=json) as update:
        try:
            grid = needles.evaluate(
                engine, lengths=needles.powers(first, last or engine.max_model_len),
                depths=[round(100 * i / (depths - 1)) for i in range(depths)], samples=samples, seed=seed,
                haystack=haystack or [], chat=False if plain else None, max_tokens=max_tokens,
                title=f"{engine.name}: needle in a haystack", settings=settings, progress=update,
            )  # fmt: skip
        except ValueError as error:  # of lengths and texts
            raise CliError(str(error), 2) from None
    _tell(grid, plot, json)


def _tell(grid: Grid, plot: Path | None, json: bool) -> None:
    """The grid as picture, JSON or lines."""
    from hadal.evals import needle as needles

    if plot is not None:
        note(f"drawn: {needles.draw([grid], plot)}")
    if json:
        print_json(grid)
        return
    for line in needles.heat_lines(grid, colour=has_colour(sys.stdout)):
        say(line)
    seconds = grid["settings"]["seconds"]
    note(f"found {100 * grid['accuracy']:.1f}% in {human_seconds(seconds)}")
