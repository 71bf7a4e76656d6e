"""Single operations at the sizes of a model, each beside what it must read and compute.

An operation cannot be faster than max(bytes / bandwidth, FLOP / rate of matrix products); its share is that
time over the measured one. Weights are drawn from a pool larger than the processor's caches, as the layers of
a model are, so that a small matrix is not timed from a cache. Values are random: only their format counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from hadal.bench.ceilings import Ceilings, best_time
from hadal.bench.models import fill_random
from hadal.config import Mla, ModelConfig, Moe
from hadal.ops import packed
from hadal.ops.experts import experts
from hadal.ops.gate import gate
from hadal.ops.linear import linear, native_bf16
from hadal.ops.packed import Packed
from hadal.ops.paged import gqa_decode, mla_decode
from hadal.ops.rms_norm import rms_norm

Weight = Tensor | Packed
FLOATS = ("float32", "bfloat16")
KINDS = (*FLOATS, *packed.KINDS)
ROWS = (1, 16, 256)
GROUPS = ("linear", "experts", "attention", "gate", "norm")
PAGE = 64
POOL_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
_ROUTINGS = 16  # different choices of experts that take turns


@dataclass(frozen=True)
class Case:
    """An operation to time: what a call reads and writes, what it computes, in which format."""

    operation: str
    shape: str
    kind: str
    nbytes: float
    flops: float
    work: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A timed operation. `bound`: what its ceiling is made of, "memory" or "compute"."""

    operation: str
    shape: str
    kind: str
    seconds: float
    bytes_per_s: float
    flops_per_s: float
    bound: str
    share: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def kinds_for(device: torch.device) -> tuple[str, ...]:
    """Number formats of weights that are timed on a device."""
    return (*FLOATS, "int8", "int4") if device.type == "cpu" else ("bfloat16", "fp8", "int8", "int4")


@torch.inference_mode()
def run(case: Case, ceilings: Ceilings, device: torch.device, budget_s: float = 0.25) -> Row:
    """Time one operation; the fastest call counts."""
    seconds = best_time(case.work, device, budget_s)
    quantize = None if case.kind in FLOATS else case.kind
    dtype = torch.bfloat16 if case.kind == "bfloat16" else torch.float32
    reading = case.nbytes / ceilings.bandwidth
    computing = case.flops / ceilings.matmul_for(dtype, quantize)
    return Row(
        case.operation,
        case.shape,
        case.kind,
        seconds,
        case.nbytes / seconds,
        case.flops / seconds,
        "memory" if reading >= computing else "compute",
        max(reading, computing) / seconds,
    )


@torch.inference_mode()
def cases(
    config: ModelConfig,
    device: torch.device,
    *,
    groups: tuple[str, ...] = GROUPS,
    kinds: tuple[str, ...] = (),
    context: int = 1024,
    memory: int = 1 << 31,
) -> Iterator[Case]:
    """Every case of the groups, one after the other: its tensors live until the next is asked for.

    memory: bytes that weights of one case may take; layers with more experts are timed with fewer.
    """
    kinds = kinds or kinds_for(device)
    for kind in kinds:
        if "linear" in groups:
            yield from _linears(config, device, kind)
        if "experts" in groups and config.moe is not None:
            yield from _experts(config, config.moe, device, kind, memory)
    for kind in (kind for kind in kinds if kind in FLOATS):
        if "attention" in groups:
            yield from _attention(config, device, kind, context)
        if "gate" in groups and config.moe is not None:
            yield from _gates(config, config.moe, device, kind)
        if "norm" in groups:
            yield from _norms(config, device, kind)


def _activations(device: torch.device, kind: str) -> torch.dtype:
    """What multiplies a weight: its own format; beside packed weights what the engine would choose here."""
    if kind in FLOATS:
        return cast(torch.dtype, getattr(torch, kind))
    return torch.bfloat16 if device.type == "cuda" or native_bf16() else torch.float32


def random_weight(shape: tuple[int, ...], kind: str, device: torch.device) -> Weight:
    """Random values of a format; packed ones straight as codes, since quantising takes long."""
    if kind in FLOATS:
        return torch.empty(shape, dtype=getattr(torch, kind), device=device).normal_(0, 0.02)
    return fill_random(Packed(cast(packed.Kind, kind), shape, device=device))


def _pool(make: Callable[[], Weight], device: torch.device) -> itertools.cycle[Weight]:
    """Copies that take turns, together larger than the caches."""
    first = make()
    copies = min(64, max(1, -(-POOL_BYTES[device.type] // first.nbytes)))
    return itertools.cycle([first, *(make() for _ in range(copies - 1))])


def _linear(x_TI: Tensor, pool: Iterator[Weight]) -> Tensor:
    return linear(x_TI, next(pool))


def _gate(x_TD: Tensor, pool: Iterator[Weight], bias_E: Tensor | None, moe: Moe) -> Tensor:
    return gate(x_TD, cast(Tensor, next(pool)), bias_E, moe)[0]


def _turn(x_TD: Tensor, turns: Iterator[Tensor], weight_TK: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    return experts(x_TD, next(turns), weight_TK, gate_up, down)


def _linears(config: ModelConfig, device: torch.device, kind: str) -> Iterator[Case]:
    width, outs = config.hidden_size, _query_width(config)
    pool = _pool(lambda: random_weight((outs, width), kind, device), device)
    nbytes = next(pool).nbytes
    for rows in ROWS:
        x_TI = torch.randn(rows, width, device=device).to(_activations(device, kind))
        moved = nbytes + rows * (width + outs) * x_TI.element_size()
        yield Case(
            "linear", f"{rows} × {width} → {outs}", kind, moved, 2.0 * rows * width * outs,
            partial(_linear, x_TI, pool),
        )  # fmt: skip


def _query_width(config: ModelConfig) -> int:
    a = config.attention
    return config.num_attention_heads * (a.qk_head_dim if isinstance(a, Mla) else a.head_dim)


def _experts(config: ModelConfig, moe: Moe, device: torch.device, kind: str, memory: int) -> Iterator[Case]:
    width, inner, chosen = config.hidden_size, moe.moe_intermediate_size, moe.num_experts_per_tok
    each = random_weight((1, 3 * inner, width), kind, device).nbytes
    E = max(chosen, min(moe.n_routed_experts, memory // each))
    gate_up = random_weight((E, 2 * inner, width), kind, device)
    down = random_weight((E, width, inner), kind, device)
    for rows in ROWS:
        x_TD = torch.randn(rows, width, device=device).to(_activations(device, kind))
        choices = [_choice(rows, E, chosen, device) for _ in range(_ROUTINGS)]
        touched = sum(c.unique().numel() for c in choices) / len(choices)
        weight_TK = torch.full((rows, chosen), 1 / chosen, device=device)
        turns = itertools.cycle(choices)
        moved = touched * (gate_up.nbytes + down.nbytes) / E + 2 * rows * width * x_TD.element_size()
        yield Case(
            "experts", f"{rows} × {chosen} of {E}, {width} × {inner}", kind, moved,
            2.0 * rows * chosen * 3 * width * inner,
            partial(_turn, x_TD, turns, weight_TK, gate_up, down),
        )  # fmt: skip


def _choice(rows: int, experts_: int, chosen: int, device: torch.device) -> Tensor:
    return torch.rand(rows, experts_, device=device).topk(chosen, -1).indices


def _attention(config: ModelConfig, device: torch.device, kind: str, context: int) -> Iterator[Case]:
    """Decode over a paged cache, one token a sequence."""
    a, heads, dtype = config.attention, config.num_attention_heads, getattr(torch, kind)
    for sequences in ROWS[:2]:
        pages = -(-context // PAGE)
        table = torch.arange(1, sequences * pages + 1, dtype=torch.int32, device=device).view(
            sequences, pages
        )
        length = torch.full((sequences,), context, dtype=torch.int32, device=device)
        values = config.cache_values_per_token
        entry = (values,) if isinstance(a, Mla) else (2, a.num_key_value_heads, a.head_dim)
        cache = torch.randn(sequences * pages + 1, PAGE, *entry, device=device).to(dtype)
        wide = values if isinstance(a, Mla) else a.head_dim
        q_SHC = torch.randn(sequences, heads, wide, device=device).to(dtype)
        out = a.kv_lora_rank if isinstance(a, Mla) else a.head_dim
        moved = (sequences * context * values + sequences * heads * (wide + out)) * dtype.itemsize
        flops = 2.0 * sequences * heads * context * (wide + out)
        arguments = (q_SHC, cache, table, length)
        if isinstance(a, Mla):
            name, work = "MLA decode", partial(mla_decode, *arguments, a.kv_lora_rank, 0.1)
        else:
            name, work = "GQA decode", partial(gqa_decode, *arguments, 0.1)
        yield Case(name, f"{sequences} × {heads} heads × {context}", kind, moved, flops, work)


def _gates(config: ModelConfig, moe: Moe, device: torch.device, kind: str) -> Iterator[Case]:
    width, E, dtype = config.hidden_size, moe.n_routed_experts, getattr(torch, kind)
    pool = _pool(lambda: random_weight((E, width), kind, device), device)
    bias = torch.zeros(E, device=device) if moe.topk_method == "noaux_tc" else None
    for rows in ROWS[:2]:
        x_TD = torch.randn(rows, width, device=device).to(dtype)
        moved = (E * width + rows * width) * dtype.itemsize + rows * moe.num_experts_per_tok * 12
        yield Case(
            "gate", f"{rows} × {width} → {moe.num_experts_per_tok} of {E}", kind, moved,
            2.0 * rows * E * width,
            partial(_gate, x_TD, pool, bias, moe),
        )  # fmt: skip


def _norms(config: ModelConfig, device: torch.device, kind: str) -> Iterator[Case]:
    width, dtype = config.hidden_size, getattr(torch, kind)
    weight = torch.ones(width, dtype=dtype, device=device)
    for rows in (ROWS[0], ROWS[2]):
        x_TD = torch.randn(rows, width, device=device).to(dtype)
        moved = (2 * rows + 1) * width * dtype.itemsize
        yield Case(
            "RMS norm", f"{rows} × {width}", kind, moved, 4.0 * rows * width,
            partial(rms_norm, x_TD, weight, 1e-6),
        )  # fmt: skip
