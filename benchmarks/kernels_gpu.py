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

import torch
from common import machine, save
from torch import Tensor

from hadal.config import Moe, preset
from hadal.ops import experts as expert_op
from hadal.ops import gate as gate_op
from hadal.ops import latent_fp8, paged
from hadal.ops.fp8 import dequantise_activations
from hadal.ops.packed import KINDS, Kind, Packed, linear_reference, pack
from hadal.ops.packed import experts_reference as packed_experts
from hadal.ops.triton import decode, fp8, gate, gate_fused, latent, packed
from hadal.ops.triton import experts as few_experts
from hadal.ops.triton import linear as few_rows

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
def mla(bench: Bench) -> None:
    rank, entry, page, scale = 512, 576, 64, 0.1
    shapes = [(s, h, n, 1) for s, h, n in FLASH_MLA] + [(32, 16, 640, 1), (1, 16, 384, 1), (8, 16, 2048, 3),
                                                       (32, 128, 4096, 2)]  # fmt: skip
    for S, H, length, Q in [(2, 4, 100, 1), (1, 20, 70, 2)] if bench.small else shapes:
        nbytes = S * length * entry * 2 + S * Q * H * (entry + rank) * 2
        sets = copies(nbytes)
        pages = -(-length // page)
        cache = random(sets * S * pages + 1, page, entry)
        cache8 = latent_fp8.quantise_entries(cache, rank)
        tables = (torch.randperm(sets * S * pages, device=DEVICE) + 1).int().view(sets, S, pages)
        tables = tables.repeat_interleave(Q, 1)
        context = (length - Q + 1 + torch.arange(Q, device=DEVICE)).int().repeat(S)
        q = random(S * Q, H, entry)
        rows = min(2 * Q, S * Q)
        few = cache[tables[0, :rows].flatten().long()].float()
        index = torch.arange(few.shape[0], device=DEVICE).view(rows, pages)
        want = paged.mla_decode_reference(q[:rows].float(), few, index, context[:rows], rank, scale)
        fp8_few = latent_fp8.dequantise_entries(cache8[tables[0, :rows].flatten().long()], rank)
        want8 = paged.mla_decode_reference(q[:rows].float(), fp8_few, index, context[:rows], rank, scale)
        flops = 2 * S * Q * H * length * (entry + rank)
        case = f"{S} × {H} heads × {length}" + (f", {Q} rows" if Q > 1 else "")
        flash = FLASH_MLA.get((S, H, length))
        peer = ("FlashMLA", flash) if flash and Q == 1 else None
        race = functools.partial(bench.race, "mla", case, flops=flops)

        def error(out: Tensor, reference: Tensor, rows: int = rows) -> float:
            return relative(out[:rows], reference)

        def calls(f: Callable[..., Tensor], c: Tensor, tables: Tensor = tables, q: Tensor = q,
                  context: Tensor = context, **options: Any) -> list[Call]:  # fmt: skip
            return [functools.partial(f, q, c, t, context, rank, scale, **options) for t in tables]

        check, check8 = functools.partial(error, reference=want), functools.partial(error, reference=want8)
        race("by token", calls(decode.mla_decode, cache), nbytes=nbytes * Q, check=check, peer=peer)
        new = calls(latent.mla_decode, cache, queries=Q)
        race("by sequence", new, nbytes=nbytes, check=check, peer=peer)
        less = nbytes - S * length * (entry * 2 - cache8.shape[-1])
        race("by sequence, FP8 cache", calls(latent.mla_decode, cache8, queries=Q), nbytes=less, check=check8)
        if bench.tune:
            for form, c in (("BF16", cache), ("FP8", cache8)):
                configs = list(latent_configs(Q * H, form == "FP8"))
                shares = sorted({1, 2, 4, 8, 16, 32} & set(range(1, max(1, length // 128) + 1)))
                best_of(
                    bench, f"mla {case} {form}", configs,
                    lambda k, c=c, Q=Q, calls=calls: calls(latent.mla_decode, c, queries=Q, config=k),
                )  # fmt: skip
                best_of(
                    bench, f"mla {case} {form} shares", shares,
                    lambda k, c=c, Q=Q, calls=calls: calls(latent.mla_decode, c, queries=Q, shares=k),
                )  # fmt: skip


def latent_configs(rows: int, fp8_cache: bool) -> Iterator[latent.Config]:
    """Those that compile for sm_90 within its shared memory and without many spills."""
    if rows <= 32:
        narrow = [(16, 64, 4, 3), (16, 64, 8, 3)]
        if fp8_cache:
            narrow += [(16, 64, 8, 2), (16, 64, 4, 2), (32, 64, 8, 3), (32, 64, 8, 2)]
        if rows > 16:
            narrow.append((64, 32, 8, 3))
        yield from (latent.Config(*sizes, slots) for sizes in narrow for slots in (1, 2))
    tall = [(64, 32, 8, 3), (64, 32, 8, 4), (64, 64, 8, 2)]
    if fp8_cache:
        tall = [(64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 3)]
    yield from (latent.Config(*sizes, 1) for sizes in tall)


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


# --- linear layers ------------------------------------------------------------------------------------------
def linear(bench: Bench) -> None:
    shapes = [(2048, 2048), (5632, 2048), (2048, 10944), (7168, 2048), (4096, 7168), (24576, 1536)]
    for N, K in [(80, 144)] if bench.small else shapes:
        plain = random(N, K, scale=K**-0.5)
        weights = {kind: pack(plain, kind) for kind in KINDS}
        for M in (1, 16, 64, 256, 4096) if not bench.small else (1, 70):
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
                if bench.tune and M in (1, 16, 64):
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
    if x.shape[0] in (64, 256):
        race(f"{weight.kind}, streamed", calls(packed.streamed))
        if weight.kind == "fp8" and fp8.wants(x, weight):
            race("fp8, both quantised", calls(fp8.linear))
        race(f"{weight.kind}, dequantised", calls(through_bf16))


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
    for E, K, D, width in [(6, 2, 144, 80)] if bench.small else [(64, 6, 2048, 1408), (32, 8, 7168, 2048)]:
        gate_up, down = random(E, 2 * width, D, scale=D**-0.5), random(E, D, width, scale=width**-0.5)
        stacks = {k: (random_packed((E, 2 * width, D), k), random_packed((E, D, width), k)) for k in KINDS}
        for T in (1, 9) if bench.small else (1, 8, 32, 256, 4096):
            if bench.late():
                return
            x, case = random(T, D), f"{E} of {D}×{width}, {T} tokens"
            choices = [torch.rand(T, E, device=DEVICE).topk(K, -1).indices for _ in range(4)]
            weight = torch.rand(T, K, device=DEVICE)
            touched = sum(len(c.unique()) for c in choices) / 4 / E
            flops = 6 * T * K * D * width
            many = T > 256
            plain = expert_op.experts_grouped if many else few_experts.experts
            calls = [functools.partial(plain, x, c, weight, gate_up, down) for c in choices]
            nbytes = (gate_up.nbytes + down.nbytes) * touched
            us = (
                bench.race("experts", case, "BF16", calls, nbytes=nbytes, flops=flops)
                if CUDA or not many
                else 0.0
            )
            for kind, pair in stacks.items():
                experts_packed(bench, case, kind, pair, x, choices, weight, touched, flops, us)


def experts_packed(
    bench: Bench, case: str, kind: Kind, pair: tuple[Packed, Packed], x: Tensor, choices: list[Tensor],
    weight: Tensor, touched: float, flops: float, peer: float,
) -> None:  # fmt: skip
    def check(out: Tensor) -> float:
        want = packed_experts(x[:4].float(), choices[0][:4], weight[:4], *pair)
        return relative(out[:4], want)

    nbytes = (pair[0].nbytes + pair[1].nbytes) * touched
    calls = [functools.partial(packed.experts, x, c, weight, *pair) for c in choices]
    limit = 0.08 if kind == "fp8" else 0.02
    rate = "fp8" if kind == "fp8" else "bf16"
    race = functools.partial(
        bench.race, "experts", case, nbytes=nbytes, flops=flops, check=check, limit=limit, peer=("BF16", peer)
    )
    race(kind, calls, rate=rate)
    if kind == "fp8" and x.shape[0] == 256 and CUDA:
        both = [functools.partial(fp8.experts, x, c, weight, *pair) for c in choices]
        race("fp8, both quantised", both, rate=rate)
    if bench.tune and x.shape[0] in (1, 32, 256, 4096) and not (kind == "fp8" and x.shape[0] > 256):
        rows = few_experts._rows_a_tile(x.shape[0] * choices[0].shape[1], pair[0].shape[0])
        warps = 4 if rows <= 32 else 8
        configs = [
            (packed.Tiles(rows, a, 128, warps, s), packed.Tiles(rows, b, 128, warps, s))
            for a in (32, 64, 128) for b in (64, 128) for s in (3, 4)
        ]  # fmt: skip
        many = x.shape[0] > packed.FEW_TOKENS
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


# --- gate ---------------------------------------------------------------------------------------------------
def gates(bench: Bench) -> None:
    names = {"V2-Lite": "deepseek-v2-lite", "V3": "deepseek-v3"}
    for name, known in names.items():
        config = preset(known).config
        moe, D = config.moe, 48 if bench.small else config.hidden_size
        assert isinstance(moe, Moe)
        weights = [random(moe.n_routed_experts, D, scale=D**-0.5) for _ in range(4)]
        bias = torch.randn(moe.n_routed_experts, device=DEVICE) if moe.topk_method == "noaux_tc" else None
        for T in (1, 4):
            x = random(T, D)
            want, _, score = gate_op.gate_reference(x, weights[0], bias, moe)

            def check(out: tuple[Tensor, Tensor], score: Tensor = score, want: Tensor = want) -> float:
                """By the scores of what was chosen: equal ones may be chosen either way."""
                return relative(
                    score.gather(1, out[0]).sort(-1).values, score.gather(1, want).sort(-1).values
                )

            for form, f in (("two kernels", gate.gate), ("one kernel", gate_fused.gate)):
                calls = [functools.partial(f, x, w, bias, moe) for w in weights]
                bench.race(
                    "gate",
                    f"{name}, {T} tokens",
                    form,
                    calls,
                    nbytes=weights[0].nbytes,
                    check=check,
                    limit=1e-5,
                )


PARTS: dict[str, Callable[[Bench], None]] = {
    "mla": mla, "gqa": gqa, "grouped": grouped, "experts": experts, "linear": linear, "gate": gates,
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
