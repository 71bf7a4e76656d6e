"""Where a step's time goes: kernels of the GPU, and what the host does meanwhile. Random weights, greedy.

    python benchmarks/profile_decode.py                                   # V2-Lite at batch 1, 32 and 256
    python benchmarks/profile_decode.py --model qwen-1.5b --batches 1 32
    python benchmarks/profile_decode.py --prefill 4000 --batches          # one long prompt alone
    python benchmarks/profile_decode.py --quantize int4 --batches 1

Two passes over the same steady decode steps: one under torch's profiler for the kernels' times (it slows the
host, not the GPU), one with clocks around the engine's own phases for the host. "Busy" is the share of a
plain step's time in which the GPU computed: where it is near 100%, the host is not the limit. Kernels that
are launched dependently (hadal/ops/triton/pdl.py) begin early and wait, and their times hold that wait: there
the sum exceeds the step's time, and only the step's own time counts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from common import machine, save, shapes
from torch.profiler import ProfilerActivity, profile

from hadal.bench.models import random_engine
from hadal.engine import Engine, SamplingParams

WARM, PLAIN, PROFILED = 12, 24, 8  # steps


def seat(engine: Engine, batch: int, prompt: int, draw: random.Random) -> None:
    """Add `batch` random prompts and compute them: afterwards every step is one of single tokens."""
    params = SamplingParams(max_tokens=WARM + PLAIN + PROFILED + 90, temperature=0.0, ignore_eos=True)
    ids = [engine.add([draw.randrange(10, 30000) for _ in range(prompt)], params) for _ in range(batch)]
    waiting = set(ids)
    while waiting:
        waiting -= {name for name, update in engine.step() if update.token_ids}
    for _ in range(WARM):
        engine.step()
    torch.cuda.synchronize()


@contextmanager
def clocks(engine: Engine) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of the engine's phases; a phase's time holds those called inside it."""
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return f(*args, **kwargs)
            finally:
                spent[name].append(time.perf_counter() - begin)

        return call

    phases = [
        (engine.scheduler, "schedule"), (engine.runner, "run"), (engine.sampler, "sample"),
        (engine.sampler, "_read"), (engine.runner, "look_ahead"), (engine, "_commit"),
    ]  # fmt: skip
    for owner, name in phases:
        setattr(owner, name, timed(name.strip("_"), getattr(owner, name)))
    try:
        yield spent
    finally:
        for owner, name in phases:
            delattr(owner, name)


def steps_of(engine: Engine, number: int) -> float:
    """Seconds of a step, the median of `number`."""
    times = []
    for _ in range(number):
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return median(times)


def kernel_times(run: Callable[[], Any], calls: int) -> list[tuple[str, float, float]]:
    """(kernel, launches a call, µs a call), the longest first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    rows = [
        (event.key, event.count / calls, event.self_device_time_total / calls)
        for event in prof.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[2])


def show(title: str, kernels: list[tuple[str, float, float]], step_us: float, top: int) -> float:
    busy = sum(us for _, _, us in kernels)
    print(f"\n{title}: {step_us:,.0f} µs, kernels {busy:,.0f} µs ({100 * busy / step_us:.0f}% busy)")
    for name, count, us in kernels[:top]:
        print(f"  {us:9.1f} µs {100 * us / busy:5.1f}%  {count:6.1f} × {us / count:8.2f}  {name[:100]}")
    return busy


def decode(engine: Engine, batch: int, prompt: int, top: int) -> dict[str, Any]:
    seat(engine, batch, prompt, random.Random(batch))
    step = steps_of(engine, PLAIN)
    with clocks(engine) as spent:
        steps_of(engine, PLAIN)
    kernels = kernel_times(engine.step, PROFILED)
    while engine.has_work():
        engine.step()
    busy = show(f"decode, batch {batch} at {prompt}", kernels, step * 1e6, top)
    phases = {name: median(times) * 1e6 for name, times in spent.items()}
    print("  host: " + ", ".join(f"{name} {us:,.0f}" for name, us in phases.items())
          + f" µs; {batch / step:,.0f} tok/s")  # fmt: skip
    return {
        "batch": batch, "prompt": prompt, "step_us": step * 1e6, "kernels_us": busy,
        "tokens_per_s": batch / step, "host_us": phases, "kernels": kernels[:top],
    }  # fmt: skip


def prefill(engine: Engine, length: int, top: int) -> dict[str, Any]:
    draw = random.Random(7)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    prompts = iter([[draw.randrange(10, 30000) for _ in range(length)] for _ in range(25)])

    def once() -> None:
        engine.add(next(prompts), params)
        while engine.has_work():
            engine.step()

    def timed(times: int) -> float:
        took = []
        for _ in range(times):
            begin = time.perf_counter()
            once()
            took.append(time.perf_counter() - begin)
        return median(took)

    timed(3)
    step = timed(8)
    with clocks(engine) as spent:
        timed(8)
    busy = show(f"prefill of {length}", kernels := kernel_times(once, 3), step * 1e6, top)
    phases = {name: median(times) * 1e6 for name, times in spent.items()}
    print("  host: " + ", ".join(f"{name} {us:,.0f}" for name, us in phases.items())
          + f" µs; {length / step:,.0f} tok/s")  # fmt: skip
    calls = host_calls(once)
    for name, count, us in calls[:top]:
        print(f"  host {us:9.1f} µs  {count:6.0f} × {us / count:8.2f}  {name[:80]}")
    return {"prefill": length, "step_us": step * 1e6, "kernels_us": busy, "tokens_per_s": length / step,
            "host_us": phases, "kernels": kernels[:top], "host_calls": calls[:top]}  # fmt: skip


def host_calls(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """(operator or runtime call, how often, µs of its own) on the host, the longest first; the profiler's own
    cost is in them, so they say where time goes, not how much a plain step takes."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    rows = [(e.key, e.count, e.self_cpu_time_total) for e in prof.key_averages() if e.self_cpu_time_total > 0]
    return sorted(rows, key=lambda row: -row[2])


def row(step: dict[str, Any]) -> list[Any]:
    """A line of the result's table."""
    what = f"batch {step['batch']} at {step['prompt']}" if "batch" in step else f"prompt of {step['prefill']}"
    host = ", ".join(f"{name} {us:,.0f}" for name, us in step.get("host_us", {}).items())
    return [what, round(step["step_us"], 1), round(step["tokens_per_s"], 1), host]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(shapes()), default="v2-lite")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32, 256])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--quantize", choices=("fp8", "int8", "int4"))
    parser.add_argument("--cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--top", type=int, default=24, help="kernels shown")
    parser.add_argument("--out", help="folder of the result instead of benchmarks/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this profile is of a GPU's steps")
    engine = random_engine(
        shapes()[args.model], name=args.model, device="cuda", quantize=args.quantize, max_model_len=8192,
        max_num_seqs=max([1, *args.batches]), max_num_batched_tokens=16384, cache_dtype=args.cache_dtype,
    )  # fmt: skip
    found = [decode(engine, batch, args.prompt, args.top) for batch in args.batches]
    found += [prefill(engine, length, args.top) for length in args.prefill]
    name = "_".join(["profile", args.model, *([args.quantize] if args.quantize else [])])
    save(name, {
        "machine": machine("cuda"), "title": f"A step of {args.model}, where the host's time goes",
        "columns": ["step", "µs", "tokens a second", "host, µs"], "rows": [row(step) for step in found],
        "quantize": args.quantize, "cache": args.cache_dtype, "steps": found,
    }, args.out)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
