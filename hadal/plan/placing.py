"""Where a model's bytes lie: memory on the fullest device by part, the context that fits, the layout."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from hadal.plan.ask import Ask
from hadal.plan.figures import Figure, PlanError, gb
from hadal.plan.layout import Layout, layouts, memory_on_device
from hadal.plan.machines import USABLE
from hadal.plan.memory import cache_bytes_per_token, expert_group_bytes, weight_groups
from hadal.plan.roofline import Work, decode_step, efficiency

MIN_CONTEXT = 4096
DECODE_CONTEXT = 4096  # speeds are stated for this context unless one is asked for


def memory_of(ask: Ask) -> float:
    """Bytes of one device; of a CPU the machine's."""
    device = ask.machine.device
    return ask.machine.ram if device.is_cpu else device.memory


def usable(ask: Ask) -> float:
    """Bytes of it that are counted with."""
    return ask.machine.usable


def parts_of(ask: Ask, layout: Layout, context: int) -> dict[str, float]:
    """Bytes on the fullest device, by part; without experts that are offloaded."""
    parts = memory_on_device(
        ask.config,
        layout,
        dtype=ask.weights,
        cache=ask.cache_dtype,
        context=context,
        batch=ask.batch,
        with_mtp=ask.drafts > 0,
        gpu=not ask.machine.device.is_cpu,
    )
    if ask.offload == "disk" or (ask.offload == "cpu" and not ask.machine.device.is_cpu):
        parts.pop("routed experts", None)
    return parts


def total(ask: Ask, layout: Layout, context: int) -> float:
    """Bytes on the fullest device."""
    return sum(parts_of(ask, layout, context).values())


def host_short(ask: Ask) -> str | None:
    """Why offloaded experts do not fit the host, if they do not."""
    if ask.offload != "cpu" or ask.machine.device.is_cpu or ask.machine.device.unified:
        return None
    experts, ram = (
        expert_group_bytes(ask.config, ask.weights, with_mtp=ask.drafts > 0),
        ask.machine.ram * USABLE,
    )
    if experts <= ram:
        return None
    return f"the experts take {gb(experts)} of host memory, and {gb(ram)} of it are usable"


def context_that_fits(ask: Ask, layout: Layout) -> int | None:
    """As asked, or as much as fits (at least 4,096 tokens where none was asked for); None if not."""
    wanted, have = ask.wanted_context, usable(ask)
    if total(ask, layout, wanted) <= have:
        return wanted
    if ask.context is not None:
        return None
    empty = total(ask, layout, 0)
    each = (total(ask, layout, 64) - empty) / 64
    room = int((have - empty) / each) // 64 * 64 if each else 0
    return room if room >= min(MIN_CONTEXT, wanted) else None


def fits(ask: Ask) -> bool:
    """Whether it fits in the layout that would be chosen, whatever layout was asked for."""
    plain = replace(ask, tp=None, dp=None, pp=None, ep=None)
    return context_that_fits(plain, choose(plain)) is not None and host_short(plain) is None


def choose(ask: Ask) -> Layout:
    """The layout asked for; else the fastest that fits, or the least full one."""
    m, given = ask.machine, (ask.tp, ask.dp, ask.pp, ask.ep)
    if any(n is not None for n in given):
        tp, pp = ask.tp or 1, ask.pp or 1
        dp = ask.dp or max(1, m.count // (tp * pp))
        found = Layout(tp, dp, pp, ask.ep or 1)
        found.check(ask.config, m.count)
        return found
    candidates = list(layouts(ask.config, m.count, m.per_node))
    fitting = [x for x in candidates if context_that_fits(ask, x) is not None]
    if not fitting:
        return min(candidates, key=lambda x: total(ask, x, min(MIN_CONTEXT, ask.wanted_context)))
    if len(fitting) == 1 or ask.offload:
        return fitting[0]
    try:
        of = efficiency(m.device.kind, "typical")
        context = min(ask.wanted_context, DECODE_CONTEXT)
        return max(fitting, key=lambda x: decode_step(work_of(ask, x), m, ask.batch, context, of).rate)
    except PlanError:  # without a figure that speeds need, the first that fits
        return fitting[0]


def work_of(ask: Ask, layout: Layout) -> Work:
    """A step's work. Of offloaded experts the share that no spare memory holds is streamed."""
    streamed, rate = 0.0, None
    if ask.offload == "disk":
        streamed, rate = 1.0, ask.machine.disk
    elif ask.offload == "cpu" and not ask.machine.device.is_cpu:
        streamed, rate = 1.0, ask.machine.device.host
    if streamed and not ask.machine.device.is_cpu:
        experts = expert_group_bytes(ask.config, ask.weights, with_mtp=False)
        spare = usable(ask) - total(ask, layout, context_that_fits(ask, layout) or MIN_CONTEXT)
        streamed = max(0.0, 1 - max(0.0, spare) / experts)
    return Work(
        ask.config,
        ask.weights,
        ask.cache_dtype,
        layout,
        ask.drafts,
        ask.acceptance or 0.0,
        None,
        streamed,
        rate,
    )


def memory_figures(ask: Ask, layout: Layout, context: int, parts: dict[str, float]) -> list[Figure]:
    """Each part's bytes with the arithmetic that gave them."""
    groups = {g.name: g for g in weight_groups(ask.config, ask.weights, with_mtp=ask.drafts > 0)}
    found = []
    for name, size in parts.items():
        if name in groups:
            g = groups[name]
            per = (g.bytes - g.scales) / g.parameters if g.parameters else 0
            formula = f"{g.parameters:,} parameters × {per:.3g} B" if g.parameters else "a copy in INT8"
            formula += f" + {g.scales:,} B of scales" if g.scales else ""
            formula += f", {size / g.bytes:.3g} of it here" if size < g.bytes - 1 else ""
        elif name.startswith("cache"):
            per_token = cache_bytes_per_token(ask.config, ask.cache_dtype)
            sequences = ceil(ask.batch / layout.dp)
            formula = f"{per_token:,.0f} B a token × {context:,} × {sequences:,} sequences"
            formula += (
                f" / {layout.cache_split(ask.config)} devices" if layout.cache_split(ask.config) > 1 else ""
            )
            formula += f", {ceil(ask.config.num_hidden_layers / layout.pp)} layers" if layout.pp > 1 else ""
            if "MTP" in name:
                formula = f"one layer more × {context:,} × {sequences:,} sequences"
        elif name == "the GPU's runtime":
            formula = "an allowance"
        else:
            formula = "2,048 tokens through the widest layer, FP32 logits of 64 sequences"
        found.append(Figure(name, size, "B", formula))
    return found
