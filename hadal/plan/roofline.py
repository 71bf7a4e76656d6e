"""How fast a model runs: the roofline of its parts, at stated efficiencies.

    decode step = max(weight bytes / (BW·η_w), FLOP / (peak·η_p))       products
                + max(cache bytes / (BW·η_c), attention FLOP / (peak·η_p))
                + layers · t_layer + MoE layers · t_moe + communication
    MoE bytes   = dense + shared + E·(1 − (1 − k/E)^B) experts a layer
    prefill     = max(FLOP / (peak·η), weight bytes / (BW·η_w)) + layers · t_layer + communication
    all-to-all  = tokens · experts · width · (1 + 2 bytes) / link    (32 · 9 · 7000 · 3 / 50 GB/s = 120.96 µs)

Three levels: pessimistic, typical, best; at best, communication hides behind computation (two micro-batches).
Efficiencies are data (hadal/plan/data/efficiency.toml).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hadal.config import Mla, ModelConfig
from hadal.plan.figures import PlanError, data
from hadal.plan.layout import Layout, experts_per_device, weights_on_device
from hadal.plan.machines import Machine
from hadal.plan.memory import CacheDtype, WeightDtype, cache_bytes_per_token, counts
from hadal.plan.speed import expected_experts, routed_parameters

Level = Literal["pessimistic", "typical", "best"]
ONE = Layout()
BYTES, FLOPS = "memory bandwidth", "arithmetic"
LEVELS: tuple[Level, ...] = ("pessimistic", "typical", "best")


@dataclass(frozen=True)
class Efficiency:
    """Shares of a datasheet's figures; seconds a layer and a collective."""

    weights: float
    cache: float
    products: float
    prefill: float
    coded: float
    coded_prefill: float
    layer: float
    moe: float
    train: float
    collective: float
    source: str
    date: str

    def reading(self, dtype: str) -> float:
        """Of memory bandwidth, for weights of `dtype`."""
        return self.coded if dtype in ("int4", "int8") else self.weights


IDEAL = Efficiency(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, "the datasheet itself", "")


def efficiency(kind: str, level: Level) -> Efficiency:
    """Of a class of devices."""
    row, i = data("efficiency")[kind], LEVELS.index(level)
    return Efficiency(
        weights=row["weights"][i],
        cache=row["cache"][i],
        products=row["products"][i],
        prefill=row["prefill"][i],
        coded=row["coded"][i],
        coded_prefill=row["coded_prefill"][i],
        layer=row["layer_us"][i] * 1e-6,
        moe=row["moe_us"][i] * 1e-6,
        train=row["train"][i],
        collective=row["collective_us"][i] * 1e-6,
        source=row["source"],
        date=row["date"],
    )


@dataclass(frozen=True)
class Work:
    """What is run, beside the machine. `drafts`: MTP tokens drafted a step, of which `acceptance` is taken;
    `touched`: experts of a layer that a step reads, where it is known."""

    config: ModelConfig
    dtype: WeightDtype
    cache: CacheDtype
    layout: Layout = ONE
    drafts: int = 0
    acceptance: float = 0.0
    touched: float | None = None
    streamed: float = 0.0  # share of the routed experts that is read from the host or a disk when needed
    stream: float | None = None  # bytes/s of that


@dataclass(frozen=True)
class Step:
    """Seconds of a step by part; tokens that it yields, over all devices."""

    parts: dict[str, float]
    seconds: float
    tokens: float
    sequences: float

    @property
    def rate(self) -> float:
        """Tokens a second, of all sequences."""
        return self.tokens / self.seconds

    @property
    def per_sequence(self) -> float:
        return self.rate / self.sequences

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


# --- communication ------------------------------------------------------------------------------------------
def all_to_all_bytes(width: int, experts: float, dispatch: float = 1, combine: float = 2) -> float:
    """Bytes that one token sends and receives in a layer: dispatched in FP8, combined in BF16."""
    return (dispatch + combine) * experts * width


def expert_parallel_bound(
    tokens: int, experts: int, width: int, layers: int, network: float
) -> tuple[float, float]:
    """DeepSeek's own bound (arXiv 2505.09343, §2.3.2): seconds of a dispatch and combine, and of a token when
    two micro-batches alternate through all layers and computation takes no time."""
    pair = tokens * all_to_all_bytes(width, experts) / network
    return pair, 2 * layers * pair


def communication(work: Work, machine: Machine, tokens: float, of: Efficiency, *, grouped: bool) -> float:
    """Seconds that `tokens` of one device's replica spend on the way, over all layers.

    grouped: tokens cross the network once a node (prefill), not once an expert (decode's direct sends).
    """
    c, layout, total = work.config, work.layout, 0.0
    sparse = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers)) if layout.ep > 1 else 0
    if layout.tp > 1:
        reduced = 2 * (layout.tp - 1) / layout.tp * tokens * c.hidden_size * 2 / (_link(machine) / 2)
        total += (2 * c.num_hidden_layers - sparse) * (reduced + of.collective)
    if sparse and c.moe is not None:
        here = min(layout.ep, machine.per_node)
        k = c.moe.num_experts_per_tok
        one = all_to_all_bytes(c.hidden_size, 1, 1 if work.dtype == "fp8" else 2)
        mine = tokens / layout.tp
        inside = mine * k * (here - 1) / layout.ep * one / (_link(machine) / 2) if here > 1 else 0.0
        outside = 0.0
        if layout.ep > here:
            far = k * (1 - here / layout.ep)
            if grouped:
                nodes = layout.ep / here
                visited = nodes * (1 - (1 - 1 / nodes) ** k)
                visited = min(visited, c.moe.topk_group) if c.moe.n_group > 1 else visited
                far = visited * (1 - 1 / nodes)
            outside = mine * far * one / _network(machine)
        total += sparse * (max(inside, outside) + 2 * of.collective)
    if layout.pp > 1:
        hop = _network(machine) if machine.nodes > 1 else _link(machine) / 2
        total += (layout.pp - 1) * (tokens * c.hidden_size * 2 / hop + of.collective)
    return total


def _link(machine: Machine) -> float:
    if machine.device.link is None:
        raise PlanError(
            f"how fast {machine.device.title} devices talk to each other is not known; add link=…GB/s to --on"
        )
    return machine.device.link


def _network(machine: Machine) -> float:
    if machine.device.network is None:
        raise PlanError(
            f"{machine.describe()}: how fast nodes talk to each other is not known; add network=…GB/s (one "
            "direction, a device) to --on"
        )
    return machine.device.network


# --- decode -------------------------------------------------------------------------------------------------
def decode_step(work: Work, machine: Machine, batch: float, context: float, of: Efficiency) -> Step:
    """One step of `batch` sequences that have `context` tokens each."""
    c, layout = work.config, work.layout
    bandwidth = _bandwidth(machine)
    sequences = max(1.0, batch / layout.dp)
    flight = max(1.0, sequences / layout.pp)  # of one micro-batch; a stage works on each in turn
    tokens = flight * (1 + work.drafts)
    everywhere = max(1.0, batch / layout.pp) * (1 + work.drafts)
    read = _weights_read(work, everywhere, everywhere / (1 + work.drafts))
    flop = _decode_flop(work, tokens)
    peak = _peak(machine, work.dtype)
    core = _peak(machine, "bf16")
    cached = flight * context * cache_bytes_per_token(c, work.cache, with_mtp=work.drafts > 0)
    cached /= layout.cache_split(c)
    attended = tokens * context * attention_flop(c, absorbed=True) / layout.tp
    slow = _streamed_bytes(work, tokens)
    reading, arithmetic = read / bandwidth / of.reading(work.dtype), flop / peak / of.products
    loading, scoring = cached / bandwidth / of.cache, attended / core / of.products
    parts = {
        f"products, by {BYTES if reading >= arithmetic else FLOPS}": max(reading, arithmetic),
        f"attention, by {BYTES if loading >= scoring else FLOPS}": max(loading, scoring),
        "launches and small operations": _launches(work, tokens * layout.dp, of),
    }
    if layout.devices > 1:
        parts["communication"] = communication(work, machine, tokens, of, grouped=False)
    if slow:
        if work.stream is None:
            raise PlanError(
                "how fast experts are read from where they lie is not known; add host=…GB/s or disk=…GB/s"
            )
        parts["streaming experts"] = slow / work.stream
    return Step(parts, _together(parts, of), batch * (1 + _accepted(work)), batch)


def _launches(work: Work, tokens: float, of: Efficiency) -> float:
    """What nothing hides; sorting rows by expert once a step has several tokens."""
    c = work.config
    sparse = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers)) if tokens > 1 else 0
    return (c.num_hidden_layers + work.drafts) * of.layer + sparse * of.moe


def _accepted(work: Work) -> float:
    """Drafts of a step that are taken on average: p + p² + … with each accepted with probability p."""
    return sum(work.acceptance**i for i in range(1, work.drafts + 1))


def _together(parts: dict[str, float], of: Efficiency) -> float:
    """One after the other; at best, communication runs beside the rest."""
    way = parts.get("communication", 0.0)
    rest = sum(parts.values()) - way
    return max(rest, way) if of.collective <= _BEST_COLLECTIVE else rest + way


_BEST_COLLECTIVE = 20e-6 / 3


def _weights_read(work: Work, tokens: float, sequences: float) -> float:
    """Bytes of weights that a step reads on the busiest device, over all stages: `tokens` of all replicas
    choose experts, one of each of `sequences` those of the drafting module."""
    c, layout = work.config, Layout(work.layout.tp, work.layout.dp, 1, work.layout.ep)
    groups = weights_on_device(c, work.dtype, layout, with_mtp=work.drafts > 0)
    groups.pop("embedding")  # a row of it
    if c.tie_word_embeddings and "head" not in groups:
        groups["head"] = c.vocab_size * c.hidden_size * (4 if work.dtype == "fp32" else 2) / layout.tp
    module = groups.pop("MTP module", 0.0)
    read = sum(groups.values())
    if c.moe is not None:
        touched = work.touched
        if touched is None:
            touched = expected_experts(c.moe.n_routed_experts, c.moe.num_experts_per_tok, tokens)
        read -= groups["routed experts"] * (1 - touched / c.moe.n_routed_experts)
        if module:
            drafted = expected_experts(c.moe.n_routed_experts, c.moe.num_experts_per_tok, sequences)
            elements = c.moe.n_routed_experts * 3 * c.hidden_size * c.moe.moe_intermediate_size
            share = elements / counts(c).mtp_unique
            module *= 1 - share * (1 - drafted / c.moe.n_routed_experts)
    return read + work.drafts * (module + groups.get("head", 0.0))


def _streamed_bytes(work: Work, tokens: float) -> float:
    """Bytes of routed experts that a step fetches from where they lie."""
    c = work.config
    if not work.streamed or c.moe is None:
        return 0.0
    experts = weights_on_device(c, work.dtype, Layout())["routed experts"]
    touched = expected_experts(c.moe.n_routed_experts, c.moe.num_experts_per_tok, tokens)
    return work.streamed * experts * touched / c.moe.n_routed_experts


def _decode_flop(work: Work, tokens: float) -> float:
    """Of the products, on one device."""
    c, layout = work.config, work.layout
    active = counts(c).active_with_head
    routed = 0 if c.moe is None else routed_parameters(c) * c.moe.num_experts_per_tok
    busiest = 1.0
    if c.moe is not None:
        busiest = experts_per_device(c, layout) * layout.dp / c.moe.n_routed_experts
    return 2 * tokens * ((active - routed) / layout.tp + routed * busiest)


def attention_flop(config: ModelConfig, *, absorbed: bool = False) -> float:
    """FLOP of scores and values for one query and one key, over all layers. Absorbed MLA works on latents:
    576 + 512 in place of 192 + 128."""
    a, heads = config.attention, config.num_attention_heads
    if isinstance(a, Mla):
        wide = 2 * a.kv_lora_rank + a.qk_rope_head_dim if absorbed else a.qk_head_dim + a.v_head_dim
    else:
        wide = 2 * a.head_dim
    return 2 * heads * wide * config.num_hidden_layers


def ceiling(work: Work, machine: Machine, batch: float = 1, context: float = 0) -> float:
    """Tokens a second if memory and units ran at their datasheet's figures, and nothing else took time."""
    return decode_step(work, machine, batch, context, IDEAL).rate


# --- prefill ------------------------------------------------------------------------------------------------
def prefill(work: Work, machine: Machine, tokens: int, of: Efficiency, *, prompts: int = 1) -> Step:
    """`prompts` of `tokens` each on every replica, in one pass; the head for each one's last token.

    `seconds` is one pass's; the tokens are those of as many passes as there are stages, all under way."""
    c, layout = work.config, work.layout
    replica = tokens * prompts
    active = counts(c).active_core
    routed = 0 if c.moe is None else routed_parameters(c) * c.moe.num_experts_per_tok
    busiest = 1.0 / layout.tp
    if c.moe is not None and layout.ep > 1:
        busiest = experts_per_device(c, layout) * layout.dp / c.moe.n_routed_experts
    flop = 2 * replica * ((active - routed) / layout.tp + routed * busiest)
    pairs = prompts * tokens * (tokens + 1) / 2
    attended = pairs * attention_flop(c) / layout.tp
    read = _weights_read(work, replica * layout.dp, prompts * layout.dp)
    bandwidth = _bandwidth(machine)
    share = of.prefill * (of.coded_prefill if work.dtype in ("int4", "int8") else 1.0)
    arithmetic = flop / _peak(machine, work.dtype) / share
    reading = read / bandwidth / of.reading(work.dtype)
    parts = {
        f"products, by {FLOPS if arithmetic >= reading else BYTES}": max(arithmetic, reading),
        f"attention, by {FLOPS}": attended / _peak(machine, "bf16") / of.prefill,
        "launches and small operations": _launches(work, replica, of),
    }
    if layout.devices > 1:
        parts["communication"] = communication(work, machine, replica, of, grouped=True)
    slow = _streamed_bytes(work, replica)
    if slow and work.stream:
        parts["streaming experts"] = slow / work.stream
    passes = layout.dp * layout.pp
    return Step(parts, _together(parts, of), replica * passes, prompts * passes)


def _bandwidth(machine: Machine) -> float:
    if machine.device.bandwidth is None:
        raise PlanError(
            f"the memory bandwidth of {machine.device.title} is not known; add bandwidth=…GB/s to --on"
        )
    return machine.device.bandwidth


def _peak(machine: Machine, dtype: str) -> float:
    found = machine.device.peak(dtype)
    if found is None:
        raise PlanError(f"the arithmetic of {machine.device.title} is not known; add bf16=…TFLOPS to --on")
    return found[0]


def sweep(
    work: Work, machine: Machine, context: float, batches: Sequence[int], level: Level = "typical"
) -> list[Step]:
    """Decode steps of growing batches."""
    of = efficiency(machine.device.kind, level)
    return [decode_step(work, machine, batch, context, of) for batch in batches]
