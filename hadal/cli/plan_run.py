"""`hadal plan run`: whether a model runs on a machine, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli import plan_common as c
from hadal.cli.terminal import BOLD, CliError, note, paint, print_json, say


def run(
    model: o.Model,
    on: c.On = None,
    dtype: c.WeightDtype = None,
    kv_dtype: c.CacheDtype = None,
    context: c.Context = None,
    prompt: c.Prompt = 1024,
    batch: c.Batch = 1,
    mtp: c.MtpDrafts = 0,
    acceptance: c.Acceptance = None,
    offload: c.Offload = None,
    tp: c.Tp = None,
    dp: c.Dp = None,
    pp: c.Pp = None,
    ep: c.Ep = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the batch sweep (.png or .svg).")
    ] = None,
    json: o.Json = False,
) -> None:
    """Say whether it runs, and how fast.

    Memory by part, three speeds, and what would help. Memory is that of the fullest device, from the
    exact shapes; 90% of a device count as usable. Without --tp, --dp, --pp or --ep the fastest layout
    that fits is taken. "Does not fit" is an answer: status 0.

    Examples:
        hadal plan deepseek-r1-distill-qwen-7b
        hadal plan deepseek-v3 --on "H100, 1000GB RAM" --offload cpu
        hadal plan deepseek-v3 --on 144xh800 --tp 1 --ep 144 --batch 12672 --context 4989
        hadal plan deepseek-v3 --on 8xh200 --mtp 1 --acceptance 0.85 --json
    """
    o.picture(plot)
    from hadal.plan.answers import ask_of
    from hadal.plan.serving import running

    given: dict[str, Any] = {
        "dtype": dtype, "kv_dtype": kv_dtype, "context": context, "prompt": prompt, "batch": batch,
        "mtp": mtp, "acceptance": acceptance, "offload": offload, "tp": tp, "dp": dp, "pp": pp, "ep": ep,
    }  # fmt: skip
    asked = {key: value for key, value in given.items() if value is not None}
    answer = running(ask_of(asked, c.machine_of(on), c.model_of(model)))
    found = answer.as_json()
    if plot is not None:
        if not found["sweep"]:
            raise CliError("there is no sweep to draw: " + (answer.why_no_speed or "the model does not fit"))
        from hadal.cli.plan_draw import draw_sweep

        draw_sweep(found, plot)
        note(f"drawn: {plot}")
    if json:
        print_json(found)
    else:
        _print(found, len(found["sweep"]))


def _print(found: dict[str, Any], swept: int) -> None:
    need, have = (c.amount(found[k]["value"], "B") for k in ("needed", "usable"))
    verdict = "fits" if found["fits"] else "does not fit"
    many = found["layout"] != "one device"
    where = f" on the fullest device ({found['layout']})" if many else ""
    say(paint(f"{found['model']} on {found['on']}: {verdict}", BOLD))
    say(f"{need} needed{where}, {have} usable; weights {found['weights']}, cache {found['cache']}")
    if found["fits"] and found["context"] < found["asked_context"]:
        say(f"with {found['context']:,} of {found['asked_context']:,} tokens of context")
    c.heading("Memory" + (" of the fullest device" if many else ""))
    c.figure_lines(found["memory"])
    if found["notes"]:
        c.heading("To know")
        c.points(found["notes"])
    if found["remedies"]:
        c.heading("What would fit")
        c.points(found["remedies"])
    if found["speeds"]:
        c.heading("Speed: pessimistic / typical / best")
        c.figure_lines(found["speeds"], ranges=True)
        limits = found["limited_by"]
        say(f"  decode is limited by {limits['decode']}, prefill by {limits['prefill']}")
    if found["why_no_speed"]:
        c.heading("Speed")
        c.points([found["why_no_speed"]])
    if swept > 1:
        c.heading("Decode by batch, typical" + (f", in {found['layout']}" if many else ""))
        for line in bars(found["sweep"]):
            say("  " + line)


def bars(sweep: list[dict[str, Any]], width: int = 40) -> list[str]:
    """A bar a batch, as long as its rate."""
    most = max(row["tokens_per_s"] for row in sweep)
    return [
        f"{row['batch']:>6,}  {'█' * max(1, round(width * row['tokens_per_s'] / most)):<{width}}  "
        f"{row['tokens_per_s']:>9,.0f} tokens/s  {row['per_sequence']:>7,.1f} each  {row['limited_by']}"
        for row in sweep
    ]
