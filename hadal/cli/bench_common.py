"""What the kinds of `hadal bench` share: flags, the engine to measure, ceilings, and how they are told."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import BOLD, CliError, bar, note, paint, say

if TYPE_CHECKING:
    from hadal.config import ModelConfig
    from hadal.engine import Engine

Prompt = Annotated[int, typer.Option("--prompt", min=1, metavar="N", help="Tokens of each prompt.")]
Output = Annotated[int, typer.Option("--output", min=2, metavar="N", help="Tokens of each answer.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Runs, after one that warms up.")]
RandomWeights = Annotated[
    bool, typer.Option("--random", help="Random weights of a known shape: nothing is downloaded.")
]
ForcedAcceptance = Annotated[
    float | None,
    typer.Option(
        "--forced-acceptance",
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="Accept drafts at this rate, right or wrong: the speed that such drafts would give.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads on a processor. Default: all its cores.")
]


def config_of(model: str) -> ModelConfig:
    """The configuration of a known name, or of a folder's config.json."""
    from hadal.weights import hub
    from hadal.weights.layout import read_config

    known = hub.find_preset(model)
    return known.config if known else read_config(hub.resolve(model))


def measured_engine(
    model: str, asked: o.Inference, tokens: int, random_weights: bool, threads: int | None, force: bool,
    *, quiet: bool,
) -> Engine:  # fmt: skip
    """The engine to measure, with room for `tokens` a sequence."""
    import torch

    from hadal.cli.loading import introduce, load_engine
    from hadal.config import PRESETS

    if threads:
        torch.set_num_threads(threads)
    if random_weights:
        from hadal.bench.models import random_engine

        config, options = config_of(model), asked.keywords()
        if tokens <= config.max_position_embeddings:
            name = model if model in PRESETS else Path(model).resolve().name
            with bar("making random weights", unit_bytes=False, quiet=quiet) as update:
                return random_engine(
                    config,
                    name=f"{name} (random weights)",
                    force=force,
                    max_model_len=tokens,
                    progress=update,
                    **options,
                )
        longest, name = config.max_position_embeddings, model
    else:
        introduce(model, quiet=quiet)
        engine = load_engine(model, asked, force=force, quiet=quiet)
        if tokens <= engine.max_model_len:
            return engine
        longest, name = engine.max_model_len, engine.name
    raise CliError(f"--prompt and --output are {tokens} tokens; {name} takes {longest}: ask for less", 2)


class Watch:
    """The machine during a measurement: its ceilings, measured before, and what neighbours took of it."""

    def __init__(self, device: Any, pids: tuple[int, ...] = (), *, quiet: bool) -> None:
        """`pids`: of further processes that belong to the measurement."""
        with bar("measuring this machine", unit_bytes=False, quiet=quiet), _interrupt_held():
            import torch

            from hadal.bench import ceilings
            from hadal.bench.neighbours import Neighbours

            self.ceilings = ceilings.measure(torch.device(device))
            self.neighbours = Neighbours([os.getpid(), *pids])

    def as_json(self) -> dict[str, Any]:
        """The ceilings, and the cores that other processes kept busy since."""
        found = {**asdict(self.ceilings), "bandwidth": self.ceilings.bandwidth}
        return {"ceilings": found, "neighbours_cores": round(self.neighbours.cores(), 2)}

    def tell(self, above: bool) -> None:
        """Notes below a table. `above`: something was faster than its ceiling."""
        from hadal.bench.neighbours import LIMIT

        c = self.ceilings
        rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in c.matmul.items())
        note(
            f"Ceilings, measured now: memory {c.bandwidth / 1e9:,.1f} GB/s (copy {c.copy / 1e9:,.1f}, triad "
            f"{c.triad / 1e9:,.1f}, read {c.read / 1e9:,.1f}); matrix products {rates} GFLOP/s."
        )
        if (cores := self.neighbours.cores()) > LIMIT:
            note(f"Other processes used {cores:.1f} cores meanwhile: these rates, ceilings too, are too low.")
        elif above:
            note("Above 100%: what is read stays in the processor's cache, which is faster than its memory.")


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C counts at the end: in the middle of importing torch it would abort the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def where() -> dict[str, Any]:
    from hadal.cli import machine
    from hadal.cli.version import versions

    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"date": date, "machine": machine.summary(), "versions": versions()}


def about(engine: Engine, watch: Watch) -> dict[str, Any]:
    import torch

    from hadal.bench.work import packed_kind

    return {
        "model": engine.name,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "quantize": packed_kind(engine.model),
        "exact": engine.exact,
        "threads": torch.get_num_threads(),
        **where(),
        **watch.as_json(),
    }


def title(engine: Engine, what: str) -> None:
    import torch

    from hadal.bench.work import packed_kind

    packed = packed_kind(engine.model)
    kind = str(engine.dtype).removeprefix("torch.") + (f", weights {packed}" if packed else "")
    kind += ", exact" if engine.exact else ""
    threads = f", {torch.get_num_threads()} threads" if engine.device.type == "cpu" else ""
    say(paint(f"{engine.name}, {kind} on {engine.device}{threads}: {what}", BOLD))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.1 else f"{100 * share:.0f}%"
