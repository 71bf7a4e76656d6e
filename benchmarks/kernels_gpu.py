"""Our CUDA kernels against their peers and the card's ceilings: correctness first, then a race, then a table.

    python benchmarks/kernels_gpu.py                          # everything, about four minutes
    python benchmarks/kernels_gpu.py --only mla,grouped       # some parts
    python benchmarks/kernels_gpu.py --tune --only grouped    # and tries block sizes; prints the best
    TRITON_INTERPRET=1 python benchmarks/kernels_gpu.py --small    # tries the script itself, without a card

A time is the median over replays of a CUDA graph that holds several launches, each on inputs of its own
where one set would fit in the L2 cache. Ceilings (a large copy, large products in BF16 and FP8) are measured
in the same run. Before a kernel is timed, freed memory is filled with NaN, and its output is compared with a
reference in FP32; what fails is said, and not timed. Figures of FlashMLA and DeepGEMM are from one H100 80GB
HBM3 (torch 2.11, CUDA 13), another run: ratios to them hold for that card.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import kernels_fp8_train
import kernels_train
import torch
from common import machine, save
from torch import Tensor

from hadal.ops import absorbed, latent_fp8, paged
from hadal.ops import attention as attention_op
from hadal.ops import experts as expert_op
from hadal.ops import rope as rope_op
from hadal.ops.fp8 import dequantise_activations
from hadal.ops.mla import absorbed_query
from hadal.ops.packed import KINDS, Kind, Packed, linear_reference, pack
from hadal.ops.packed import experts_reference as packed_experts
from hadal.ops.triton import decode, flash, fp8, latent, packed, packed_gemv, route
from hadal.ops.triton import experts as few_experts
from hadal.ops.triton import heads as head_kernels
from hadal.ops.triton import linear as few_rows
from hadal.ops.triton import mla as around_mla

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
L2_BYTES = 160e6  # rotated over at least so much, three times an H100's cache
Call = Callable[[], Any]

# µs or TFLOP/s of peers, by case (see above)
FLASH_MLA = {(128, 128, 4096): 293.0, (128, 16, 4096): 239.0, (64, 128, 8192): 275.0, (32, 16, 8192): 137.0,
             (1, 16, 4096): 35.0}  # fmt: skip
DEEP_GEMM = {(4, 8192, 4096, 7168): 1334.0, (4, 8192, 7168, 2048): 1211.0, (32, 256, 4096, 7168): 998.0,
             (1, 4096, 7168, 2048): 1217.0, (1, 4096, 4096, 7168): 1327.0}  # fmt: skip


@dataclass
class Bench:
    """What all parts share: the options, the ceilings once measured, and the rows so far."""

    small: bool
    tune: bool
    deadline: float
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[list[Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def race(
        self, part: str, case: str, name: str, calls: list[Call], *, nbytes: float = 0, flops: float = 0,
        rate: str = "bf16", check: Callable[[Any], float] | None = None, limit: float = 0.02,
        peer: tuple[str, float] | None = None,
    ) -> float:  # fmt: skip
        """Check, time and print one candidate; µs, or infinity where it failed or time is over."""
        if self.late():
            return float("inf")
        try:
            if check is not None:
                poison()
                error = check(calls[0]())
                if not error <= limit:
                    raise AssertionError(f"relative error {error:.3g}, allowed {limit:.3g}")
            us = microseconds(calls)
        except Exception as fault:  # a table with a hole is worth more than none, on a lent machine
            self.failed.append(f"{part}, {case}, {name}: {type(fault).__name__}: {str(fault)[:300]}")
            print(f"FAILED {self.failed[-1]}")
            return float("inf")
        floor = max(nbytes / self.ceilings["copy"], flops / self.ceilings[rate]) * 1e6
        against = f"{peer[1] / us:.2f}× {peer[0]}" if peer else ""
        speed = (
            f"{flops / us / 1e6:,.0f} TFLOP/s"
            if rate_counts(nbytes, flops, self.ceilings, rate)
            else f"{nbytes / us / 1e6:.2f} TB/s"
        )
        row = [part, case, name, round(us, 1), speed, f"{100 * floor / us:.0f}%", against]
        self.rows.append(row)
        print(f"{part:8} {case:30} {name:26} {us:9.1f} µs  {speed:>14} {row[5]:>5}  {against}", flush=True)
        return us


def rate_counts(nbytes: float, flops: float, ceilings: dict[str, float], rate: str) -> bool:
    """Whether arithmetic, not memory, is the floor."""
    return flops / ceilings[rate] > nbytes / ceilings["copy"]


def poison() -> None:
    """NaN in memory that the next outputs are likely to be given."""
    if CUDA:
        torch.cuda.empty_cache()
    blocks = [torch.full((1 << bits,), float("nan"), device=DEVICE) for bits in range(8, 28 if CUDA else 12)]
    del blocks


def microseconds(calls: list[Call], seconds: float = 0.15) -> float:
    """Median time of a call, by replays of a graph of them all, each at least once."""
    if not CUDA:
        begin = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - begin) * 1e6
    for call in calls[:1] * 2:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    guess = max(time.perf_counter() - begin, 2e-6)
    launches = max(len(calls), min(20, int(0.01 / guess)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), launches):
            call()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 100):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) * 1e3 / launches)
    return median(times)


def relative(out: Tensor, want: Tensor) -> float:
    """Error in norm; NaN stays NaN."""
    return float((out.double() - want.double()).norm() / want.double().norm())


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE) * scale


def copies(nbytes: float) -> int:
    """Input sets whose bytes together exceed the cache."""
    return max(1, min(8, int(-(-L2_BYTES // nbytes)))) if CUDA else 1


def best_of(bench: Bench, title: str, configs: list[Any], run: Callable[[Any], list[Call]]) -> None:
    """Try every configuration while there is time, and print the three best."""
    found: list[tuple[float, Any]] = []
    for config in configs:
        if bench.late():
            print(f"tune: out of time, {len(configs) - len(found)} of {len(configs)} not tried")
            break
        try:
            found.append((microseconds(run(config), 0.05), config))
        except Exception as fault:  # too much shared memory, too many registers: not this one
            print(f"tune: {title}: {config}: {type(fault).__name__}: {str(fault)[:120]}")
    for us, config in sorted(found, key=lambda pair: pair[0])[:3]:
        print(f"tune: {title}: {us:9.1f} µs  {config}", flush=True)


# --- ceilings -----------------------------------------------------------------------------------------------
def ceilings(bench: Bench) -> None:
    """Copy bandwidth (bytes read and written), and the rates of large products, per second."""
    n = 1 << (16 if bench.small else 30)
    source = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bench.ceilings["copy"] = 2 * n / microseconds([functools.partial(target.copy_, source)]) * 1e6
    del source, target
    n = 64 if bench.small else 8192
    a, b = random(n, n), random(n, n)
    bench.ceilings["bf16"] = 2 * n**3 / microseconds([lambda: a @ b]) * 1e6
    bench.ceilings["fp8"] = 2 * bench.ceilings["bf16"]
    if CUDA and torch.cuda.get_device_capability() >= (8, 9):
        qa, qb, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones(1, device=DEVICE)
        call = functools.partial(torch._scaled_mm, qa, qb.t(), one, one, out_dtype=torch.bfloat16)
        bench.ceilings["fp8"] = 2 * n**3 / microseconds([call]) * 1e6
    c = bench.ceilings
    print(f"ceilings: copy {c['copy'] / 1e12:.2f} TB/s, BF16 {c['bf16'] / 1e12:.0f} TFLOP/s, "
          f"FP8 {c['fp8'] / 1e12:.0f} TFLOP/s (one scale a tensor)")  # fmt: skip


# --- MLA decode ---------------------------------------------------------------------------------------------
RANK, ENTRY, PAGE = 512, 576, 64
MLA_SHAPES = [(s, h, n, 1) for s, h, n in FLASH_MLA] + [(1, 16, 512, 1), (32, 16, 640, 1), (1, 128, 4096, 1),
                                                       (8, 16, 2048, 3), (32, 128, 4096, 2)]  # fmt: skip


class MlaCase:
    """Inputs of a shape: caches in BF16 and FP8, shuffled pages in several sets, references of few rows."""

    def __init__(self, S: int, H: int, length: int, Q: int) -> None:
        self.rows, self.Q, self.scale = Q * H, Q, 0.1
        self.flops = 2 * S * Q * H * length * (ENTRY + RANK)
        self.nbytes = S * length * ENTRY * 2 + S * Q * H * (ENTRY + RANK) * 2
        self.less = self.nbytes - S * length * (ENTRY * 2 - 656)
        sets, pages = copies(self.nbytes), -(-length // PAGE)
        self.cache = random(sets * S * pages + 1, PAGE, ENTRY)
        self.cache8 = latent_fp8.quantise_entries(self.cache, RANK)
        tables = (torch.randperm(sets * S * pages, device=DEVICE) + 1).int().view(sets, S, pages)
        self.tables = tables.repeat_interleave(Q, 1)
        self.context = (length - Q + 1 + torch.arange(Q, device=DEVICE)).int().repeat(S)
        self.q = random(S * Q, H, ENTRY)
        self.title = f"{S} × {H} heads × {length}" + (f", {Q} rows" if Q > 1 else "")
        flash = FLASH_MLA.get((S, H, length))
        self.peer = ("FlashMLA", flash) if flash and Q == 1 else None

    def want(self, cache: Tensor) -> Tensor:
        """The first sequences' outputs, in FP32."""
        n = min(2 * self.Q, self.q.shape[0])
        few = cache[self.tables[0, :n].flatten().long()]
        few = latent_fp8.dequantise_entries(few, RANK) if few.dtype == torch.uint8 else few.float()
        index = torch.arange(few.shape[0], device=DEVICE).view(n, -1)
        q = self.q[:n].float()
        return paged.mla_decode_reference(q, few, index, self.context[:n], RANK, self.scale)

    def calls(self, f: Callable[..., Tensor], cache: Tensor, **options: Any) -> list[Call]:
        arguments = (self.context, RANK, self.scale, self.Q)
        return [functools.partial(f, self.q, cache, t, *arguments, **options) for t in self.tables]

    def race(
        self, bench: Bench, name: str, f: Callable[..., Tensor], fp8_cache: bool, **options: Any
    ) -> None:
        cache = self.cache8 if fp8_cache else self.cache
        want = self.want(cache)
        bench.race(
            "mla", self.title, name + (", FP8 cache" if fp8_cache else ""), self.calls(f, cache, **options),
            flops=self.flops, nbytes=self.less if fp8_cache else self.nbytes, peer=self.peer,
            check=lambda out: relative(out[: len(want)], want),
        )  # fmt: skip


def mla(bench: Bench) -> None:
    """What is chosen, and for many rows what Triton's own kernel does."""
    shapes = [(2, 4, 100, 1), (1, 20, 70, 2)] if bench.small else MLA_SHAPES
    for shape in shapes:
        case = MlaCase(*shape)
        for fp8_cache in (False, True):
            case.race(bench, "chosen", latent.mla_decode, fp8_cache)
            for name, config in latent_candidates(case.rows, fp8_cache).items():
                case.race(bench, name, latent.mla_decode, fp8_cache, config=config)
        del case
    for S, H in [(2, 3)] if bench.small else [(1, 16), (4, 16), (32, 16), (1, 128), (4, 128), (16, 128)]:
        mla_ends(bench, S, H)
    for shape in shapes if bench.tune else []:
        tune_mla(bench, MlaCase(*shape))


def latent_candidates(rows: int, fp8_cache: bool) -> dict[str, latent.Config]:
    """Beside what is chosen; all compile for sm_90 within its shared memory."""
    return {"in Triton": latent.config_for(rows, fp8_cache)} if rows > 32 else {}


def tune_mla(bench: Bench, case: MlaCase) -> None:
    for form, cache in (("BF16", case.cache), ("FP8", case.cache8)):
        configs = list(latent_configs(case.rows, form == "FP8"))
        keys = case.tables.shape[-1] * PAGE
        shares = [n for n in (1, 2, 4, 8, 16, 32) if n <= max(1, keys // 64)]

        def run(config: latent.Config | None, shares: int | None = None, cache: Tensor = cache) -> list[Call]:
            return case.calls(latent.mla_decode, cache, config=config, shares=shares)

        best_of(bench, f"mla {case.title} {form}", configs, run)
        best_of(bench, f"mla {case.title} {form} shares", shares, lambda n, run=run: run(None, n))


def latent_configs(rows: int, fp8_cache: bool) -> Iterator[latent.Config]:
    """Those that compile for sm_90 within its shared memory and without many spills."""
    if rows <= 32:
        sizes = [
            (16, 32, 4, 2, 2),
            (16, 32, 4, 3, 2),
            (16, 64, 4, 2, 2),
            (16, 64, 8, 2, 2),
            (16, 16, 4, 3, 3),
        ]
        if fp8_cache:
            sizes = [(16, 32, 8, 1, 1), (16, 16, 8, 1, 2), (16, 16, 4, 1, 2)]
            yield latent.Config(16, 32, 8, 1, 2, 64, 128)
        for least in (64, 128):
            yield from (latent.Config(*each, least) for each in sizes)
        return
    tall = [(64, 32, 8, 2), (64, 32, 8, 3), (64, 32, 8, 4), (64, 64, 8, 2)]
    if fp8_cache:
        tall = [(64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 3)]
    yield from (latent.Config(*sizes, 1, least) for sizes in tall for least in (128, 256))


def mla_ends(bench: Bench, S: int, H: int) -> None:
    """The kernels around attention, at a context of 512, each and all: fused against what they replace."""
    nope, value, length = 128, 128, 64 if bench.small else 512
    sets = 2 if bench.small else min(40, int(-(-L2_BYTES // (H * 256 * RANK * 2))))
    ups = [random(H, nope + value, RANK, scale=0.05) for _ in range(sets)]
    product, norm = random(S, H * 192 + ENTRY), random(RANK)
    q, kv = product[:, : H * 192].unflatten(1, (H, 192)), product[:, H * 192 :]
    angle = torch.rand(S, 32, device=DEVICE) * 6
    rotation = torch.cat([angle.cos(), angle.sin()], -1)
    pages = length // PAGE
    plain = random(S * pages + 1, PAGE, ENTRY)
    table = (torch.randperm(S * pages, device=DEVICE) + 1).int().view(S, pages)
    context = torch.full((S,), length, dtype=torch.int32, device=DEVICE)
    slot = table[:, -1].long() * PAGE + PAGE - 1
    exact = absorbed_query(q[..., :nope].float(), q[..., nope:].float(), rotation, ups[0][:, :nope].float())
    for cache in (plain, latent_fp8.quantise_entries(plain, RANK)):
        case = f"{S} × {H} heads" + (", FP8 cache" if cache.dtype == torch.uint8 else "")

        def enter(up: Tensor, cache: Tensor = cache) -> Tensor:
            return absorbed.queries(q, kv, norm, 1e-6, rotation, up[:, :nope], cache, slot)

        def whole(up: Tensor, cache: Tensor = cache) -> Tensor:
            return absorbed.attend(enter(up), cache, table, context, up[:, nope:], 0.1)

        parts = latent.attend(random(S, H, ENTRY), cache, table, context, RANK, 0.1)
        latent.merge(parts)
        z = parts.out_SHL.clone()
        want = torch.einsum("shl,hvl->shv", z.float(), ups[0][:, nope:].float()).flatten(1)

        def leave(up: Tensor, parts: latent.Parts = parts) -> Tensor:
            if absorbed.FEW_VALUES:
                return around_mla.values(parts, up[:, nope:])
            out = latent.merge(parts)
            return torch.bmm(out.transpose(0, 1), up[:, nope:].transpose(1, 2)).transpose(0, 1).flatten(1)

        checks = {
            "queries, entries": (enter, exact),
            "merge, values": (leave, want),
            "with attention": (whole, None),
        }
        for title, (call, reference) in checks.items():
            ends_race(bench, f"{case}: {title}", call, ups, reference)


def ends_race(
    bench: Bench, case: str, call: Callable[[Tensor], Tensor], ups: list[Tensor], want: Tensor | None
) -> None:
    """Apart and fused; without a reference, fused against apart."""
    few, apart = (absorbed.FEW_QUERIES, absorbed.FEW_VALUES), None
    try:
        for name, rows in (("apart", 0), ("fused", 1 << 20)):
            absorbed.FEW_QUERIES = absorbed.FEW_VALUES = rows
            result = call(ups[0])
            apart = result.float() if apart is None else apart
            reference = apart if want is None else want
            bench.race(
                "mla", case, name, [functools.partial(call, up) for up in ups], nbytes=ups[0].nbytes,
                check=lambda out, reference=reference: relative(out, reference),
            )  # fmt: skip
    finally:
        absorbed.FEW_QUERIES, absorbed.FEW_VALUES = few


# --- GQA decode ---------------------------------------------------------------------------------------------
def gqa(bench: Bench) -> None:
    """Qwen-1.5B's heads: 12 over 2 groups of 128 channels."""
    heads, groups, width, page, scale = 12, 2, 128, 64, 0.1
    for S, length in [(2, 100)] if bench.small else [(1, 384), (32, 640), (256, 640), (32, 8192)]:
        nbytes = S * length * 2 * groups * width * 2
        sets, pages = copies(nbytes), -(-length // page)
        cache = random(sets * S * pages + 1, page, 2, groups, width)
        tables = (torch.randperm(sets * S * pages, device=DEVICE) + 1).int().view(sets, S, pages)
        context = torch.full((S,), length, dtype=torch.int32, device=DEVICE)
        q = random(S, heads, width)
        few = cache[tables[0, :1].flatten().long()].float()
        index = torch.arange(pages, device=DEVICE).unsqueeze(0)
        want = paged.gqa_decode_reference(q[:1].float(), few, index, context[:1], scale)
        for name, ahead, stages in [("two stages", False, 2), ("ahead, 3", True, 3), ("ahead, 4", True, 4)]:
            calls = [
                functools.partial(decode.gqa_decode, q, cache, t, context, scale, ahead, stages)
                for t in tables
            ]
            bench.race("gqa", f"{S} × {length}", name, calls, nbytes=nbytes,
                       check=lambda out, want=want: relative(out[:1], want))  # fmt: skip
        gqa_entries(bench, S, heads, groups, width, cache)


def gqa_entries(bench: Bench, S: int, heads: int, groups: int, width: int, cache: Tensor) -> None:
    """Rotation and the cache entries of S tokens: in one kernel, and as three operations."""
    qkv, rotation = random(S, heads + 2 * groups, width), rotations(S, width // 2)
    slot = torch.randperm(cache.shape[0] * cache.shape[1], device=DEVICE)[:S]

    def apart() -> Tensor:
        turned = rope_op.rotate_half(qkv[:, : heads + groups], rotation)
        entry = torch.stack([turned[:, heads:], qkv[:, heads + groups :]], 1)
        cache.flatten(0, 1).index_copy_(0, slot, entry)
        return turned

    copy = qkv.clone()
    want = apart()
    race = functools.partial(bench.race, "gqa", f"{S} tokens to the cache", nbytes=qkv.nbytes * 2)
    us = race("three operations", [apart])
    once = functools.partial(head_kernels.gqa_heads, qkv.clone(), rotation, groups, cache, slot)
    error = relative(once()[:, : heads + groups], want)  # in place: only the first call has these inputs
    if not error <= 1e-6:
        bench.failed.append(f"gqa, {S} tokens to the cache: relative error {error:.3g}")
    call = functools.partial(head_kernels.gqa_heads, copy, rotation, groups, cache, slot)
    race("one kernel", [call], peer=("three", us))


# --- around the products of a prefill -----------------------------------------------------------------------
def prefill(bench: Bench) -> None:
    """V2-Lite's shapes at a prompt of 4000 tokens; each kernel beside what it replaces."""
    T, D, E, K, width = (40, 48, 8, 2, 24) if bench.small else (4000, 2048, 64, 6, 1408)
    routing(bench, T, D, E, K)
    swiglu(bench, T * K, width)
    H, nope, rope, value = (2, 16, 16, 16) if bench.small else (16, 128, 64, 128)
    mla_prefill(bench, T, H, nope, rope, value)
    gqa_prefill(bench, T, 4 if bench.small else 12, 2, 16 if bench.small else 128)
    if CUDA:
        new_lengths(H, nope + rope, value)


def swiglu(bench: Bench, rows: int, width: int) -> None:
    product = random(rows, 2 * width)
    gate, up = product.chunk(2, -1)
    want = torch.nn.functional.silu(gate.float()) * up.float()
    race = functools.partial(
        bench.race, "prefill", f"SwiGLU {rows} × {2 * width}", nbytes=3 * product.nbytes // 2,
        check=lambda out: relative(out, want),
    )  # fmt: skip
    us = race("torch", [lambda: torch.nn.functional.silu(gate) * up])
    race("ours", [lambda: expert_op.swiglu(product)], peer=("torch", us))


def rotations(T: int, pairs: int) -> Tensor:
    """cos and sin of random angles: rotating over and over, as a race does, keeps lengths."""
    angle = torch.rand(T, pairs, device=DEVICE) * 6
    return torch.stack([angle.cos(), angle.sin()], 1)


def routing(bench: Bench, T: int, D: int, E: int, K: int) -> None:
    x, expert = random(T, D), torch.rand(T, E, device=DEVICE).topk(K, -1).indices

    def by_sort() -> tuple[Tensor, Tensor, Tensor]:
        flat = expert.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(E, dtype=torch.int32, device=DEVICE)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=DEVICE)
        return x.index_select(0, order // K), place, counts.cumsum(0, dtype=torch.int32)

    def by_counting() -> tuple[Tensor, Tensor, Tensor]:
        place, end = route.places(expert, E)
        return route.spread(x, place, K), place, end

    want = by_sort()

    def differs(out: tuple[Tensor, Tensor, Tensor]) -> float:
        return float(not all(torch.equal(a, b) for a, b in zip(out, want, strict=True)))

    race = functools.partial(bench.race, "prefill", f"{T} × {K} rows of {D} to {E} experts",
                             nbytes=(K + 1) * x.nbytes, check=differs)  # fmt: skip
    us = race("sorted", [by_sort])
    race("counted", [by_counting], peer=("sorted", us))
    bench.race("prefill", f"{T} × {K} places of {E} experts", "counted",
               [functools.partial(route.places, expert, E)], nbytes=2 * expert.nbytes)  # fmt: skip


def mla_prefill(bench: Bench, T: int, H: int, nope: int, rope: int, value: int) -> None:
    """Heads and attention of one prompt: torch's attention over whole keys, ours over keys in two parts."""
    q, kv = random(T, H, nope + rope), random(T, H, nope + value)
    entry, rotation = random(T, 512 + rope), rotations(T, rope // 2)
    k_rope, scale, lengths = entry[:, 512:], (nope + rope) ** -0.5, [T]
    k, v = torch.cat([kv[..., :nope], k_rope.unsqueeze(1).expand(-1, H, -1)], -1), kv[..., nope:]

    def apart() -> tuple[Tensor, Tensor, Tensor]:
        turned = torch.cat([q[..., :nope], rope_op.rotate_interleaved(q[..., nope:], rotation)], -1)
        whole = torch.cat([kv[..., :nope], k_rope.unsqueeze(1).expand(-1, H, -1)], -1)
        return turned, whole, torch.nn.functional.pad(v, (0, nope + rope - value))

    case, moved = f"{T} × {H} heads × {nope}+{rope}", q.nbytes + 3 * kv.nbytes
    us = bench.race("prefill", f"heads, {case}", "four operations", [apart], nbytes=moved)
    once = functools.partial(head_kernels.mla_heads, q.clone(), rotation, kv, k_rope)  # turns on at each call
    bench.race("prefill", f"heads, {case}", "one kernel", [once], nbytes=moved, peer=("four", us),
               check=lambda out: relative(out, k))  # fmt: skip
    turn = functools.partial(head_kernels.rotate_queries, q.clone(), rotation, nope)
    bench.race("prefill", f"heads, {case}", "queries alone", [turn], nbytes=2 * T * H * rope * q.itemsize)
    rows = min(T, 200)  # the last ones see the most
    want = attention_op.attention_reference(q[-rows:].float(), k.float(), v.float(), [rows], [T], scale)
    race = functools.partial(
        bench.race, "prefill", f"attention, {case}, {value}", flops=T * T * H * (nope + rope + value),
        check=lambda out: relative(out[-rows:], want),
    )  # fmt: skip
    wide = torch.nn.functional.pad(v, (0, nope + rope - value))
    us = race("torch, values padded",
              [lambda: attention_op._uniform(q, k, wide, 1, scale)[..., :value]])  # fmt: skip
    if CUDA and attention_op.varlen_available(q):
        race("torch, variable lengths", [lambda: attention_op._varlen(q, k, v, lengths, lengths, scale)],
             peer=("padded", us))  # fmt: skip
    for config in flash_configs(bench.small):
        ours = functools.partial(
            flash.attention, q, kv[..., :nope], v, lengths, lengths, scale, k_rope, config
        )
        race(f"ours {tuple(config)}", [ours], peer=("padded", us))
    ours = functools.partial(flash.attention, q, k, v, lengths, lengths, scale)
    race("ours, keys together", [ours], peer=("padded", us))


def flash_configs(small: bool) -> list[flash.Config]:
    """Those that compile for sm_90 without spills."""
    if small:
        return [flash.Config(32, 16, 4, 2)]
    return [flash.Config(*sizes) for sizes in
            [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 4)]]  # fmt: skip


def gqa_prefill(bench: Bench, T: int, heads: int, groups: int, width: int) -> None:
    qkv, scale = random(T, heads + 2 * groups, width), width**-0.5
    q, k, v = qkv.split([heads, groups, groups], 1)
    rows = min(T, 200)
    want = attention_op.attention_reference(q[-rows:].float(), k.float(), v.float(), [rows], [T], scale)
    race = functools.partial(
        bench.race, "prefill", f"attention, {T} × {heads}/{groups} heads × {width}",
        flops=2 * T * T * heads * width, check=lambda out: relative(out[-rows:], want),
    )  # fmt: skip
    us = race("torch", [lambda: attention_op._uniform(q, k, v, 1, scale)])
    for config in flash_configs(bench.small):
        ours = functools.partial(flash.attention, q, k, v, [T], [T], scale, None, config)
        race(f"ours {tuple(config)}", [ours], peer=("torch", us))


def new_lengths(H: int, width: int, value: int) -> None:
    """What the first call at a length costs: cuDNN plans anew for each."""
    for name in ("torch", "ours"):
        for T in (1000, 1001, 1037, 1037):
            q, k, v = random(T, H, width), random(T, H, width), random(T, H, value)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            if name == "torch":
                attention_op._uniform(q, k, v, 1, 0.1)
            else:
                flash.attention(q, k, v, [T], [T], 0.1)
            torch.cuda.synchronize()
            ms = (time.perf_counter() - begin) * 1e3
            print(f"prefill  attention at a length of {T}, {name}: {ms:.2f} ms")


# --- linear layers ------------------------------------------------------------------------------------------
def linear(bench: Bench) -> None:
    """What matters most first: compiling is half of this part's time."""
    shapes = [(2048, 2048), (5632, 2048), (2048, 10944)]
    more = [(4096, 7168), (24576, 1536)] if bench.tune else []
    cases = []
    for N, K in [(80, 160)] if bench.small else [*shapes, *more]:
        plain = random(N, K, scale=K**-0.5)
        cases.append((N, K, plain, {kind: pack(plain, kind) for kind in KINDS}))
    for M in (1, 2, 70) if bench.small else (1, 16, 2, 64, 128, 256, 4, 4096):
        for N, K, plain, weights in cases:
            if bench.late():
                return
            x, case = random(M, K), f"{M} × {N} × {K}"
            work = {"flops": 2 * M * N * K}
            moved = 2 * M * (N + K)
            sets = [plain] + [plain.clone() for _ in range(copies(plain.nbytes) - 1)]
            multiply = few_rows.linear if CUDA and few_rows.wants(x, plain) else torch.nn.functional.linear
            bf16 = [functools.partial(multiply, x, w) for w in sets]
            us = bench.race("linear", case, "BF16", bf16, nbytes=plain.nbytes + moved, **work)
            peer = ("BF16", us)
            for weight in weights.values():
                packed_linear(bench, case, x, weight, moved, work["flops"], peer)
                if bench.tune and M in (16, 64):
                    tune_linear(bench, case, x, weight)


def packed_linear(
    bench: Bench, case: str, x: Tensor, weight: Packed, moved: int, flops: int, peer: tuple[str, float]
) -> None:
    """The ways to multiply with one packed weight: chosen, and at the crossings each of them."""
    sets = [weight] + [duplicate(weight) for _ in range(copies(weight.nbytes) - 1)]
    want = linear_reference(x.float(), weight)

    def calls(f: Callable[..., Tensor]) -> list[Call]:
        return [functools.partial(f, x, w) for w in sets]

    race = functools.partial(
        bench.race, "linear", case, nbytes=weight.nbytes + moved, flops=flops, peer=peer,
        check=lambda out: relative(out, want), limit=0.05 if weight.kind == "fp8" else 0.02,
    )  # fmt: skip
    race(weight.kind, calls(packed.linear))
    M, K = x.shape
    if M in (2, 4) and packed_gemv.wants(weight):
        few = M <= packed_gemv.MAX_ROWS
        race(
            f"{weight.kind}, {'tiles' if few else 'gemv'}",
            calls(packed.streamed if few else packed_gemv.linear),
        )
    if M == 128:
        other = packed.streamed if M > packed.STREAMED_ROWS else through_bf16
        race(f"{weight.kind}, {'streamed' if other is packed.streamed else 'dequantised'}", calls(other))
    if M == 1 and (bench.tune or K <= 2048) and packed_gemv.wants(weight):
        for config in gemv_configs(weight, bench.tune):
            race(
                f"{weight.kind}, {tuple(config)}", calls(functools.partial(packed_gemv.linear, config=config))
            )


def gemv_configs(weight: Packed, tune: bool) -> list[packed_gemv.Config]:
    """Beside what is chosen: half the outputs of a program; with --tune others, and warps and inputs as well.
    Every thread has a chunk at least."""
    chosen = packed_gemv.config_for(weight.kind, weight.shape[-1], False)
    if not tune:
        return [chosen._replace(outputs=4)]
    chunk = packed_gemv.CHUNK[weight.kind]
    return [
        packed_gemv.Config(outputs, 32 * warps * chunk * chunks, warps)
        for outputs in (2, 4, 8, 16) for warps in (1, 2, 4, 8) for chunks in (1, 2)
        if chosen.inputs // 2 <= 32 * warps * chunk * chunks <= 2 * chosen.inputs
    ]  # fmt: skip


def through_bf16(x: Tensor, weight: Packed) -> Tensor:
    return torch.nn.functional.linear(x, packed.dequantise(weight, x.dtype))


def duplicate(weight: Packed) -> Packed:
    copy = Packed(weight.kind, weight.shape, group=weight.group, rows=weight.rows, device=weight.device)
    copy.codes.copy_(weight.codes)
    copy.scale.copy_(weight.scale)
    return copy


def tune_linear(bench: Bench, case: str, x: Tensor, weight: Packed) -> None:
    sets = [weight] + [duplicate(weight) for _ in range(copies(weight.nbytes) - 1)]
    rows = min(64, max(16, 1 << (x.shape[0] - 1).bit_length()))
    inputs = (128, 256) if weight.kind == "int4" else (128,)
    configs = [
        (packed.Tiles(rows, outputs, width, max(2, outputs // 16) if rows <= 32 else 8, stages), splits)
        for outputs in ((32, 64, 128) if rows <= 32 else (64, 128))
        for width in inputs for stages in (3, 5) for splits in (1, 2, 4)
    ]  # fmt: skip
    best_of(
        bench, f"linear {case} {weight.kind}", configs,
        lambda k: [functools.partial(packed.streamed, x, w, tiles=k[0], splits=k[1]) for w in sets],
    )  # fmt: skip


# --- experts ------------------------------------------------------------------------------------------------
def random_packed(shape: tuple[int, ...], kind: Kind) -> Packed:
    """A stack of quantised matrices, one expert drawn and the rest its permutations by rows."""
    weight = Packed(kind, shape, device=DEVICE)
    one = pack(random(*shape[1:], scale=shape[-1] ** -0.5), kind)
    for e in range(shape[0]):
        weight.codes[e] = one.codes.view(torch.uint8).roll(128 * e, 0).view(one.codes.dtype)
        weight.scale[e] = (
            one.scale.roll(128 // one.rows * e, 0) if one.rows > 1 else one.scale.roll(128 * e, 0)
        )
    return weight


def experts(bench: Bench) -> None:
    """V2-Lite's, with its shared expert up to 256 tokens, and 32 of V3's; as the model calls them."""
    for E, K, D, width in [(6, 2, 160, 128)] if bench.small else [(64, 6, 2048, 1408), (32, 8, 7168, 2048)]:
        gate_up, down = random(E, 2 * width, D, scale=D**-0.5), random(E, D, width, scale=width**-0.5)
        stacks = {k: (random_packed((E, 2 * width, D), k), random_packed((E, D, width), k)) for k in KINDS}
        wide = 2 * width if E != 32 else 0
        common = random(2 * wide, D, scale=D**-0.5), random(D, wide, scale=0.02)
        for T in (1, 9) if bench.small else (1, 32, 256, 8, 2, 4096):
            if bench.late():
                return
            x, case = random(T, D), f"{E} of {D}×{width}, {T} tokens"
            choices = [torch.rand(T, E, device=DEVICE).topk(K, -1).indices for _ in range(4)]
            weight = torch.rand(T, K, device=DEVICE)
            touched = sum(len(c.unique()) for c in choices) / 4 / E
            plain = common if wide and T <= 256 else None
            flops = 6 * T * D * (width * K + (wide if plain else 0))
            run = expert_op.experts if CUDA else few_experts.experts
            calls = [functools.partial(run, x, c, weight, gate_up, down, plain) for c in choices]
            nbytes = (gate_up.nbytes + down.nbytes) * touched + sum(w.nbytes for w in plain or ())
            us = float("inf")
            if CUDA or T <= 256:
                us = bench.race("experts", case, "BF16", calls, nbytes=nbytes, flops=flops)
            for kind, pair in stacks.items():
                shared = (pack(common[0], kind), pack(common[1], kind)) if plain else None
                experts_packed(bench, case, kind, pair, shared, x, choices, weight, touched, flops, us)


def experts_packed(
    bench: Bench, case: str, kind: Kind, pair: tuple[Packed, Packed], shared: tuple[Packed, Packed] | None,
    x: Tensor, choices: list[Tensor], weight: Tensor, touched: float, flops: float, peer: float,
) -> None:  # fmt: skip
    def check(out: Tensor) -> float:
        few = x[:4].float()
        want = packed_experts(few, choices[0][:4], weight[:4], *pair)
        if shared is not None:
            gate, up = linear_reference(few, shared[0]).chunk(2, -1)
            want += linear_reference(torch.nn.functional.silu(gate) * up, shared[1])
        return relative(out[:4], want)

    def chosen(choice: Tensor) -> Tensor:
        if CUDA:
            return expert_op.experts(x, choice, weight, *pair, shared)
        return packed.experts(x, choice, weight, *pair, shared=shared)

    def tiled(choice: Tensor) -> Tensor:
        rows = packed.expert_rows(x, choice, *pair, False, shared=shared)
        return few_experts._combine(rows, None, weight, None, None, 2 if shared else 0)

    nbytes = (pair[0].nbytes + pair[1].nbytes) * touched + sum(w.nbytes for w in shared or ())
    race = functools.partial(
        bench.race, "experts", case, nbytes=nbytes, flops=flops, check=check, peer=("BF16", peer),
        limit=0.08 if kind == "fp8" else 0.02, rate="fp8" if kind == "fp8" else "bf16",
    )  # fmt: skip
    race(kind, [functools.partial(chosen, c) for c in choices])
    T = x.shape[0]
    if T == packed.PAIRED_TOKENS:
        race(f"{kind}, tiles", [functools.partial(tiled, c) for c in choices])
    if kind == "fp8" and T == 256 and CUDA and bench.tune:
        race("fp8, both quantised", [functools.partial(fp8.experts, x, c, weight, *pair) for c in choices])
    if bench.tune and T in (32, 256, 4096) and not (kind == "fp8" and T > 256):
        rows = few_experts._rows_a_tile(T * choices[0].shape[1], pair[0].shape[0])
        warps = 4 if rows <= 32 else 8
        configs = [
            (packed.Tiles(rows, a, 128, warps, s), packed.Tiles(rows, b, 128, warps, s))
            for a in (32, 64, 128) for b in (64, 128) for s in (3, 4)
        ]  # fmt: skip
        many = T > packed.FEW_TOKENS
        best_of(
            bench, f"experts {case} {kind}", configs,
            lambda k: [functools.partial(packed.expert_rows, x, c, *pair, many, k) for c in choices],
        )  # fmt: skip


# --- FP8 products of many rows ------------------------------------------------------------------------------
def grouped(bench: Bench) -> None:
    shapes = [*DEEP_GEMM, (64, 384, 2816, 2048), (1, 8192, 8192, 8192)]
    for G, rows, N, K in [(2, 128, 272, 256)] if bench.small else shapes:
        weight = random_packed((G, N, K), "fp8")
        x = random(G * rows, K)
        tiles = G * -(-rows // 128)
        expert = torch.arange(G, device=DEVICE).repeat_interleave(tiles // G).int()
        used = torch.tensor([tiles], dtype=torch.int32, device=DEVICE)
        q, scale = fp8.quantise_rows(x)
        case, flops = f"{G} × {rows} × {N} × {K}", 2 * G * rows * N * K
        known = DEEP_GEMM.get((G, rows, N, K))
        peer = ("DeepGEMM", flops / known / 1e6) if known else None
        seen = dequantise_activations(q[:128], scale[:, :128].t())
        want = seen @ weight.dequantise(torch.float32, 0).T
        race = functools.partial(
            bench.race, "grouped", case, flops=flops, nbytes=weight.nbytes + q.nbytes + 2 * G * rows * N,
            rate="fp8", peer=peer, check=lambda out, want=want: relative(out[:128], want), limit=5e-3,
        )  # fmt: skip

        product = functools.partial(fp8.grouped_matmul, q, scale, weight, expert, used, DTYPE)

        def ours(config: fp8.Config | None = None, product: Call = product) -> list[Call]:
            return [functools.partial(product, config)]

        race("ours", ours())
        race("ours, in Triton", ours(fp8.Config()))
        if CUDA:
            loop = [functools.partial(scaled_in_turn, q, scale, [weight_of(weight, g) for g in range(G)])]
            race("torch scaled_mm" + (", in turn" if G > 1 else ""), loop)
            if G > 1:
                bf16 = weight.dequantise(torch.bfloat16).transpose(1, 2)
                offsets = (torch.arange(1, G + 1, device=DEVICE) * rows).int()
                call = functools.partial(torch._grouped_mm, x, bf16, offs=offsets)
                bench.race("grouped", case, "torch grouped BF16", [call], flops=flops, peer=peer)
                del bf16
        if bench.tune:
            best_of(bench, f"grouped {case}", list(grouped_configs()), ours)
    quantisers(bench)


def grouped_configs() -> Iterator[fp8.Config]:
    """Those that compile for sm_90 within its shared memory."""
    for flatten, together in itertools.product((False, True), (4, 8, 16)):
        yield fp8.Config(128, 2, 8, 3, together, flatten)
    yield from (fp8.Config(128, 1, 8, stages, 8, flatten) for stages in (4, 5) for flatten in (False, True))
    yield from (fp8.Config(64, 2, 8, stages, 8, flatten) for stages in (4, 5) for flatten in (False, True))
    yield from (fp8.Config(64, 1, 4, stages, 8, False) for stages in (4, 6))


def weight_of(stack: Packed, g: int) -> Packed:
    one = Packed("fp8", stack.shape[1:], rows=stack.rows, device="meta")
    one.codes, one.scale = stack.codes[g], stack.scale[g]
    return one


def scaled_in_turn(q: Tensor, scale: Tensor, weights: list[Packed]) -> Tensor:
    """torch's block-wise product, an expert after the other: the host must know the counts for it."""
    rows = q.shape[0] // len(weights)
    parts = []
    for g, weight in enumerate(weights):
        at = slice(g * rows, (g + 1) * rows)
        parts.append(fp8.scaled_mm(q[at], scale[:, at].contiguous(), weight, DTYPE))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def quantisers(bench: Bench) -> None:
    T, D, width = (5, 256, 128) if bench.small else (8192, 7168, 2048)
    x, wide, norm = random(T, D), random(T, 2 * width), random(D)
    calls = {
        f"rows {T} × {D}": (lambda: fp8.quantise_rows(x), 3 * x.numel()),
        f"SwiGLU {T} × {width}": (lambda: fp8.swiglu_quantise(wide), 5 * wide.numel() // 2),
        f"RMSNorm {T} × {D}": (lambda: fp8.rms_norm_quantise(x, norm, 1e-6), 5 * x.numel()),
    }
    for case, (call, nbytes) in calls.items():
        bench.race("quantise", case, "ours", [call], nbytes=nbytes)


PARTS: dict[str, Callable[[Bench], None]] = {
    "mla": mla, "gqa": gqa, "prefill": prefill, "grouped": grouped, "experts": experts, "linear": linear,
    "train": kernels_train.train, "attention-train": kernels_train.attention_train,
    "fp8train": kernels_fp8_train.fp8train,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"parts, with commas between: {', '.join(PARTS)}")
    parser.add_argument("--tune", action="store_true", help="try block sizes as well")
    parser.add_argument("--seconds", type=float, default=330, help="begin nothing after so long")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try this script")
    parser.add_argument("--out", help="folder of the result instead of benchmarks/results")
    options = parser.parse_args()
    parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not CUDA and not options.small:
        parser.error("no CUDA device; --small tries the script itself in Triton's interpreter")
    torch.manual_seed(0)
    begin = time.perf_counter()
    bench = Bench(options.small, options.tune, begin + options.seconds)
    with torch.inference_mode():
        ceilings(bench)
        for part in parts:
            PARTS[part](bench)
            if CUDA:
                torch.cuda.empty_cache()
    print(
        f"{time.perf_counter() - begin:.0f} s" + (", out of time: parts are missing" if bench.late() else "")
    )
    for failure in bench.failed:
        print(f"FAILED {failure}")
    if CUDA:
        card = torch.cuda.get_device_name().split()[1].lower()
        save(
            f"kernels_cuda_{card}" + (f"_{'_'.join(parts)}" if options.only else ""),
            result(bench),
            options.out,
        )
    return 1 if bench.failed else 0


def result(bench: Bench) -> dict[str, Any]:
    ceiling = {name: round(value / 1e12, 2) for name, value in bench.ceilings.items()}
    return {
        "machine": machine(DEVICE.type),
        "title": "CUDA kernels against peers and ceilings",
        "columns": ["part", "case", "kernel", "µs", "rate", "of the ceiling", "speed against"],
        "rows": bench.rows,
        "ceilings": ceiling,
        "notes": f"Ceilings of this run: copy {ceiling['copy']} TB/s, BF16 {ceiling['bf16']} and FP8 "
        f"{ceiling['fp8']} TFLOP/s. FlashMLA and DeepGEMM: another run, one H100 80GB.",
        "failed": bench.failed,
    }


if __name__ == "__main__":
    raise SystemExit(main())
