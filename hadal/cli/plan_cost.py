"""`hadal plan cost`: tokens here and by API, in dollars."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli import plan_common as c
from hadal.cli.terminal import BOLD, paint, print_json, say


def cost(
    model: o.Model,
    tokens_in: Annotated[str, typer.Option("--in", metavar="N", help="Tokens in, such as 2e6 or 500k.")],
    tokens_out: Annotated[str, typer.Option("--out", metavar="N", help="Tokens out.")],
    on: c.On = None,
    dtype: c.WeightDtype = None,
    context: c.Context = None,
    batch: c.Batch = 1,
    hourly: c.Hourly = None,
    api: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare with deepseek-chat or deepseek-reasoner.")
    ] = None,
    api_date: Annotated[str | None, typer.Option(metavar="DATE", help="The API's price on that day.")] = None,
    cache_hits: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Of the API's input, found in its cache.")
    ] = 0.0,
    owned: Annotated[
        float | None,
        typer.Option(min=0, metavar="DOLLARS", help="What the machine cost: then an hour is electricity."),
    ] = None,
    kwh: Annotated[float | None, typer.Option(min=0, metavar="DOLLARS", help="Of electricity.")] = None,
    watts: Annotated[float | None, typer.Option(min=1, metavar="W", help="Of a device.")] = None,
    pue: Annotated[float | None, typer.Option(min=1, help="Power of the room over that of devices.")] = None,
    json: o.Json = False,
) -> None:
    """Compare the cost here with an API's.

    Tokens in and out, in hours and dollars, and where the break-even lies. A local run is not free: a
    rented device has a price an hour, an owned one takes electricity. Prices are dated lists with their
    sources; your own go before them.

    Examples:
        hadal plan cost deepseek-v2-lite --on a100-80 --in 2e6 --out 5e5 --batch 16 --api deepseek-chat
        hadal plan cost deepseek-v2-lite --on rtx-4090 --dtype int4 --in 1e6 --out 1e5 --owned 1800
    """
    from hadal.plan.answers import ask_of, costs

    given: dict[str, Any] = {
        "dtype": dtype, "context": context, "batch": batch, "hourly": hourly, "api": api,
        "api_date": api_date, "cache_hits": cache_hits, "owned": owned, "kwh": kwh, "watts": watts,
        "pue": pue,
        "tokens_in": c.number(tokens_in), "tokens_out": c.number(tokens_out),
    }  # fmt: skip
    q = {key: value for key, value in given.items() if value is not None}
    found = costs(ask_of(q, c.machine_of(on), c.model_of(model)), q)
    if json:
        print_json(found.as_json())
        return
    say(paint(f"{found.run.ask.name} on {found.run.ask.machine.describe()}, {batch} at once", BOLD))
    c.figure_lines([f.as_json() for f in found.figures], ranges=True)
    if found.price_missing:
        say(f"  dollars here are not told: {found.price_missing}")
    if api is not None:
        say(
            f"  the API answers with a model of its own, named above: compare its answers with {model}'s, too"
        )
