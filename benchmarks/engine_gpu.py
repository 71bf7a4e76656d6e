"""The engine on one GPU: rates at batch 1, 32 and 256 and of a long prompt, beside the card's ceilings.

    python benchmarks/engine_gpu.py                              # V2-Lite's and Qwen 1.5B's shapes, BF16
    python benchmarks/engine_gpu.py --models v2-lite --speculation
    python benchmarks/engine_gpu.py --models v2-lite --quantize int4 --cases 1 32
    python benchmarks/engine_gpu.py --startup                    # a fresh process, to its first token

Random weights, greedy, every prompt new, no prefix cache. "Output rate" is generated tokens over all the
time, prompts included; "decode rate" is that of the steps after the prompts. The ceiling of a decode rate is
the best bandwidth that the card showed on a large buffer, over the bytes that a step must read: with experts,
those that the batch really touches (counted by the router). `--alike` gives every sequence the same prompt:
then all choose the same experts, which is what a server under test with one dummy prompt measures. Beside
each stands what vLLM 0.26 did on an H100 80GB in another run (BF16, random weights).
`--speculation`: one MTP draft, accepted with a forced probability of 0.85.
"""

from __future__ import annotations

import argparse
import gc
import random
import subprocess
import sys
import time
from typing import Any

import torch
from common import machine, save, shapes

from hadal.bench.ceilings import Ceilings, best_time
from hadal.bench.models import random_engine
from hadal.bench.offline import Trace
from hadal.bench.work import measured_experts, step_work
from hadal.engine import Engine, SamplingParams

CASES = {1: (128, 256), 32: (512, 256), 256: (512, 256)}  # sequences: prompt, output
VLLM = {("v2-lite", 1): 256, ("v2-lite", 32): 5554, ("v2-lite", 256): 17987, ("v2-lite", 4000): 74000,
        ("qwen-1.5b", 1): 423, ("qwen-1.5b", 32): 10027, ("qwen-1.5b", 256): 23753,
        ("qwen-1.5b", 4000): 147000}  # fmt: skip
COLUMNS = ["case", "output rate", "decode rate", "of the bytes' ceiling", "experts touched", "vLLM 0.26",
           "against"]  # fmt: skip


def bandwidth() -> float:
    """Bytes a second that the card reads: the best of a copy and a sum of a large buffer."""
    device = torch.device("cuda")
    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best_time(lambda: target.copy_(source), device, 0.1)
    read = source.nbytes / best_time(source.sum, device, 0.1)
    return Ceilings(copy, 0.0, read).bandwidth


def run(engine: Engine, batch: int, prompt: int, output: int, draw: random.Random, alike: bool) -> Trace:
    """`batch` sequences at once, `output` tokens each."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    ids = [[draw.randrange(10, engine.vocab_size - 10) for _ in range(prompt)] for _ in range(batch)]
    ids = [ids[0]] * batch if alike else ids
    begin = time.perf_counter()
    arrivals: dict[str, list[tuple[float, int]]] = {engine.add(one, params): [] for one in ids}
    while engine.has_work():
        updates = engine.step()
        now = time.perf_counter() - begin
        for name, update in updates:
            if update.finish_reason == "error":
                raise RuntimeError(update.error)
            if update.token_ids:
                arrivals[name].append((now, len(update.token_ids)))
    return Trace(list(arrivals.values()), time.perf_counter() - begin)


def rates(engine: Engine, name: str, batch: int, alike: bool, per_second: float) -> list[Any]:
    prompt, output = CASES[batch]
    draw = random.Random(batch)
    for _ in range(2):  # warm up: kernels, graphs of steps, and of a prompt when its size is asked for again
        run(engine, batch, prompt, 8, draw, alike)
    traces = [run(engine, batch, prompt, output, draw, alike) for _ in range(2 if batch > 1 else 4)]
    best = max(traces, key=lambda t: t.tokens / t.ended)
    decode = max(t.decoded() / (t.ended - t.filled) for t in traces)
    work = step_work(engine)
    moe = engine.config.moe
    touched = (moe.num_experts_per_tok if moe else None) if alike else measured_experts(engine, batch)
    ceiling = batch * per_second / work.bytes(batch, prompt + output / 2, touched)
    out = best.tokens / best.ended
    known = VLLM.get((name, batch))
    shown = decode if batch == 1 else out
    plain = known and not engine.stats().speculation
    return [
        f"batch {batch}, {prompt}/{output}" + (", alike" if alike else ""), round(out, 1), round(decode, 1),
        f"{100 * decode / ceiling:.0f}%", "" if touched is None else f"{touched:.1f}",
        f"{known:,}" if plain else "", f"{shown / known:.2f}×" if plain else "",
    ]  # fmt: skip


def prefill(engine: Engine, name: str, length: int = 4000) -> list[Any]:
    draw = random.Random(1)
    times = [run(engine, 1, length, 1, draw, False).ended for _ in range(10)][2:]
    rate, known = length / min(times), VLLM.get((name, length))
    return [f"prompt of {length}", round(rate, 1), "", "", "", f"{known:,}" if known else "",
            f"{rate / known:.2f}×" if known else ""]  # fmt: skip


def measure(name: str, args: argparse.Namespace, per_second: float) -> list[list[Any]]:
    more: dict[str, Any] = {}
    if args.speculation:
        more = {"speculation": "mtp", "num_speculative_tokens": 1, "speculation_forced_acceptance": 0.85,
                "speculation_adaptive": False}  # fmt: skip
    engine = random_engine(
        shapes()[name], name=name, device="cuda", quantize=args.quantize, cache_dtype=args.cache_dtype,
        max_model_len=8192, max_num_seqs=max(args.cases), max_num_batched_tokens=16384, prefix_caching=False,
        **more,
    )  # fmt: skip
    rows = []
    for batch in args.cases:
        rows.append(rates(engine, name, batch, args.alike, per_second))
        print(f"{name:10}", *(str(cell).rjust(12) for cell in rows[-1]), flush=True)
    if not args.speculation and not args.alike:
        rows.append(prefill(engine, name))
        print(f"{name:10}", *(str(cell).rjust(12) for cell in rows[-1]), flush=True)
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return [[name, *row] for row in rows]


def first_token(name: str) -> None:
    """In this process: make an engine and one token, and say how long each took since the start."""
    begin = time.perf_counter()
    engine = random_engine(shapes()[name], name=name, device="cuda", max_model_len=8192)
    made = time.perf_counter()
    done = run(engine, 1, 128, 4, random.Random(0), False)
    seconds = {"made": made - begin}
    seconds |= {"first": seconds["made"] + done.first, "fourth": seconds["made"] + done.ended}
    print(" ".join(f"{key} {value:.1f}" for key, value in seconds.items()))


def startup(name: str) -> list[list[Any]]:
    """A fresh process, twice: kernels compiled (unless the cache holds them), then out of the cache."""
    rows = []
    for number in (1, 2):
        begin = time.perf_counter()
        command = [sys.executable, __file__, "--first-token", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - begin
        words = done.stdout.split()
        inside = {key: float(value) for key, value in zip(words[::2], words[1::2], strict=True)}
        rows.append([name, f"run {number}", round(seconds, 1), inside["first"], inside["made"]])
        print(f"{name}: process {seconds:.1f} s; after its imports {done.stdout.strip()} s", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=list(shapes()), default=["v2-lite", "qwen-1.5b"])
    parser.add_argument("--cases", nargs="*", type=int, choices=list(CASES), default=list(CASES))
    parser.add_argument("--quantize", choices=("fp8", "int8", "int4"))
    parser.add_argument("--cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--alike", action="store_true", help="the same prompt for every sequence")
    parser.add_argument("--speculation", action="store_true", help="one MTP draft, accepted at 0.85")
    parser.add_argument("--startup", action="store_true", help="time fresh processes instead")
    parser.add_argument("--first-token", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="folder of the result instead of benchmarks/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    if args.first_token:
        first_token(args.first_token)
        return 0
    card = torch.cuda.get_device_name().split()[1].lower()
    what = [args.quantize, "fp8cache" if args.cache_dtype == "fp8" else "", "alike" if args.alike else "",
            "speculation" if args.speculation else "", "startup" if args.startup else ""]  # fmt: skip
    name = "_".join(["engine", card, *filter(None, what)])
    if args.startup:
        rows = [row for model in args.models for row in startup(model)]
        columns = ["model", "", "process, s", "first token, s", "model made, s"]
        title = "From nothing to a token"
        notes = "Random weights: nothing is read from disk. The first run compiles the kernels."
    else:
        per_second = bandwidth()
        rows = [row for model in args.models for row in measure(model, args, per_second)]
        columns, title = ["model", *COLUMNS], "The engine, tokens a second"
        notes = f"Bandwidth of this run: {per_second / 1e12:.2f} TB/s. vLLM: another run, one H100 80GB."
    save(name, {"machine": machine("cuda"), "title": title, "columns": columns, "rows": rows, "notes": notes},
         args.out)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
