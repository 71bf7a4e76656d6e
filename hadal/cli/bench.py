"""`hadal bench`: latency and throughput of a model here, beside the ceiling that this machine sets.

Decode: a step reads the weights that it touches once, and every sequence's cache; the ceiling is batch ×
measured bandwidth / those bytes. Prefill: the ceiling is the measured rate of matrix products / FLOP per
token. Every run uses new random prompts, so that no prefix is found in the cache; of the repeats the fastest
counts.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import BOLD, CliError, human_seconds, note, paint, print_json, say, table

if TYPE_CHECKING:
    from hadal.engine import Engine


@dataclass
class Result:
    """One row: a batch size, its times, its ceilings. Rates in tokens per second of the batch."""

    batch: int
    prompt: int
    output: int
    first_token_s: float
    prefill_rate: float
    prefill_ceiling: float
    decode_rate: float
    decode_ceiling: float

    def row(self) -> tuple[str, ...]:
        """Cells of the printed table."""
        return (
            str(self.batch),
            human_seconds(self.first_token_s),
            f"{self.prefill_rate:,.0f}",
            f"{100 * self.prefill_rate / self.prefill_ceiling:.0f}%",
            f"{self.decode_rate:,.1f}",
            f"{self.decode_rate / self.batch:,.1f}",
            f"{self.decode_ceiling:,.0f}",
            f"{100 * self.decode_rate / self.decode_ceiling:.0f}%",
        )


def bench(
    model: o.Model = "hadal-mini",
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences at once; may be given again. Default: 1, 4, 16."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each prompt.")] = 128,
    output: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of each answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each batch size; the fastest counts.")] = 3,
    random_weights: Annotated[
        bool, typer.Option("--random", help="Random weights of a known shape: nothing is downloaded.")
    ] = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Measure speed, with this machine's ceiling beside it.

    Time to first token, prefill and decode rates, by batch size.

    Examples:
        hadal bench
        hadal bench hadal-mini --batch 1 --batch 32 --prompt 256 --output 128
        hadal bench deepseek-r1-distill-qwen-1.5b --random --dtype bfloat16 --json
    """
    from hadal.cli.loading import introduce, load_engine, random_engine

    batches = sorted(set(batch or [1, 4, 16]))
    introduce(model, quiet=json)
    wanted = prompt + output
    if random_weights:
        engine = random_engine(
            model, device=device, dtype=dtype, max_model_len=wanted, max_num_seqs=max(batches), force=force
        )
    else:
        engine = load_engine(
            model, device=device, dtype=dtype, max_num_seqs=max(batches), force=force, quiet=json
        )
    if wanted > engine.max_model_len:
        raise CliError(
            f"--prompt {prompt} and --output {output} are {wanted} tokens; {engine.name} takes "
            f"{engine.max_model_len}: ask for less",
            2,
        )
    results = [measure(engine, size, prompt, output, repeats) for size in batches]
    if json:
        print_json(_as_json(engine, results))
    else:
        _print(engine, results)


def measure(engine: Engine, batch: int, prompt: int, output: int, repeats: int) -> Result:
    """Run one batch size and put the ceilings beside it."""
    import torch

    from hadal.cli import machine
    from hadal.plan.speed import prefill_flops, step_bytes

    draw = random.Random(0)
    _once(engine, batch, prompt, 2, draw)  # warm up
    runs = [_once(engine, batch, prompt, output, draw) for _ in range(repeats)]
    device = torch.device(engine.device)
    width = torch.empty((), dtype=engine.dtype).element_size()
    read = step_bytes(
        engine.config, prompt + output / 2, bytes_per_weight=width, bytes_per_value=width, batch=batch
    )
    flops = prefill_flops(engine.config, prompt) / prompt
    return Result(
        batch=batch,
        prompt=prompt,
        output=output,
        first_token_s=min(run[0] for run in runs),
        prefill_rate=batch * prompt / min(run[1] for run in runs),
        prefill_ceiling=machine.matmul_rate(device, engine.dtype) / flops,
        decode_rate=batch * (output - 1) / min(run[2] for run in runs),
        decode_ceiling=batch * machine.bandwidth(device) / read,
    )


def _once(
    engine: Engine, batch: int, prompt: int, output: int, draw: random.Random
) -> tuple[float, float, float]:
    """Seconds: until the first sequence's first token, until all have one, and from then to the end."""
    from hadal.engine import SamplingParams

    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    vocab = engine.config.vocab_size
    started = time.perf_counter()
    waiting = {engine.add([draw.randrange(vocab) for _ in range(prompt)], params) for _ in range(batch)}
    first = filled = 0.0
    while engine.has_work():
        for request, update in engine.step():
            if update.finish_reason == "error":
                raise CliError(f"the engine failed in the benchmark: {update.error}")
            if update.token_ids and request in waiting:
                waiting.discard(request)
                filled = time.perf_counter()
                first = first or filled
    return first - started, filled - started, time.perf_counter() - filled


def _as_json(engine: Engine, results: list[Result]) -> dict[str, Any]:
    from hadal.cli import machine
    from hadal.cli.version import versions

    return {
        "model": engine.name,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.summary(),
        "versions": versions(),
        "results": [asdict(result) for result in results],
    }


def _print(engine: Engine, results: list[Result]) -> None:
    one = results[0]
    where = f"{str(engine.dtype).removeprefix('torch.')} on {engine.device}"
    say(paint(f"{engine.name}, {where}: prompts of {one.prompt} tokens, answers of {one.output}", BOLD))
    header = ("BATCH", "FIRST", "PREFILL/s", "OF CEILING", "DECODE/s", "EACH/s", "CEILING/s", "OF CEILING")
    table(header, [result.row() for result in results], right=tuple(range(8)))
    note("Ceilings: measured matrix products (prefill) and measured memory bandwidth (decode).")
    if any(result.decode_rate > result.decode_ceiling for result in results):
        note("Above 100%: the weights stay in the processor's cache, which is faster than its memory.")
