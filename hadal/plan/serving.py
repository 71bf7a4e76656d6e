"""Will a model run on a machine, and how fast: memory on the fullest device, speeds at three levels, and what
would help where it does not fit.

What is said of more than one device holds for any engine with such a layout; Hadal's own runs on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hadal.plan.ask import PUBLISHED_FP8, Ask, Running
from hadal.plan.figures import Figure, PlanError, gb
from hadal.plan.known import config_of
from hadal.plan.layout import Layout
from hadal.plan.machines import USABLE
from hadal.plan.memory import counts, memory_bytes
from hadal.plan.placing import (
    DECODE_CONTEXT,
    choose,
    context_that_fits,
    host_short,
    memory_figures,
    memory_of,
    parts_of,
    total,
    usable,
    work_of,
)
from hadal.plan.remedies import cards, remedies
from hadal.plan.roofline import LEVELS, ceiling, decode_step, efficiency, prefill

__all__ = ["Ask", "Running", "cards", "config_of", "remedies", "running"]

MOST_A_REPLICA = 512  # sequences, in a sweep


def running(ask: Ask) -> Running:
    """Whether it runs there, how fast, and what would help if not."""
    ask.check()
    layout = choose(ask)
    context = context_that_fits(ask, layout)
    fits = context is not None
    context = context if context is not None else ask.wanted_context
    parts = parts_of(ask, layout, context)
    memory = tuple(memory_figures(ask, layout, context, parts))
    need, have = sum(parts.values()), usable(ask)
    fits = fits and host_short(ask) is None
    answer = Running(
        ask=ask,
        fits=fits,
        layout=layout,
        context=context,
        memory=memory,
        needed=Figure("needed on the fullest device", need, "B", " + ".join(p for p in parts)),
        usable=Figure(
            "usable there", have, "B", f"{USABLE:.0%} of {memory_of(ask):,.0f} B", ask.machine.device.source
        ),
        notes=tuple(_notes(ask, fits)),
        remedies=() if fits else tuple(remedies(ask)),
    )
    return _with_speeds(answer) if fits else answer


def _notes(ask: Ask, fits: bool) -> list[str]:
    c, device, n = ask.config, ask.machine.device, counts(ask.config)
    found = []
    whole = memory_bytes(c, ask.weights, with_mtp=False)
    if ask.dtype is None and ask.weights == "fp8":
        found.append("Weights are taken in FP8, as they are published (`hadal run --quantize fp8`)")
    if device.lacks_fp8 and ask.weights == "fp8":
        peak = device.peak("bf16")
        how = f"multiplied in {peak[1].upper()}" if peak else "decoded"
        found.append(
            f"{device.title} has no FP8 units: {device.lacks_fp8}. Weights may lie there in FP8 and are {how}"
        )
    if c.moe is not None and not fits:
        active, total = (f"{x / 1e9:.{0 if x >= 1e10 else 1}f}B" for x in (n.active_with_head, n.main))
        found.append(
            f"{active} active is what one token computes with, not what memory must hold: the next token "
            f"takes other experts, so all {total} ({gb(whole)}) lie in memory, or are streamed"
        )
    if n.mtp_copies and n.main > PUBLISHED_FP8:
        found.append(
            f"The {n.stored / 1e9:.0f}B of the hub count the MTP module ({n.mtp_unique / 1e9:.1f}B, and "
            f"copies of embedding and head) and scales; the model has {n.main / 1e9:.1f}B"
        )
    if ask.machine.count > 1:
        found.append(
            "Hadal's own engine runs on one device; figures for more hold for engines with such a layout"
        )
    if device.note:
        found.append(f"{device.title}: {device.note}")
    if c.dsa is not None:
        found.append(
            "Hadal does not run sparse attention (V3.2); cache and times are those of full attention"
        )
    short = host_short(ask)
    if short:
        found.append(short[0].upper() + short[1:])
    if "bf16" not in device.flops and "fp16" in device.flops and ask.weights == "bf16":
        found.append(f"{device.title} has no BF16 units; the products are counted in FP16")
    return found


def _with_speeds(answer: Running) -> Running:
    ask, m, layout = answer.ask, answer.ask.machine, answer.layout
    work = work_of(ask, layout)
    context = min(answer.context, ask.context or DECODE_CONTEXT)
    prompt = min(ask.prompt, answer.context)
    try:
        efficiencies = [efficiency(m.device.kind, level) for level in LEVELS]
        decodes = [decode_step(work, m, ask.batch, context, of) for of in efficiencies]
        fills = [prefill(work, m, prompt, of) for of in efficiencies]
        top = ceiling(work, m, ask.batch, context)
        of = efficiencies[1]
        steps = tuple((n, decode_step(work, m, n, context, of)) for n in _batches(ask, layout, context))
    except PlanError as error:
        return replace(answer, why_no_speed=str(error))
    source = f"{m.device.source}; efficiencies: {of.source}"
    notes = answer.notes
    if work.streamed and work.stream is not None:
        where = "host memory" if ask.offload == "cpu" else "disk"
        notes += (
            f"Experts come from {where} at {work.stream / 1e9:g} GB/s, the full rate, at all three levels: "
            "what that limits is a ceiling, not a forecast",
        )

    def levels(name: str, unit: str, values: Sequence[float], formula: str) -> Figure:
        low, typical, high = values
        return Figure(name, typical, unit, formula, source, of.date, low, high)

    shown = " + ".join(f"{s * 1e3:,.3g} ms {part}" for part, s in decodes[1].parts.items())
    after = f"at {context:,} tokens of context"
    speeds = [
        levels(
            "decode",
            "tokens/s",
            [s.rate for s in decodes],
            f"{ask.batch} × tokens / step {after}; step = {shown}",
        ),
        levels("decode, each sequence", "tokens/s", [s.per_sequence for s in decodes], "decode / sequences"),
        levels(
            "prefill", "tokens/s", [s.rate for s in fills], f"prompts of {prompt:,} tokens on every replica"
        ),
        levels("first token after", "s", [s.seconds for s in fills], f"one prompt of {prompt:,} tokens"),
        Figure(
            "decode ceiling",
            top,
            "tokens/s",
            f"bytes of a step {after} / memory bandwidth, all else free",
            m.device.source,
        ),
    ]
    if m.nodes > 1:
        per_node = [s.rate / m.nodes for s in decodes]
        speeds.append(levels("decode, a node", "tokens/s", per_node, f"decode / {m.nodes} nodes"))
        per_node = [s.rate / m.nodes for s in fills]
        speeds.append(levels("prefill, a node", "tokens/s", per_node, f"prefill / {m.nodes} nodes"))
    return replace(
        answer, notes=notes, speeds=tuple(speeds), limits=(fills[1].limit, decodes[1].limit), steps=steps
    )


def _batches(ask: Ask, layout: Layout, context: int) -> list[int]:
    """Batches of the sweep whose cache fits at `context`."""
    found = []
    powers = (2**i for i in range((MOST_A_REPLICA * layout.dp).bit_length()))
    for n in sorted({*powers, ask.batch}):
        if total(replace(ask, batch=n), layout, context) <= usable(ask):
            found.append(n)
    return found
