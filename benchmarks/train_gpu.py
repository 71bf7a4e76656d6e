"""Training steps on one GPU: tokens a second, model FLOPs utilisation (MFU), peak memory and its prediction.

    python benchmarks/train_gpu.py                           # V2-Lite's width, a dense 1.5B's, and hadal-mini
    python benchmarks/train_gpu.py --cases v2-lite --fp8     # the FP8 recipe beside BF16, in one process
    python benchmarks/train_gpu.py --cases v2-lite --profile 30   # kernels by time as well
    python benchmarks/train_gpu.py --no-graph                # every kernel sent by the host

Random weights, random tokens, whole optimizer steps: forward, backward, FP32 accumulation over micro-batches,
balance, AdamW. `v2-lite`: the width of DeepSeek-V2-Lite (hidden 2048, 64 experts of 1408, 2 shared, MLA) with
as many layers as one card holds with its optimizer; `qwen-1.5b`: the width of Qwen2 1.5B, whole. MFU counts
6·N of the parameters that a token meets and causal attention (hadal/train/flops.py) over the data sheet's
dense BF16 peak, for FP8 as well. In published runs TorchTitan's 16B MoE reached 20.5% on 8 H100,
DeepSeek-V3's training 38.9%.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from common import machine, save, shapes
from torch.profiler import ProfilerActivity, profile

from hadal.config import ModelConfig, Moe
from hadal.data.stream import Rows
from hadal.model.transformer import Transformer
from hadal.plan.training import TrainingShape, training_memory
from hadal.train.batches import Batch, batches
from hadal.train.flops import peak, step_flops
from hadal.train.graphs import WARM, PassGraphs
from hadal.train.losses import Objective
from hadal.train.optimizer import AdamW
from hadal.train.schedules import LearningRate, Schedule
from hadal.train.trainer import Trainer

COLUMNS = ["case", "tokens/s", "MFU", "step, ms", "peak GiB", "predicted", "against BF16"]


@dataclass(frozen=True)
class Case:
    """A model and the shape of its step: rows of `context` tokens, `micro` of them a pass."""

    config: ModelConfig
    context: int
    micro: int
    passes: int
    documents: int = 1  # in a row; more than one are masked from each other
    recompute: tuple[str, ...] = ()


def cases(layers: int) -> dict[str, Case]:
    lite, known = shapes()["v2-lite"], shapes()
    assert isinstance(lite.moe, Moe)
    trained = replace(lite, num_hidden_layers=layers)
    return {
        "v2-lite": Case(trained, 4096, 4, 4, recompute=("norm", "up", "swiglu")),
        "qwen-1.5b": Case(known["qwen-1.5b"], 4096, 4, 4, recompute=("norm",)),
        "hadal-mini": Case(known["hadal-mini"], 1024, 64, 1, documents=9),
    }


class RandomRows:
    """Rows of random tokens: `documents` in each, of equal length."""

    def __init__(self, case: Case) -> None:
        self.case, self.random = case, np.random.default_rng(0)

    def rows(self, start: int, count: int) -> Rows:
        C, n = self.case.context, self.case.documents
        token_RC = self.random.integers(10, self.case.config.vocab_size - 10, (count, C))
        lengths = [C // n] * (n - 1) + [C - C // n * (n - 1)]
        return Rows(token_RC, np.ones((count, C), dtype=np.float32), lengths * count, [False] * (n * count))


def stream(case: Case) -> Iterator[Batch]:
    """Endless batches on the card: the same few, so that the host's NumPy is not what is measured."""
    source = batches(
        RandomRows(case), position=0, rows=case.micro * case.passes, micro_rows=case.micro,
        depths=case.config.num_nextn_predict_layers, mask_documents=case.documents > 1,
    )  # fmt: skip
    few = [next(source).to(torch.device("cuda")) for _ in range(3)]
    while True:
        yield from few


def trainer(case: Case, fp8: bool, graph: bool) -> Trainer:
    model = Transformer(case.config, dtype=torch.bfloat16, device="cuda", max_positions=case.context)
    model.init_weights(0, 0.006 if case.config.hidden_size > 1000 else 0.02)
    schedule = Schedule(LearningRate(1e-4, 1e-5, 0, 10**12, 10**12), 0.001, 10**12, 0.3, 0.1, 10**12)
    objective = Objective(sequence_alpha=1e-4, recompute=case.recompute, fp8=fp8)
    optimizer = AdamW(model.named_parameters())
    graphs = PassGraphs(model, optimizer) if graph else None
    return Trainer(model, optimizer, stream(case), schedule, objective, graphs=graphs)


def timed(run: Callable[[], object], seconds: float) -> float:
    """Seconds of a step, the median of as many as fit; every step is waited for."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times)


def measure(name: str, case: Case, fp8: bool, graph: bool, seconds: float, top: int) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = trainer(case, fp8, graph)
    batch = next(run.batches)
    begin = time.perf_counter()
    arrived = [run.step() for _ in range(WARM + 1)]  # the last one is recorded
    torch.cuda.synchronize()
    warm = time.perf_counter() - begin
    step = timed(run.step, seconds)
    flops = step_flops(case.config, batch.tokens, batch.attended_pairs)
    shape = TrainingShape(
        case.micro * case.context, recompute=case.recompute, fp8=fp8, micro_batches=len(batch.micros)
    )
    found = {
        "tokens_per_second": batch.tokens / step, "step_ms": 1000 * step, "warm_up_s": warm,
        "mfu": flops / step / peak(torch.device("cuda"), torch.bfloat16).flops,
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "predicted_gib": training_memory(case.config, shape).peak / 2**30,
        "tokens_a_step": batch.tokens, "graphs": run.graphs.recorded if run.graphs else 0,
        "graphs_gib": run.graphs.bytes / 2**30 if run.graphs else 0.0,
        "graphs_off": run.graphs.broken if run.graphs else None,
        "losses": [stats.loss for few in [*arrived, run.arrived(wait=True)] for stats in few][:3],
    }  # fmt: skip
    print(f"{name}{' FP8' if fp8 else ''}: {found}", flush=True)
    if top:
        show_kernels(run, top)
    return found


def show_kernels(run: Trainer, top: int) -> None:
    """The kernels of one step, by time, and the GPU's idle share."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        begin = time.perf_counter()
        run.step()
        torch.cuda.synchronize()
        whole = 1e3 * (time.perf_counter() - begin)
    spent: dict[str, list[float]] = defaultdict(list)
    for event in prof.events():
        if event.device_time_total > 0:
            spent[event.name].append(event.device_time_total / 1e3)
    busy, launches = sum(map(sum, spent.values())), sum(map(len, spent.values()))
    print(f"  step {whole:.1f} ms under the profiler, kernels {busy:.1f} ms, {launches} launches")
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"  {sum(times):8.2f} ms {len(times):6} x {name[:120]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=["v2-lite", "qwen-1.5b", "hadal-mini"])
    parser.add_argument("--fp8", action="store_true", help="the FP8 recipe as well, beside BF16")
    parser.add_argument("--layers", type=int, default=7, help="of the V2-Lite-width model")
    parser.add_argument("--no-graph", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measurement a case")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="show the N longest kernels")
    parser.add_argument("--out", help="folder of the result file")
    args = parser.parse_args()
    rows: list[list[Any]] = []
    raw: dict[str, Any] = {}
    for name in args.cases:
        case, base = cases(args.layers)[name], None
        for fp8 in (False, True) if args.fp8 else (False,):
            try:
                found = measure(name, case, fp8, not args.no_graph, args.seconds, args.profile)
            except torch.cuda.OutOfMemoryError as error:
                print(f"{name}: {str(error)[:200]}", flush=True)
                continue
            label = f"{name} width, {case.config.num_hidden_layers} layers, {'FP8' if fp8 else 'BF16'}"
            raw[label], rate = found, found["tokens_per_second"]
            base = base or rate
            predicted = "" if found["predicted_gib"] is None else f"{found['predicted_gib']:.1f}"
            rows.append([
                label, f"{rate:,.0f}", f"{found['mfu']:.1%}", f"{found['step_ms']:.1f}",
                f"{found['peak_gib']:.1f}", predicted, f"x{rate / base:.2f}" if fp8 else "",
            ])  # fmt: skip
    title = "Training steps on one GPU"
    result = {"title": title, "columns": COLUMNS, "rows": rows, "raw": raw}
    save("train_gpu", {"machine": machine("cuda")} | result, args.out)


if __name__ == "__main__":
    main()
