"""What exact mode costs: the same forward passes with and without it, in turn.

    python benchmarks/exact_cost.py                          # hadal-mini's shape, this CPU, FP32
    python benchmarks/exact_cost.py --dtype bfloat16 --threads 2
    python benchmarks/exact_cost.py --device cuda --dtype bfloat16 --model v2-lite

Random weights. A round runs each case `--repeats` times in ordinary mode, then as often in exact mode; a
neighbour's burst of work disturbs single runs, so the fastest run of all rounds counts for either mode, and
the spread of the rounds' own ratios is kept beside it. Cases: prefill of one sequence and of several packed
ones; decode steps with 300 tokens of context; a training step (forward, loss, backward) on packed sequences.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import machine, save, shapes

from hadal.model import Cache, Context, Transformer
from hadal.ops import exact_cpu
from hadal.ops.cross_entropy import linear_cross_entropy
from hadal.ops.exact import exact

PAGE, CONTEXT = 64, 300


def prefill(model: Transformer, lengths: list[int]) -> Callable[[], Any]:
    """One packed pass, logits of the last token."""
    token = torch.randint(0, model.config.vocab_size, (sum(lengths),), device=model.device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model.logits(model(token, Context.packed(lengths, model.device))[-1:])

    return run


def decode(model: Transformer, batch: int) -> Callable[[], Any]:
    """One step of `batch` sequences with CONTEXT tokens each, from hidden states to logits."""
    per, device = -(-CONTEXT // PAGE), model.device
    cache = Cache(model.config, batch * per + 1, PAGE, model.dtype, device)
    table = (torch.arange(batch * per, device=device).view(batch, per) + 1).int()
    position = torch.full((batch,), CONTEXT - 1, device=device)
    slot = table[:, -1].long() * PAGE + (CONTEXT - 1) % PAGE
    token = torch.randint(0, model.config.vocab_size, (batch,), device=device)
    lens = [CONTEXT] * batch

    @torch.inference_mode()
    def run() -> torch.Tensor:
        context = Context(
            position, list(range(batch + 1)), cache, slot, table, (position + 1).int(), lens, batch
        )
        return model.logits(model(token, context))

    return run


def training_step(model: Transformer, lengths: list[int]) -> Callable[[], Any]:
    """Forward, loss and backward on packed sequences."""
    token = torch.randint(0, model.config.vocab_size, (sum(lengths),), device=model.device)

    def run() -> None:
        hidden = model.norm(model(token, Context.packed(lengths, model.device)))
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        linear_cross_entropy(hidden, head.matrix, token.roll(-1)).mean().backward()
        model.zero_grad()

    return run


def seconds(run: Callable[[], Any], repeats: int, cuda: bool) -> float:
    """The fastest of so many runs."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def compare(run: Callable[[], Any], rounds: int, repeats: int, cuda: bool) -> dict[str, Any]:
    """Fastest seconds of both modes, and the ratios of the rounds."""
    pairs = []
    for number in range(rounds + 1):
        pair = []
        for on in (False, True):
            with exact(on):
                pair.append(seconds(run, repeats, cuda))
        if number:  # the first round warms up
            pairs.append(pair)
    ordinary, exactly = (min(column) for column in zip(*pairs, strict=True))
    ratios = sorted(e / o for o, e in pairs)
    return {"ordinary": ordinary, "exact": exactly, "ratio": exactly / ordinary, "rounds": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="hadal-mini", choices=list(shapes()))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the result goes; default benchmarks/results")
    parser.add_argument("--name", help="of the result; default exact_cost_DEVICE")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.device == "cpu":
        exact_cpu.set_threads(asked.threads)
    torch.manual_seed(0)
    config = shapes()[asked.model]
    dtype = getattr(torch, asked.dtype)
    model = Transformer(config, dtype=dtype, device=asked.device).init_weights(0)
    cases = {
        "prefill of 512": prefill(model, [512]),
        "prefill of 8 × 128": prefill(model, [128] * 8),
        "decode, batch 1": decode(model, 1),
        "decode, batch 16": decode(model, 16),
        "training step, 8 × 128": training_step(model, [128] * 8),
    }
    found = {}
    for name, run in cases.items():
        found[name] = compare(run, asked.rounds, asked.repeats, asked.device == "cuda")
        print(
            f"{name:24} {found[name]['ratio']:.2f}×, rounds {median(found[name]['rounds']):.2f}", flush=True
        )
    rows = [
        [name, f"{1e3 * f['ordinary']:.2f}", f"{1e3 * f['exact']:.2f}", f"**{f['ratio']:.2f}×**",
         f"{f['rounds'][0]:.2f}–{f['rounds'][-1]:.2f}×"]
        for name, f in found.items()
    ]  # fmt: skip
    result = {
        "machine": {**machine(asked.device), "threads": asked.threads},
        "title": f"Exact mode, {asked.model}, {asked.dtype}",
        "columns": ["milliseconds", "ordinary", "exact", "exact ÷ ordinary", "rounds"],
        "rows": rows,
        "notes": "Random weights; the fastest run of each mode. Below 1, exact mode is the faster one.",
        "seconds": found,
    }
    save(asked.name or f"exact_cost_{asked.device}", result, asked.folder)


if __name__ == "__main__":
    main()
