"""`hadal bench kernels`: single operations at a model's sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hadal.cli import bench_common as common
from hadal.cli import options as o
from hadal.cli.terminal import BOLD, CliError, bar, paint, print_json, say, table

if TYPE_CHECKING:
    from hadal.bench.kernels import Row


def kernels(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Whose sizes to take.")] = "deepseek-v2-lite",
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help="linear, experts, attention, gate or norm; may be given again.",
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="FORMAT",
            help="Weights as float32, bfloat16, fp8, int8 or int4; may be given again.",
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Cached tokens for attention.")] = 1024,
    device: o.Device = "auto",
    threads: common.Threads = None,
    json: o.Json = False,
) -> None:
    """Single operations at a model's sizes, beside the ceiling.

    Random values, in turns from a pool larger than the caches. The ceiling of an operation is the longer of
    reading its bytes and computing its products. Only the sizes of MODEL are used: nothing is downloaded.

    Examples:
        hadal bench kernels
        hadal bench kernels deepseek-v3 --only linear --kind int8 --kind int4
        hadal bench kernels hadal-mini --threads 1 --json
    """
    import torch

    from hadal.bench import kernels as room
    from hadal.cli import machine
    from hadal.engine.loading import pick_device

    _check("--only", only, room.GROUPS)
    _check("--kind", kind, room.KINDS)
    where, config = pick_device(device), common.config_of(model)
    if threads:
        torch.set_num_threads(threads)
    watch = common.Watch(where, quiet=json)
    free = machine.memory().available if where.type == "cpu" else torch.cuda.mem_get_info(where)[0]
    wanted = room.cases(
        config, where, groups=tuple(only or room.GROUPS), kinds=tuple(kind or ()), context=context,
        memory=free // 8,
    )  # fmt: skip
    rows = []
    with bar("measuring", unit_bytes=False, quiet=json) as update:
        for case in wanted:
            rows.append(room.run(case, watch.ceilings, where))
            update(len(rows), None, f"{case.operation} {case.kind}")
    if not rows:
        raise CliError(f"{model} has nothing to measure with these flags: it has no experts", 2)
    if json:
        about = {"model": model, "device": str(where), "threads": torch.get_num_threads(), **common.where()}
        results = [row.as_json() for row in rows]
        print_json({**about, **watch.as_json(), "results": results})
    else:
        _print_kernels(f"operations of {model} on {where}", watch, rows)


def _check(flag: str, given: list[str] | None, known: tuple[str, ...]) -> None:
    for name in given or ():
        if name not in known:
            raise CliError(f"{flag} {name} is unknown; use {', '.join(known)}", 2)


def _print_kernels(title: str, watch: common.Watch, rows: list[Row]) -> None:
    say(paint(title, BOLD))
    cells = [
        (
            r.operation,
            r.shape,
            r.kind,
            f"{1e6 * r.seconds:,.1f} µs",
            f"{r.bytes_per_s / 1e9:,.1f}",
            f"{r.flops_per_s / 1e9:,.1f}",
            r.bound,
            common.percent(r.share),
        )
        for r in rows
    ]
    header = ("OPERATION", "SIZE", "WEIGHTS", "TIME", "GB/s", "GFLOP/s", "BOUND BY", "OF CEILING")
    table(header, cells, right=(3, 4, 5, 7))
    watch.tell(any(r.share > 1 for r in rows))
