"""`hadal plan training` and `hadal plan pipeline`: hours, days, dollars, memory; bubbles and schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hadal.cli import options as o
from hadal.cli import plan_common as c
from hadal.cli.terminal import BOLD, CliError, human_count, note, paint, print_json, say, table

Schedule = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]


def training(
    model: o.Model,
    tokens: Annotated[str, typer.Option(metavar="N", help="To train on, such as 14.8T.")],
    on: c.On = None,
    sequence: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens a row; default: 4,096, or what the model bears."),
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="SHARE", help="Of the BF16 peak; default: a range.")
    ] = None,
    goodput: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Of the hours, those whose steps count.")
    ] = 1.0,
    hourly: c.Hourly = None,
    tp: c.Tp = None,
    dp: c.Dp = None,
    pp: c.Pp = None,
    ep: c.Ep = None,
    zero: Annotated[int, typer.Option(min=0, max=3, help="1 splits the optimizer, 2 gradients, 3 all.")] = 1,
    schedule: Annotated[Schedule, typer.Option(help="Of the pipeline.")] = "1f1b",
    micro_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Rows at a time.")] = 1,
    recompute: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="norm, up, swiglu, rows; may be given again.")
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Products in FP8, as V3.")] = False,
    json: o.Json = False,
) -> None:
    """Turn tokens into hours, days and dollars.

    Also what such a figure leaves out, and the memory of a device. MFU (the share of the peak while
    steps run) and goodput (the share of hours that count) are kept apart. Without --tp, --dp, --pp or
    --ep the smallest layout of all devices that fits is proposed.

    Examples:
        hadal plan training deepseek-v3 --on 2048xh800 --tokens 14.8T --mfu 0.3894 --pp 16 --ep 64
        hadal plan training llama-3.1-405b --on 16384xh100 --tokens 15.6T --mfu 0.41 --goodput 0.84
        hadal plan training hadal-mini --on h100 --tokens 2e9
    """
    from hadal.plan.answers import training as answer

    given: dict[str, Any] = {
        "tokens": c.number(tokens), "sequence": sequence, "mfu": mfu, "goodput": goodput, "hourly": hourly,
        "tp": tp, "dp": dp, "pp": pp, "ep": ep, "zero": zero, "schedule": schedule,
        "micro_batch": micro_batch, "recompute": recompute or [], "fp8": fp8,
    }  # fmt: skip
    q = {key: value for key, value in given.items() if value is not None}
    found = answer(q, c.machine_of(on), c.model_of(model))
    if json:
        print_json(found)
        return
    rows = f"in rows of {found['sequence']:,}" + (", as long as it bears" if found["sequence_short"] else "")
    say(paint(f"{found['model']} on {found['on']}: {human_count(c.number(tokens))} tokens {rows}", BOLD))
    c.figure_lines(found["figures"])
    if mfu is None:
        low, high = found["range"]["best"], found["range"]["pessimistic"]
        name = "cost" if "cost" in low else "device hours"
        unit = "$" if name == "cost" else "h"
        say(f"  MFU was not given: {c.amount(low[name], unit)} to {c.amount(high[name], unit)} is possible")
        say(f"  source: {found['mfu_source']}")
    if not found["price_known"]:
        say(f"  {found['price_missing']}")
    c.heading("That leaves out")
    c.points(found["leaves_out"])
    _memory(found)
    if found["bubbles"]:
        c.heading("Bubbles, in times of one forward")
        _bubbles(found["bubbles"])


def _memory(found: dict[str, Any]) -> None:
    """What a step takes of the fullest device, and in which layout."""
    c.heading(f"Memory of a device ({found['layout']}, ZeRO-{found['zero']}, {found['schedule']})")
    if found["layout_why"] != "as given":
        say(f"  {found['layout_why']}")
    c.figure_lines(found["memory"])
    need, have = (c.amount(found[k], "B") for k in ("needed", "usable"))
    say(f"  {need} of {have}: {'fits' if found['needed'] <= found['usable'] else 'does not fit'}")
    say("  activations as Hadal's operations keep them (DeepSeek's keep less), without workspace")
    if found["needed"] > found["usable"]:
        say("  less a device: --zero 2 or 3, --recompute, a shorter --sequence, --tp, --pp or --ep")


def pipeline(
    stages: Annotated[int, typer.Option(min=2, metavar="N", help="Of the model.")] = 16,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of a step; default: twice the stages.")
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(help="Draw this one; without it, all bubbles by formula.")
    ] = None,
    forward: Annotated[float, typer.Option(min=0, metavar="TIME", help="Of a stage.")] = 1.0,
    backward: Annotated[float, typer.Option(min=0, metavar="TIME", help="The whole of it.")] = 2.0,
    weights: Annotated[float, typer.Option(min=0, metavar="TIME", help="Its part for weights.")] = 1.0,
    overlapped: Annotated[
        float | None, typer.Option(min=0, metavar="TIME", help="Forward and backward together.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it (.png or .svg).")] = None,
    json: o.Json = False,
) -> None:
    """Compare pipeline schedules, and draw one.

    Bubbles of 1F1B, ZB1P, DualPipe and DualPipeV, by formula and as a schedule that is carried out.

    Examples:
        hadal plan pipeline --stages 16
        hadal plan pipeline --stages 8 --micro-batches 20 --schedule dualpipe
        hadal plan pipeline --stages 8 --schedule zb1p --plot zb1p.svg
    """
    o.picture(plot)
    from hadal.plan.answers import answer, times_of
    from hadal.plan.pipeline import LETTERS, NAMES, drawing, timeline

    given: dict[str, Any] = {
        "stages": stages, "micro_batches": micro_batches, "forward": forward, "backward": backward,
        "weights": weights, "overlapped": overlapped, "schedule": schedule,
    }  # fmt: skip
    q = {key: value for key, value in given.items() if value is not None}
    found = answer({"ask": "pipeline", **q})
    if plot is not None and schedule is None:
        raise CliError("--plot draws one schedule; say which with --schedule", 2)
    line = timeline(schedule, stages, micro_batches or 2 * stages, times_of(q)) if schedule else None
    if plot is not None and line is not None:
        from hadal.cli.plan_draw import draw_timeline

        draw_timeline(line, plot)
        note(f"drawn: {plot}")
    if json:
        print_json(found)
        return
    _bubbles(found["bubbles"])
    if line is not None:
        c.heading(f"{NAMES[line.kind]}, {micro_batches or 2 * stages} micro-batches")
        for row in drawing(line, 110):
            say("  " + row)
        say(f"  {LETTERS}")
        say(f"  a step takes {line.length:g}, of which a device waits {line.bubble:g}")


def _bubbles(rows: list[dict[str, Any]]) -> None:
    table(
        ("SCHEDULE", "BUBBLE", "DEVICES", "PARAMETERS", "ACTIVATIONS"),
        [(r["schedule"], f"{r['bubble']:g}", r["devices"], r["parameters"], r["activations"]) for r in rows],
        right=(1, 2),
    )
