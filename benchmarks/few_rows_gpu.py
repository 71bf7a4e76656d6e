"""Kernels of a decode step with few rows, against torch and the memory's rate: V2-Lite's and Qwen 1.5B's.

    python benchmarks/few_rows_gpu.py
    python benchmarks/few_rows_gpu.py --tune          # tries block sizes too; prints the best of each

Launches follow each other on weights of their own, as the layers of a step do, so that what is timed is a
launch among others: with programmatic dependent launch they overlap. `--shard i/n` times nothing and
compiles every n-th configuration into Triton's cache: n such processes first make a tuning run short.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, save
from kernels_gpu import Bench, Call, ceilings, copies, microseconds, random, relative
from torch.nn.functional import linear as torch_linear

from hadal.config import Moe, preset
from hadal.ops.experts import experts_reference, ffn
from hadal.ops.rms_norm import rms_norm_reference
from hadal.ops.triton import argmax, gate, gemv, linear, norm
from hadal.ops.triton import experts as few

PAIR = (3072, 576)  # V2-Lite's queries and latents
LINEAR = {  # name: outputs, inputs, kind
    "V2-Lite q + kv_a": (3648, 2048, "pair"), "V2-Lite o": (2048, 2048, ""),
    "V2-Lite gate_up": (10944, 2048, "swiglu"), "V2-Lite down": (2048, 10944, "residual"),
    "V2-Lite head": (102400, 2048, "wide"), "Qwen qkv": (2048, 1536, "bias"), "Qwen o": (1536, 1536, ""),
    "Qwen gate_up": (8960, 1536, "swiglu"), "Qwen down": (1536, 8960, "residual"),
}  # fmt: skip


class Tuner:
    """Tries configurations: times them, or only compiles a share of them."""

    def __init__(self, bench: Bench, shard: tuple[int, int] | None) -> None:
        self.bench, self.shard = bench, shard
        self.found: dict[str, list[list[Any]]] = {}

    def best(self, title: str, configs: list[Any], run: Callable[[Any], list[Call]]) -> None:
        times: list[tuple[float, Any]] = []
        for number, config in enumerate(configs):
            if self.bench.late():
                print(f"tune: {title}: out of time, {len(configs) - number} configurations not tried")
                break
            try:
                if self.shard is not None:
                    if number % self.shard[1] == self.shard[0]:
                        run(config)[0]()
                    continue
                times.append((microseconds(run(config), 0.03), config))
            except Exception as fault:  # too much shared memory, too many registers: not this one
                if self.shard is None:
                    print(f"tune: {title}: {config}: {type(fault).__name__}: {str(fault)[:90]}")
        times.sort(key=lambda pair: pair[0])
        self.found[title] = [[round(us, 2), repr(config)] for us, config in times]
        for us, config in times[:3]:
            print(f"tune: {title:34} {us:8.2f} µs  {config}", flush=True)


def linears(bench: Bench, tuner: Tuner | None) -> None:
    for name, (N, K, kind) in LINEAR.items():
        weight = random(N * (2 if kind == "swiglu" else 1), K, scale=K**-0.5)
        weights = [weight] + [weight.clone() for _ in range(copies(weight.nbytes) - 1)]
        bias = random(N) if kind == "bias" else None
        for M in (1, 4, 32):
            x = random(M, K)
            residual = random(M, N) if kind == "residual" else None

            def call(w: torch.Tensor, config: linear.Config | gemv.Config | None = None, x: torch.Tensor = x,
                     residual: torch.Tensor | None = residual) -> torch.Tensor:  # fmt: skip
                if kind == "pair":  # noqa: B023 — called within the turn
                    return torch.cat(linear.linear_pair(x, w[: PAIR[0]], w[PAIR[0] :], config), 1)
                dtype = torch.float32 if kind == "wide" else None  # noqa: B023
                swiglu = kind == "swiglu"  # noqa: B023
                return linear.linear(x, w, bias, residual, swiglu, dtype, config)  # noqa: B023

            def plain(w: torch.Tensor, x: torch.Tensor = x) -> list[Any]:
                if kind == "pair":  # noqa: B023
                    return linear.linear_pair(x, w[: PAIR[0]], w[PAIR[0] :])
                return call(w)

            wide = torch_linear(x.float(), weight.float(), None if bias is None else bias.float())
            if kind == "swiglu":
                g, u = wide.chunk(2, 1)
                wide = torch.nn.functional.silu(g) * u
            if residual is not None:
                wide = wide + residual.float()
            case, moved = f"{name}, {M} rows", weight.nbytes + 2 * M * (N + K)
            if tuner is None or tuner.shard is None:
                torch_calls = [functools.partial(torch_linear, x, w, bias) for w in weights]
                us = bench.race("linear", case, "torch, product alone", torch_calls, nbytes=moved)
                ours = [functools.partial(plain, w) for w in weights]
                if kind == "pair":
                    bench.race("linear", case, "ours", ours, nbytes=moved, peer=("torch", us),
                               check=lambda out, want=wide: relative(torch.cat(out, 1), want))  # fmt: skip
                else:
                    bench.race("linear", case, "ours", ours, nbytes=moved, peer=("torch", us),
                               check=lambda out, want=wide: relative(out, want))  # fmt: skip
            if tuner is not None:
                tune_linear(tuner, case, kind, N, K, M, weights, x, bias, residual)


def tune_linear(
    tuner: Tuner, case: str, kind: str, N: int, K: int, M: int, weights: list[torch.Tensor], x: torch.Tensor,
    bias: torch.Tensor | None, residual: torch.Tensor | None,
) -> None:  # fmt: skip
    splits = [1] if kind == "swiglu" or N > 16384 else [1, 2, 4] if K > 4096 else [1, 2]
    blocks = [(16, 256, 2), (16, 512, 4), (32, 256, 4), (64, 128, 4)]
    configs: list[linear.Config | gemv.Config] = [
        linear.Config(n, k, warps, stages, s)
        for (n, k, warps), stages, s in itertools.product(blocks, (3, 5), splits)
    ]
    if M <= gemv.MAX_ROWS:
        blocks = [
            (8, 2048, 4),
            (4, 2048, 4),
            (16, 2048, 8),
            (8, 2048, 8),
            (8, 1024, 4),
            (16, 1024, 4),
            (4, 4096, 8),
        ]
        configs = [linear.Config(64, 128, 4, 5, s) for s in splits] + [gemv.Config(*b) for b in blocks]
    dtype = torch.float32 if kind == "wide" else None

    def run(config: linear.Config | gemv.Config) -> list[Call]:
        if kind == "pair":
            return [
                functools.partial(linear.linear_pair, x, w[: PAIR[0]], w[PAIR[0] :], config) for w in weights
            ]
        return [
            functools.partial(linear.linear, x, w, bias, residual, kind == "swiglu", dtype, config)
            for w in weights
        ]

    tuner.best(case, configs, run)


def experts(bench: Bench, tuner: Tuner | None) -> None:
    """V2-Lite's layer: 64 experts, 6 a token, a shared one of two widths."""
    E, K, D, width = 64, 6, 2048, 1408
    up, down = random(E, 2 * width, D, scale=D**-0.5), random(E, D, width, scale=width**-0.5)
    shared = random(4 * width, D, scale=D**-0.5), random(D, 2 * width, scale=width**-0.5)
    for T in (1, 4, 32, 64, 256):
        x, weight = random(T, D), torch.rand(T, K, device=up.device)
        choices = [torch.rand(T, E, device=up.device).topk(K, -1).indices for _ in range(6)]
        touched = sum(len(c.unique()) for c in choices) / len(choices) / E
        moved = (up.nbytes + down.nbytes) * touched + shared[0].nbytes + shared[1].nbytes
        want = experts_reference(
            x[:4].float(), choices[0][:4], weight[:4], up.float(), down.float()
        ) + ffn(x[:4].float(), shared[0].float(), shared[1].float())  # fmt: skip
        check = functools.partial(_first_rows, want)
        race = functools.partial(
            bench.race, "experts", f"V2-Lite with shared, {T} tokens", nbytes=moved, check=check,
            flops=6 * T * D * width * (K + 2),
        )  # fmt: skip

        def call(c: torch.Tensor, tiles: Any = None, rows: int | None = None,
                 x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:  # fmt: skip
            return few.experts(x, c, weight, up, down, shared, None, tiles, rows)

        if tuner is None or tuner.shard is None:
            race("ours", [functools.partial(call, c) for c in choices])
        if tuner is not None and T in (1, 32, 256):
            rows = {1: (16,), 32: (16,), 256: (32, 64)}[T]
            one = [few.Tiles(*t) for t in ((32, 256, 4, 3), (64, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4),
                                           (128, 64, 8, 4))]  # fmt: skip
            two = [few.Tiles(*t) for t in ((32, 256, 4, 3), (64, 128, 4, 4), (64, 64, 4, 5), (128, 64, 8, 4),
                                           (128, 128, 8, 3))]  # fmt: skip
            base = few.Tiles(64, 128, 4, 3), few.Tiles(64, 128, 4, 4)
            configs = [((a, base[1]), r) for a in one for r in rows] + [
                ((base[0], b), r) for b in two for r in rows
            ]
            tuner.best(
                f"experts, {T} tokens", configs,
                lambda c, choices=choices: [functools.partial(call, e, c[0], c[1]) for e in choices],
            )  # fmt: skip


def _first_rows(want: torch.Tensor, out: torch.Tensor) -> float:
    return relative(out[: want.shape[0]], want)


def small(bench: Bench) -> None:
    """Gate, norm and argmax: hardly any bytes, so what counts is the launch."""
    config = preset("deepseek-v2-lite").config
    moe, D = config.moe, config.hidden_size
    assert isinstance(moe, Moe)
    weights = [random(moe.n_routed_experts, D, scale=D**-0.5) for _ in range(6)]
    one = random(D)
    for T in (1, 4, 32):
        x, delta = random(T, D), random(T, D)
        calls = [functools.partial(gate.gate, x, w, None, moe) for w in weights]
        bench.race("gate", f"V2-Lite, {T} tokens", "ours", calls, nbytes=weights[0].nbytes)
        want = rms_norm_reference((x + delta).float(), one.float(), 1e-6)
        bench.race(
            "norm", f"{T} × {D}", "ours", [lambda x=x, d=delta: norm.add_rms_norm(x, d, one, 1e-6)] * 4,
            nbytes=8 * x.numel(), check=lambda out, want=want: relative(out[1], want),
        )  # fmt: skip
        logits = torch.randn(T, 102400, device=x.device)
        us = bench.race(
            "argmax", f"{T} × 102400", "torch", [lambda v=logits: v.argmax(-1)] * 4, nbytes=logits.nbytes
        )
        bench.race(
            "argmax", f"{T} × 102400", "ours", [lambda v=logits: argmax.argmax(v)] * 4, nbytes=logits.nbytes,
            peer=("torch", us), check=lambda out, v=logits: float((out != v.argmax(-1)).any()),
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="try block sizes as well")
    parser.add_argument("--shard", help="i/n: compile every n-th configuration, time nothing (with --tune)")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after so long")
    parser.add_argument("--out", help="folder of the result instead of benchmarks/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    shard = None
    if args.shard:
        first, of = args.shard.split("/")
        shard = int(first), int(of)
    torch.manual_seed(0)
    bench = Bench(False, args.tune, time.perf_counter() + args.seconds)
    tuner = Tuner(bench, shard) if args.tune else None
    with torch.inference_mode():
        if shard is None:
            ceilings(bench)
            small(bench)
        linears(bench, tuner)
        experts(bench, tuner)
    for failure in bench.failed:
        print(f"FAILED {failure}")
    if shard is None:
        card = torch.cuda.get_device_name().split()[1].lower()
        save(f"few_rows_cuda_{card}", {
            "machine": machine("cuda"), "title": "CUDA kernels of a decode step",
            "columns": ["part", "case", "kernel", "µs", "rate", "of the ceiling", "speed against"],
            "rows": bench.rows, "ceilings": {k: round(v / 1e12, 2) for k, v in bench.ceilings.items()},
            "failed": bench.failed, "tuned": tuner.found if tuner else {},
        }, args.out)  # fmt: skip
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
