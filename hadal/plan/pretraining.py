"""What training takes: FLOPs to device hours, days and money; and the memory of a device under a layout.

    FLOP a token = 6 · N_active + 3 · heads · (d_qk + d_v) · S · layers      (causal; V3 at 4K: 250.46 GFLOP)
    hours        = tokens · FLOP a token / (peak · MFU · 3600) / goodput

N_active leaves the input embedding out, which multiplies nothing. MFU is the share of the peak while steps
run; goodput the share of hours in which steps run that count. They are different things, and are kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

from hadal.config import Mla, ModelConfig
from hadal.plan.figures import Figure, PlanError
from hadal.plan.layout import Layout, weights_on_device
from hadal.plan.machines import Machine
from hadal.plan.training import TrainingShape, activations

# What a figure such as "$5.576M" does not hold; the V3 report says so of its own (arXiv 2412.19437, §1).
LEDGER = (
    "earlier research and ablations, on architectures, algorithms and data",
    "runs that failed or were thrown away",
    "staff (29 to 49% of amortised cost by arXiv 2405.21015)",
    "data: licences, crawling, cleaning, synthetic data",
    "hardware bought: a rent stands for it, but clusters are bought or reserved for years",
    "evaluation, and serving during development",
    "what comes after: R1's reinforcement learning took 147K H800 hours more, $294K",
)

ONE = Layout()
USUAL_SEQUENCE = 4096  # tokens a row that are counted with where nothing is said, and the model bears them
ZERO = (0, 1, 2, 3)
Schedule = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]


def usual_sequence(config: ModelConfig) -> int:
    """Tokens a row where nothing is said: 4,096, or what the model bears."""
    return min(USUAL_SEQUENCE, config.max_position_embeddings)


def attention_flop_per_token(config: ModelConfig, sequence: int) -> float:
    """Forward and backward, causal: half of the pairs, three times the forward pass's 2 FLOP."""
    a = config.attention
    wide = a.qk_head_dim + a.v_head_dim if isinstance(a, Mla) else 2 * a.head_dim
    return 3.0 * config.num_attention_heads * wide * sequence * config.num_hidden_layers


def flop_per_token(config: ModelConfig, sequence: int) -> float:
    """Of training, without the MTP module."""
    return 6.0 * config.parameters().active_with_head + attention_flop_per_token(config, sequence)


def device_hours(flop: float, peak: float, mfu: float, goodput: float = 1.0) -> float:
    """Hours of one device. PlanError for shares that are none."""
    for name, share in (("MFU", mfu), ("goodput", goodput)):
        if not 0 < share <= 1:
            raise PlanError(f"{name} is {share}; it is a share above 0, at most 1")
    return flop / (peak * mfu * 3600) / goodput


def implied_mfu(flop: float, hours: float, peak: float) -> float:
    """MFU and goodput together, from hours that were taken."""
    return flop / (hours * 3600 * peak)


@dataclass(frozen=True)
class Run:
    """A training run: figures in the order of their arithmetic."""

    figures: tuple[Figure, ...]
    ledger: tuple[str, ...] = LEDGER

    def __getitem__(self, name: str) -> float:
        return next(f.value for f in self.figures if f.name == name)


def run(
    config: ModelConfig,
    machine: Machine,
    tokens: float,
    *,
    sequence: int | None = None,
    mfu: float,
    goodput: float = 1.0,
    hourly: Figure | None = None,
) -> Run:
    """Hours, days and dollars of a pre-training. The peak is BF16's, as papers count MFU, for FP8, too.
    Without `sequence` rows are `usual_sequence` long."""
    sequence = usual_sequence(config) if sequence is None else sequence
    if tokens <= 0 or sequence < 1:
        raise PlanError(f"{tokens:,} tokens in sequences of {sequence} are no training")
    most = config.max_position_embeddings
    if sequence > most:
        raise PlanError(f"sequence is {sequence:,}; the model bears 1 to {most:,} tokens a row")
    found = machine.device.peak("bf16")
    if found is None:
        raise PlanError(f"the arithmetic of {machine.device.title} is not known; add bf16=…TFLOPS to --on")
    peak, unit = found
    each = flop_per_token(config, sequence)
    active = config.parameters().active_with_head
    attention = attention_flop_per_token(config, sequence)
    total = each * tokens
    hours = device_hours(total, peak, mfu, goodput)
    chip = f"{machine.device.title}: {machine.device.source}"
    figures = [
        Figure(
            "FLOP a token",
            each,
            "FLOP",
            f"6 × {active:,} + {attention:.4g} of causal attention at {sequence:,}",
        ),
        Figure("FLOP", total, "FLOP", f"FLOP a token × {tokens:,.0f} tokens"),
        Figure(
            "FLOP/s a device", peak * mfu, "FLOP/s", f"{peak:.4g} in {unit.upper()} × MFU {mfu:.2%}", chip
        ),
        Figure("device hours", hours, "h", f"FLOP / FLOP/s a device / 3600 / goodput {goodput:.0%}", chip),
        Figure(
            "days", hours / machine.count / 24, "days", f"device hours / {machine.count:,} devices / 24", chip
        ),
        Figure("tokens a day", tokens / (hours / machine.count / 24), "tokens", "tokens / days", chip),
    ]
    if hourly is not None:
        rate = hourly.value / machine.count
        figures.append(
            Figure("cost", hours * rate, "$", f"device hours × ${rate:g}", hourly.source, hourly.date)
        )
    return Run(tuple(figures))


# --- memory by layout ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainingLayout:
    """How a training step is spread. zero: 1 splits the optimizer's state over replicas, 2 gradients too, 3
    parameters too (FSDP). micro_batch: sequences at a time on a replica."""

    layout: Layout = ONE
    zero: int = 1
    schedule: Schedule = "1f1b"
    micro_batch: int = 1
    sequence: int = 4096
    recompute: tuple[str, ...] = ()
    fp8: bool = False

    def in_flight(self) -> int:
        """Micro-batches whose activations of a stage the fullest device keeps (V3 report, table 2)."""
        pp = self.layout.pp
        return pp if pp == 1 or self.schedule in ("1f1b", "zb1p") else pp + 1

    def copies(self) -> int:
        """Of the parameters: DualPipe holds two stages on a device."""
        return 2 if self.schedule in ("dualpipe", "dualpipev") and self.layout.pp > 1 else 1


def memory(config: ModelConfig, of: TrainingLayout) -> tuple[Figure, ...]:
    """Bytes of the fullest device by part: BF16 parameters, FP32 gradients, FP32 masters, BF16 moments, and
    activations, an even share of the layers'. Workspace and what an allocator wastes are not in it."""
    if of.zero not in ZERO:
        raise PlanError(f"zero is {of.zero}; use one of {', '.join(map(str, ZERO))}")
    x = of.layout
    groups = weights_on_device(config, "bf16", x, with_mtp=True)
    copies = of.copies()
    for name in groups.keys() - {"embedding", "head", "MTP module"}:
        groups[name] *= copies
    if copies > 1:  # the first device of DualPipe has the last stage, too
        groups["embedding"] = groups["head"]
    experts = groups.pop("routed experts", 0.0) / 2
    parts = {"experts": experts, "others": sum(groups.values()) / 2}
    count = sum(parts.values())
    replicas = {"experts": x.tp * x.dp // x.ep, "others": x.dp}

    def split(level: int, width: float, name: str) -> Figure:
        ways = replicas if of.zero >= level else dict.fromkeys(replicas, 1)
        size = sum(parts[k] * width / ways[k] for k in parts)
        formula = f"{count / 1e9:.3g}B parameters here × {width:g} B"
        if of.zero >= level:
            alike = ways["others"] == ways["experts"] or not parts["experts"]
            copied = "" if alike else f" (experts: {ways['experts']})"
            formula += f", over {ways['others']} replicas{copied}" if ways["others"] > 1 else ""
        return Figure(name, size, "B", formula)

    # Devices that share experts see each other's rows: gaps between experts are counted once for all of them.
    shape = TrainingShape(of.micro_batch * of.sequence * x.ep, recompute=of.recompute, fp8=of.fp8)
    kept = _kept(config, shape) / x.ep / x.pp / x.tp * of.in_flight()
    formula = f"{of.micro_batch} × {of.sequence:,} tokens, 1/{x.pp * x.tp} of the layers"
    formula += f" × {of.in_flight()} in flight"
    return (
        split(3, 2, "parameters"),
        split(2, 4, "gradients, FP32"),
        split(1, 4, "masters, FP32"),
        split(1, 4, "two moments, BF16"),
        Figure("activations", kept, "B", formula),
    )


@lru_cache(maxsize=64)
def _kept(config: ModelConfig, shape: TrainingShape) -> int:
    """`activations`, counted once for all layouts that share a shape."""
    return activations(config, shape)


def total(parts: Sequence[Figure]) -> float:
    """The sum of figures in one unit."""
    return sum(f.value for f in parts)


def stage_layers(config: ModelConfig, pp: int) -> int:
    """Layers of the fullest stage."""
    return ceil(config.num_hidden_layers / pp)
